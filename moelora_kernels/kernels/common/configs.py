"""Which tiles a kernel is launched with: one table per architecture, looked up by shape.

Nothing here is timed at run time. An entry is qualified by the `gpu` tests (float64 comparison, NaN
scan, 50 bitwise repeats) on the hardware it names; without a name it is compiled ahead of time for
its architecture only (no spills, shared memory, vector loads:
`tests/kernels/test_ahead_of_time.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """Rows and step of a program, and how it is compiled.

    tokens: tokens of a tile (for the weight_grads: of a step; for tiles of an expert at least
    `types.TILE`). step: columns per step of the loop (for the weight_grads, `shrink_dx` and
    `grouped_expand`: columns of the wide side that a program owns). qualified: GPU, torch, Triton
    and commit of the `gpu` tests that passed with it; empty: compiled only.
    """

    tokens: int
    step: int
    warps: int
    stages: int
    qualified: str = ""


# Programs that fill the chip once, by architecture: A100, L40S, H100 and H200, B200.
PROCESSORS = {"sm_80": 108, "sm_89": 142, "sm_90": 132, "sm_100": 148}

# Shared memory a program may take, in bytes.
SHARED = {"sm_80": 163 << 10, "sm_89": 99 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}

# (kernel, bytes of an element of x, columns of the rank tile) -> Tile. Found by compiling ahead of
# time: tiles as large as the registers hold without spills, because each program reads its columns
# of A or B anew, and as many stages as keep 16 bytes per thread on the way.
_SM_90 = {
    ("shrink_gate", 2, 16): Tile(64, 128, 4, 3),
    ("shrink_gate", 2, 32): Tile(64, 128, 4, 3),
    ("shrink_gate", 2, 64): Tile(64, 128, 8, 3),
    ("shrink_gate", 2, 128): Tile(64, 64, 8, 4),
    ("shrink_gate", 4, 16): Tile(64, 32, 4, 3),
    ("shrink_gate", 4, 32): Tile(64, 32, 4, 3),
    ("shrink_gate", 4, 64): Tile(64, 32, 8, 3),
    ("shrink_gate", 4, 128): Tile(64, 32, 8, 3),
    ("shrink_gate_backward", 2, 16): Tile(64, 128, 4, 3),
    ("shrink_gate_backward", 2, 32): Tile(64, 128, 4, 3),
    ("shrink_gate_backward", 2, 64): Tile(64, 128, 8, 3),
    ("shrink_gate_backward", 2, 128): Tile(64, 64, 8, 3),
    ("shrink_gate_backward", 4, 16): Tile(64, 32, 4, 3),
    ("shrink_gate_backward", 4, 32): Tile(64, 32, 4, 3),
    ("shrink_gate_backward", 4, 64): Tile(64, 32, 8, 3),
    ("shrink_gate_backward", 4, 128): Tile(64, 32, 8, 3),
    ("weight_grad", 2, 16): Tile(64, 128, 4, 3),
    ("weight_grad", 2, 32): Tile(64, 128, 4, 3),
    ("weight_grad", 2, 64): Tile(64, 128, 8, 3),
    ("weight_grad", 2, 128): Tile(64, 128, 8, 3),
    ("weight_grad", 4, 16): Tile(32, 64, 4, 3),
    ("weight_grad", 4, 32): Tile(32, 64, 4, 3),
    ("weight_grad", 4, 64): Tile(32, 64, 8, 3),
    ("weight_grad", 4, 128): Tile(32, 64, 8, 3),
    ("shrink_dx", 2, 16): Tile(64, 128, 8, 2),
    ("shrink_dx", 2, 32): Tile(64, 128, 8, 2),
    ("shrink_dx", 2, 64): Tile(128, 128, 8, 2),
    ("shrink_dx", 4, 16): Tile(64, 64, 4, 2),
    ("shrink_dx", 4, 32): Tile(64, 64, 4, 2),
    ("shrink_dx", 4, 64): Tile(64, 64, 4, 2),
    ("router_logits", 2, 16): Tile(64, 128, 4, 3),
    ("router_logits", 2, 32): Tile(64, 128, 4, 3),
    ("router_logits", 2, 64): Tile(64, 64, 4, 3),
    ("router_logits", 4, 16): Tile(64, 32, 4, 3),
    ("router_logits", 4, 32): Tile(64, 32, 4, 3),
    ("router_logits", 4, 64): Tile(64, 32, 8, 3),
    ("router_grad", 2, 16): Tile(64, 128, 4, 3),
    ("router_grad", 2, 32): Tile(64, 128, 4, 3),
    ("router_grad", 2, 64): Tile(64, 128, 8, 3),
    ("router_grad", 4, 16): Tile(32, 64, 4, 3),
    ("router_grad", 4, 32): Tile(32, 64, 4, 3),
    ("router_grad", 4, 64): Tile(32, 64, 8, 3),
    ("grouped_shrink", 2, 16): Tile(64, 128, 4, 3),
    ("grouped_shrink", 2, 32): Tile(64, 128, 4, 3),
    ("grouped_shrink", 2, 64): Tile(64, 128, 8, 3),
    ("grouped_shrink", 4, 16): Tile(64, 32, 4, 3),
    ("grouped_shrink", 4, 32): Tile(64, 32, 4, 3),
    ("grouped_shrink", 4, 64): Tile(64, 32, 8, 3),
    ("grouped_shrink_backward", 2, 16): Tile(64, 128, 8, 3),
    ("grouped_shrink_backward", 2, 32): Tile(64, 128, 8, 3),
    ("grouped_shrink_backward", 2, 64): Tile(64, 128, 8, 3),
    ("grouped_shrink_backward", 4, 16): Tile(64, 32, 4, 3),
    ("grouped_shrink_backward", 4, 32): Tile(64, 32, 4, 3),
    ("grouped_shrink_backward", 4, 64): Tile(64, 32, 8, 3),
    ("grouped_expand", 2, 16): Tile(64, 128, 8, 2),
    ("grouped_expand", 2, 32): Tile(64, 128, 8, 2),
    ("grouped_expand", 2, 64): Tile(64, 128, 8, 2),
    ("grouped_expand", 4, 16): Tile(64, 64, 4, 2),
    ("grouped_expand", 4, 32): Tile(64, 64, 4, 2),
    ("grouped_weight_grad", 2, 16): Tile(64, 128, 4, 3),
    ("grouped_weight_grad", 2, 32): Tile(64, 128, 4, 3),
    ("grouped_weight_grad", 2, 64): Tile(64, 128, 8, 3),
    ("grouped_weight_grad", 4, 16): Tile(32, 64, 4, 3),
    ("grouped_weight_grad", 4, 32): Tile(32, 64, 4, 3),
    ("grouped_weight_grad", 4, 64): Tile(32, 64, 8, 3),
}

# With Triton 3.8, though not with 3.6 or 3.9, the product of R = 256 keeps 8 bytes on the stack.
_SM_100 = {
    **_SM_90,
    ("shrink_gate", 2, 16): Tile(64, 128, 8, 3),
    ("shrink_gate", 2, 32): Tile(64, 128, 8, 3),
    ("shrink_gate_backward", 2, 32): Tile(64, 128, 8, 3),
    ("weight_grad", 2, 128): Tile(64, 128, 8, 2),
    ("router_logits", 2, 16): Tile(64, 128, 8, 3),
    ("grouped_weight_grad", 2, 64): Tile(64, 128, 8, 2),
    ("grouped_weight_grad", 4, 32): Tile(32, 64, 8, 3),
    ("router_grad", 4, 16): Tile(32, 64, 8, 3),
    ("grouped_shrink_backward", 4, 64): Tile(64, 32, 8, 2),
}
# Without wgmma a tile of 64 tokens and 128 columns does not fit the registers.
_SM_80 = {
    **_SM_90,
    ("shrink_gate", 2, 32): Tile(64, 64, 4, 3),
    ("shrink_gate", 2, 128): Tile(64, 32, 8, 3),
    ("shrink_gate_backward", 2, 128): Tile(32, 64, 4, 3),
    ("shrink_gate_backward", 4, 128): Tile(32, 32, 8, 3),
    ("weight_grad", 2, 32): Tile(64, 128, 8, 3),
    ("weight_grad", 2, 128): Tile(32, 64, 8, 3),
    ("shrink_dx", 2, 64): Tile(64, 128, 8, 2),
    ("shrink_dx", 4, 64): Tile(32, 64, 4, 2),
    ("router_grad", 2, 32): Tile(64, 128, 8, 3),
    ("router_grad", 2, 64): Tile(32, 64, 8, 3),
    ("grouped_expand", 2, 16): Tile(64, 64, 8, 2),
    ("grouped_expand", 4, 32): Tile(64, 64, 8, 2),
    ("grouped_weight_grad", 2, 16): Tile(64, 128, 8, 3),
}
_SM_89 = {
    **_SM_80,
    ("shrink_gate", 2, 64): Tile(64, 64, 8, 3),
    ("shrink_gate_backward", 2, 64): Tile(64, 64, 8, 3),
    ("grouped_shrink_backward", 4, 32): Tile(64, 32, 8, 3),
    ("grouped_expand", 4, 32): Tile(64, 32, 4, 2),
}

TILES = {"sm_80": _SM_80, "sm_89": _SM_89, "sm_90": _SM_90, "sm_100": _SM_100}

# What runs over rank space or element by element: no loop over products to pipeline.
ROWS = Tile(16, 64, 4, 1)

_assumed: str | None = None


@contextmanager
def assume(architecture: str) -> Iterator[None]:
    """Choose tiles for this architecture, whatever the device (to compile ahead of time)."""
    global _assumed
    if architecture not in TILES:
        raise ValueError(f"architecture: expected one of {', '.join(TILES)}, got {architecture!r}")
    outer, _assumed = _assumed, architecture
    try:
        yield
    finally:
        _assumed = outer


@cache
def _of_gpu(index: int | None) -> tuple[str, int]:
    properties = torch.cuda.get_device_properties(index)
    major, minor = properties.major, properties.minor
    if major < 8:
        raise RuntimeError(
            f"{properties.name} has compute capability {major}.{minor}, and the Triton kernels "
            'need 8.0 or newer; impl="reference" runs everywhere'
        )
    # What has the 99 KiB of an L40S takes its tiles: 8.6, 8.9, 12.x.
    name = {(8, 0): "sm_80", (9, 0): "sm_90"}.get((major, minor))
    return name or ("sm_100" if major == 10 else "sm_89"), properties.multi_processor_count


def processors(device: torch.device) -> tuple[str, int]:
    """Architecture and number of multiprocessors; an H200's where the device has none."""
    if _assumed is not None:
        return _assumed, PROCESSORS[_assumed]
    if device.type == "cuda":
        return _of_gpu(device.index)
    return "sm_90", PROCESSORS["sm_90"]


def tile(kernel: str, device: torch.device, dtype: torch.dtype, columns: int) -> Tile:
    """The entry of the table for this rank tile."""
    return TILES[processors(device)[0]][kernel, dtype.itemsize, columns]


def splits(device: torch.device, programs: int, steps: int, least: int = 4) -> int:
    """Into how many parts to cut a loop of `steps` so that `programs` fill the chip.

    1 where three quarters of the multiprocessors have a program anyway: what the last quarter adds
    is less than the second launch costs that sums the parts. Each part keeps `least` steps.
    """
    _, count = processors(device)
    parts = 1
    while 4 * programs * parts < 3 * count and steps >= 2 * parts * least:
        parts *= 2
    return parts
