"""Whole-FFN experts: the gated MLP of every expert on the tokens that are routed to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moelora_kernels.reference.gates import compute_dtype
from moelora_kernels.reference.grouped import grouped_expand, grouped_shrink, route
from moelora_kernels.types import CHUNK, TILE


def ffn(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    weights: Tensor,
    indices: Tensor,
    gate_a: Tensor,
    gate_b: Tensor,
    up_a: Tensor,
    up_b: Tensor,
    down_a: Tensor,
    down_b: Tensor,
    activation: Callable[[Tensor], Tensor],
    ranks: Sequence[int],
    scaling: Sequence[float],
    dropout: float = 0.0,
    dropout_per_expert: bool = False,
    seed_x: Tensor | None = None,
    seed_a: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What the experts add around the frozen products of a gated MLP; e = indices[t, k].

        a_tk     = act(gate_t + scale_e Bg_e Ag_e d(x_t)) * (up_t + scale_e Bu_e Au_e d(x_t))
        summed_t = sum_k w_tk a_tk                             the input of the frozen down product
        delta_t  = sum_k w_tk scale_e Bd_e Ad_e d(a_tk)        d: dropout

    x [T, I]; gate, up [T, F] the frozen products; weights [T, K], zero where the index is not in
    [0, E); gate_a, up_a [R, I], gate_b, up_b [F, R], down_a [R, F], down_b [I, R]. A weight of zero
    adds zero, whatever its expert holds. Returns summed [T, F] and delta [T, I] in x.dtype.
    """
    tokens, slots = weights.shape
    order, offsets, tiles, _ = route(indices, len(ranks), 1, TILE, CHUNK)
    routing = (order, offsets, tiles, ranks)
    drop = (dropout, dropout_per_expert)

    def adapted(base: Tensor, lora_a: Tensor, lora_b: Tensor) -> Tensor:
        _, u = grouped_shrink(x, [lora_a], None, *routing, scaling, *drop, seed_x)
        return grouped_expand(u, [lora_b], base, *routing, tokens, per_pair=True)

    a = (activation(adapted(gate, gate_a, gate_b)) * adapted(up, up_a, up_b)).to(x.dtype)
    _, u = grouped_shrink(a, [down_a], weights, *routing, scaling, *drop, seed_a)
    delta = grouped_expand(u, [down_b], None, *routing, tokens)
    weight = weights[:, :, None].to(compute_dtype(x))
    terms = weight * a.view(tokens, slots, a.shape[1]).to(weight.dtype)
    summed = torch.where(weight == 0, 0, terms).sum(dim=1)
    return summed.to(x.dtype), delta
