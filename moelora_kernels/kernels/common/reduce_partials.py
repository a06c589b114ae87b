"""The second stage of split sums: parts added in their order, and rounded once."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from moelora_kernels.kernels.common import launcher
from moelora_kernels.kernels.common.configs import Tile


@triton.jit
def load_partials(
    partials_ptr,
    tokens,
    inside,
    sibling,
    columns,
    some,
    T,
    n: tl.constexpr,
    WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """The sum over the parts of partials [SPLIT, T, n WIDTH] at `some` columns of a sibling."""
    total = tl.zeros((tokens.shape[0], columns.shape[0]), tl.float32)
    for split in range(SPLIT):
        row = (split * T + tokens)[:, None] * (n * WIDTH) + sibling * WIDTH
        address = partials_ptr + row + columns[None, :]
        total += tl.load(address, mask=inside[:, None] & some[None, :], other=0.0)
    return total


@triton.jit
def reduce_partials_kernel(
    partials_ptr, stride_plane, outputs, sizes, starts, SPLIT: tl.constexpr, BLOCK: tl.constexpr
):
    """outputs[i] = sum over the partials of partials[s, starts[i] : starts[i] + sizes[i]].

    Programs: blocks of the outputs, one output after the other.
    """
    block = tl.program_id(0)
    stride_plane = tl.full((), 0, tl.int64) + stride_plane
    for i in tl.static_range(len(outputs)):
        blocks = tl.cdiv(sizes[i], BLOCK)
        if (block >= 0) & (block < blocks):
            element = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            real = element < sizes[i]
            total = tl.zeros((BLOCK,), tl.float32)
            for split in range(SPLIT):
                at = partials_ptr + split * stride_plane + starts[i] + element
                total += tl.load(at, mask=real, other=0.0)
            tl.store(outputs[i] + element, total.to(outputs[i].dtype.element_ty), mask=real)
        block -= blocks


def reduce_partials(
    partials: Tensor, outputs: Sequence[Tensor], starts: Sequence[int] = (0,)
) -> None:
    """Fill contiguous `outputs` with sums over partials [SPLIT, *] float32, from starts[i] on."""
    tile = Tile(1, 1024, 4, 1)
    sizes = tuple(o.numel() for o in outputs)
    launcher.run(
        reduce_partials_kernel,
        sum(launcher.ceil_div(size, tile.step) for size in sizes),
        tile,
        dict(
            partials_ptr=partials,
            stride_plane=partials.stride(0),
            outputs=tuple(outputs),
            sizes=sizes,
            starts=tuple(starts),
        ),
        dict(SPLIT=partials.shape[0], BLOCK=tile.step),
    )
