"""A whole layer in the grouped formulation: every expert on its own tokens; and its backward.

Made of the other ops and of ATen's products, in x's dtype. Arguments are those of `wide`.
"""

from __future__ import annotations

import torch

from moelora_kernels.ops.grouped_expand import grouped_expand
from moelora_kernels.ops.grouped_shrink import grouped_shrink, grouped_shrink_backward
from moelora_kernels.ops.grouped_weight_grad import _fake as _fake_weight_grad
from moelora_kernels.ops.grouped_weight_grad import grouped_weight_grad
from moelora_kernels.ops.registration import register
from moelora_kernels.ops.route import _fake as _fake_route
from moelora_kernels.ops.route import route
from moelora_kernels.ops.router import router_grad, router_logits
from moelora_kernels.ops.topk_gate import _backward as topk_gate_backward
from moelora_kernels.ops.topk_gate import _forward as topk_gate
from moelora_kernels.ops.wide import ARGUMENTS, STATIC, matrix
from moelora_kernels.reference import compute_dtype
from moelora_kernels.types import CHUNK, TILE

_SCHEMA = (
    f"({ARGUMENTS}, {STATIC}) -> (Tensor[] y, Tensor h, Tensor order, Tensor offsets, "
    "Tensor tiles, Tensor chunks, Tensor weights, Tensor indices, Tensor logits)"
)
_SCHEMA_BACKWARD = (
    "(Tensor[] dy, Tensor x, Tensor[] weight, Tensor[] lora_a, Tensor[] lora_b, "
    "Tensor[] router_weight, Tensor h, Tensor weights, Tensor indices, Tensor order, "
    "Tensor offsets, Tensor tiles, Tensor chunks, Tensor? logits, Tensor? dlogits, Tensor? seed, "
    f"{STATIC}, bool needs_x, bool needs_adapters) "
    "-> (Tensor dx, Tensor dgate, Tensor da, Tensor drouter, Tensor dbias, Tensor[] db)"
)


def _forward(
    x, weight, bias, base, lora_a, lora_b, router_weight, router_bias, gates, indices, rows, seed,
    ranks, scaling, share_a, top_k, renormalize, temperature, dropout, dropout_per_expert,
):  # fmt: skip
    """y_i = x Wt_i + b_i + sum over the slots of a token of its experts; and the routing."""
    tokens, n, num_experts = x.shape[0], len(lora_a), len(ranks)
    logits, weights = (x.new_empty(0, dtype=compute_dtype(x)) for _ in range(2))
    chosen = x.new_empty(0, dtype=torch.int32)
    if router_weight:
        logits = router_logits(x, router_weight, router_bias)
        weights, chosen = topk_gate(
            logits.view(tokens * n, num_experts), top_k, renormalize, temperature
        )
        gates = weights = weights.view(tokens, n * top_k)
        indices = chosen = chosen.view(tokens, n * top_k)
    order, offsets, tiles, chunks = route(indices, num_experts, n, TILE, CHUNK)
    h, u = grouped_shrink(
        x, lora_a, gates, order, offsets, tiles, ranks, scaling, dropout, dropout_per_expert, seed
    )
    outputs = []
    for i, b in enumerate(lora_b):
        start = base[i] if base else bias[i] if bias else None
        y = grouped_expand(
            u, [b], start, order, offsets, tiles, ranks, tokens, i, False, 0.0, False, None
        )
        # Base product last and in place: y is written once more and rounded together with it.
        outputs.append(y if base else y.addmm_(x, weight[i].t()))
    return outputs, h, order, offsets, tiles, chunks, weights, chosen, logits


