"""Gradients of zero for the A and B of frozen experts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moelora_kernels.reference.gates import blocks
from moelora_kernels.types import LinearTensors, Mixture


def frozen_ranges(ranks: Sequence[int], frozen: Sequence[int]) -> list[tuple[int, int]]:
    """Return (start, length) of the rows of A that belong to frozen experts, neighbours joined.

    ranks: the ranks of the E experts. frozen: numbers of experts in rising order.
    """
    ranges: list[tuple[int, int]] = []
    all_columns = blocks(ranks)
    for e in frozen:
        start, stop = all_columns[e].start, all_columns[e].stop
        if ranges and sum(ranges[-1]) == start:
            start, _ = ranges.pop()
        ranges.append((start, stop - start))
    return ranges


def zero_frozen(
    da: Sequence[Tensor | None],
    db: Sequence[Tensor | None],
    ranks: Sequence[int],
    frozen: Sequence[int],
) -> None:
    """Set the gradients of frozen experts to zero, in place.

    da: any number of [R, in], or None; db: of [out, R], or None.
    """
    for start, length in frozen_ranges(ranks, frozen):
        for gradient, dim in [*((g, 0) for g in da), *((g, 1) for g in db)]:
            if gradient is not None:
                gradient.narrow(dim, start, length).zero_()


class ZeroGradient(torch.autograd.Function):
    """Return a matrix unchanged. Its gradient is zero in some rows (dim 0) or columns (dim 1).

    The inputs are the dimension, the (start, length) of every range, and the matrix.
    """

    @staticmethod
    def forward(dim, ranges, matrix):
        return matrix.view_as(matrix)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.dim, ctx.ranges, _ = inputs

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        for start, length in ctx.ranges:
            gradient.narrow(ctx.dim, start, length).zero_()
        return None, None, gradient


def without_frozen(
    a: Tensor, b: Tensor, ranks: Sequence[int], frozen: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return A [R, in] and B [out, R] for a computation whose gradients torch computes.

    The gradients of frozen experts are zero.
    """
    if not frozen:
        return a, b
    ranges = frozen_ranges(ranks, frozen)
    a, b = (
        ZeroGradient.apply(dim, ranges, m) if m.requires_grad and torch.is_grad_enabled() else m
        for dim, m in enumerate((a, b))
    )
    return a, b


def linears_without_frozen(
    linears: Sequence[LinearTensors], mixture: Mixture, frozen: Sequence[int]
) -> Sequence[LinearTensors]:
    """Return the linears with the A and B of `without_frozen`. An A that is shared stays."""
    if not frozen:
        return linears
    result = []
    for linear in linears:
        a, b = without_frozen(linear.lora_a, linear.lora_b, mixture.ranks, frozen)
        a = linear.lora_a if mixture.share_a else a
        result.append(linear._replace(lora_a=a, lora_b=b))
    return result
