"""The grouped formulation: every expert on the tokens that are routed to it, and on no others.

`types.Routing` explains order, offsets and tiles. A matrix of rows that belong to tokens has T
rows, one whose rows belong to pairs P = T S; pair p reads row p // (P / rows) of either.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moelora_kernels.reference.gates import blocks, compute_dtype, dropout
from moelora_kernels.types import count_tiles


def route(
    indices: Tensor, num_experts: int, siblings: int, tile: int, chunk: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The routing arrays of `indices` [T, S]: order, offsets, tiles, chunks, all int32.

    Columns i K to (i + 1) K belong to sibling i. An index outside [0, E) is not routed. Raises
    ValueError for 2^31 pairs and more.
    """
    tokens, slots = indices.shape
    if tokens * slots >= 2**31:
        raise ValueError(f"indices: expected less than 2^31 pairs, got {tokens} x {slots}")
    experts = siblings * num_experts
    sibling = torch.arange(slots, device=indices.device) // max(slots // siblings, 1)
    routed = (indices >= 0) & (indices < num_experts)
    expert = torch.where(routed, indices.long() + sibling * num_experts, experts)
    by_slot = expert.t().reshape(-1)
    place = by_slot.argsort(stable=True)
    order = place % max(tokens, 1) * slots + place // max(tokens, 1)
    firsts = torch.arange(experts + 1, device=indices.device)
    offsets = torch.searchsorted(by_slot[place], firsts)
    maps = [_tiles(offsets, order.numel(), size) for size in (tile, chunk)]
    return order.to(torch.int32), offsets.to(torch.int32), *maps


def _tiles(offsets: Tensor, pairs: int, size: int) -> Tensor:
    begin = offsets
    end = torch.cat([offsets[1:], offsets.new_full((1,), pairs)])
    count = (end - begin + size - 1) // size
    last = count.cumsum(dim=0)
    experts = offsets.numel() - 1
    tile = torch.arange(count_tiles(pairs, experts, size), device=offsets.device)
    found = torch.searchsorted(last, tile, right=True)
    expert = found.clamp_max(experts)
    first = begin[expert] + (tile - (last - count)[expert]) * size
    return torch.stack([expert, torch.where(found > experts, pairs, first)], dim=1).to(torch.int32)


def _expert_of(offsets: Tensor, pairs: int) -> Tensor:
    """The expert of every place, N where the pair is not routed."""
    place = torch.arange(pairs, device=offsets.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets[1:].contiguous(), place, right=True)


def _row_of(order: Tensor, rows: int) -> Tensor:
    """The row of every place in a matrix of `rows` rows, one for each token or for each pair."""
    return order.long() // max(order.numel() // max(rows, 1), 1)


def _scale_of(
    expert: Tensor, order: Tensor, weights: Tensor | None, scaling: Sequence[float], dtype
) -> Tensor:
    """scale * weight of every place, [P, 1]; 0 where the pair is not routed."""
    factors = torch.tensor([*scaling], dtype=dtype, device=order.device)
    scale = factors[expert % len(scaling)]
    if weights is not None:
        scale = scale * weights.to(dtype).reshape(-1)[order.long()]
    return scale[:, None]


def _experts(parts: Sequence[Tensor], ranks: Sequence[int], first: int = 0):
    """(expert of all siblings, sibling among `parts`, its columns in rank space)."""
    for i in range(len(parts)):
        for e, columns in enumerate(blocks(ranks)):
            yield (first + i) * len(ranks) + e, i, columns


def _dropped(x: Tensor, p: float, per_expert: bool, seed: Tensor | None, expert: int, dtype):
    """x as expert `expert` of a sibling sees it."""
    if p == 0.0:
        return x.to(dtype)
    return dropout(x, p, seed, expert if per_expert else 0).to(dtype)


