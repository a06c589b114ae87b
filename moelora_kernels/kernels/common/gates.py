"""Device functions: the gate of a tile of tokens, [BLOCK_T, BLOCK_E], as the reference defines it.

`experts_ptr` is S [E, R] of `launcher.expert_columns`: 1 in the columns of an expert, 0 elsewhere.
A gate W [T, E] is repeated over the ranks by W S, and the sum over the ranks of an expert is a
product with St, whatever the ranks are.

FORM names how gates are given: "sparse" (weights and indices [T, n K]), "dense" ([T, n E]), "one"
([1, n E], a row for all tokens), "rows" ([G, n E] and rows [T]); "router" is a linear router's.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moelora_kernels.kernels.common.products import exact_sum


@triton.jit
def finite(tile):
    """Whether elements are neither NaN nor infinite."""
    return tl.abs(tile) < float("inf")


@triton.jit
def dense_gate(
    gates_ptr,
    indices_ptr,
    rows_ptr,
    tokens,
    inside,
    sibling,
    G,
    n: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    FORM: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The gate of these tokens in float32 and whether a token is routed to an expert."""
    experts = tl.arange(0, BLOCK_E)
    if FORM == "sparse":
        gate = tl.zeros((tokens.shape[0], BLOCK_E), tl.float32)
        routed = gate != 0
        for k in range(K):
            slot = tokens * (n * K) + sibling * K + k
            index = tl.load(indices_ptr + slot, mask=inside, other=-1)
            weight = tl.load(gates_ptr + slot, mask=inside, other=0.0).to(tl.float32)
            here = (index[:, None] == experts[None, :]) & (experts < E)[None, :]
            gate += tl.where(here, weight[:, None], 0.0)
            routed = routed | here
    else:
        row = tokens
        if FORM == "one":
            row = tokens * 0
        elif FORM == "rows":
            row = tl.load(rows_ptr + tokens, mask=inside, other=-1).to(tl.int64)
        routed = (inside & (row >= 0) & (row < G))[:, None] & (experts < E)[None, :]
        address = gates_ptr + row[:, None] * (n * E) + sibling * E + experts[None, :]
        gate = tl.load(address, mask=routed, other=0.0).to(tl.float32)
    return gate, routed


@triton.jit
def load_experts(experts_ptr, columns, E: tl.constexpr, R: tl.constexpr, BLOCK_E: tl.constexpr):
    """Columns of S, [BLOCK_E, BLOCK_R]."""
    experts = tl.arange(0, BLOCK_E)
    inside = (experts < E)[:, None] & (columns < R)[None, :]
    return tl.load(experts_ptr + experts[:, None] * R + columns[None, :], mask=inside, other=0.0)


@triton.jit
def load_scaling(scaling_ptr, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """scale of every expert, [1, BLOCK_E]."""
    experts = tl.arange(0, BLOCK_E)
    return tl.load(scaling_ptr + experts, mask=experts < E, other=0.0)[None, :]


@triton.jit
def rank_gate(scaled, of_experts, UPCAST: tl.constexpr):
    """scale * gate, [BLOCK_T, BLOCK_E], over the columns of S, [BLOCK_T, BLOCK_R]."""
    total = tl.zeros((scaled.shape[0], of_experts.shape[1]), tl.float32)
    return exact_sum(scaled, of_experts, total, UPCAST)


@triton.jit
def gated(gate, h):
    """gate (.) h, where the gate is zero without what is not finite in h."""
    return tl.where((gate == 0) & (finite(h) == 0), 0.0, gate * h)


@triton.jit
def topk_gate(
    logits,
    temperature,
    E: tl.constexpr,
    K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The gate of the K largest logits, and the place of an expert among them (K: not chosen)."""
    experts = tl.arange(0, BLOCK_E)[None, :]
    real = (experts < E) & (tl.zeros_like(logits) == 0)
    scaled = tl.where(real, tl.div_rn(logits, temperature), float("-inf"))
    if K == E:
        place = tl.where(real, experts, K)
    else:
        # A NaN is the largest, as where torch sorts; what is taken already has another place than
        # K, so that an expert is found once although several are -inf.
        key = tl.where(scaled == scaled, scaled, float("inf"))
        place = tl.where(real, K, -1)
        for k in range(K):
            free = place == K
            largest = tl.max(tl.where(free, key, float("-inf")), axis=1)
            among = free & (key == largest[:, None])
            first = tl.min(tl.where(among, experts, BLOCK_E), axis=1)
            place = tl.where(experts == first[:, None], k, place)
        place = tl.where(place < 0, K, place)
    chosen = place < K
    counted = real
    if RENORMALIZE:
        counted = chosen
    largest = tl.max(tl.where(counted, scaled, float("-inf")), axis=1)
    exponential = tl.where(counted, tl.exp(scaled - largest[:, None]), 0.0)
    gate = exponential / tl.sum(exponential, axis=1)[:, None]
    return tl.where(chosen, gate, 0.0), place


@triton.jit
def store_routing(
    weights_ptr,
    indices_ptr,
    gate,
    place,
    tokens,
    inside,
    sibling,
    n: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Weights [T, n K] and, unless every expert is chosen, indices [T, n K], in their places."""
    experts = tl.arange(0, BLOCK_E)[None, :]
    slots = tokens[:, None] * (n * K) + sibling * K + place
    chosen = inside[:, None] & (place < K)
    tl.store(weights_ptr + slots, gate, mask=chosen)
    if indices_ptr is not None:
        tl.store(indices_ptr + slots, (experts + place * 0).to(tl.int32), mask=chosen)


@triton.jit
def topk_gate_backward(
    dgate,
    gate,
    routed,
    logits,
    temperature,
    E: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Dlogits from the gradient of the gate; logits are read without RENORMALIZE only."""
    dgate = tl.where(routed, dgate, 0.0)
    mean = tl.sum(tl.where(routed, gate * dgate, 0.0), axis=1)[:, None]
    if RENORMALIZE:
        dlogits = tl.where(routed, gate * (dgate - mean), 0.0)
    else:
        real = tl.arange(0, BLOCK_E)[None, :] < E
        scaled = tl.where(real, tl.div_rn(logits, temperature), float("-inf"))
        slope = tl.where(real, tl.exp(scaled - tl.max(scaled, axis=1)[:, None]), 0.0)
        dlogits = slope / tl.sum(slope, axis=1)[:, None] * (dgate - mean)
    return tl.div_rn(dlogits, temperature)


def gate_form(
    gates: Tensor, indices: Tensor | None, rows: Tensor | None, tokens: int, n: int
) -> tuple[int, str]:
    """K and FORM of gates that are given."""
    if indices is not None:
        return gates.shape[1] // n, "sparse"
    if rows is not None:
        return 0, "rows"
    return 0, "dense" if gates.shape[0] == tokens else "one"
