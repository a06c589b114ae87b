"""Whole-FFN experts: the gated MLP of every expert on the tokens that are routed to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from moelora_kernels.numerics import absent, compute_dtype
from moelora_kernels.reference.grouped import (
    gate_rank_space,
    grouped_expand,
    grouped_shrink,
    grouped_shrink_backward,
    grouped_weight_grad,
    is_routed,
    route,
)
from moelora_kernels.types import (
    NO_DROPOUT,
    Dropout,
    FfnMixture,
    FfnTensors,
    Gate,
    InnerAdapters,
    InnerGrads,
    InnerInputs,
    InnerOptions,
    Routing,
)


def ffn(
    x: Tensor,
    gate_out: Tensor,
    up_out: Tensor,
    gate: Gate,
    tensors: FfnTensors,
    activation: Callable[[Tensor], Tensor],
    mixture: FfnMixture,
    dropout_x: Dropout = NO_DROPOUT,
    dropout_a: Dropout = NO_DROPOUT,
) -> tuple[Tensor, Tensor]:
    """Compute the experts' part of a gated MLP. The layer computes the frozen products.

        z_tk     = gate_out_t + scale_e Bg_e Ag_e d(x_t)       d: dropout
        a_tk     = act(z_tk) * (up_out_t + scale_e Bu_e Au_e d(x_t))
        summed_t = sum_k w_tk a_tk                             the input of the frozen down product
        delta_t  = sum_k w_tk scale_e Bd_e Ad_e d(a_tk)        d: dropout

    e = gate.experts[t, k] and w = gate.weights [T, K], zero if the expert is not in [0, E).
    A slot with weight zero adds zero, even if its expert contains NaN.

    x [T, I]; gate_out, up_out [T, F], the outputs of the frozen gate and up projections; tensors
    gate_a, up_a [R, I], gate_b, up_b [F, R], down_a [R, F], down_b [I, R]. Returns summed [T, F]
    and delta [T, I] in x's dtype.
    """
    weights, experts = gate.weights, gate.experts
    tokens, slots = weights.shape
    ranks, scaling = mixture[:2]
    assert experts is not None
    routing = route(experts, len(ranks))

    def adapted(base_output: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        _, u = grouped_shrink(x, [lora_a], None, routing, ranks, scaling, dropout_x)
        return grouped_expand(
            u, [lora_b], base_output, routing, ranks, tokens=tokens, per_pair=True
        )

    z_gate = adapted(gate_out, tensors.gate_a, tensors.gate_b)
    z_up = adapted(up_out, tensors.up_a, tensors.up_b)
    a = (activation(z_gate) * z_up).to(x.dtype)
    _, u = grouped_shrink(a, [tensors.down_a], weights, routing, ranks, scaling, dropout_a)
    delta = grouped_expand(u, [tensors.down_b], None, routing, ranks, tokens=tokens)
    weight = weights[:, :, None].to(compute_dtype(x))
    terms = weight * a.view(tokens, slots, a.shape[1]).to(weight.dtype)
    summed = torch.where(weight == 0, 0, terms).sum(dim=1)
    return summed.to(x.dtype), delta


def ffn_inner(
    inner: InnerInputs,
    adapters: InnerAdapters,
    weights: Tensor,
    routing: Routing,
    options: InnerOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the experts' activations between the frozen products, without storing them.

        z_tk     = gate_out_t + Bg_e u_gate_tk
        a_tk     = act(z_tk) * (up_out_t + Bu_e u_up_tk)
        summed_t = sum_k w_tk a_tk                  [T, F], the input of the frozen down product
        h_tk     = Ad_e dropout(a_tk)               [P, largest rank], by sorted position
        u_tk     = scale_e w_tk h_tk

    e is the expert of slot k of token t. A slot that is not routed, or whose weight is zero, adds
    zero to `summed`, even if its expert contains NaN. Returns summed, h and u in gate_out's dtype.
    """
    T, K = weights.shape
    dtype, ranks, scaling = inner.gate_out.dtype, options.ranks, options.scaling
    z_gate, z_up = _projections(inner, adapters, routing, ranks)
    a = ffn_activation(z_gate, options.activation) * z_up
    terms = weights.to(a.dtype).reshape(-1, 1) * a
    terms = torch.where(_selected(weights, routing), terms, 0)
    summed = terms.view(T, K, a.shape[1]).sum(dim=1)
    h, _ = grouped_shrink(a, [adapters.down_a], None, routing, ranks, scaling, options.dropout)
    h = h.to(dtype)
    return summed.to(dtype), h, gate_rank_space(h, weights, routing, ranks, scaling)


