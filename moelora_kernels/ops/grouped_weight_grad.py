"""The gradients of A and B: sums over the pairs of each expert."""

from __future__ import annotations

from moelora_kernels import reference
from moelora_kernels.ops.registration import register, register_kernels

_SCHEMA = (
    "(Tensor x, Tensor dh, Tensor[] dy, Tensor u, Tensor order, Tensor offsets, Tensor chunks, "
    "ScalarType lora_dtype, int[] ranks, float dropout, bool dropout_per_expert, Tensor? seed) "
    "-> (Tensor da, Tensor[] db)"
)


def _fake(
    x, dh, dy, u, order, offsets, chunks, lora_dtype, ranks, dropout, dropout_per_expert, seed
):
    total = sum(ranks)
    da = x.new_empty((len(dy) * total, x.shape[1]), dtype=lora_dtype)
    return da, [x.new_empty((g.shape[1], total), dtype=lora_dtype) for g in dy]


grouped_weight_grad = register("grouped_weight_grad", _SCHEMA, reference.grouped_weight_grad, _fake)
register_kernels("grouped_weight_grad")
