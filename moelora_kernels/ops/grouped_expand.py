"""From the rank space of every expert to features, the slots of a token added or kept apart."""

from __future__ import annotations

from moelora_kernels import reference
from moelora_kernels.ops.registration import register, register_kernels

_SCHEMA = (
    "(Tensor u, Tensor[] matrices, Tensor? start, Tensor order, Tensor offsets, Tensor tiles, "
    "int[] ranks, SymInt tokens, int first, bool per_pair, float dropout, "
    "bool dropout_per_expert, Tensor? seed) -> Tensor"
)


def _fake(
    u, matrices, start, order, offsets, tiles, ranks, tokens, first, per_pair, dropout,
    dropout_per_expert, seed,
):  # fmt: skip
    dtype = start.dtype if start is not None and start.dim() == 2 else u.dtype
    rows = order.shape[0] if per_pair else tokens
    return u.new_empty((rows, matrices[0].shape[0]), dtype=dtype)


grouped_expand = register("grouped_expand", _SCHEMA, reference.grouped_expand, _fake)
register_kernels("grouped_expand")
