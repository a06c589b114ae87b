"""Shrink the rows of every expert to rank space and gate them: forward and backward."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moelora_kernels import reference
from moelora_kernels.numerics import compute_dtype
from moelora_kernels.ops.registration import register, register_kernels
from moelora_kernels.types import NO_DROPOUT, Dropout, Routing


def _fake(
    x: Tensor,
    lora_a: Sequence[Tensor],
    weights: Tensor | None,
    routing: Routing,
    ranks: Sequence[int],
    scaling: Sequence[float],
    dropout: Dropout,
) -> tuple[Tensor, Tensor]:
    shape = (routing.order.shape[0], max(ranks))
    return x.new_empty(shape), x.new_empty(shape)


def _fake_backward(
    dy: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    h: Tensor,
    weights: Tensor | None,
    routing: Routing,
    ranks: Sequence[int],
    scaling: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    shape = 0 if weights is None else weights.shape
    return h.new_empty(h.shape), h.new_empty(h.shape), h.new_empty(shape, dtype=compute_dtype(h))


_op = register(
    "grouped_shrink",
    (
        "Tensor x",
        "Tensor[] lora_a",
        "Tensor? weights",
        Routing,
        "int[] ranks",
        "float[] scaling",
        Dropout,
    ),
    "(Tensor h, Tensor u)",
    reference.grouped_shrink,
    _fake,
)
_op_backward = register(
    "grouped_shrink_backward",
    (
        "Tensor[] dy",
        "Tensor[] lora_b",
        "Tensor h",
        "Tensor? weights",
        Routing,
        "int[] ranks",
        "float[] scaling",
    ),
    "(Tensor dh, Tensor u, Tensor dweights)",
    reference.grouped_shrink_backward,
    _fake_backward,
)
register_kernels("grouped_shrink")
register_kernels("grouped_shrink_backward")


def grouped_shrink(
    x: Tensor,
    lora_a: Sequence[Tensor],
    weights: Tensor | None,
    routing: Routing,
    ranks: Sequence[int],
    scaling: Sequence[float],
    dropout: Dropout = NO_DROPOUT,
) -> tuple[Tensor, Tensor]:
    """Compute h and u of every routed pair, in the order of sorted positions.

        h_p = dropout(x_p) At_e          e is the expert of the pair, x_p its row of x
        u_p = scale_e * weight_p * h_p   zero if the weight is zero, even if h is NaN

    Args:
        x: [T, I], or [P, I] with a row for every pair.
        lora_a: n x [R, I].
        weights: [T, S], the gate weights; None means that all are 1.
        routing: the routing of the gate's experts.
        ranks, scaling: the ranks and scales of the E experts.
        dropout: applied to x before A.

    Returns:
        h, u [P, largest rank] in x's dtype. Columns beyond the rank of an expert, and rows of
        pairs that are not routed, are 0.
    """
    return _op(x, lora_a, weights, *routing, ranks, scaling, *dropout)


def grouped_shrink_backward(
    dy: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    h: Tensor,
    weights: Tensor | None,
    routing: Routing,
    ranks: Sequence[int],
    scaling: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dh and the gradient of the weights from dy; and u again, for dB.

        du_p = dy_p B_e                      [P, largest rank], never stored
        dh_p = scale_e * weight_p * du_p
        dweight_p = scale_e <du_p, h_p>       zero if the pair is not routed

    Args:
        dy: n x [T, O_i], or one [P, O] with a row for every pair.
        lora_b: n x [O_i, R].
        h: [P, largest rank], the h that `grouped_shrink` returned.
        weights, routing, ranks, scaling: as in the forward.

    Returns:
        dh, u [P, largest rank] in h's dtype; dweights [T, S] in float32 (float64 for float64 h),
        empty if weights is None.
    """
    return _op_backward(dy, lora_b, h, weights, *routing, ranks, scaling)