def ffn_inner_backward(
    dsummed: Tensor,
    inner: InnerInputs,
    adapters: InnerAdapters,
    dh: Tensor,
    weights: Tensor,
    routing: Routing,
    options: InnerOptions,
    needs_adapters: bool = True,
) -> InnerGrads:
    """Compute the gradients of `ffn_inner`; z and a are computed again.

        da_tk      = dropout(Ad_e^T dh_tk) + w_tk dsummed_t
        dz_up_tk   = da_tk * act(z_tk)                  zero if the weight is zero
        dz_gate_tk = da_tk * z_up_tk * act'(z_tk)       zero if the weight is zero
        dgate_out  = sum_k dz_gate_tk                   dup_out   = sum_k dz_up_tk
        dh_gate_tk = scale_e Bg_e^T dz_gate_tk          dh_up_tk  = scale_e Bu_e^T dz_up_tk
        dweight_tk = <dsummed_t, a_tk>                  dAd_e     = sum_p dh_p^T dropout(a_p)
        dBg_e      = sum_p dz_gate_p^T u_gate_p         dBu_e     = sum_p dz_up_p^T u_up_p

    dsummed [T, F]; dh [P, largest rank]: the gradient of h, already times scale and weight.
    """
    T, K = weights.shape
    ranks, scaling, dropout = options.ranks, options.scaling, options.dropout
    x, compute = inner.gate_out, compute_dtype(inner.gate_out)
    z_gate, z_up = _projections(inner, adapters, routing, ranks)
    value = ffn_activation(z_gate, options.activation)
    a = value * z_up
    transposed = [adapters.down_a.t()]
    da = grouped_expand(
        dh.to(compute), transposed, None, routing, ranks, dropout, tokens=T, per_pair=True
    )
    dsummed_of_pair = dsummed.to(compute).repeat_interleave(K, dim=0)
    da = da + weights.to(compute).reshape(-1, 1) * dsummed_of_pair
    selected = _selected(weights, routing)
    dz_up = torch.where(selected, da * value, 0)
    slope = ffn_activation_slope(z_gate, options.activation)
    dz_gate = torch.where(selected, da * z_up * slope, 0)
    dgate_out, dup_out = (dz.view(T, K, dz.shape[1]).sum(dim=1) for dz in (dz_gate, dz_up))
    is_selected = selected.view(T, K).to(compute)
    dh_gate, dh_up = (
        grouped_shrink_backward([dz], [b], u, is_selected, routing, ranks, scaling)[0]
        for dz, b, u in (
            (dz_gate, adapters.gate_b, inner.u_gate),
            (dz_up, adapters.up_b, inner.u_up),
        )
    )
    dweights = torch.where(is_routed(routing), (dsummed_of_pair * a).sum(dim=1), 0).view(T, K)
    dgate_b, dup_b, ddown_a = (absent(x, matrix.dtype) for matrix in adapters)
    if needs_adapters:

        def weight_grads(dz: Tensor, u: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            ddown_a, (db,) = grouped_weight_grad(a, dh, [dz], u, routing, ranks, dropout, dtype)
            return ddown_a, db

        ddown_a, dgate_b = weight_grads(dz_gate, inner.u_gate, compute)
        _, dup_b = weight_grads(dz_up, inner.u_up, adapters.up_b.dtype)
        ddown_a, dgate_b = ddown_a.to(adapters.down_a.dtype), dgate_b.to(adapters.gate_b.dtype)
    dtype = x.dtype
    return InnerGrads(
        dgate_out.to(dtype), dup_out.to(dtype), dh_gate, dh_up, dweights, dgate_b, dup_b, ddown_a
    )


def _projections(
    inner: InnerInputs, adapters: InnerAdapters, routing: Routing, ranks: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Return z_gate and z_up [P, F] in the compute dtype, in the order of pairs."""
    T, dtype = inner.gate_out.shape[0], compute_dtype(inner.gate_out)

    def projection(out: Tensor, u: Tensor, b: Tensor) -> Tensor:
        return grouped_expand(u, [b], out.to(dtype), routing, ranks, tokens=T, per_pair=True)

    return (
        projection(inner.gate_out, inner.u_gate, adapters.gate_b),
        projection(inner.up_out, inner.u_up, adapters.up_b),
    )


def _selected(weights: Tensor, routing: Routing) -> Tensor:
    """Return which pairs are routed with a weight that is not zero, [P, 1]."""
    return (is_routed(routing) & (weights.reshape(-1) != 0))[:, None]


def ffn_activation(z: Tensor, activation: str) -> Tensor:
    """Return act(z) of an activation of `FFN_ACTIVATIONS`."""
    if activation == "silu":
        return functional.silu(z)
    if activation == "relu":
        return functional.relu(z)
    return functional.gelu(z, approximate="tanh" if activation == "gelu_tanh" else "none")


def ffn_activation_slope(z: Tensor, activation: str) -> Tensor:
    """Return the derivative of `ffn_activation` at z; 0 for relu at 0."""
    if activation == "relu":
        return (z > 0).to(z.dtype)
    if activation == "silu":
        sigmoid = z.sigmoid()
        return sigmoid * (1 + z * (1 - sigmoid))
    if activation == "gelu":
        density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
        return 0.5 * (1 + torch.erf(z / math.sqrt(2))) + z * density
    # gelu_tanh is z sigmoid(2 y) with y = sqrt(2 / pi) (z + 0.044715 z^3).
    root = math.sqrt(2 / math.pi)
    sigmoid = (2 * root * (z + 0.044715 * z**3)).sigmoid()
    return sigmoid + z * sigmoid * (1 - sigmoid) * 2 * root * (1 + 3 * 0.044715 * z * z)
