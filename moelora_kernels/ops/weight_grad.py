"""The gradients of the parameters: products that sum over the tokens."""

from __future__ import annotations

from moelora_kernels import reference
from moelora_kernels.ops.registration import register, register_kernels

_SCHEMA = (
    "(Tensor x, Tensor dh, Tensor? dlogits, Tensor[] dy, Tensor u, ScalarType lora_dtype, "
    "ScalarType router_dtype, int[] ranks, float dropout, bool dropout_per_expert, Tensor? seed) "
    "-> (Tensor da, Tensor drouter, Tensor dbias, Tensor[] db)"
)


def _fake(
    x, dh, dlogits, dy, u, lora_dtype, router_dtype, ranks, dropout, dropout_per_expert, seed
):
    rank = u.shape[1] // len(dy)
    experts = 0 if dlogits is None else dlogits.shape[1]
    return (
        x.new_empty((dh.shape[1], x.shape[1]), dtype=lora_dtype),
        x.new_empty((experts, x.shape[1]) if experts else 0, dtype=router_dtype),
        x.new_empty(experts, dtype=router_dtype),
        [x.new_empty((g.shape[1], rank), dtype=lora_dtype) for g in dy],
    )


weight_grad = register("weight_grad", _SCHEMA, reference.weight_grad, _fake)
register_kernels("weight_grad")
