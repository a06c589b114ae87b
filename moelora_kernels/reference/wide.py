"""The wide form: two skinny products over all experts, gated in rank space.

Each function is the specification of the op of its name. `moelora_kernels.ops` describes the
arguments.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from moelora_kernels.numerics import absent, compute_dtype
from moelora_kernels.reference.gates import (
    blocks,
    dense_gate,
    dense_gate_backward,
    drop_elements,
    rank_gate,
    topk_gate,
    topk_gate_backward,
)
from moelora_kernels.types import (
    NO_DROPOUT,
    Decoded,
    Dropout,
    Gate,
    LayerForward,
    Mixture,
    RouterTensors,
    Shrunk,
    ShrunkGrads,
    SiblingTensors,
    WeightGrads,
)


def shrink_gate(
    x: Tensor,
    lora_a: Sequence[Tensor],
    router: RouterTensors,
    gate: Gate | None,
    mixture: Mixture,
    dropout: Dropout = NO_DROPOUT,
) -> Shrunk:
    """Compute h and u of n siblings, and with linear routers the gate.

        h = dropout(x) At               without the gate
        u = scale * gate (.) h          zero if the gate is zero, even if h is NaN
        logits = x Wrt + br             float32; then `topk_gate` of each sibling's E columns

    x [T, I]; lora_a n x [R, I], with share_a n x [r, I]; router n x [E, I] and n x [E], or empty;
    gate: None if the routers compute it.
    Returns h [T, n R] ([T, n r]) and u [T, n R] in x's dtype; weights [T, n K] and logits
    [T, n E] in the compute dtype; experts [T, n K] int32. experts is empty if K = E. All three are
    empty if a gate is passed.
    """
    dtype, n, E, T = compute_dtype(x), len(lora_a), len(mixture.ranks), x.shape[0]
    # x is converted only once, so that autograd rounds the gradient of x only once.
    converted_x = x.to(dtype)
    h = _shrink(x, converted_x, lora_a, mixture.ranks, dropout).to(x.dtype)

    weights, logits = absent(x, dtype), absent(x, dtype)
    experts = absent(x, torch.int32)
    if len(router.weight):
        logits = _logits(converted_x, router)
        K = mixture.router_top_k
        weights, top_experts = topk_gate(
            logits.view(T * n, E), K, mixture.renormalize, mixture.temperature
        )
        weights = weights.view(T, n * K)
        if K < E:
            experts = top_experts.view(T, n * K)
        gate = mixture.router_gate(weights, experts, logits)

    assert gate is not None
    by_rank = rank_gate(dense_gate(gate, T, n, E, dtype), mixture.ranks, mixture.scaling)
    h_of_ranks = _per_rank(h.to(dtype), n, mixture)
    # 0 * NaN is NaN, so a value of h that is not finite is replaced if its gate is zero. Finite
    # values stay, because autograd differentiates this product: the gradient <du, h> of a zero gate
    # needs h. `shrink_gate_backward` is not differentiated: there u is zero if the gate is.
    selected = torch.where((by_rank == 0) & ~h_of_ranks.isfinite(), 0, h_of_ranks)
    u = (by_rank * selected).flatten(1).to(x.dtype)
    return Shrunk(h, u, weights, experts, logits)


def _shrink(
    x: Tensor, converted_x: Tensor, lora_a: Sequence[Tensor], ranks: Sequence[int], dropout: Dropout
) -> Tensor:
    """Return dropout(x) At of all siblings, [T, n R] or [T, n r], in the compute dtype.

    converted_x: x in the compute dtype.
    """
    dtype = converted_x.dtype
    if dropout.p > 0.0 and dropout.per_expert:
        per_expert = [drop_elements(x, dropout, e).to(dtype) for e in range(len(ranks))]
        products = [
            per_expert[e] @ a[block].to(dtype).t()
            for a in lora_a
            for e, block in enumerate(blocks(ranks))
        ]
    else:
        dropped = drop_elements(x, dropout).to(dtype) if dropout.p > 0.0 else converted_x
        products = [dropped @ a.to(dtype).t() for a in lora_a]
    return torch.cat(products, dim=1)


def _logits(x: Tensor, router: RouterTensors) -> Tensor:
    """Return the logits of n routers, [T, n E], in x's dtype."""
    biases = router.bias if len(router.bias) else [None] * len(router.weight)
    products = [
        linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        for weight, bias in zip(router.weight, biases, strict=True)
    ]
    return torch.cat(products, dim=1)


