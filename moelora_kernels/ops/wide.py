"""A whole layer in one op: shrink and gate, expand, base product; and its backward.

Made of the other ops and of ATen's products, in x's dtype. The native library does the same without
coming back to Python in between.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moelora_kernels.ops.registration import register
from moelora_kernels.ops.shrink_dx import shrink_dx
from moelora_kernels.ops.shrink_gate import _fake as _fake_shrink_gate
from moelora_kernels.ops.shrink_gate import _fake_backward as _fake_shrink_gate_backward
from moelora_kernels.ops.shrink_gate import shrink_gate, shrink_gate_backward
from moelora_kernels.ops.weight_grad import _fake as _fake_weight_grad
from moelora_kernels.ops.weight_grad import weight_grad

STATIC = (
    "int[] ranks, float[] scaling, bool share_a, int top_k, bool renormalize, float temperature, "
    "float dropout, bool dropout_per_expert"
)
ARGUMENTS = (
    "Tensor x, Tensor[] weight, Tensor[] bias, Tensor[] base, Tensor[] lora_a, Tensor[] lora_b, "
    "Tensor[] router_weight, Tensor[] router_bias, Tensor? gates, Tensor? indices, Tensor? rows, "
    "Tensor? seed"
)
_SCHEMA = (
    f"({ARGUMENTS}, {STATIC}) "
    "-> (Tensor[] y, Tensor h, Tensor weights, Tensor indices, Tensor logits)"
)
_SCHEMA_BACKWARD = (
    "(Tensor[] dy, Tensor x, Tensor[] weight, Tensor[] lora_a, Tensor[] lora_b, "
    "Tensor[] router_weight, Tensor h, Tensor gates, Tensor? indices, Tensor? rows, "
    f"Tensor? logits, Tensor? dlogits, Tensor? seed, {STATIC}, bool needs_x, bool needs_adapters) "
    "-> (Tensor dx, Tensor dgate, Tensor da, Tensor drouter, Tensor dbias, Tensor[] db)"
)


def matrix(dy: Tensor, dtype: torch.dtype) -> Tensor:
    """dy in `dtype` with dense rows that do not overlap."""
    dy = dy.to(dtype)
    return dy if dy.stride(1) == 1 and dy.stride(0) >= dy.shape[1] else dy.contiguous()


def _forward(
    x, weight, bias, base, lora_a, lora_b, router_weight, router_bias, gates, indices, rows, seed,
    *mixture,
):  # fmt: skip
    """y_i = x Wt_i + b_i + u_i Bt_i, or base_i + u_i Bt_i; and what `shrink_gate` returns but u."""
    h, u, weights, chosen, logits = shrink_gate(
        x, lora_a, gates, indices, rows, router_weight, router_bias, *mixture, seed
    )
    outputs = []
    for i, (gated, b) in enumerate(zip(u.chunk(len(lora_b), dim=1), lora_b, strict=True)):
        if base:
            # The result keeps the base's dtype; the base's output may be saved elsewhere.
            dtype = base[i].dtype
            outputs.append(torch.addmm(base[i], gated.to(dtype), b.to(dtype).t()))
            continue
        # Expand first, base product last and in place: each writes y once, and the large one is
        # rounded once together with the small one.
        expand = b.to(x.dtype).t()
        y = torch.addmm(bias[i], gated, expand) if bias else torch.mm(gated, expand)
        outputs.append(y.addmm_(x, weight[i].t()))
    return outputs, h, weights, chosen, logits


def _backward(
    dy, x, weight, lora_a, lora_b, router_weight, h, gates, indices, rows, logits, dlogits, seed,
    ranks, scaling, share_a, top_k, renormalize, temperature, dropout, dropout_per_expert,
    needs_x, needs_adapters,
):  # fmt: skip
    """dx; the gradient of the gates, or of the logits of a router; those of the parameters.

    Empty are dx without needs_x, the others without needs_adapters.
    """
    dy = [matrix(g, x.dtype) for g in dy]
    dh, u, dgate = shrink_gate_backward(
        dy, lora_b, h, gates, indices, rows, logits, dlogits,
        ranks, scaling, share_a, top_k, renormalize, temperature,
    )  # fmt: skip
    of_router = dgate if router_weight else None
    dx = x.new_empty(0)
    if needs_x:
        dx = shrink_dx(
            dh, of_router, lora_a, router_weight, ranks, dropout, dropout_per_expert, seed
        )
        for g, w in zip(dy, weight, strict=False):
            dx.addmm_(g, w)
    lora_dtype, router_dtype = _dtypes(x, lora_a, router_weight)
    if not needs_adapters:
        empty = [x.new_empty(0, dtype=router_dtype) for _ in range(2)]
        return dx, dgate, x.new_empty(0, dtype=lora_dtype), *empty, []
    return dx, dgate, *weight_grad(
        x, dh, of_router, dy, u, lora_dtype, router_dtype, ranks, dropout, dropout_per_expert, seed
    )  # fmt: skip


def _dtypes(x, lora_a, router_weight) -> tuple[torch.dtype, torch.dtype]:
    return lora_a[0].dtype, router_weight[0].dtype if router_weight else x.dtype


def _fake(
    x, weight, bias, base, lora_a, lora_b, router_weight, router_bias, gates, indices, rows, seed,
    *mixture,
):  # fmt: skip
    h, _, *routing = _fake_shrink_gate(
        x, lora_a, gates, indices, rows, router_weight, router_bias, *mixture, seed
    )
    dtypes = [b.dtype for b in base] or [x.dtype] * len(lora_b)
    shapes = [(x.shape[0], b.shape[0]) for b in lora_b]
    return [x.new_empty(s, dtype=d) for s, d in zip(shapes, dtypes, strict=True)], h, *routing


def _fake_backward(
    dy, x, weight, lora_a, lora_b, router_weight, h, gates, indices, rows, logits, dlogits, seed,
    ranks, scaling, share_a, top_k, renormalize, temperature, dropout, dropout_per_expert,
    needs_x, needs_adapters,
):  # fmt: skip
    dh, u, dgate = _fake_shrink_gate_backward(
        dy, lora_b, h, gates, indices, rows, logits, dlogits,
        ranks, scaling, share_a, top_k, renormalize, temperature,
    )  # fmt: skip
    dx = x.new_empty(x.shape if needs_x else 0)
    lora_dtype, router_dtype = _dtypes(x, lora_a, router_weight)
    if not needs_adapters:
        empty = [x.new_empty(0, dtype=router_dtype) for _ in range(2)]
        return dx, dgate, x.new_empty(0, dtype=lora_dtype), *empty, []
    return dx, dgate, *_fake_weight_grad(
        x, dh, dgate if router_weight else None, dy, u, lora_dtype, router_dtype, ranks, dropout,
        dropout_per_expert, seed,
    )  # fmt: skip


wide = register("wide", _SCHEMA, _forward, _fake)
wide_backward = register("wide_backward", _SCHEMA_BACKWARD, _backward, _fake_backward)
