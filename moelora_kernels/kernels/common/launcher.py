"""How kernels are launched: on the device of their tensors, or recorded instead of launched."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from moelora_kernels.kernels.common.configs import Tile
from moelora_kernels.reference import blocks

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"


class Launch(NamedTuple):
    """One launch: what it would take to compile it, and to count what it moves."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    constants: dict[str, Any]
    tile: Tile


_records: list[Launch] | None = None


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Collect launches; tensors on the meta device are enough for it, and run nothing."""
    global _records
    outer, _records = _records, []
    try:
        yield _records
    finally:
        _records = outer


def run(
    kernel, programs: int, tile: Tile, arguments: dict[str, Any], constants: dict[str, Any]
) -> None:
    """Launch `programs` programs on grid.x, on the current stream of the tensors' device.

    arguments: tensors, tuples of tensors, numbers or None; constants: what is compiled in.
    """
    if _records is not None:
        _records.append(Launch(kernel, programs, arguments, constants, tile))
    first = next(a for a in _flat(arguments.values()) if isinstance(a, Tensor))
    if first.is_meta or programs == 0:
        return
    guard = nullcontext()
    if first.is_cuda:
        elsewhere = first.device.index != torch.cuda.current_device()
        if elsewhere or torch.cuda.is_current_stream_capturing():
            guard = _guard(first.device)
    with guard:
        kernel[(programs,)](**arguments, **constants, **options(tile))


def options(tile: Tile) -> dict[str, Any]:
    """How a kernel is compiled. Sums are fused multiply-adds, whatever Triton's default becomes."""
    return {"num_warps": tile.warps, "num_stages": tile.stages, "enable_fp_fusion": True}


@contextmanager
def _guard(device: torch.device) -> Iterator[None]:
    """Launches go to `device`, and compile nothing while a CUDA graph is captured there."""
    runtime = triton.knobs.runtime
    hook = runtime.jit_cache_hook
    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            # Called where a kernel is not found among the compiled ones.
            runtime.jit_cache_hook = lambda **_: require_no_capture("kernels", device)
        try:
            yield
        finally:
            runtime.jit_cache_hook = hook


def _flat(values) -> Iterator:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _flat(value)
        else:
            yield value


def block(size: int, least: int = 16) -> int:
    """The power of two that holds `size` columns; 16 is the smallest operand of a product."""
    return max(least, 1 << (size - 1).bit_length())


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up."""
    return -(-a // b)


def rank_divisor(ranks: Sequence[int]) -> int:
    """The largest power of two up to 16 that every expert begins at a multiple of."""
    return math.gcd(16, *ranks)


def rows_dense(matrix: Tensor) -> Tensor:
    """The matrix itself where its rows are contiguous, at any distance, else a copy."""
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def contiguous(tensors: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
    """A tuple of pointers for a kernel; None where there are none."""
    return tuple(t.contiguous() for t in tensors) or None


def _outside_pools(make: Callable[[], Tensor]) -> Tensor:
    """make() in a thread of its own: what it allocates belongs to no graph's memory pool.

    Compiled models that run as CUDA graphs direct the allocations of their thread into a pool, and
    refuse tensors in it that outlive a run, as the tables of experts do.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(make).result()


def require_no_capture(what: str, device: torch.device) -> None:
    """Raise RuntimeError while a CUDA graph is being captured on `device`."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{what} must exist before a CUDA graph is captured: "
            "run the same shapes once before, or moelora_kernels.warmup(model, tokens)"
        )


def rank_constants(ranks: Sequence[int]) -> dict[str, int]:
    """What kernels over tiles of experts are compiled for; RANK is 0 where ranks differ."""
    equal = min(ranks) == max(ranks)
    return dict(RANK=ranks[0] if equal else 0, WIDEST=max(ranks), RANK_DIVISOR=rank_divisor(ranks))


@cache
def rank_table(ranks: tuple[int, ...], device: torch.device) -> Tensor | None:
    """First column and rank of every expert, [E, 2] int32; None where all ranks are equal.

    Made once, then kept.
    """
    if min(ranks) == max(ranks):
        return None
    require_no_capture("the table of ranks", device)
    table = torch.tensor([(c.start, c.stop - c.start) for c in blocks(ranks)], dtype=torch.int32)
    return _outside_pools(lambda: table.to(device))


@cache
def expert_columns(ranks: tuple[int, ...], device: torch.device) -> Tensor:
    """S [E, R] bfloat16: 1 in the columns of expert e, 0 elsewhere. Made once and kept."""
    require_no_capture("the table of experts", device)
    matrix = torch.zeros(len(ranks), sum(ranks), dtype=torch.bfloat16)
    for row, columns in zip(matrix, blocks(ranks), strict=True):
        row[columns] = 1
    return _outside_pools(lambda: matrix.to(device))


@cache
def scaling_of(scaling: tuple[float, ...], device: torch.device) -> Tensor:
    """The scaling of the experts, [E] float32. Made once and kept."""
    require_no_capture("the scaling of the experts", device)
    table = torch.tensor(scaling, dtype=torch.float32)
    return _outside_pools(lambda: table.to(device))


@cache
def expert_tiles(ranks: tuple[int, ...], n: int, width: int, device: torch.device) -> Tensor:
    """Column tiles that stay within one expert: [tiles, 4] int32 of start, end, expert, sibling.

    start and end count the columns of all n siblings. Made once, then kept.
    """
    require_no_capture("the table of column tiles", device)
    total = sum(ranks)
    tiles = [
        (sibling * total + start, sibling * total + min(start + width, columns.stop), e, sibling)
        for sibling in range(n)
        for e, columns in enumerate(blocks(ranks))
        for start in range(columns.start, columns.stop, width)
    ]
    table = torch.tensor(tiles, dtype=torch.int32)
    return _outside_pools(lambda: table.to(device))
