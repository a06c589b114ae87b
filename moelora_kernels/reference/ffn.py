"""Whole-FFN experts: the gated MLP of every expert on the tokens that are routed to it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moelora_kernels.numerics import compute_dtype
from moelora_kernels.reference.grouped import grouped_expand, grouped_shrink, route
from moelora_kernels.types import NO_DROPOUT, Dropout, FfnMixture, FfnTensors, Gate


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
    ranks, scaling, _ = mixture
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