def grouped_shrink(
    x: Tensor,
    lora_a: Sequence[Tensor],
    weights: Tensor | None,
    order: Tensor,
    offsets: Tensor,
    tiles: Tensor,
    ranks: Sequence[int],
    scaling: Sequence[float],
    dropout_p: float = 0.0,
    dropout_per_expert: bool = False,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h and u of every routed pair, in the order of places.

        h_p = dropout(x_p) At_e          e the expert of the place, x_p the row of its pair
        u_p = scale_e * weight_p * h_p   zero, whatever h holds, where the weight is zero

    x [T, I] or [P, I]; lora_a n x [R, I]; weights [T, S], None: all 1. Returns h and u
    [P, largest rank] in x.dtype; columns beyond the rank of e and places without expert hold 0.
    """
    dtype, widest = compute_dtype(x), max(ranks)
    expert = _expert_of(offsets, order.numel())
    row = _row_of(order, x.shape[0])
    h = x.new_zeros((order.numel(), widest), dtype=dtype)
    for e, i, columns in _experts(lora_a, ranks):
        own = _dropped(x, dropout_p, dropout_per_expert, seed, e % len(ranks), dtype)
        product = own[row] @ lora_a[i][columns].to(dtype).t()
        padded = torch.nn.functional.pad(product, (0, widest - product.shape[1]))
        h = torch.where((expert == e)[:, None], padded, h)
    h = h.to(x.dtype)
    scale = _scale_of(expert, order, weights, scaling, dtype)
    u = torch.where((scale == 0) | (expert == len(lora_a) * len(ranks))[:, None], 0, scale * h)
    return h, u.to(x.dtype)


def grouped_expand(
    u: Tensor,
    matrices: Sequence[Tensor],
    start: Tensor | None,
    order: Tensor,
    offsets: Tensor,
    tiles: Tensor,
    ranks: Sequence[int],
    tokens: int,
    first: int = 0,
    per_pair: bool = False,
    dropout_p: float = 0.0,
    dropout_per_expert: bool = False,
    seed: Tensor | None = None,
) -> Tensor:
    """From rank space to features, summed over the slots of a token or not.

        y_t = start + sum over the pairs p of t: dropout(u_p Mt_e)        [T, O]
        y_p = start_t + u_p Mt_e                         with per_pair    [P, O]

    u [P, largest rank] in the order of places; matrices m x [O, R], of siblings first to first + m,
    any strides; pairs of other siblings add nothing. start [O], [T, O] or None (0). With per_pair
    there is one sibling, and a row of y for every pair, in the order of pairs. Returns y in
    u.dtype, or the dtype of a start [T, O]; slots are added in their order.
    """
    dtype, pairs = compute_dtype(u), order.numel()
    expert = _expert_of(offsets, pairs)
    outputs = matrices[0].shape[0]
    terms = u.new_zeros((pairs, outputs), dtype=dtype)
    row = _row_of(order, pairs if per_pair else tokens)
    for e, i, columns in _experts(matrices, ranks, first):
        used = u[:, : columns.stop - columns.start].to(dtype)
        product = used @ matrices[i][:, columns].to(dtype).t()
        if dropout_p > 0.0:
            ones = product.new_ones((pairs if per_pair else tokens, outputs))
            of_expert = e % len(ranks)
            mask = _dropped(ones, dropout_p, dropout_per_expert, seed, of_expert, dtype)
            product = product * mask[row]
        terms = torch.where((expert == e)[:, None], product, terms)
    by_pair = torch.zeros_like(terms)
    by_pair[order.long()] = terms
    by_token = by_pair.view(tokens, pairs // max(tokens, 1), outputs)
    if start is None:
        start = u.new_zeros(outputs)
    of_tokens = start.dim() == 2
    begin = start.to(dtype).view(-1 if of_tokens else 1, 1, outputs)
    # Not a view where it is a layer's output: autograd lets nobody change one of those in place.
    y = (by_token + begin).flatten(0, 1) if per_pair else by_token.sum(dim=1) + begin[:, 0]
    return y.to(start.dtype if of_tokens else u.dtype)


def grouped_shrink_backward(
    dy: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    h: Tensor,
    weights: Tensor | None,
    order: Tensor,
    offsets: Tensor,
    tiles: Tensor,
    ranks: Sequence[int],
    scaling: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """dh and the gradient of the weights from dy; u once more, for dB.

        P_p  = dy_p B_e                       [P, largest rank], never stored
        dh_p = scale_e * weight_p * P_p
        dweight_p = scale_e <P_p, h_p>        zero where not routed

    dy n x [T, O_i] or one [P, O]; lora_b n x [O_i, R]; h [P, largest rank]; weights [T, S], None:
    all 1. Returns dh, u [P, largest rank] in h.dtype, dweights [T, S] in the compute dtype (empty
    without weights).
    """
    dtype, widest = compute_dtype(h), max(ranks)
    expert = _expert_of(offsets, order.numel())
    product = h.new_zeros(h.shape, dtype=dtype)
    for e, i, columns in _experts(dy, ranks):
        row = _row_of(order, dy[i].shape[0])
        own = dy[i].to(dtype)[row] @ lora_b[i][:, columns].to(dtype)
        padded = torch.nn.functional.pad(own, (0, widest - own.shape[1]))
        product = torch.where((expert == e)[:, None], padded, product)
    scale = _scale_of(expert, order, weights, scaling, dtype)
    idle = (scale == 0) | (expert == len(dy) * len(ranks))[:, None]
    dh = torch.where(idle, 0, scale * product).to(h.dtype)
    u = torch.where(idle, 0, scale * h.to(dtype)).to(h.dtype)
    if weights is None:
        return dh, u, h.new_empty(0, dtype=dtype)
    factors = _scale_of(expert, order, None, scaling, dtype)[:, 0]
    inner = factors * (product * h.to(dtype)).sum(dim=1)
    dweights = torch.zeros_like(inner)
    dweights[order.long()] = torch.where(expert == len(dy) * len(ranks), 0, inner)
    return dh, u, dweights.view(weights.shape)


def grouped_weight_grad(
    x: Tensor,
    dh: Tensor,
    dy: Sequence[Tensor],
    u: Tensor,
    order: Tensor,
    offsets: Tensor,
    chunks: Tensor,
    lora_dtype: torch.dtype,
    ranks: Sequence[int],
    dropout_p: float = 0.0,
    dropout_per_expert: bool = False,
    seed: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """The gradients of A and B: sums over the pairs of each expert, zero for an expert without any.

        dA_e = sum_p dh_p^T dropout(x_p)        dB_e = sum_p dy_p^T u_p

    x [T, I] or [P, I]; dh, u [P, largest rank]; dy n x [T, O_i] or one [P, O]. Returns dA [n R, I]
    and n x dB_i [O_i, R] in `lora_dtype`.
    """
    dtype = compute_dtype(x)
    expert = _expert_of(offsets, order.numel())
    row = _row_of(order, x.shape[0])
    da, db = [], [[] for _ in dy]
    for e, i, columns in _experts(dy, ranks):
        own, rank = (expert == e)[:, None], columns.stop - columns.start
        read = _dropped(x, dropout_p, dropout_per_expert, seed, e % len(ranks), dtype)[row]
        left = torch.where(own, dh[:, :rank].to(dtype), 0)
        da.append(left.t() @ torch.where(own, read, 0))
        gated = torch.where(own, u[:, :rank].to(dtype), 0)
        grad = torch.where(own, dy[i].to(dtype)[_row_of(order, dy[i].shape[0])], 0)
        db[i].append(grad.t() @ gated)
    return torch.cat(da).to(lora_dtype), [torch.cat(parts, dim=1).to(lora_dtype) for parts in db]


def router_logits(
    x: Tensor, router_weight: Sequence[Tensor], router_bias: Sequence[Tensor]
) -> Tensor:
    """logits = x Wrt + br of n linear routers, [T, n E] in the compute dtype."""
    dtype = compute_dtype(x)
    logits = x.to(dtype) @ torch.cat([w.to(dtype) for w in router_weight]).t()
    return logits + torch.cat([b.to(dtype) for b in router_bias]) if router_bias else logits


def router_grad(dlogits: Tensor, x: Tensor, router_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The gradients of n linear routers: dWr = dlogits^T x [n E, I], dbr = sum_t dlogits [n E]."""
    dtype = compute_dtype(x)
    drouter = dlogits.to(dtype).t() @ x.to(dtype)
    return drouter.to(router_dtype), dlogits.to(dtype).sum(dim=0).to(router_dtype)