def _backward(
    dy, x, weight, lora_a, lora_b, router_weight, h, weights, indices, order, offsets, tiles,
    chunks, logits, dlogits, seed,
    ranks, scaling, share_a, top_k, renormalize, temperature, dropout, dropout_per_expert,
    needs_x, needs_adapters,
):  # fmt: skip
    """dx; the gradient of the weights, or of the logits of a router; those of the parameters.

    Empty are dx without needs_x, the others without needs_adapters.
    """
    dy = [matrix(g, x.dtype) for g in dy]
    n, num_experts = len(dy), len(ranks)
    dh, u, dgate = grouped_shrink_backward(
        dy, lora_b, h, weights, order, offsets, tiles, ranks, scaling
    )
    if router_weight:
        by_sibling = (weights.shape[0] * n, top_k)
        of_logits = (weights.shape[0], n * num_experts)
        # The values of the logits count only without renormalize; their shape always does.
        like = dgate.new_empty(of_logits) if logits is None else logits
        dgate = topk_gate_backward(
            dgate.view(by_sibling), weights.view(by_sibling), indices.view(by_sibling),
            like.view(-1, num_experts), renormalize, temperature,
        ).view(of_logits)  # fmt: skip
        dgate = dgate if dlogits is None else dgate + dlogits
    dx = x.new_empty(0)
    if needs_x:
        dx = grouped_expand(
            dh, [a.t() for a in lora_a], None, order, offsets, tiles, ranks, x.shape[0], 0, False,
            dropout, dropout_per_expert, seed,
        )  # fmt: skip
        if router_weight:
            stacked = torch.cat([*router_weight]) if n > 1 else router_weight[0]
            dx.addmm_(dgate.to(x.dtype), stacked.to(x.dtype))
        for g, w in zip(dy, weight, strict=False):
            dx.addmm_(g, w)
    lora_dtype, router_dtype = lora_a[0].dtype, (router_weight or [x])[0].dtype
    drouter, dbias = (x.new_empty(0, dtype=router_dtype) for _ in range(2))
    if not needs_adapters:
        return dx, dgate, x.new_empty(0, dtype=lora_dtype), drouter, dbias, []
    da, db = grouped_weight_grad(
        x, dh, dy, u, order, offsets, chunks, lora_dtype, ranks, dropout, dropout_per_expert, seed
    )
    if router_weight:
        drouter, dbias = router_grad(dgate, x, router_dtype)
    return dx, dgate, da, drouter, dbias, db


def _fake(
    x, weight, bias, base, lora_a, lora_b, router_weight, router_bias, gates, indices, rows, seed,
    ranks, scaling, share_a, top_k, renormalize, temperature, dropout, dropout_per_expert,
):  # fmt: skip
    tokens, n, num_experts = x.shape[0], len(lora_a), len(ranks)
    dtype = compute_dtype(x)
    weights, logits = x.new_empty(0, dtype=dtype), x.new_empty(0, dtype=dtype)
    chosen = x.new_empty(0, dtype=torch.int32)
    if router_weight:
        weights = x.new_empty((tokens, n * top_k), dtype=dtype)
        indices = chosen = x.new_empty((tokens, n * top_k), dtype=torch.int32)
        logits = x.new_empty((tokens, n * num_experts), dtype=dtype)
    routing = _fake_route(indices, num_experts, n, TILE, CHUNK)
    dtypes = [b.dtype for b in base] or [x.dtype] * n
    y = [x.new_empty((tokens, b.shape[0]), dtype=d) for b, d in zip(lora_b, dtypes, strict=True)]
    h = x.new_empty((routing[0].shape[0], max(ranks)))
    return y, h, *routing, weights, chosen, logits


def _fake_backward(
    dy, x, weight, lora_a, lora_b, router_weight, h, weights, indices, order, offsets, tiles,
    chunks, logits, dlogits, seed,
    ranks, scaling, share_a, top_k, renormalize, temperature, dropout, dropout_per_expert,
    needs_x, needs_adapters,
):  # fmt: skip
    n, dtype = len(dy), compute_dtype(x)
    of_logits = (x.shape[0], n * len(ranks))
    dgate = x.new_empty(of_logits if router_weight else weights.shape, dtype=dtype)
    dx = x.new_empty(x.shape if needs_x else 0)
    lora_dtype, router_dtype = lora_a[0].dtype, (router_weight or [x])[0].dtype
    drouter, dbias = (x.new_empty(0, dtype=router_dtype) for _ in range(2))
    if not needs_adapters:
        return dx, dgate, x.new_empty(0, dtype=lora_dtype), drouter, dbias, []
    da, db = _fake_weight_grad(
        x, h, dy, h, order, offsets, chunks, lora_dtype, ranks, dropout, dropout_per_expert,
        seed,
    )  # fmt: skip
    if router_weight:
        drouter = x.new_empty((n * len(ranks), x.shape[1]), dtype=router_dtype)
        dbias = x.new_empty(n * len(ranks), dtype=router_dtype)
    return dx, dgate, da, drouter, dbias, db


grouped = register("grouped", _SCHEMA, _forward, _fake)
grouped_backward = register("grouped_backward", _SCHEMA_BACKWARD, _backward, _fake_backward)
