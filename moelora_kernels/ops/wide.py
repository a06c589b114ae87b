"""A whole layer in one op: shrink and gate, expand, base product; and its backward.

On a GPU the op calls the other ops and ATen's products, in x's dtype. On a CPU the native library
computes the same in one call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moelora_kernels.numerics import absent, cast_all
from moelora_kernels.ops.registration import register, register_planned
from moelora_kernels.ops.shrink_dx import shrink_dx
from moelora_kernels.ops.shrink_gate import (
    shrink_gate,
    shrink_gate_backward,
    shrink_gate_backward_fake,
    shrink_gate_fake,
)
from moelora_kernels.ops.weight_grad import weight_grad, weight_grad_fake
from moelora_kernels.types import (
    NO_DROPOUT,
    NO_GATE,
    Dropout,
    Gate,
    LayerForward,
    LayerGrads,
    Mixture,
    Needs,
    RouterTensors,
    SiblingTensors,
)

# From this many tokens on, the kernels get A and B in x's dtype. With fewer tokens they round the
# tiles of float32 A and B that they load: at 1024 tokens the launch that casts takes as long as it
# saves (modelled for an H200 with R = 128).
CAST_TOKENS = 2048

RETURNS_GRADS = "(Tensor dx, Tensor dgate, Tensor da, Tensor drouter, Tensor dbias, Tensor[] db)"


def matrix(dy: Tensor, dtype: torch.dtype) -> Tensor:
    """Return dy in `dtype`, copied unless its rows are contiguous and do not overlap."""
    dy = dy.to(dtype)
    return dy if dy.stride(1) == 1 and dy.stride(0) >= dy.shape[1] else dy.contiguous()


def adapter_dtypes(x: Tensor, tensors: SiblingTensors) -> tuple[torch.dtype, torch.dtype]:
    """Return the dtypes of the gradients of A and B, and of the routers."""
    return tensors.lora_a[0].dtype, (tensors.router_weight or [x])[0].dtype


def absent_grads(
    dx: Tensor, dgate: Tensor, lora_dtype: torch.dtype, router_dtype: torch.dtype
) -> LayerGrads:
    """Return the gradients of a layer whose adapters and routers need none."""
    drouter, dbias = (absent(dx, router_dtype) for _ in range(2))
    return LayerGrads(dx, dgate, absent(dx, lora_dtype), drouter, dbias, [])


def _forward(
    x: Tensor,
    tensors: SiblingTensors,
    gate: Gate,
    mixture: Mixture,
    dropout: Dropout,
) -> tuple[Any, ...]:
    routers = RouterTensors(tensors.router_weight, tensors.router_bias)
    _, bias, base_output, lora_a, lora_b, *_ = tensors
    n = len(lora_a)
    # The products below are ATen's, which need both operands in the dtype of their result.
    dtypes = [y.dtype for y in base_output] or [x.dtype] * n
    if x.shape[0] < CAST_TOKENS:
        lora_b = cast_all(lora_b, dtypes)
    else:
        cast = cast_all([*lora_a, *lora_b], [x.dtype] * n + dtypes)
        lora_a, lora_b = cast[:n], cast[n:]
    h, u, weights, experts, logits = shrink_gate(x, lora_a, routers, gate, mixture, dropout)
    outputs = []
    for i, (u_i, b) in enumerate(zip(u.chunk(n, dim=1), lora_b, strict=True)):
        if base_output:
            # The result has the base's dtype. It is a new tensor, because autograd, a hook or a
            # stream may still need the base's output; see "Bases that are called" in
            # kernels/README.md.
            outputs.append(torch.addmm(base_output[i], u_i.to(dtypes[i]), b.t()))
            continue
        # Expand first, base product last and in place: each writes y once, and the base product
        # is not rounded before the experts are added.
        y = torch.addmm(bias[i], u_i, b.t()) if bias else torch.mm(u_i, b.t())
        outputs.append(y.addmm_(x, tensors.weight[i].t()))
    return outputs, h, weights, experts, logits


def _backward(
    dy: Sequence[Tensor],
    x: Tensor,
    tensors: SiblingTensors,
    h: Tensor,
    gate: Gate,
    dlogits: Tensor | None,
    mixture: Mixture,
    dropout: Dropout,
    needs: Needs,
) -> LayerGrads:
    dy = [matrix(g, x.dtype) for g in dy]
    n, lora_a, lora_b = len(dy), tensors.lora_a, tensors.lora_b
    router_weight = tensors.router_weight
    if x.shape[0] >= CAST_TOKENS:
        matrices = [*lora_b, *lora_a] if needs.x else [*lora_b]
        # With routers in bfloat16, `shrink_dx` can keep A in shared memory.
        if needs.x and x.dtype == torch.bfloat16:
            matrices += router_weight
        cast = cast_all(matrices, [x.dtype] * len(matrices))
        lora_b, lora_a = cast[:n], cast[n : 2 * n]
        router_weight = cast[2 * n :] or router_weight
    dh, u, dgate = shrink_gate_backward(dy, lora_b, h, gate, dlogits, mixture)
    dlogits = dgate if tensors.router_weight else None
    ranks = mixture.ranks
    dx = absent(x, x.dtype)
    if needs.x:
        dx = shrink_dx(dh, dlogits, lora_a, router_weight, ranks, dropout)
        for g, w in zip(dy, tensors.weight, strict=False):
            dx.addmm_(g, w)
    dtypes = adapter_dtypes(x, tensors)
    if not needs.adapters:
        return absent_grads(dx, dgate, *dtypes)
    return LayerGrads(dx, dgate, *weight_grad(x, dh, dlogits, dy, u, ranks, dropout, *dtypes))


def _fake(
    x: Tensor,
    tensors: SiblingTensors,
    gate: Gate,
    mixture: Mixture,
    dropout: Dropout,
) -> tuple[Any, ...]:
    routers = RouterTensors(tensors.router_weight, tensors.router_bias)
    h, _, weights, experts, logits = shrink_gate_fake(
        x, tensors.lora_a, routers, gate, mixture, dropout
    )
    return outputs_fake(x, tensors), h, weights, experts, logits


def outputs_fake(x: Tensor, tensors: SiblingTensors) -> list[Tensor]:
    """Return tensors of the shapes and dtypes of the outputs n x [T, O_i]."""
    dtypes = [base.dtype for base in tensors.base_output] or [x.dtype] * len(tensors.lora_b)
    return [
        x.new_empty((x.shape[0], b.shape[0]), dtype=dtype)
        for b, dtype in zip(tensors.lora_b, dtypes, strict=True)
    ]


def _fake_backward(
    dy: Sequence[Tensor],
    x: Tensor,
    tensors: SiblingTensors,
    h: Tensor,
    gate: Gate,
    dlogits: Tensor | None,
    mixture: Mixture,
    dropout: Dropout,
    needs: Needs,
) -> LayerGrads:
    dh, u, dgate = shrink_gate_backward_fake(dy, tensors.lora_b, h, gate, dlogits, mixture)
    dlogits = dgate if tensors.router_weight else None
    dx = x.new_empty(x.shape if needs.x else 0)
    dtypes = adapter_dtypes(x, tensors)
    if not needs.adapters:
        return absent_grads(dx, dgate, *dtypes)
    return LayerGrads(
        dx, dgate, *weight_grad_fake(x, dh, dlogits, dy, u, mixture.ranks, dropout, *dtypes)
    )


_op = register(
    "wide",
    ("Tensor x", SiblingTensors, Gate, Mixture, Dropout),
    "(Tensor[] y, Tensor h, Tensor weights, Tensor experts, Tensor logits)",
    _forward,
    _fake,
)
_op_backward = register(
    "wide_backward",
    (
        "Tensor[] dy",
        "Tensor x",
        SiblingTensors,
        "Tensor h",
        Gate,
        "Tensor? dlogits",
        Mixture,
        Dropout,
        Needs,
    ),
    RETURNS_GRADS,
    _backward,
    _fake_backward,
)
_by_device = register_planned("wide", _forward)
_backward_by_device = register_planned("wide_backward", _backward)


def wide(
    x: Tensor,
    tensors: SiblingTensors,
    gate: Gate | None,
    mixture: Mixture,
    dropout: Dropout = NO_DROPOUT,
) -> LayerForward:
    """Compute a layer of n siblings with products over all experts at once.

        y_i = x Wt_i + b_i + u_i Bt_i        u from `shrink_gate`

    Args:
        x: [T, I].
        tensors: the tensors of the siblings: weight and maybe bias, or base_output (x Wt + b).
        gate: the gate of every token; None if the routers in `tensors` compute it.
        mixture: the static options.
        dropout: applied to x before A.

    Returns:
        y_i [T, O_i] in the dtype of base_output or x; and h, weights, experts and logits of
        `shrink_gate`.
    """
    op = _by_device.get(x.device.type, _op)
    return LayerForward(*op(x, *tensors, *(gate or NO_GATE), *mixture, *dropout))


def wide_backward(
    dy: Sequence[Tensor],
    x: Tensor,
    tensors: SiblingTensors,
    h: Tensor,
    gate: Gate,
    dlogits: Tensor | None,
    mixture: Mixture,
    dropout: Dropout,
    needs: Needs,
) -> LayerGrads:
    """Compute the gradients of a layer that `wide` computed.

    Args:
        dy: n x [T, O_i], any strides and dtype.
        x: [T, I].
        tensors: the tensors of the siblings; bias, base_output and router_bias are not read.
        h: the h that `wide` returned.
        gate: the gate that was passed to `wide`, or that its routers computed.
        dlogits: [T, n E], the gradient of the logits from auxiliary losses, or None.
        mixture, dropout: as in the forward.
        needs: which gradients to compute.

    Returns:
        dx = dy W + `shrink_dx`, dgate of `shrink_gate_backward`, and the results of `weight_grad`.
    """
    op = _backward_by_device.get(x.device.type, _op_backward)
    return LayerGrads(*op(dy, x, *tensors, h, *gate, dlogits, *mixture, *dropout, *needs))
