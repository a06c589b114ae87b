"""The rank-space part of dx: what the experts and a linear router add to dy W."""

from __future__ import annotations

from moelora_kernels import reference
from moelora_kernels.ops.registration import register, register_kernels

_SCHEMA = (
    "(Tensor dh, Tensor? dlogits, Tensor[] lora_a, Tensor[] router_weight, int[] ranks, "
    "float dropout, bool dropout_per_expert, Tensor? seed) -> Tensor"
)


def _fake(dh, dlogits, lora_a, router_weight, ranks, dropout, dropout_per_expert, seed):
    return dh.new_empty((dh.shape[0], lora_a[0].shape[1]))


shrink_dx = register("shrink_dx", _SCHEMA, reference.shrink_dx, _fake)
register_kernels("shrink_dx")