def _per_rank(h: Tensor, n: int, mixture: Mixture) -> Tensor:
    """Return h as [T, n, R]; with share_a the r columns are repeated for every expert."""
    repeat = len(mixture.ranks) if mixture.share_a else 1
    return h.view(h.shape[0], n, h.shape[1] // n).repeat(1, 1, repeat)


def shrink_gate_backward(
    dy: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    h: Tensor,
    gate: Gate,
    dlogits: Tensor | None,
    mixture: Mixture,
) -> ShrunkGrads:
    """Compute dh and the gradient of the gate from dy; and u again, for dB.

        du = dy B                           [T, n R], never stored
        dh = scale * gate (.) du            share_a: summed over the experts
        dgate[t, e] = scale * <du, h>       over the ranks of e; zero if t is not routed to e

    dy n x [T, O_i]; lora_b n x [O_i, R]; h [T, n R]; dlogits [T, n E] or None. gate.logits is read
    only without renormalize. Returns dh and u in h's dtype, and dgate in the compute dtype. If
    router_top_k is 0, dgate is the gradient of gate.weights. Otherwise it is the gradient of the
    logits, [T, n E], with dlogits added.
    """
    dtype, n, T, E = compute_dtype(h), len(dy), h.shape[0], len(mixture.ranks)
    by_rank = rank_gate(dense_gate(gate, T, n, E, dtype), mixture.ranks, mixture.scaling)
    h_of_ranks = _per_rank(h.to(dtype), n, mixture)
    u = torch.where(by_rank == 0, 0, by_rank * h_of_ranks).flatten(1).to(h.dtype)

    products = [g.to(dtype) @ b.to(dtype) for g, b in zip(dy, lora_b, strict=True)]
    du = torch.stack(products, dim=1)
    dh = torch.where(by_rank == 0, 0, by_rank * du)
    if mixture.share_a:
        dh = dh.view(T, n, E, mixture.ranks[0]).sum(dim=2)
    dh = dh.flatten(1).to(h.dtype)

    inner = du * h_of_ranks
    dgate = torch.stack(
        [
            s * inner[..., columns].sum(dim=-1)
            for s, columns in zip(mixture.scaling, blocks(mixture.ranks), strict=True)
        ],
        dim=2,
    )
    dweights = dense_gate_backward(dgate, gate)
    if mixture.router_top_k == 0:
        return ShrunkGrads(dh, u, dweights)
    router_dlogits = _router_dlogits(dweights, gate, n, mixture)
    return ShrunkGrads(dh, u, router_dlogits if dlogits is None else router_dlogits + dlogits)


def _router_dlogits(dweights: Tensor, gate: Gate, n: int, mixture: Mixture) -> Tensor:
    """Apply `topk_gate_backward` to n routers: dlogits [T, n E] from dweights [T, n K]."""
    T, E, K = dweights.shape[0], len(mixture.ranks), mixture.router_top_k
    experts = gate.experts
    if experts is None:
        experts = torch.arange(K, device=dweights.device).expand(T * n, K)
    # With renormalize `topk_gate_backward` reads only the shape of the logits.
    logits = dweights.new_empty(T * n, E)
    if not mixture.renormalize:
        assert gate.logits is not None
        logits = gate.logits.view(T * n, E)
    return topk_gate_backward(
        dweights.view(T * n, K),
        gate.weights.view(T * n, K),
        experts.view(T * n, K),
        logits,
        mixture.renormalize,
        mixture.temperature,
    ).view(T, n * E)


def shrink_dx(
    dh: Tensor,
    dlogits: Tensor | None,
    lora_a: Sequence[Tensor],
    router_weight: Sequence[Tensor],
    ranks: Sequence[int],
    dropout: Dropout = NO_DROPOUT,
) -> Tensor:
    """Compute dropout(dh A) + dlogits Wr, summed over the n siblings.

    dh [T, n R]; dlogits [T, n E] or None; lora_a n x [R, I]; router_weight n x [E, I] or empty.
    The dropout masks are the same as in the forward. Returns [T, I] in dh's dtype.
    """
    dtype = compute_dtype(dh)
    pairs = [
        (columns, a.to(dtype))
        for columns, a in zip(dh.to(dtype).chunk(len(lora_a), dim=1), lora_a, strict=True)
    ]
    if dropout.p > 0.0 and dropout.per_expert:
        terms = [
            drop_elements(columns[:, c] @ a[c], dropout, e)
            for columns, a in pairs
            for e, c in enumerate(blocks(ranks))
        ]
        dx = torch.stack(terms).sum(dim=0)
    else:
        dx = torch.stack([columns @ a for columns, a in pairs]).sum(dim=0)
        if dropout.p > 0.0:
            dx = drop_elements(dx, dropout)
    if dlogits is not None:
        dx = dx + dlogits.to(dtype) @ torch.cat([w.to(dtype) for w in router_weight])
    return dx.to(dh.dtype)


def weight_grad(
    x: Tensor,
    dh: Tensor,
    dlogits: Tensor | None,
    dy: Sequence[Tensor],
    u: Tensor,
    ranks: Sequence[int],
    dropout: Dropout,
    lora_dtype: torch.dtype,
    router_dtype: torch.dtype,
) -> WeightGrads:
    """Compute the gradients of all parameters: products that sum over the tokens.

        dA = dh^T dropout(x)        [n R, I]        dB_i = dy_i^T u_i       [O_i, R]
        dWr = dlogits^T x           [n E, I]        dbr = sum_t dlogits     [n E]

    x [T, I]; dh [T, n R]; dlogits [T, n E], or None: dWr and dbr are then empty; dy n x [T, O_i];
    u [T, n R]. Returns dA and dB in lora_dtype, dWr and dbr in router_dtype: the dtypes of A and of
    the routers.
    """
    dtype, n = compute_dtype(x), len(dy)
    dh_t = dh.to(dtype).t()
    if dropout.p > 0.0 and dropout.per_expert:
        dropped = [drop_elements(x, dropout, e).to(dtype) for e in range(len(ranks))]
        dh_of_experts = dh_t.split([*ranks] * n)
        da = torch.cat([dh_e @ dropped[e % len(ranks)] for e, dh_e in enumerate(dh_of_experts)])
    else:
        da = dh_t @ (drop_elements(x, dropout) if dropout.p > 0.0 else x).to(dtype)
    drouter, dbias = absent(x, router_dtype), absent(x, router_dtype)
    if dlogits is not None:
        drouter = (dlogits.to(dtype).t() @ x.to(dtype)).to(router_dtype)
        dbias = dlogits.to(dtype).sum(dim=0).to(router_dtype)
    db = [
        (g.to(dtype).t() @ columns).to(lora_dtype)
        for g, columns in zip(dy, u.to(dtype).chunk(n, dim=1), strict=True)
    ]
    return WeightGrads(da.to(lora_dtype), drouter, dbias, db)


def wide(
    x: Tensor,
    tensors: SiblingTensors,
    gate: Gate | None,
    mixture: Mixture,
    dropout: Dropout = NO_DROPOUT,
) -> LayerForward:
    """Compute a layer of n siblings: y_i = x Wt_i + b_i + u_i Bt_i. Autograd differentiates it.

    x [T, I]; weight n x [O_i, I] and bias n x [O_i] (or empty), or base_output n x [T, O_i] in the
    place of x Wt + b; lora_b n x [O_i, R]. Returns y n x [T, O_i] in the dtype of base_output or
    x; and h, weights, experts and logits of `shrink_gate`.
    """
    dtype = compute_dtype(x)
    weight, bias, base_output, lora_a, lora_b, router_weight, router_bias = tensors
    h, u, weights, experts, logits = shrink_gate(
        x, lora_a, RouterTensors(router_weight, router_bias), gate, mixture, dropout
    )
    y = []
    for i, (u_i, lora_b_i) in enumerate(zip(u.chunk(len(lora_b), dim=1), lora_b, strict=True)):
        if base_output:
            base = base_output[i].to(dtype)
        else:
            base = x.to(dtype) @ weight[i].to(dtype).t() + (bias[i].to(dtype) if bias else 0)
        result = base + u_i.to(dtype) @ lora_b_i.to(dtype).t()
        y.append(result.to((base_output[i] if base_output else x).dtype))
    return LayerForward(y, h, weights, experts, logits)


def decode(x: Tensor, tensors: SiblingTensors, gate: Gate | None, mixture: Mixture) -> Decoded:
    """Compute a layer of n siblings without dropout: y, weights, experts and logits of `wide`."""
    y, _, weights, experts, logits, *_ = wide(x, tensors, gate, mixture)
    return Decoded(y, weights, experts, logits)
