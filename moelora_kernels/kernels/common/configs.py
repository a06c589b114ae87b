"""The tile sizes and compiler options of every kernel: one table per architecture.

A launcher selects its entry by shape; nothing is timed at run time. Tiles that were tuned on this
GPU take the place of shipped entries (`tuned.py`). The `gpu` tests (float64 comparison, NaN scan,
50 bitwise repeats) qualify an entry on the hardware that it names. An entry without a name was only
compiled ahead of time for its architecture: it does not spill, fits into shared memory and loads
wide vectors (`tests/kernels/test_ahead_of_time.py`). For the architectures in EXECUTED its compiled
code also ran on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch

from moelora_kernels.kernels.common.blocks import BLOCKS


class TileConfig(NamedTuple):
    """The tile of one program, and how its kernel is compiled."""

    # Tokens of a tile. In the weight gradients: tokens of one step of the loop. In grouped kernels:
    # sorted positions of a tile, at least `types.TILE`.
    tokens: int
    # Columns of one step of the loop. In the weight gradients and `shrink_dx`: columns of the wide
    # side (I or O) that a program owns.
    step: int
    warps: int
    stages: int
    # Programs that one multiprocessor runs at the same time: of the kernel that stores outputs, and
    # of the one that stores partial sums. From `blocks.BLOCKS`. A tuned tile keeps the numbers of
    # the shipped tile.
    blocks: tuple[int, int] = (1, 1)
    # GPU, torch, Triton and commit of the `gpu` tests that passed; empty if no GPU ran it.
    # `EXECUTED` says which entries ran on a CPU.
    qualified: str = ""
    # Registers that a thread may use. None: ptxas decides, and may spill a few to run more programs
    # at the same time.
    registers: int | None = None


# Multiprocessors of A100, L40S, H100 and H200, B200, RTX 5090.
PROCESSORS = {"sm_80": 108, "sm_89": 142, "sm_90": 132, "sm_100": 148, "sm_120": 170}

# Shared memory that one program may use, in bytes.
SHARED = {
    "sm_80": 163 << 10,
    "sm_89": 99 << 10,
    "sm_90": 227 << 10,
    "sm_100": 227 << 10,
    "sm_120": 99 << 10,
}

# Elements of a float32 sum that leaves few of the registers of 8 warps.
LARGE_TILE = 128 * 128

# A kernel whose name has this suffix in a table is the entry of the kernel for layers of fewer than
# FEW_ROWS rows, tokens times siblings. Chosen by the model of `benchmarks/budget.py`.
FEW, FEW_ROWS = "_few", 2048

# (kernel, bytes of an element of x, columns of the rank tile) -> TileConfig. Found by compiling
# ahead of time. Tiles are as large as the registers hold without spills, because every program
# reads its columns of A or B again. Stages are as many as keep 16 bytes per thread in flight.
_SM_90 = {
    ("shrink_gate", 2, 16): TileConfig(64, 128, 4, 3),
    ("shrink_gate", 2, 32): TileConfig(64, 128, 4, 3),
    ("shrink_gate", 2, 64): TileConfig(128, 64, 8, 3),
    ("shrink_gate", 2, 128): TileConfig(128, 64, 8, 3),
    ("shrink_gate", 4, 16): TileConfig(64, 32, 4, 3),
    ("shrink_gate", 4, 32): TileConfig(64, 32, 4, 3),
    ("shrink_gate", 4, 64): TileConfig(64, 32, 8, 3),
    ("shrink_gate", 4, 128): TileConfig(64, 32, 8, 3),
    ("shrink_gate_backward", 2, 16): TileConfig(64, 128, 4, 3),
    ("shrink_gate_backward", 2, 32): TileConfig(64, 128, 4, 3),
    ("shrink_gate_backward", 2, 64): TileConfig(128, 64, 8, 3),
    ("shrink_gate_backward", 2, 128): TileConfig(128, 64, 8, 3),
    ("shrink_gate_backward", 4, 16): TileConfig(64, 32, 4, 3),
    ("shrink_gate_backward", 4, 32): TileConfig(64, 32, 4, 3),
    ("shrink_gate_backward", 4, 64): TileConfig(64, 32, 8, 3),
    ("shrink_gate_backward", 4, 128): TileConfig(64, 32, 8, 3),
    ("weight_grad", 2, 16): TileConfig(64, 128, 4, 3),
    ("weight_grad", 2, 32): TileConfig(64, 128, 4, 3),
    ("weight_grad", 2, 64): TileConfig(64, 128, 8, 3),
    ("weight_grad", 2, 128): TileConfig(64, 256, 8, 3),
    ("weight_grad", 4, 16): TileConfig(32, 64, 4, 3),
    ("weight_grad", 4, 32): TileConfig(32, 64, 4, 3),
    ("weight_grad", 4, 64): TileConfig(32, 64, 8, 3),
    ("weight_grad", 4, 128): TileConfig(32, 64, 8, 3),
    ("shrink_dx", 2, 16): TileConfig(64, 128, 8, 2),
    ("shrink_dx", 2, 32): TileConfig(64, 128, 8, 2),
    ("shrink_dx", 2, 64): TileConfig(128, 128, 8, 2),
    ("shrink_dx", 4, 16): TileConfig(64, 64, 4, 2),
    ("shrink_dx", 4, 32): TileConfig(64, 64, 4, 2),
    ("shrink_dx", 4, 64): TileConfig(64, 64, 4, 2),
    ("router_logits", 2, 16): TileConfig(64, 128, 4, 3),
    ("router_logits", 2, 32): TileConfig(64, 128, 4, 3),
    ("router_logits", 2, 64): TileConfig(64, 64, 4, 3),
    ("router_logits", 4, 16): TileConfig(64, 32, 4, 3),
    ("router_logits", 4, 32): TileConfig(64, 32, 4, 3),
    ("router_logits", 4, 64): TileConfig(64, 32, 8, 3),
    ("router_grad", 2, 16): TileConfig(64, 128, 4, 3),
    ("router_grad", 2, 32): TileConfig(64, 128, 4, 3),
    # Twice the columns of the other entries: dlogits are read half as often.
    ("router_grad", 2, 64): TileConfig(32, 256, 8, 3),
    ("router_grad", 4, 16): TileConfig(32, 64, 4, 3),
    ("router_grad", 4, 32): TileConfig(32, 64, 4, 3),
    ("router_grad", 4, 64): TileConfig(32, 64, 8, 3),
    ("grouped_shrink", 2, 16): TileConfig(64, 128, 4, 3),
    ("grouped_shrink", 2, 32): TileConfig(64, 128, 4, 3),
    ("grouped_shrink", 2, 64): TileConfig(64, 128, 8, 3),
    ("grouped_shrink", 4, 16): TileConfig(64, 32, 4, 3),
    ("grouped_shrink", 4, 32): TileConfig(64, 32, 4, 3),
    ("grouped_shrink", 4, 64): TileConfig(64, 32, 8, 3),
    ("grouped_shrink_backward", 2, 16): TileConfig(64, 128, 8, 3),
    ("grouped_shrink_backward", 2, 32): TileConfig(64, 128, 8, 3),
    ("grouped_shrink_backward", 2, 64): TileConfig(64, 128, 8, 3),
    ("grouped_shrink_backward", 4, 16): TileConfig(64, 32, 4, 3),
    ("grouped_shrink_backward", 4, 32): TileConfig(64, 32, 4, 3),
    ("grouped_shrink_backward", 4, 64): TileConfig(64, 32, 8, 3),
    ("grouped_expand", 2, 16): TileConfig(64, 128, 8, 3),
    ("grouped_expand", 2, 32): TileConfig(64, 128, 8, 3),
    ("grouped_expand", 2, 64): TileConfig(64, 128, 8, 3),
    ("grouped_expand", 4, 16): TileConfig(64, 64, 4, 2),
    ("grouped_expand", 4, 32): TileConfig(64, 64, 4, 2),
    ("grouped_weight_grad", 2, 16): TileConfig(64, 256, 4, 3),
    ("grouped_weight_grad", 2, 32): TileConfig(64, 128, 4, 3),
    ("grouped_weight_grad", 2, 64): TileConfig(64, 128, 8, 3),
    ("grouped_weight_grad", 4, 16): TileConfig(32, 64, 4, 3),
    ("grouped_weight_grad", 4, 32): TileConfig(32, 64, 4, 3),
    ("grouped_weight_grad", 4, 64): TileConfig(32, 64, 8, 3),
    ("ffn_inner", 2, 16): TileConfig(128, 64, 8, 2),
    ("ffn_inner", 2, 32): TileConfig(128, 64, 8, 2),
    ("ffn_inner", 2, 64): TileConfig(128, 64, 8, 2),
    ("ffn_inner", 2, 128): TileConfig(128, 32, 8, 2),
    ("ffn_inner_backward", 2, 16): TileConfig(128, 32, 8, 2),
    ("ffn_inner_backward", 2, 32): TileConfig(128, 32, 8, 2),
    ("ffn_inner_backward", 2, 64): TileConfig(128, 32, 8, 2),
    ("ffn_inner_backward", 2, 128): TileConfig(128, 16, 8, 2, registers=255),
    ("ffn_inner_weight_grad", 2, 16): TileConfig(128, 32, 8, 2),
    ("ffn_inner_weight_grad", 2, 32): TileConfig(64, 64, 8, 2),
    ("ffn_inner_weight_grad", 2, 64): TileConfig(128, 32, 8, 2),
    ("ffn_inner_weight_grad", 2, 128): TileConfig(32, 64, 8, 1),
}

# Triton 3.8 keeps 8 bytes on the stack in the product of R = 256; Triton 3.6 and 3.9 do not.
_SM_100 = {
    **_SM_90,
    ("shrink_gate_backward", 2, 64): TileConfig(64, 128, 8, 3),
    ("shrink_gate", 2, 128): TileConfig(64, 64, 8, 4),
    ("shrink_gate_backward", 2, 128): TileConfig(64, 64, 8, 3),
    ("shrink_gate", 2, 16): TileConfig(64, 128, 8, 3),
    ("shrink_gate", 2, 32): TileConfig(64, 128, 8, 3),
    ("shrink_gate_backward", 2, 32): TileConfig(64, 128, 8, 3),
    ("weight_grad", 2, 128): TileConfig(32, 128, 8, 3),
    ("router_logits", 2, 16): TileConfig(64, 128, 8, 3),
    ("router_logits", 4, 32): TileConfig(64, 32, 8, 3),
    ("grouped_weight_grad", 2, 16): TileConfig(64, 128, 4, 3),
    ("grouped_weight_grad", 2, 64): TileConfig(64, 128, 8, 2, registers=255),
    ("grouped_weight_grad", 4, 32): TileConfig(32, 64, 8, 3),
    ("router_grad", 4, 16): TileConfig(32, 64, 8, 3),
    ("grouped_shrink_backward", 4, 64): TileConfig(64, 32, 8, 2),
    ("grouped_expand", 4, 32): TileConfig(64, 64, 8, 2),
    # ptxas spills registers to run more programs at the same time.
    ("grouped_expand", 2, 16): TileConfig(64, 128, 8, 3, registers=255),
    ("grouped_expand", 4, 16): TileConfig(64, 64, 4, 2, registers=255),
    # The same, with odd ranks.
    ("shrink_gate", 2, 64): TileConfig(64, 128, 8, 3, registers=255),
    ("weight_grad", 2, 64): TileConfig(64, 128, 8, 3, registers=255),
    ("shrink_gate_backward", 4, 128): TileConfig(64, 32, 8, 3, registers=255),
    ("ffn_inner", 2, 128): TileConfig(64, 64, 8, 2),
    ("ffn_inner_backward", 2, 16): TileConfig(64, 32, 8, 2),
    ("ffn_inner_backward", 2, 32): TileConfig(64, 32, 8, 2),
    ("ffn_inner_backward", 2, 64): TileConfig(64, 32, 8, 2),
    ("ffn_inner_backward", 2, 128): TileConfig(64, 32, 8, 2),
    ("ffn_inner_weight_grad", 2, 16): TileConfig(64, 64, 8, 2),
    ("ffn_inner_weight_grad", 2, 64): TileConfig(64, 64, 8, 2),
    ("ffn_inner_weight_grad", 2, 128): TileConfig(64, 64, 8, 1),
}
# Without wgmma, a tile of 64 tokens and 128 columns does not fit into the registers.
_SM_80 = {
    **_SM_90,
    ("shrink_gate", 2, 32): TileConfig(64, 64, 4, 3),
    ("shrink_gate", 2, 64): TileConfig(64, 64, 8, 3),
    ("shrink_gate", 2, 128): TileConfig(64, 32, 8, 3),
    ("shrink_gate_backward", 2, 64): TileConfig(64, 128, 8, 3),
    ("shrink_gate_backward", 2, 128): TileConfig(32, 64, 8, 3),
    ("shrink_gate_backward", 4, 128): TileConfig(32, 32, 8, 3),
    ("weight_grad", 2, 32): TileConfig(64, 128, 8, 3),
    ("weight_grad", 2, 128): TileConfig(32, 64, 8, 3),
    ("shrink_dx", 2, 64): TileConfig(64, 128, 8, 2),
    ("shrink_dx", 4, 64): TileConfig(32, 64, 4, 2),
    ("router_grad", 2, 32): TileConfig(64, 128, 8, 3),
    ("router_grad", 2, 64): TileConfig(32, 64, 8, 3),
    ("grouped_expand", 4, 32): TileConfig(64, 32, 8, 2),
    # ptxas spills registers to run more programs at the same time.
    ("grouped_expand", 4, 16): TileConfig(64, 64, 4, 2, registers=255),
    ("grouped_weight_grad", 2, 16): TileConfig(64, 128, 4, 3),
    ("ffn_inner", 2, 16): TileConfig(64, 64, 8, 2),
    ("ffn_inner", 2, 32): TileConfig(64, 64, 8, 2),
    ("ffn_inner", 2, 64): TileConfig(64, 64, 8, 2),
    ("ffn_inner", 2, 128): TileConfig(64, 64, 8, 2),
    ("ffn_inner_backward", 2, 16): TileConfig(64, 32, 8, 2),
    # With two stages, ptxas of Triton 3.6 spills two registers.
    ("ffn_inner_backward", 2, 32): TileConfig(64, 32, 8, 1),
    ("ffn_inner_backward", 2, 64): TileConfig(32, 32, 8, 2),
    ("ffn_inner_backward", 2, 128): TileConfig(16, 32, 8, 2, registers=255),
    ("ffn_inner_weight_grad", 2, 16): TileConfig(32, 64, 8, 2),
    ("ffn_inner_weight_grad", 2, 32): TileConfig(32, 64, 8, 2),
    ("ffn_inner_weight_grad", 2, 64): TileConfig(16, 32, 8, 2, registers=255),
    ("ffn_inner_weight_grad", 2, 128): TileConfig(16, 32, 8, 2, registers=255),
}
_SM_89 = {
    **_SM_80,
    # ptxas spills two registers without the limit that is written out.
    ("shrink_gate_backward", 4, 128): TileConfig(32, 32, 8, 3, registers=255),
    # With dropout, 4 warps spill.
    ("grouped_shrink", 2, 16): TileConfig(64, 128, 8, 3),
    ("shrink_gate_backward", 2, 64): TileConfig(64, 64, 8, 3),
    ("grouped_shrink_backward", 4, 32): TileConfig(64, 32, 8, 3),
    ("grouped_expand", 4, 32): TileConfig(64, 32, 4, 2),
    ("ffn_inner", 2, 128): TileConfig(64, 64, 8, 1),
    # ptxas spills registers to run two programs at the same time.
    ("ffn_inner_backward", 2, 64): TileConfig(32, 32, 8, 2, registers=255),
}
# Without wgmma and with 99 KiB of shared memory, like sm_89, but more of its tiles spill.
_SM_120 = {
    **_SM_89,
    # Entries with a limit: without it, ptxas of Triton 3.6 spills two to four registers.
    ("shrink_gate", 2, 64): TileConfig(32, 64, 8, 3),
    ("shrink_gate", 2, 128): TileConfig(64, 32, 8, 3, registers=255),
    ("shrink_gate", 4, 64): TileConfig(32, 32, 8, 3),
    ("shrink_gate_backward", 2, 64): TileConfig(64, 64, 8, 3, registers=255),
    ("shrink_gate_backward", 2, 128): TileConfig(16, 64, 8, 3),
    ("shrink_gate_backward", 4, 64): TileConfig(32, 32, 8, 3),
    ("shrink_gate_backward", 4, 128): TileConfig(16, 32, 8, 3),
    ("weight_grad", 4, 16): TileConfig(32, 64, 8, 3),
    ("weight_grad", 4, 128): TileConfig(32, 32, 8, 3),
    ("router_logits", 2, 16): TileConfig(64, 128, 8, 3),
    # ptxas spills registers to run three programs at the same time.
    ("grouped_expand", 2, 16): TileConfig(64, 128, 8, 3, registers=255),
    # The same, with float32 adapters.
    ("shrink_gate", 2, 32): TileConfig(64, 64, 4, 3, registers=255),
    ("grouped_shrink_backward", 2, 64): TileConfig(64, 128, 8, 3, registers=255),
    ("grouped_expand", 4, 32): TileConfig(64, 32, 8, 2),
}

# Tiles of a program that keeps the rows of all A in shared memory, by their number.
_RESIDENT = {
    ("shrink_dx", 2, 128): TileConfig(64, 256, 8, 3),
    ("shrink_dx", 2, 192): TileConfig(64, 256, 8, 3),
    ("shrink_dx", 2, 256): TileConfig(64, 128, 8, 3),
}
# With Triton 3.6, sums of 256 columns do not fit into the tensor memory beside their operands. With
# Triton 3.9, ptxas spills two registers for odd ranks without the limit that is written out.
_RESIDENT_SM_100 = {
    **_RESIDENT,
    ("shrink_dx", 2, 128): TileConfig(64, 128, 8, 3, registers=255),
    ("shrink_dx", 2, 192): TileConfig(64, 128, 8, 3),
}


def _with_blocks(architecture: str, table: dict) -> dict[tuple[str, int, int], TileConfig]:
    """Return the table with the `blocks` of its entries."""
    blocks = {
        (kernel, itemsize, 16 << i): each
        for (kernel, itemsize), by_columns in BLOCKS[architecture].items()
        for i, each in enumerate(by_columns)
    }
    return {key: tile._replace(blocks=blocks.get(key, (1, 1))) for key, tile in table.items()}


# Layers of few rows have few tiles of 256 features.
_FEW_SM_90 = {(f"weight_grad{FEW}", 2, 128): TileConfig(64, 128, 8, 3)}

_TABLES = {
    "sm_80": _SM_80,
    "sm_89": _SM_89,
    "sm_90": _SM_90 | _FEW_SM_90 | _RESIDENT,
    "sm_100": _SM_100 | _RESIDENT_SM_100,
    "sm_120": _SM_120,
}
TILE_CONFIGS = {name: _with_blocks(name, table) for name, table in _TABLES.items()}
# The architectures whose products read their right operand from shared memory. A loop can keep it
# there; the others load it into registers for every product.
SHARED_OPERANDS = ("sm_90", "sm_100")
# The architectures for which the tests execute the compiled code of every entry on a CPU
# (`tests/kernels/test_executed_tiles.py`).
EXECUTED = ("sm_80", "sm_90")

# For kernels that work on rank space or element by element, and loop over no large product.
ROW_TILE = TileConfig(16, 64, 4, 1, blocks=(6, 6))
# For the second launch of a shrink, which adds partial sums and applies the gate.
PARTIALS_TILE = ROW_TILE._replace(registers=255)

_assumed: str | None = None
# Device -> its table, with the tiles tuned on it. Read once in a process.
_tables: dict[torch.device, dict[tuple[str, int, int], TileConfig]] = {}


@contextmanager
def assume(architecture: str) -> Iterator[None]:
    """Choose tiles for this architecture on every device, to compile ahead of time.

    Raises:
        ValueError: there is no table for the architecture.
    """
    global _assumed
    if architecture not in TILE_CONFIGS:
        expected = ", ".join(TILE_CONFIGS)
        raise ValueError(f"architecture: expected one of {expected}, got {architecture!r}")
    outer, _assumed = _assumed, architecture
    try:
        yield
    finally:
        _assumed = outer


@cache
def _query_gpu(index: int | None) -> tuple[str, int]:
    """Return the architecture whose table serves this GPU, and its number of multiprocessors."""
    properties = torch.cuda.get_device_properties(index)
    major, minor = properties.major, properties.minor
    if major < 8:
        raise RuntimeError(
            f"{properties.name} has compute capability {major}.{minor}, and the Triton kernels "
            'need 8.0 or newer; impl="reference" runs everywhere'
        )
    name = {9: "sm_90", 10: "sm_100", 12: "sm_120"}.get(major)
    # Other GPUs have at least the 99 KiB of shared memory of an L40S: 8.6, 8.7, 8.9, 11.0.
    name = name or ("sm_80" if (major, minor) == (8, 0) else "sm_89")
    return name, properties.multi_processor_count


def processors(device: torch.device) -> tuple[str, int]:
    """Return the architecture and the number of multiprocessors; an H200's if it is not a GPU."""
    if _assumed is not None:
        return _assumed, PROCESSORS[_assumed]
    if device.type == "cuda":
        return _query_gpu(device.index)
    return "sm_90", PROCESSORS["sm_90"]


