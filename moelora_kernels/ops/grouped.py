"""A whole layer in one op: every expert computes only the tokens that are routed to it.

On a GPU the op calls the other ops and ATen's products, in x's dtype. On a CPU the native library
computes the same in one call. The arguments are as in `wide`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moelora_kernels.numerics import absent, compute_dtype
from moelora_kernels.ops.grouped_dx import grouped_dx
from moelora_kernels.ops.grouped_expand import grouped_expand
from moelora_kernels.ops.grouped_shrink import grouped_shrink, grouped_shrink_backward
from moelora_kernels.ops.grouped_weight_grad import grouped_weight_grad, grouped_weight_grad_fake
from moelora_kernels.ops.registration import register, register_planned
from moelora_kernels.ops.route import route, route_fake
from moelora_kernels.ops.router import router_grad, router_logits
from moelora_kernels.ops.topk_gate import _op as topk_gate
from moelora_kernels.ops.topk_gate import topk_gate_backward
from moelora_kernels.ops.wide import (
    RETURNS_GRADS,
    absent_grads,
    adapter_dtypes,
    matrix,
    outputs_fake,
)
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
    Routing,
    SiblingTensors,
)


def _forward(
    x: Tensor,
    tensors: SiblingTensors,
    gate: Gate,
    mixture: Mixture,
    dropout: Dropout,
) -> LayerForward:
    T, n, E = x.shape[0], len(tensors.lora_a), len(mixture.ranks)
    ranks, scaling, _, K, renormalize, temperature = mixture
    logits, weights = (absent(x, compute_dtype(x)) for _ in range(2))
    experts = absent(x, torch.int32)
    if tensors.router_weight:
        routers = RouterTensors(tensors.router_weight, tensors.router_bias)
        logits = router_logits(x, routers)
        weights, experts = topk_gate(logits.view(T * n, E), K, renormalize, temperature)
        weights, experts = weights.view(T, n * K), experts.view(T, n * K)
        gate = Gate(weights, experts)
    assert gate.experts is not None
    routing = route(gate.experts, E, n)
    h, u = grouped_shrink(x, tensors.lora_a, gate.weights, routing, ranks, scaling, dropout)
    weight, bias, base_output, _, lora_b, *_ = tensors
    outputs = []
    for i, b in enumerate(lora_b):
        start = base_output[i] if base_output else bias[i] if bias else None
        y = grouped_expand(u, [b], start, routing, ranks, tokens=T, first_sibling=i)
        # The base product is added last and in place, so it is not rounded before the experts are
        # added.
        outputs.append(y if base_output else y.addmm_(x, weight[i].t()))
    return LayerForward(outputs, h, weights, experts, logits, *routing)


def _backward(
    dy: Sequence[Tensor],
    x: Tensor,
    tensors: SiblingTensors,
    h: Tensor,
    gate: Gate,
    dlogits: Tensor | None,
    routing: Routing,
    mixture: Mixture,
    dropout: Dropout,
    needs: Needs,
    frozen: Sequence[int] = (),
) -> LayerGrads:
    dy = [matrix(g, x.dtype) for g in dy]
    T, n, E = x.shape[0], len(dy), len(mixture.ranks)
    ranks, scaling, _, K, renormalize, temperature = mixture
    dh, u, dgate = grouped_shrink_backward(
        dy, tensors.lora_b, h, gate.weights, routing, ranks, scaling
    )
    if tensors.router_weight:
        assert gate.experts is not None
        # With renormalize `topk_gate_backward` reads only the shape of the logits.
        logits = dgate.new_empty((T, n * E)) if gate.logits is None else gate.logits
        dgate = topk_gate_backward(
            dgate.view(T * n, K), gate.weights.view(T * n, K), gate.experts.view(T * n, K),
            logits.view(T * n, E), renormalize, temperature,
        ).view(T, n * E)  # fmt: skip
        dgate = dgate if dlogits is None else dgate + dlogits
    dx = absent(x, x.dtype)
    if needs.x:
        routers = tensors.router_weight
        all_dlogits = dgate if routers else None
        # The softmax over the experts of a token alone leaves the other dlogits at 0.
        sparse = renormalize and dlogits is None
        dx = grouped_dx(
            dh, all_dlogits, tensors.lora_a, routers, routing, ranks, dropout, T, sparse
        )
        for g, w in zip(dy, tensors.weight, strict=False):
            dx.addmm_(g, w)
    lora_dtype, router_dtype = adapter_dtypes(x, tensors)
    if not needs.adapters:
        return absent_grads(dx, dgate, lora_dtype, router_dtype)
    da, db = grouped_weight_grad(x, dh, dy, u, routing, ranks, dropout, lora_dtype, frozen)
    drouter, dbias = (absent(x, router_dtype) for _ in range(2))
    if tensors.router_weight:
        drouter, dbias = router_grad(dgate, x, router_dtype)
    return LayerGrads(dx, dgate, da, drouter, dbias, db)


def _fake(
    x: Tensor,
    tensors: SiblingTensors,
    gate: Gate,
    mixture: Mixture,
    dropout: Dropout,
) -> LayerForward:
    T, n, E, K = x.shape[0], len(tensors.lora_a), len(mixture.ranks), mixture.router_top_k
    dtype = compute_dtype(x)
    weights, logits, experts = absent(x, dtype), absent(x, dtype), absent(x, torch.int32)
    routed = gate.experts
    if tensors.router_weight:
        weights = x.new_empty((T, n * K), dtype=dtype)
        routed = experts = x.new_empty((T, n * K), dtype=torch.int32)
        logits = x.new_empty((T, n * E), dtype=dtype)
    assert routed is not None
    routing = route_fake(routed, E, n)
    h = x.new_empty((routing.order.shape[0], max(mixture.ranks)))
    return LayerForward(outputs_fake(x, tensors), h, weights, experts, logits, *routing)


def _fake_backward(
    dy: Sequence[Tensor],
    x: Tensor,
    tensors: SiblingTensors,
    h: Tensor,
    gate: Gate,
    dlogits: Tensor | None,
    routing: Routing,
    mixture: Mixture,
    dropout: Dropout,
    needs: Needs,
    frozen: Sequence[int] = (),
) -> LayerGrads:
    num_logits = len(dy) * len(mixture.ranks)
    shape = (x.shape[0], num_logits) if tensors.router_weight else gate.weights.shape
    dgate = x.new_empty(shape, dtype=compute_dtype(x))
    dx = x.new_empty(x.shape if needs.x else 0)
    lora_dtype, router_dtype = adapter_dtypes(x, tensors)
    if not needs.adapters:
        return absent_grads(dx, dgate, lora_dtype, router_dtype)
    da, db = grouped_weight_grad_fake(x, h, dy, h, routing, mixture.ranks, dropout, lora_dtype)
    drouter, dbias = (absent(x, router_dtype) for _ in range(2))
    if tensors.router_weight:
        drouter = x.new_empty((num_logits, x.shape[1]), dtype=router_dtype)
        dbias = x.new_empty(num_logits, dtype=router_dtype)
    return LayerGrads(dx, dgate, da, drouter, dbias, db)


_op = register(
    "grouped",
    ("Tensor x", SiblingTensors, Gate, Mixture, Dropout),
    "(Tensor[] y, Tensor h, Tensor weights, Tensor experts, Tensor logits, Tensor order, "
    "Tensor offsets, Tensor tiles, Tensor chunks)",
    _forward,
    _fake,
)
_op_backward = register(
    "grouped_backward",
    (
        "Tensor[] dy",
        "Tensor x",
        SiblingTensors,
        "Tensor h",
        Gate,
        "Tensor? dlogits",
        Routing,
        Mixture,
        Dropout,
        Needs,
        "int[] frozen",
    ),
    RETURNS_GRADS,
    _backward,
    _fake_backward,
)
_by_device = register_planned("grouped", _forward)
_backward_by_device = register_planned("grouped_backward", _backward)


def grouped(
    x: Tensor,
    tensors: SiblingTensors,
    gate: Gate | None,
    mixture: Mixture,
    dropout: Dropout = NO_DROPOUT,
) -> LayerForward:
    """Compute a layer of n siblings. Every expert multiplies only the tokens routed to it.

        y_i = x Wt_i + b_i + sum over the slots k of a token: u_ik Bt_e

    Args:
        x: [T, I].
        tensors: as in `wide`.
        gate: sparse; None if the routers in `tensors` compute it.
        mixture: the static options; share_a is False.
        dropout: applied to x before A.

    Returns:
        The results of `wide`, but h is [P, largest rank] by sorted position; and the routing
        arrays.
    """
    op = _by_device.get(x.device.type, _op)
    return LayerForward(*op(x, *tensors, *(gate or NO_GATE), *mixture, *dropout))


def grouped_backward(
    dy: Sequence[Tensor],
    x: Tensor,
    tensors: SiblingTensors,
    h: Tensor,
    gate: Gate,
    dlogits: Tensor | None,
    routing: Routing,
    mixture: Mixture,
    dropout: Dropout,
    needs: Needs,
    frozen: Sequence[int] = (),
) -> LayerGrads:
    """Compute the gradients of a layer that `grouped` computed.

    Arguments and results are as in `wide_backward`, with the routing that `grouped` returned, and
    the experts whose dA and dB are zero (`grouped_weight_grad`).
    """
    op = _backward_by_device.get(x.device.type, _op_backward)
    return LayerGrads(
        *op(
            dy, x, *tensors, h, *gate, dlogits, *routing, *mixture, *dropout, *needs, frozen,
        )
    )  # fmt: skip
