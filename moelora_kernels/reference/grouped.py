"""The grouped form: every expert computes only the tokens that are routed to it.

Each function is the specification of the op of its name. `moelora_kernels.ops` describes the
arguments, and `types.Routing` the routing arrays. A matrix has a row for every token (T rows) or
for every pair (P = T S rows); pair p reads row p // (P / number of rows).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from moelora_kernels.numerics import absent, compute_dtype
from moelora_kernels.reference.gates import blocks, drop_elements
from moelora_kernels.types import (
    CHUNK,
    NO_DROPOUT,
    TILE,
    Dropout,
    RouterTensors,
    Routing,
    count_tiles,
)


def route(
    experts: Tensor, num_experts: int, siblings: int = 1, tile: int = TILE, chunk: int = CHUNK
) -> Routing:
    """Return the routing arrays of `experts` [T, S], all int32.

    Columns i K to (i + 1) K belong to sibling i. An expert outside [0, E) is not routed. Raises
    ValueError for 2^31 pairs or more.
    """
    tokens, slots = experts.shape
    if tokens * slots >= 2**31:
        raise ValueError(f"experts: expected less than 2^31 pairs, got {tokens} x {slots}")
    N = siblings * num_experts
    sibling = torch.arange(slots, device=experts.device) // max(slots // siblings, 1)
    routed = (experts >= 0) & (experts < num_experts)
    expert = torch.where(routed, experts.long() + sibling * num_experts, N)
    by_slot = expert.t().reshape(-1)
    sorted_slots = by_slot.argsort(stable=True)
    order = sorted_slots % max(tokens, 1) * slots + sorted_slots // max(tokens, 1)
    offsets = torch.searchsorted(by_slot[sorted_slots], torch.arange(N + 1, device=experts.device))
    maps = [_tiles(offsets, order.numel(), size) for size in (tile, chunk)]
    return Routing(order.to(torch.int32), offsets.to(torch.int32), *maps)


def _tiles(offsets: Tensor, pairs: int, size: int) -> Tensor:
    """Return (expert, first sorted position) of every tile of `size` positions, [M, 2] int32."""
    begin = offsets
    end = torch.cat([offsets[1:], offsets.new_full((1,), pairs)])
    count = (end - begin + size - 1) // size
    last = count.cumsum(dim=0)
    N = offsets.numel() - 1
    tile = torch.arange(count_tiles(pairs, N, size), device=offsets.device)
    owner = torch.searchsorted(last, tile, right=True)
    expert = owner.clamp_max(N)
    first = begin[expert] + (tile - (last - count)[expert]) * size
    return torch.stack([expert, torch.where(owner > N, pairs, first)], dim=1).to(torch.int32)


def _expert_of_position(routing: Routing) -> Tensor:
    """Return the expert of every sorted position, [P]; N if its pair is not routed."""
    offsets = routing.offsets
    position = torch.arange(routing.order.numel(), device=offsets.device, dtype=offsets.dtype)
    return torch.searchsorted(offsets[1:].contiguous(), position, right=True)


def _row_of_position(routing: Routing, num_rows: int) -> Tensor:
    """Return the row of every sorted position in a matrix with a row per token or per pair."""
    order = routing.order
    return order.long() // max(order.numel() // max(num_rows, 1), 1)


def _scale_of_position(
    routing: Routing,
    expert: Tensor,
    weights: Tensor | None,
    scaling: Sequence[float],
    dtype: torch.dtype,
) -> Tensor:
    """Return scale * weight of every sorted position, [P, 1]."""
    factors = torch.tensor([*scaling], dtype=dtype, device=expert.device)
    scale = factors[expert % len(scaling)]
    if weights is not None:
        scale = scale * weights.to(dtype).reshape(-1)[routing.order.long()]
    return scale[:, None]


def _is_rank(expert: Tensor, num_experts: int, ranks: Sequence[int]) -> Tensor:
    """Return which of the columns of a sorted position belong to its expert, [P, largest rank].

    None of them if its pair is not routed: its expert is then num_experts.
    """
    of_expert = torch.tensor([*ranks], device=expert.device)[expert % len(ranks)]
    of_position = torch.where(expert < num_experts, of_expert, 0)
    return torch.arange(max(ranks), device=expert.device) < of_position[:, None]


def _experts(
    matrices: Sequence[Tensor], ranks: Sequence[int], first_sibling: int = 0
) -> Iterator[tuple[int, int, slice]]:
    """Yield (expert i E + e of all siblings, index of its matrix, its columns)."""
    for i in range(len(matrices)):
        for e, columns in enumerate(blocks(ranks)):
            yield (first_sibling + i) * len(ranks) + e, i, columns


def _dropped(x: Tensor, dropout: Dropout, expert: int) -> Tensor:
    """Return x after the dropout for `expert` (0 to E - 1), in the compute dtype."""
    if dropout.p == 0.0:
        return x.to(compute_dtype(x))
    stream = expert if dropout.per_expert else 0
    return drop_elements(x, dropout, stream).to(compute_dtype(x))


def grouped_shrink(
    x: Tensor,
    lora_a: Sequence[Tensor],
    weights: Tensor | None,
    routing: Routing,
    ranks: Sequence[int],
    scaling: Sequence[float],
    dropout: Dropout = NO_DROPOUT,
) -> tuple[Tensor, Tensor]:
    """Compute h and u of every routed pair, in the order of sorted positions.

        h_p = dropout(x_p) At_e          e is the expert of the pair, x_p its row of x
        u_p = scale_e * weight_p * h_p   zero if the weight is zero, even if h is NaN

    x [T, I] or [P, I]; lora_a n x [R, I]; weights [T, S], or None: all 1. Returns h and u
    [P, largest rank] in x's dtype. Columns beyond the rank of an expert, and rows of pairs that are
    not routed, are 0.
    """
    dtype, widest = compute_dtype(x), max(ranks)
    expert = _expert_of_position(routing)
    row = _row_of_position(routing, x.shape[0])
    h = x.new_zeros((row.numel(), widest), dtype=dtype)
    for e, i, block in _experts(lora_a, ranks):
        product = _dropped(x, dropout, e % len(ranks))[row] @ lora_a[i][block].to(dtype).t()
        padded = pad(product, (0, widest - product.shape[1]))
        h = torch.where((expert == e)[:, None], padded, h)
    h = h.to(x.dtype)
    return h, gate_rank_space(h, weights, routing, ranks, scaling, len(lora_a))


def gate_rank_space(
    h: Tensor,
    weights: Tensor | None,
    routing: Routing,
    ranks: Sequence[int],
    scaling: Sequence[float],
    siblings: int = 1,
) -> Tensor:
    """Return u_p = scale_e * weight_p * h_p in h's dtype; zero if the weight is zero.

    h [P, largest rank] by sorted position; weights [T, S], or None: all 1.
    """
    expert = _expert_of_position(routing)
    scale = _scale_of_position(routing, expert, weights, scaling, compute_dtype(h))
    is_rank = _is_rank(expert, siblings * len(ranks), ranks)
    return torch.where(is_rank & (scale != 0), scale * h, 0).to(h.dtype)


def is_routed(routing: Routing) -> Tensor:
    """Return which pairs are routed, [P] in the order of pairs."""
    position = torch.arange(routing.order.numel(), device=routing.order.device)
    result = torch.empty_like(position, dtype=torch.bool)
    result[routing.order.long()] = position < routing.offsets[-1]
    return result


def grouped_expand(
    u: Tensor,
    matrices: Sequence[Tensor],
    start: Tensor | None,
    routing: Routing,
    ranks: Sequence[int],
    dropout: Dropout = NO_DROPOUT,
    tokens: int = 0,
    first_sibling: int = 0,
    per_pair: bool = False,
) -> Tensor:
    """Multiply every pair's row of u with its expert's matrix, and add the slots of a token.

        y_t = start + sum over the pairs p of t: dropout(u_p Mt_e)        [T, O]
        y_p = start_t + dropout(u_p Mt_e)                with per_pair    [P, O]

    u [P, largest rank] in the order of sorted positions; matrices m x [O, R], any strides, one for
    each sibling from first_sibling on; pairs of other siblings add nothing. start [O] or [T, O];
    None means 0. per_pair needs a single sibling; the rows of y then have the order of pairs.
    Returns y in the dtype of start if that is [T, O], else in u's dtype. The slots of a token are
    added in their order.
    """
    dtype, pairs = compute_dtype(u), routing.order.numel()
    expert = _expert_of_position(routing)
    outputs, num_rows = matrices[0].shape[0], pairs if per_pair else tokens
    terms = u.new_zeros((pairs, outputs), dtype=dtype)
    row = _row_of_position(routing, num_rows)
    for e, i, columns in _experts(matrices, ranks, first_sibling):
        u_e = u[:, : columns.stop - columns.start].to(dtype)
        product = u_e @ matrices[i][:, columns].to(dtype).t()
        if dropout.p > 0.0:
            mask = _dropped(product.new_ones((num_rows, outputs)), dropout, e % len(ranks))
            product = torch.where(mask[row] == 0, 0, product * mask[row])
        terms = torch.where((expert == e)[:, None], product, terms)
    by_pair = torch.zeros_like(terms)
    by_pair[routing.order.long()] = terms
    by_token = by_pair.view(tokens, pairs // max(tokens, 1), outputs)
    if start is None:
        start = u.new_zeros(outputs)
    start_per_token = start.dim() == 2
    first_term = start.to(dtype).view(-1 if start_per_token else 1, 1, outputs)
    # `flatten` of a new tensor, because autograd forbids in-place changes of an output that is a
    # view.
    if per_pair:
        y = (by_token + first_term).flatten(0, 1)
    else:
        y = by_token.sum(dim=1) + first_term[:, 0]
    return y.to(start.dtype if start_per_token else u.dtype)


def grouped_dx(
    dh: Tensor,
    dlogits: Tensor | None,
    lora_a: Sequence[Tensor],
    router_weight: Sequence[Tensor],
    routing: Routing,
    ranks: Sequence[int],
    dropout: Dropout = NO_DROPOUT,
    tokens: int = 0,
    sparse_dlogits: bool = False,
) -> Tensor:
    """Add the rank-space parts of dx over the pairs of every token, and dlogits Wr.

        dx_t = sum over the pairs p of t: dropout(dh_p A_e) + dlogits_t Wr      [T, I]

    dh [P, largest rank] in the order of sorted positions; dlogits [T, n E] or None; lora_a
    n x [R, I]; router_weight n x [E, I] or empty. The dropout masks are the same as in the forward.
    sparse_dlogits: dlogits is 0 for every expert that a token has no pair of; nothing depends on it
    here. Returns dx in dh's dtype; dlogits and Wr are rounded to it.
    """
    transposed = [a.t() for a in lora_a]
    dx = grouped_expand(dh, transposed, None, routing, ranks, dropout, tokens)
    if dlogits is None:
        return dx
    router = torch.cat([*router_weight]) if len(router_weight) > 1 else router_weight[0]
    return dx.addmm_(dlogits.to(dx.dtype), router.to(dx.dtype))


def grouped_shrink_backward(
    dy: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    h: Tensor,
    weights: Tensor | None,
    routing: Routing,
    ranks: Sequence[int],
    scaling: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dh and the gradient of the weights from dy; and u again, for dB.

        du_p = dy_p B_e                      [P, largest rank], never stored
        dh_p = scale_e * weight_p * du_p
        dweight_p = scale_e <du_p, h_p>       zero if the pair is not routed

    dy n x [T, O_i] or one [P, O]; lora_b n x [O_i, R]; h [P, largest rank]; weights [T, S], or
    None: all 1. Returns dh, u [P, largest rank] in h's dtype; dweights [T, S] in the compute dtype
    (empty without weights).
    """
    dtype, widest = compute_dtype(h), max(ranks)
    expert = _expert_of_position(routing)
    product = h.new_zeros(h.shape, dtype=dtype)
    for e, i, columns in _experts(dy, ranks):
        row = _row_of_position(routing, dy[i].shape[0])
        product_e = dy[i].to(dtype)[row] @ lora_b[i][:, columns].to(dtype)
        padded = pad(product_e, (0, widest - product_e.shape[1]))
        product = torch.where((expert == e)[:, None], padded, product)
    scale = _scale_of_position(routing, expert, weights, scaling, dtype)
    is_rank = _is_rank(expert, len(dy) * len(ranks), ranks)
    selected = is_rank & (scale != 0)
    dh = torch.where(selected, scale * product, 0).to(h.dtype)
    u = torch.where(selected, scale * h.to(dtype), 0).to(h.dtype)
    if weights is None:
        return dh, u, absent(h, dtype)
    factors = _scale_of_position(routing, expert, None, scaling, dtype)[:, 0]
    inner = torch.where(is_rank, product * h.to(dtype), 0)
    dweights = torch.zeros_like(factors)
    dweights[routing.order.long()] = factors * inner.sum(dim=1)
    return dh, u, dweights.view(weights.shape)


