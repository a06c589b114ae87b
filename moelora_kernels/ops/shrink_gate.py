"""Shrink x to rank space and gate it there: the first op of a forward, and of a backward."""

from __future__ import annotations

import torch

from moelora_kernels import reference
from moelora_kernels.ops.registration import register, register_kernels

_SCHEMA = (
    "(Tensor x, Tensor[] lora_a, Tensor? gates, Tensor? indices, Tensor? rows, "
    "Tensor[] router_weight, Tensor[] router_bias, int[] ranks, float[] scaling, bool share_a, "
    "int top_k, bool renormalize, float temperature, float dropout, bool dropout_per_expert, "
    "Tensor? seed) -> (Tensor h, Tensor u, Tensor weights, Tensor indices, Tensor logits)"
)
_SCHEMA_BACKWARD = (
    "(Tensor[] dy, Tensor[] lora_b, Tensor h, Tensor gates, Tensor? indices, Tensor? rows, "
    "Tensor? logits, Tensor? dlogits, int[] ranks, float[] scaling, bool share_a, int top_k, "
    "bool renormalize, float temperature) -> (Tensor dh, Tensor u, Tensor dgate)"
)


def _fake(
    x, lora_a, gates, indices, rows, router_weight, router_bias, ranks, scaling, share_a, top_k,
    renormalize, temperature, dropout, dropout_per_expert, seed,
):  # fmt: skip
    siblings, num_experts, tokens = len(lora_a), len(ranks), x.shape[0]
    dtype = reference.compute_dtype(x)
    h = x.new_empty((tokens, sum(a.shape[0] for a in lora_a)))
    u = x.new_empty((tokens, siblings * sum(ranks)))
    if not router_weight:
        return (
            h,
            u,
            x.new_empty(0, dtype=dtype),
            x.new_empty(0, dtype=torch.int32),
            x.new_empty(0, dtype=dtype),
        )
    slots = (tokens, siblings * top_k) if top_k < num_experts else (0,)
    return (
        h,
        u,
        x.new_empty((tokens, siblings * top_k), dtype=dtype),
        x.new_empty(slots, dtype=torch.int32),
        x.new_empty((tokens, siblings * num_experts), dtype=dtype),
    )


def _fake_backward(
    dy, lora_b, h, gates, indices, rows, logits, dlogits, ranks, scaling, share_a, top_k,
    renormalize, temperature,
):  # fmt: skip
    dtype = reference.compute_dtype(h)
    u = h.new_empty((h.shape[0], len(dy) * sum(ranks)))
    of_logits = (h.shape[0], len(dy) * len(ranks))
    return h.new_empty(h.shape), u, h.new_empty(of_logits if top_k else gates.shape, dtype=dtype)


shrink_gate = register("shrink_gate", _SCHEMA, reference.shrink_gate, _fake)
shrink_gate_backward = register(
    "shrink_gate_backward", _SCHEMA_BACKWARD, reference.shrink_gate_backward, _fake_backward
)
register_kernels("shrink_gate")
register_kernels("shrink_gate_backward")
