"""Shrink the rows of every expert to its ranks and gate them: forward, and backward."""

from __future__ import annotations

from moelora_kernels import reference
from moelora_kernels.ops.registration import register, register_kernels

_ROUTING = "Tensor order, Tensor offsets, Tensor tiles, int[] ranks"
_SCHEMA = (
    f"(Tensor x, Tensor[] lora_a, Tensor? weights, {_ROUTING}, float[] scaling, float dropout, "
    "bool dropout_per_expert, Tensor? seed) -> (Tensor h, Tensor u)"
)
_SCHEMA_BACKWARD = (
    f"(Tensor[] dy, Tensor[] lora_b, Tensor h, Tensor? weights, {_ROUTING}, float[] scaling) "
    "-> (Tensor dh, Tensor u, Tensor dweights)"
)


def _fake(
    x, lora_a, weights, order, offsets, tiles, ranks, scaling, dropout, dropout_per_expert, seed
):
    shape = (order.shape[0], max(ranks))
    return x.new_empty(shape), x.new_empty(shape)


def _fake_backward(dy, lora_b, h, weights, order, offsets, tiles, ranks, scaling):
    shape = 0 if weights is None else weights.shape
    dweights = h.new_empty(shape, dtype=reference.compute_dtype(h))
    return h.new_empty(h.shape), h.new_empty(h.shape), dweights


grouped_shrink = register("grouped_shrink", _SCHEMA, reference.grouped_shrink, _fake)
grouped_shrink_backward = register(
    "grouped_shrink_backward",
    _SCHEMA_BACKWARD,
    reference.grouped_shrink_backward,
    _fake_backward,
)
register_kernels("grouped_shrink")
register_kernels("grouped_shrink_backward")
