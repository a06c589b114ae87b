"""The specification: every op of the package in plain PyTorch.

Alphabet: T tokens, I in_features, O out_features, E experts, K experts per token, r rank of one
expert, R sum of the ranks, G gate rows, n siblings that read the same x.

    y   = x Wt + b + u Bt                x [T, I]   W [O, I] frozen   A [R, I]   B [O, R]
    h   = x At                           h [T, R]   ungated
    u   = scale * gate (.) h             gate[t, e] repeated over the ranks of expert e
    P   = dy B                           P [T, R]
    dgate[t, e] = scale * <P, h>         over the ranks of expert e
    dh  = scale * gate (.) P
    dx  = dy W + dh A       dA = dh^T x       dB = dy^T u

Every function computes in `promote_types(dtype, float32)` and rounds once, on return. Siblings
stand side by side: column block i of h, u, gates and logits belongs to sibling i.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PHILOX_ROUNDS = 10
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
UINT32 = 0xFFFFFFFF


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype that sums are kept in: float32, or float64 for float64 tensors."""
    return torch.promote_types(tensor.dtype, torch.float32)


def blocks(ranks: Sequence[int]) -> list[slice]:
    """The columns of each expert in rank space: expert-major, in the order of `ranks`."""
    ends = [sum(ranks[: e + 1]) for e in range(len(ranks))]
    return [slice(end - rank, end) for end, rank in zip(ends, ranks, strict=True)]


