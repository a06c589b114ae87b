"""The wide formulation: two skinny products over all experts, gated in rank space."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moelora_kernels.reference.gates import (
    blocks,
    compute_dtype,
    dense_gate,
    dense_gate_backward,
    dropout,
    rank_gate,
    topk_gate,
    topk_gate_backward,
)


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


def weight_grad(
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
    *mixture,
) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """A whole layer of n siblings, differentiable by autograd: y_i = x Wt_i + b_i + u_i Bt_i.

    weight n x [O_i, I] and bias n x [O_i] (or empty), or base n x [T, O_i] in place of x Wt + b;
    lora_b n x [O_i, R]; the rest as `shrink_gate`, whose arguments after router_bias are `mixture`.
    Returns n x [T, O_i] in the dtype of base or x, and what `shrink_gate` returns but u.
    """
    dtype = compute_dtype(x)
    h, u, weights, chosen, logits = shrink_gate(
        x, lora_a, gates, indices, rows, router_weight, router_bias, *mixture, seed
    )
    y = []
    for i, (gated, b) in enumerate(zip(u.chunk(len(lora_b), dim=1), lora_b, strict=True)):
        if base:
            start = base[i].to(dtype)
        else:
            start = x.to(dtype) @ weight[i].to(dtype).t() + (bias[i].to(dtype) if bias else 0)
        y.append((start + gated.to(dtype) @ b.to(dtype).t()).to((base[i] if base else x).dtype))
    return y, h, weights, chosen, logits
