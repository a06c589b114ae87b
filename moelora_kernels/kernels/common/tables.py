"""Small tensors that depend only on ranks and scaling. Each is built once per device and cached."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor

from moelora_kernels.kernels.common.launcher import require_no_capture
from moelora_kernels.reference import blocks

# Tables are filled on this device, not on torch's default device. Under a default device "cuda"
# they would be in the memory pool of the caller's thread, see `_outside_pools`.
_HOST = torch.device("cpu")


# Every table by its id. The caches below keep the tables for ever.
_tables: dict[int, Tensor] = {}


def is_table(tensor: Tensor) -> bool:
    """Return whether a function of this module built the tensor."""
    return _tables.get(id(tensor)) is tensor


def rank_divisor(ranks: Sequence[int]) -> int:
    """Return the largest power of two, up to 16, that divides every rank."""
    return math.gcd(16, *ranks)


def rank_constants(ranks: Sequence[int]) -> dict[str, int]:
    """Return the constants that grouped kernels are compiled for. RANK is 0 if ranks differ."""
    equal = min(ranks) == max(ranks)
    return dict(
        RANK=ranks[0] if equal else 0, MAX_RANK=max(ranks), RANK_DIVISOR=rank_divisor(ranks)
    )


@cache
def rank_table(
    ranks: tuple[int, ...], device: torch.device, frozen: tuple[int, ...] = ()
) -> Tensor | None:
    """Return [E, 2] int32: first column and rank of every expert; the rank of `frozen` ones is 0.

    None if all ranks are equal and none is frozen.
    """
    if min(ranks) == max(ranks) and not frozen:
        return None
    require_no_capture("the table of ranks", device)
    rows = [(c.start, 0 if e in frozen else c.stop - c.start) for e, c in enumerate(blocks(ranks))]
    table = torch.tensor(rows, dtype=torch.int32, device=_HOST)
    return _outside_pools(lambda: table.to(device))


@cache
def expert_columns(ranks: tuple[int, ...], device: torch.device) -> Tensor:
    """Return a matrix [E, R] bfloat16: 1 in the columns of expert e, 0 elsewhere."""
    require_no_capture("the table of experts", device)
    matrix = torch.zeros(len(ranks), sum(ranks), dtype=torch.bfloat16, device=_HOST)
    for row, columns in zip(matrix, blocks(ranks), strict=True):
        row[columns] = 1
    return _outside_pools(lambda: matrix.to(device))


@cache
def scaling_table(scaling: tuple[float, ...], device: torch.device) -> Tensor:
    """Return the scale of every expert, [E] float32."""
    require_no_capture("the scaling of the experts", device)
    table = torch.tensor(scaling, dtype=torch.float32, device=_HOST)
    return _outside_pools(lambda: table.to(device))


@cache
def column_tile_table(ranks: tuple[int, ...], n: int, width: int, device: torch.device) -> Tensor:
    """Return column tiles of up to `width` columns that each lie within one expert.

    [tiles, 4] int32: first column, end, expert, sibling. Columns count over all n siblings.
    """
    require_no_capture("the table of column tiles", device)
    total = sum(ranks)
    tiles = [
        (sibling * total + start, sibling * total + min(start + width, columns.stop), e, sibling)
        for sibling in range(n)
        for e, columns in enumerate(blocks(ranks))
        for start in range(columns.start, columns.stop, width)
    ]
    table = torch.tensor(tiles, dtype=torch.int32, device=_HOST)
    return _outside_pools(lambda: table.to(device))


def _outside_pools(make: Callable[[], Tensor]) -> Tensor:
    """Return make(), called in another thread, so that the result is in no graph's memory pool.

    A compiled model that runs as a CUDA graph allocates the tensors of its thread in a memory
    pool. A tensor in the pool must not live longer than a run, but these tables do.
    """
    with ThreadPoolExecutor(1) as thread:
        table = thread.submit(make).result()
    _tables[id(table)] = table
    return table