def dropout(x: Tensor, p: float, seed: Tensor, stream: int = 0) -> Tensor:
    """x (.) mask / (1 - p), the mask a pure function of (seed, stream, position).

    Element n of x (row-major) is kept where lane n % 4 of Philox-4x32-10 with counter
    (n // 4 low, n // 4 high, stream, 0) and key (seed low, seed high) is at least p * 2^32.

    x [T, I]; seed one int64; stream tells masks of one seed apart. Returns [T, I] in x.dtype.
    """
    counter = torch.arange((x.numel() + 3) // 4, device=x.device)
    low, high = counter & UINT32, (counter >> 32) & UINT32
    words = [low, high, torch.full_like(counter, stream), torch.zeros_like(counter)]
    key = [seed.reshape(()) & UINT32, (seed.reshape(()) >> 32) & UINT32]
    for _ in range(PHILOX_ROUNDS):
        # int64 products wrap modulo 2^64, which leaves all 64 bits of a 32 x 32 bit product intact.
        products = [words[0] * PHILOX_MULTIPLIERS[0], words[2] * PHILOX_MULTIPLIERS[1]]
        high = [(product >> 32) & UINT32 for product in products]
        low = [product & UINT32 for product in products]
        words = [high[1] ^ words[1] ^ key[0], low[1], high[0] ^ words[3] ^ key[1], low[0]]
        key = [(k + step) & UINT32 for k, step in zip(key, PHILOX_KEY_STEPS, strict=True)]
    random = torch.stack(words, dim=1).flatten()[: x.numel()]
    keep = (random >= round(p * 2**32)).view(x.shape)
    scaled = x.to(compute_dtype(x)) / (1.0 - p)
    return torch.where(keep, scaled, 0).to(x.dtype)


def topk_gate(
    logits: Tensor, top_k: int, renormalize: bool, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Softmax over the experts, the K largest kept, renormalised to sum 1 if asked.

        p = softmax(logits / temperature)
        weights_k = p[indices_k]        or, with renormalize, p[indices_k] / sum_j p[indices_j]

    Equal logits: the lower expert first. With K = E the experts stay in their own order.

    logits [N, E]. Returns weights [N, K] in the compute dtype, indices [N, K] int32.
    """
    scaled = logits.to(compute_dtype(logits)) / temperature
    if top_k == logits.shape[1]:
        indices = torch.arange(top_k, device=logits.device).expand(logits.shape)
    else:
        indices = scaled.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    if renormalize:
        weights = scaled.gather(1, indices).softmax(dim=1)
    else:
        weights = scaled.softmax(dim=1).gather(1, indices)
    return weights, indices.to(torch.int32).contiguous()


def topk_gate_backward(
    dweights: Tensor,
    weights: Tensor,
    indices: Tensor,
    logits: Tensor,
    renormalize: bool,
    temperature: float = 1.0,
) -> Tensor:
    """dlogits from dweights.

        mean = sum_j weights_j dweights_j
        dlogits[i_k] = weights_k (dweights_k - mean) / temperature           with renormalize
        dlogits_e = p_e ((dweights of e, or 0) - mean) / temperature         without

    dweights, weights, indices [N, K], logits [N, E] (values read only without renormalize).
    Returns [N, E] in the compute dtype.
    """
    dtype = compute_dtype(logits)
    weights, dweights = weights.to(dtype), dweights.to(dtype)
    mean = (weights * dweights).sum(dim=1, keepdim=True)
    zeros = torch.zeros(logits.shape, dtype=dtype, device=logits.device)
    if renormalize:
        dlogits = zeros.scatter(1, indices.long(), weights * (dweights - mean))
    else:
        probabilities = (logits.to(dtype) / temperature).softmax(dim=1)
        dlogits = probabilities * (zeros.scatter(1, indices.long(), dweights) - mean)
    return dlogits / temperature


def dense_gate(
    gates: Tensor,
    indices: Tensor | None,
    rows: Tensor | None,
    tokens: int,
    siblings: int,
    num_experts: int,
) -> Tensor:
    """The gate of every token and expert, [T, n, E]: zero where a token is not routed.

    Dense: gates [G, n E], row rows[t] for token t (None: G == T, or one row for all tokens); a
    row outside [0, G) gates with zero. Sparse: gates are weights [T, n K] with indices [T, n K]; an
    index outside [0, E) means "not routed", a repeated index adds.
    """
    if indices is not None:
        slots = indices.view(tokens, siblings, indices.shape[1] // siblings, 1)
        chosen = slots == torch.arange(num_experts, device=gates.device)
        weights = gates.view(slots.shape)
        return torch.where(chosen, weights, 0).sum(dim=2)
    if rows is not None:
        valid = (rows >= 0) & (rows < gates.shape[0])
        # Without any gate row there is no row 0 to stand in for the ones out of range.
        padded = gates if gates.shape[0] else gates.new_zeros((1, gates.shape[1]))
        gates = torch.where(valid[:, None], padded[torch.where(valid, rows, 0).long()], 0)
    return gates.expand(tokens, -1).reshape(tokens, siblings, num_experts)


def dense_gate_backward(
    dgate: Tensor, gates: Tensor, indices: Tensor | None, rows: Tensor | None
) -> Tensor:
    """The gradient of `gates` from dgate [T, n, E], in the form and shape of gates."""
    tokens, siblings, num_experts = dgate.shape
    if indices is not None:
        slots = indices.view(tokens, siblings, indices.shape[1] // siblings).long()
        valid = (slots >= 0) & (slots < num_experts)
        picked = dgate.gather(2, torch.where(valid, slots, 0))
        return torch.where(valid, picked, 0).view(gates.shape)
    flat = dgate.reshape(tokens, siblings * num_experts)
    if rows is not None:
        of_row = rows[None, :] == torch.arange(gates.shape[0], device=gates.device)[:, None]
        return of_row.to(flat.dtype) @ flat
    return flat.sum(dim=0, keepdim=True) if gates.shape[0] == 1 else flat


def rank_gate(gate: Tensor, ranks: Sequence[int], scaling: Sequence[float]) -> Tensor:
    """scale * gate, repeated over the ranks of each expert: [T, n, E] -> [T, n, R]."""
    scaled = gate * torch.tensor(scaling, dtype=gate.dtype, device=gate.device)
    expert = [e for e, rank in enumerate(ranks) for _ in range(rank)]
    return scaled[..., torch.tensor(expert, device=gate.device)]


def shrink_gate(
    x: Tensor,
    lora_a: Sequence[Tensor],
    gates: Tensor | None,
    indices: Tensor | None,
    rows: Tensor | None,
    router_weight: Sequence[Tensor],
    router_bias: Sequence[Tensor],
    ranks: Sequence[int],
    scaling: Sequence[float],
    share_a: bool = False,
    top_k: int = 0,
    renormalize: bool = True,
    temperature: float = 1.0,
    dropout_p: float = 0.0,
    dropout_per_expert: bool = False,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """h and u of n siblings in one read of x, and with a linear router its gate from the same read.

        h = dropout(x) At               [T, n R]    (share_a: [T, n r], one A for all experts)
        u = scale * gate (.) h          [T, n R]    zero, whatever h holds, where the gate is zero
        logits = x Wrt + br             [T, n E]    float32; topk_gate of each sibling's E columns

    x [T, I]; lora_a n x [R, I] or, with share_a, n x [r, I]; gates, indices, rows as in
    `dense_gate`, or None with router_weight n x [E, I], router_bias n x [E] (or empty) and top_k in
    [1, E]. Returns h, u in x.dtype; weights [T, n K] and logits [T, n E] in the compute dtype and
    indices [T, n K] int32. Empty are indices for K = E, and all three where the gates were given.
    """
    dtype, siblings, num_experts = compute_dtype(x), len(lora_a), len(ranks)
    tokens = x.shape[0]
    wide = x.to(dtype)
    if dropout_p == 0.0:
        h = torch.cat([wide @ a.to(dtype).t() for a in lora_a], dim=1)
    elif dropout_per_expert:
        dropped = [dropout(x, dropout_p, seed, stream).to(dtype) for stream in range(num_experts)]
        h = torch.cat(
            [
                dropped[e] @ a[columns].to(dtype).t()
                for a in lora_a
                for e, columns in enumerate(blocks(ranks))
            ],
            dim=1,
        )
    else:
        dropped = dropout(x, dropout_p, seed).to(dtype)
        h = torch.cat([dropped @ a.to(dtype).t() for a in lora_a], dim=1)
    h = h.to(x.dtype)

    weights, logits = x.new_empty(0, dtype=dtype), x.new_empty(0, dtype=dtype)
    chosen = x.new_empty(0, dtype=torch.int32)
    if len(router_weight):
        bias = router_bias if len(router_bias) else [None] * siblings
        parts = [
            torch.nn.functional.linear(wide, w.to(dtype), None if b is None else b.to(dtype))
            for w, b in zip(router_weight, bias, strict=True)
        ]
        logits = torch.cat(parts, dim=1)
        weights, picked = topk_gate(
            logits.view(tokens * siblings, num_experts), top_k, renormalize, temperature
        )
        weights = weights.view(tokens, siblings * top_k)
        gates = weights
        if top_k < num_experts:
            indices = chosen = picked.view(tokens, siblings * top_k)

    gate = dense_gate(gates.to(dtype), indices, rows, tokens, siblings, num_experts)
    gate = rank_gate(gate, ranks, scaling)
    repeat = num_experts if share_a else 1
    ungated = h.to(dtype).view(tokens, siblings, h.shape[1] // siblings).repeat(1, 1, repeat)
    # 0 * NaN is NaN: where nothing is selected h must be replaced, not only multiplied by zero.
    # Finite values stay, so that a gate which starts at zero has its true gradient <P, h>.
    selected = torch.where((gate == 0) & ~ungated.isfinite(), 0, ungated)
    u = (gate * selected).flatten(1).to(x.dtype)
    return h, u, weights, chosen, logits


def shrink_gate_backward(
    dy: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    h: Tensor,
    gates: Tensor,
    indices: Tensor | None,
    rows: Tensor | None,
    logits: Tensor | None,
    dlogits: Tensor | None,
    ranks: Sequence[int],
    scaling: Sequence[float],
    share_a: bool = False,
    top_k: int = 0,
    renormalize: bool = True,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """dh and the gradient of the gate from dy; u once more, for dB.

        P  = dy B                           [T, n R], never stored
        dh = scale * gate (.) P             [T, n R]    (share_a: summed over experts, [T, n r])
        dgate[t, e] = scale * <P, h>        over the ranks of e, zero where not routed

    dy n x [T, O_i]; lora_b n x [O_i, R]; h [T, n R] as `shrink_gate` returned it; gates, indices,
    rows what it was given, or the weights and indices it returned (then top_k > 0). logits is
    needed only without renormalize; dlogits [T, n E] is a gradient that reaches the logits on
    another way. Returns dh, u in h.dtype; dgate in the compute dtype: the gradient of gates
    [G, n E] or [T, n K], or with top_k > 0 that of the logits, [T, n E], dlogits included.
    """
    dtype, siblings, num_experts = compute_dtype(h), len(dy), len(ranks)
    tokens = h.shape[0]
    gate = dense_gate(gates.to(dtype), indices, rows, tokens, siblings, num_experts)
    by_rank = rank_gate(gate, ranks, scaling)
    repeat = num_experts if share_a else 1
    ungated = h.to(dtype).view(tokens, siblings, h.shape[1] // siblings).repeat(1, 1, repeat)
    u = torch.where(by_rank == 0, 0, by_rank * ungated).flatten(1).to(h.dtype)

    products = [g.to(dtype) @ b.to(dtype) for g, b in zip(dy, lora_b, strict=True)]
    p = torch.stack(products, dim=1)
    dh = torch.where(by_rank == 0, 0, by_rank * p)
    if share_a:
        dh = dh.view(tokens, siblings, num_experts, ranks[0]).sum(dim=2)
    dh = dh.flatten(1).to(h.dtype)

    inner = p * ungated
    dgate = torch.stack(
        [s * inner[..., c].sum(dim=-1) for s, c in zip(scaling, blocks(ranks), strict=True)], dim=2
    )
    if top_k == 0:
        return dh, u, dense_gate_backward(dgate, gates, indices, rows)

    shape = (tokens * siblings, num_experts)
    dweights = dense_gate_backward(dgate, gates, indices, rows).view(-1, top_k)
    if indices is None:
        indices = torch.arange(top_k, device=h.device).expand(shape)
    of_gate = topk_gate_backward(
        dweights,
        gates.view(-1, top_k),
        indices.view(-1, top_k),
        dgate.view(shape) if renormalize else logits.view(shape),
        renormalize,
        temperature,
    ).view(tokens, siblings * num_experts)
    return dh, u, of_gate if dlogits is None else of_gate + dlogits


def shrink_dx(
    dh: Tensor,
    dlogits: Tensor | None,
    lora_a: Sequence[Tensor],
    router_weight: Sequence[Tensor],
    ranks: Sequence[int],
    dropout_p: float = 0.0,
    dropout_per_expert: bool = False,
    seed: Tensor | None = None,
) -> Tensor:
    """The rank-space part of dx: dropout(dh A) + dlogits Wr, summed over the siblings.

    dh [T, n R]; dlogits [T, n E] or None; lora_a n x [R, I]; router_weight n x [E, I] or empty.
    Returns [T, I] in dh.dtype. Dropout draws the masks of the forward.
    """
    dtype = compute_dtype(dh)
    columns, a = dh.to(dtype).chunk(len(lora_a), dim=1), [part.to(dtype) for part in lora_a]
    if dropout_p > 0.0 and dropout_per_expert:
        parts = [
            dropout(column[:, c] @ part[c], dropout_p, seed, e)
            for column, part in zip(columns, a, strict=True)
            for e, c in enumerate(blocks(ranks))
        ]
        dx = torch.stack(parts).sum(dim=0)
    else:
        dx = torch.stack([c @ part for c, part in zip(columns, a, strict=True)]).sum(dim=0)
        if dropout_p > 0.0:
            dx = dropout(dx, dropout_p, seed)
    if dlogits is not None:
        dx = dx + dlogits.to(dtype) @ torch.cat([w.to(dtype) for w in router_weight])
    return dx.to(dh.dtype)


def gram(
    x: Tensor,
    dh: Tensor,
    dlogits: Tensor | None,
    dy: Sequence[Tensor],
    u: Tensor,
    lora_dtype: torch.dtype,
    router_dtype: torch.dtype,
    ranks: Sequence[int],
    dropout_p: float = 0.0,
    dropout_per_expert: bool = False,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """The gradients of all parameters: products that sum over the tokens.

        dA = dh^T dropout(x)        [n R, I]        dB_i = dy_i^T u_i       [O_i, R]
        dWr = dlogits^T x           [n E, I]        dbr = sum_t dlogits     [n E]

    x [T, I]; dh [T, n R]; dlogits [T, n E] or None (then dWr and dbr are empty); dy n x [T, O_i];
    u [T, n R]. Returns dA, dWr, dbr and the list of dB_i.
    """
    dtype, siblings = compute_dtype(x), len(dy)
    left = dh.to(dtype).t()
    if dropout_p == 0.0:
        da = left @ x.to(dtype)
    elif dropout_per_expert:
        dropped = [dropout(x, dropout_p, seed, e).to(dtype) for e in range(len(ranks))]
        parts = left.split([*ranks] * siblings)
        da = torch.cat([part @ dropped[i % len(ranks)] for i, part in enumerate(parts)])
    else:
        da = left @ dropout(x, dropout_p, seed).to(dtype)
    drouter, dbias = (x.new_empty(0, dtype=router_dtype) for _ in range(2))
    if dlogits is not None:
        drouter = (dlogits.to(dtype).t() @ x.to(dtype)).to(router_dtype)
        dbias = dlogits.to(dtype).sum(dim=0).to(router_dtype)
    gated = u.to(dtype).chunk(siblings, dim=1)
    db = [(g.to(dtype).t() @ part).to(lora_dtype) for g, part in zip(dy, gated, strict=True)]
    return da.to(lora_dtype), drouter, dbias, db


def wide(
    x: Tensor,
    weight: Sequence[Tensor],
    bias: Sequence[Tensor],
    base: Sequence[Tensor],
    lora_a: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    router_weight: Sequence[Tensor],
    router_bias: Sequence[Tensor],
    gates: Tensor | None,
    indices: Tensor | None,
    rows: Tensor | None,
    seed: Tensor | None,
    *plan,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """A whole layer of n siblings, differentiable by autograd: y_i = x Wt_i + b_i + u_i Bt_i.

    weight n x [O_i, I] and bias n x [O_i] (or empty), or base n x [T, O_i] in place of x Wt + b;
    lora_b n x [O_i, R]; the rest as `shrink_gate`, whose arguments after router_bias are `plan`.
    Returns n x [T, O_i] in the dtype of base or x, and what `shrink_gate` returns but u.
    """
    dtype = compute_dtype(x)
    h, u, weights, chosen, logits = shrink_gate(
        x, lora_a, gates, indices, rows, router_weight, router_bias, *plan, seed
    )
    y = []
    for i, (gated, b) in enumerate(zip(u.chunk(len(lora_b), dim=1), lora_b, strict=True)):
        if base:
            start = base[i].to(dtype)
        else:
            start = x.to(dtype) @ weight[i].to(dtype).t() + (bias[i].to(dtype) if bias else 0)
        y.append((start + gated.to(dtype) @ b.to(dtype).t()).to((base[i] if base else x).dtype))
    return y, h, weights, chosen, logits
