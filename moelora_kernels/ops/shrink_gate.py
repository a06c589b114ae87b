"""Shrink to rank space and gate there: the first op of the wide form's forward and backward."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moelora_kernels import reference
from moelora_kernels.numerics import absent, compute_dtype
from moelora_kernels.ops.registration import register, register_kernels
from moelora_kernels.types import (
    NO_DROPOUT,
    NO_GATE,
    Dropout,
    Gate,
    Mixture,
    RouterTensors,
    Shrunk,
    ShrunkGrads,
)


def shrink_gate_fake(
    x: Tensor,
    lora_a: Sequence[Tensor],
    router: RouterTensors,
    gate: Gate,
    mixture: Mixture,
    dropout: Dropout,
) -> Shrunk:
    """Return tensors of the shapes and dtypes that `shrink_gate` returns."""
    n, E, T, K = len(lora_a), len(mixture.ranks), x.shape[0], mixture.router_top_k
    dtype = compute_dtype(x)
    h = x.new_empty((T, sum(a.shape[0] for a in lora_a)))
    u = x.new_empty((T, n * sum(mixture.ranks)))
    if not router.weight:
        return Shrunk(h, u, absent(x, dtype), absent(x, torch.int32), absent(x, dtype))
    return Shrunk(
        h,
        u,
        x.new_empty((T, n * K), dtype=dtype),
        x.new_empty((T, n * K) if K < E else 0, dtype=torch.int32),
        x.new_empty((T, n * E), dtype=dtype),
    )


def shrink_gate_backward_fake(
    dy: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    h: Tensor,
    gate: Gate,
    dlogits: Tensor | None,
    mixture: Mixture,
) -> ShrunkGrads:
    """Return tensors of the shapes and dtypes that `shrink_gate_backward` returns."""
    n, T = len(dy), h.shape[0]
    shape = (T, n * len(mixture.ranks)) if mixture.router_top_k else gate.weights.shape
    u = h.new_empty((T, n * sum(mixture.ranks)))
    return ShrunkGrads(h.new_empty(h.shape), u, h.new_empty(shape, dtype=compute_dtype(h)))


_op = register(
    "shrink_gate",
    ("Tensor x", "Tensor[] lora_a", RouterTensors, Gate, Mixture, Dropout),
    "(Tensor h, Tensor u, Tensor weights, Tensor experts, Tensor logits)",
    reference.shrink_gate,
    shrink_gate_fake,
)
_op_backward = register(
    "shrink_gate_backward",
    ("Tensor[] dy", "Tensor[] lora_b", "Tensor h", Gate, "Tensor? dlogits", Mixture),
    "(Tensor dh, Tensor u, Tensor dgate)",
    reference.shrink_gate_backward,
    shrink_gate_backward_fake,
)
register_kernels("shrink_gate", module="cluster_shrink")
register_kernels("shrink_gate_backward")


def shrink_gate(
    x: Tensor,
    lora_a: Sequence[Tensor],
    router: RouterTensors,
    gate: Gate | None,
    mixture: Mixture,
    dropout: Dropout = NO_DROPOUT,
) -> Shrunk:
    """Compute h and u of n siblings, and with linear routers also the gate.

        h = dropout(x) At               without the gate
        u = scale * gate (.) h          zero if the gate is zero, even if h is NaN
        logits = x Wrt + br             float32; then `topk_gate` of each sibling's E columns

    x is read once for all siblings, experts and routers; with a dropout mask per expert it is read
    once for every expert.

    Args:
        x: [T, I].
        lora_a: n x [R, I]; with mixture.share_a n x [r, I].
        router: n linear routers, or `NO_ROUTER` if `gate` is passed.
        gate: the gate of every token, whose logits are not read; None if the routers compute it.
        mixture: the static options; router_top_k is 0 if `gate` is passed.
        dropout: applied to x before A. The routers read x without dropout.

    Returns:
        h, u; and weights, experts, logits, which are empty if `gate` was passed.
    """
    return Shrunk(*_op(x, lora_a, *router, *(gate or NO_GATE), *mixture, *dropout))


def shrink_gate_backward(
    dy: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    h: Tensor,
    gate: Gate,
    dlogits: Tensor | None,
    mixture: Mixture,
) -> ShrunkGrads:
    """Compute dh and the gradient of the gate from dy; and u again, for dB.

        du = dy B                           [T, n R], never stored
        dh = scale * gate (.) du            share_a: summed over the experts
        dgate[t, e] = scale * <du, h>       over the ranks of e; zero if t is not routed to e

    Args:
        dy: n x [T, O_i].
        lora_b: n x [O_i, R].
        h: the h that `shrink_gate` returned.
        gate: the gate that was passed to `shrink_gate`, or that its routers computed. Its logits
            are read only if the routers computed it and mixture.renormalize is False.
        dlogits: [T, n E], the gradient that the routers' logits get from other users, such as
            auxiliary losses; or None. None if a gate was passed.
        mixture: as in the forward.

    Returns:
        dh, u, and dgate. If mixture.router_top_k is 0, dgate is the gradient of gate.weights.
        Otherwise it is the gradient of the routers' logits, with `dlogits` added.
    """
    return ShrunkGrads(*_op_backward(dy, lora_b, h, *gate, dlogits, *mixture))