def grouped_weight_grad(
    x: Tensor,
    dh: Tensor,
    dy: Sequence[Tensor],
    u: Tensor,
    routing: Routing,
    ranks: Sequence[int],
    dropout: Dropout,
    lora_dtype: torch.dtype,
    frozen: Sequence[int] = (),
) -> tuple[Tensor, list[Tensor]]:
    """Compute dA and dB of every expert; exact zeros for an expert without pairs, or in `frozen`.

        dA_e = sum_p dh_p^T dropout(x_p)        dB_e = sum_p dy_p^T u_p

    x [T, I] or [P, I]; dh, u [P, largest rank]; dy n x [T, O_i] or one [P, O]. Returns dA [n R, I]
    and n x dB_i [O_i, R] in lora_dtype.
    """
    dtype = compute_dtype(x)
    expert = _expert_of_position(routing)
    row = _row_of_position(routing, x.shape[0])
    da: list[Tensor] = []
    db: list[list[Tensor]] = [[] for _ in dy]
    for e, i, columns in _experts(dy, ranks):
        is_trained = e % len(ranks) not in frozen
        in_expert, rank = ((expert == e) & is_trained)[:, None], columns.stop - columns.start
        x_e = torch.where(in_expert, _dropped(x, dropout, e % len(ranks))[row], 0)
        dh_e = torch.where(in_expert, dh[:, :rank].to(dtype), 0)
        da.append(dh_e.t() @ x_e)
        u_e = torch.where(in_expert, u[:, :rank].to(dtype), 0)
        dy_of_pairs = dy[i].to(dtype)[_row_of_position(routing, dy[i].shape[0])]
        db[i].append(torch.where(in_expert, dy_of_pairs, 0).t() @ u_e)
    return (
        torch.cat(da).to(lora_dtype),
        [torch.cat(columns, dim=1).to(lora_dtype) for columns in db],
    )


def router_logits(x: Tensor, router: RouterTensors) -> Tensor:
    """Compute x Wrt + br of n linear routers, [T, n E] in the compute dtype."""
    dtype = compute_dtype(x)
    logits = x.to(dtype) @ torch.cat([w.to(dtype) for w in router.weight]).t()
    return logits + torch.cat([b.to(dtype) for b in router.bias]) if router.bias else logits


def router_grad(dlogits: Tensor, x: Tensor, router_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Compute dWr = dlogits^T x [n E, I] and dbr = sum_t dlogits [n E] of n linear routers."""
    dtype = compute_dtype(x)
    drouter = dlogits.to(dtype).t() @ x.to(dtype)
    return drouter.to(router_dtype), dlogits.to(dtype).sum(dim=0).to(router_dtype)