def _table(device: torch.device) -> dict[tuple[str, int, int], TileConfig]:
    """Return the table of a device: the table of its architecture, with its tuned tiles."""
    if _assumed is not None:
        return TILE_CONFIGS[_assumed]
    table = _tables.get(device)
    if table is None:
        # This module is imported by the other one.
        from moelora_kernels.kernels.common import tuned

        tiles = {} if device.type == "meta" else tuned.tiles(device)
        table = _tables[device] = TILE_CONFIGS[processors(device)[0]] | tiles
    return table


@contextmanager
def shipped_tiles(device: torch.device) -> Iterator[dict[tuple[str, int, int], TileConfig]]:
    """Take the shipped tiles on a device, and not the tuned ones. Yield the table, to change it."""
    outer = _tables.pop(device, None)
    _tables[device] = dict(TILE_CONFIGS[processors(device)[0]])
    try:
        yield _tables[device]
    finally:
        del _tables[device]
        if outer is not None:
            _tables[device] = outer


def tile_config(
    kernel: str,
    device: torch.device,
    dtype: torch.dtype,
    rank_columns: int,
    row: int = 16,
    rows: int = FEW_ROWS,
    is_simple: bool = True,
) -> TileConfig:
    """Return the entry of the table for tiles of `rank_columns` columns of rank space.

    row: a number that divides the distance of the rows in rank space, in elements. If float32 rows
    are not aligned to 16 bytes, a step is half as long: the addresses of single elements take
    registers. rows: tokens times siblings. is_simple: nothing but the products takes registers.
    Otherwise a step of 256 columns is half as long, and one of 16 columns is twice as long, with a
    fourth of the tokens.
    """
    table = _table(device)
    entry = table[kernel, dtype.itemsize, rank_columns]
    if rows < FEW_ROWS:
        entry = table.get((kernel + FEW, dtype.itemsize, rank_columns), entry)
    if (dtype.itemsize == 4 and row % 4) or (entry.step == 256 and not is_simple):
        return entry._replace(step=entry.step // 2)
    if entry.step == 16 and not is_simple:
        return entry._replace(tokens=entry.tokens // 4, step=32)
    return entry
