"""Partial sums. A long sum is split so that its programs fill whole waves of the GPU.

Each split stores a float32 partial sum, and a second launch adds the partial sums in their order
and rounds once. Two runs give the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from moelora_kernels.kernels.common import launcher
from moelora_kernels.kernels.common.configs import TileConfig


@triton.jit
def store_partial(
    partials_ptr,
    split,
    tokens,
    tokens_in,
    sibling,
    columns,
    columns_in,
    partial,
    T,
    n: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Store the tile `partial` of one split to partials [splits, T, n WIDTH] float32."""
    row = (split * T + tokens)[:, None] * (n * WIDTH) + sibling * WIDTH
    in_bounds = tokens_in[:, None] & columns_in[None, :]
    tl.store(partials_ptr + row + columns[None, :], partial, mask=in_bounds)


@triton.jit
def load_partials(
    partials_ptr,
    tokens,
    tokens_in,
    sibling,
    columns,
    columns_in,
    T,
    n: tl.constexpr,
    WIDTH: tl.constexpr,
    splits,
):
    """Return the sum over all splits of a tile of partials [splits, T, n WIDTH]."""
    total = tl.zeros((tokens.shape[0], columns.shape[0]), tl.float32)
    in_bounds = tokens_in[:, None] & columns_in[None, :]
    offsets = tokens[:, None] * (n * WIDTH) + (sibling * WIDTH + columns)[None, :]
    for _ in range(splits):
        total += tl.load(partials_ptr + offsets, mask=in_bounds, other=0.0)
        partials_ptr += T.to(tl.int64) * (n * WIDTH)
    return total


@triton.jit(do_not_specialize=["splits"])
def reduce_partials_kernel(
    partials_ptr, partial_stride, out_ptrs, sizes, starts, splits, BLOCK: tl.constexpr
):
    """out_i = sum over s of partials[s, start_i : start_i + size_i].

    partials [splits, *] float32, rows `partial_stride` apart; out_i contiguous, of any dtype.
    Programs: blocks of BLOCK elements, one output after the other.
    """
    block = tl.program_id(0)
    partial_stride = tl.full((), 0, tl.int64) + partial_stride
    for i in tl.static_range(len(out_ptrs)):
        blocks = tl.cdiv(sizes[i], BLOCK)
        if (block >= 0) & (block < blocks):
            elements = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            elements_in = elements < sizes[i]
            total = tl.zeros((BLOCK,), tl.float32)
            for split in range(splits):
                address = partials_ptr + split * partial_stride + starts[i] + elements
                total += tl.load(address, mask=elements_in, other=0.0)
            out = total.to(out_ptrs[i].dtype.element_ty)
            tl.store(out_ptrs[i] + elements, out, mask=elements_in)
        block -= blocks


class Partials:
    """Where a kernel whose sums are split writes `outputs`, and the launch that adds its partials.

    With split = 1 the kernel writes the outputs. With more, split s writes its partial sum of
    output i to targets[i] + s * stride, in float32, and `reduce` fills the outputs.
    """

    def __init__(self, outputs: Sequence[Tensor], split: int, alignment: int = 16) -> None:
        """`alignment`: every partial sum starts at a multiple of this many elements."""
        self.outputs = list(outputs)
        self.targets = self.outputs
        self.stride = 0
        self.workspace: Tensor | None = None
        if split > 1:
            sizes = [launcher.ceil_div(out.numel(), alignment) * alignment for out in outputs]
            self.starts = [sum(sizes[:i]) for i in range(len(sizes))]
            self.stride = sum(sizes)
            self.workspace = outputs[0].new_empty((split, self.stride), dtype=torch.float32)
            self.targets = [self.workspace[0, start:] for start in self.starts]

    def reduce(self) -> None:
        """Add the partial sums of all splits into the outputs: one launch, none with split = 1."""
        if self.workspace is None:
            return
        tile_config = TileConfig(tokens=1, step=1024, warps=4, stages=1)
        sizes = tuple(out.numel() for out in self.outputs)
        launcher.run(
            reduce_partials_kernel,
            sum(launcher.ceil_div(size, tile_config.step) for size in sizes),
            tile_config,
            dict(
                partials_ptr=self.workspace,
                partial_stride=self.stride,
                out_ptrs=tuple(self.outputs),
                sizes=sizes,
                starts=tuple(self.starts),
                splits=self.workspace.shape[0],
            ),
            dict(BLOCK=tile_config.step),
        )
