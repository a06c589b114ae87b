"""Device functions: the gate of a tile of tokens, [BLOCK_T, BLOCK_E] float32.

FORM is the form of the gate (`types.Gate` explains the first four):

    "sparse"    weights [T, n K] and experts [T, n K]
    "dense"     weights [T, n E]
    "one"       weights [1, n E]: one row for all tokens
    "rows"      weights [G, n E] and rows [T]
    "router"    the logits of a linear router, which the kernel computes

From experts to columns of rank space and back, a kernel multiplies by the matrix `expert_columns`
[E, R] (`tables.expert_columns`), which is 1 in the columns of an expert and 0 elsewhere. The
product of the gate and this matrix repeats the gate of an expert over its columns. The product of
du (.) h and its transpose sums the columns of an expert. Both work for any ranks.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moelora_kernels.kernels.common.products import exact_sum, is_finite, select_from


@triton.jit
def dense_gate(
    gate_weights_ptr,
    gate_experts_ptr,
    gate_rows_ptr,
    tokens,
    tokens_in,
    sibling,
    G,
    n: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    FORM: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Return the gate of these tokens, and whether each token is routed to each expert.

    The gate may be dense or sparse, as FORM says; the results are dense. Both are
    [BLOCK_T, BLOCK_E]. The gate is 0 if a token is not routed to the expert.
    """
    experts = tl.arange(0, BLOCK_E)
    if FORM == "sparse":
        gate = tl.zeros((tokens.shape[0], BLOCK_E), tl.float32)
        routed = gate != 0
        for k in range(K):
            slot = tokens * (n * K) + sibling * K + k
            expert = tl.load(gate_experts_ptr + slot, mask=tokens_in, other=-1)
            weight = tl.load(gate_weights_ptr + slot, mask=tokens_in, other=0.0).to(tl.float32)
            matches = (expert[:, None] == experts[None, :]) & (experts < E)[None, :]
            gate += tl.where(matches, weight[:, None], 0.0)
            routed = routed | matches
    else:
        row = tokens
        if FORM == "one":
            row = tokens * 0
        elif FORM == "rows":
            row = tl.load(gate_rows_ptr + tokens, mask=tokens_in, other=-1).to(tl.int64)
        routed = (tokens_in & (row >= 0) & (row < G))[:, None] & (experts < E)[None, :]
        address = gate_weights_ptr + row[:, None] * (n * E) + sibling * E + experts[None, :]
        gate = tl.load(address, mask=routed, other=0.0).to(tl.float32)
    return gate, routed


@triton.jit
def load_expert_columns(
    expert_columns_ptr, columns, E: tl.constexpr, R: tl.constexpr, BLOCK_E: tl.constexpr
):
    """Return these columns of `expert_columns`, [BLOCK_E, BLOCK_R] bfloat16."""
    experts = tl.arange(0, BLOCK_E)
    in_bounds = (experts < E)[:, None] & (columns < R)[None, :]
    address = expert_columns_ptr + experts[:, None] * R + columns[None, :]
    return tl.load(address, mask=in_bounds, other=0.0)


@triton.jit
def load_scaling(scaling_ptr, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Return the scale of every expert, [1, BLOCK_E] float32."""
    experts = tl.arange(0, BLOCK_E)
    return tl.load(scaling_ptr + experts, mask=experts < E, other=0.0)[None, :]


@triton.jit
def gate_per_column(scaled_gate, expert_columns, UPCAST: tl.constexpr):
    """Return scale * gate [BLOCK_T, BLOCK_E] in every column of its expert, [BLOCK_T, BLOCK_R]."""
    total = tl.zeros((scaled_gate.shape[0], expert_columns.shape[1]), tl.float32)
    return exact_sum(scaled_gate, expert_columns, total, UPCAST)


@triton.jit
def apply_gate(column_gate, h):
    """Return column_gate (.) h [BLOCK_T, BLOCK_R]; 0 if the gate is 0 and h is NaN or infinite."""
    return tl.where((column_gate == 0) & (is_finite(h) == 0), 0.0, column_gate * h)


@triton.jit
def topk_gate(
    logits,
    temperature,
    E: tl.constexpr,
    K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Return the gate of the K largest logits, and the slot of every expert.

    logits [BLOCK_T, BLOCK_E] float32. gate [BLOCK_T, BLOCK_E]: softmax(logits / temperature) over
    the selected experts with RENORMALIZE, else over all E experts; 0 where not selected. slot
    [BLOCK_T, BLOCK_E]: 0 for the expert with the largest logit, 1 for the next, and so on; K for an
    expert that is not selected. With K = E, slot e is expert e.
    """
    experts = tl.arange(0, BLOCK_E)[None, :]
    is_expert = (experts < E) & (tl.zeros_like(logits) == 0)
    scaled = tl.where(is_expert, tl.div_rn(logits, temperature), float("-inf"))

    # Select: K times the largest logit among the experts without a slot, the first if several tie.
    if K == E:
        slot = tl.where(is_expert, experts, K)
    else:
        # A NaN counts as the largest, like in torch.sort. An expert that has a slot is excluded by
        # its slot, not by its key, so each expert is selected once even if several keys are -inf.
        key = tl.where(scaled == scaled, scaled, float("inf"))
        slot = tl.where(is_expert, K, -1)
        for k in range(K):
            free = slot == K
            largest = tl.max(tl.where(free, key, float("-inf")), axis=1)
            tied = free & (key == largest[:, None])
            first = tl.min(tl.where(tied, experts, BLOCK_E), axis=1)
            slot = tl.where(experts == first[:, None], k, slot)
        slot = tl.where(slot < 0, K, slot)
    selected = slot < K

    # Softmax: over the selected experts with RENORMALIZE, else over all E experts.
    counted = is_expert
    if RENORMALIZE:
        counted = selected
    largest = tl.max(tl.where(counted, scaled, float("-inf")), axis=1)
    exponential = tl.where(counted, tl.exp(scaled - largest[:, None]), 0.0)
    gate = exponential / tl.sum(exponential, axis=1)[:, None]
    return tl.where(selected, gate, 0.0), slot


@triton.jit
def store_topk(
    weights_ptr,
    experts_ptr,
    gate,
    slot,
    tokens,
    tokens_in,
    sibling,
    n: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Store the results of `topk_gate` by slot: weights [T, n K] and experts [T, n K] int32.

    experts_ptr is None if K = E: slot k is then expert k.
    """
    experts = tl.arange(0, BLOCK_E)[None, :]
    offsets = tokens[:, None] * (n * K) + sibling * K + slot
    selected = tokens_in[:, None] & (slot < K)
    tl.store(weights_ptr + offsets, gate, mask=selected)
    if experts_ptr is not None:
        tl.store(experts_ptr + offsets, (experts + slot * 0).to(tl.int32), mask=selected)


@triton.jit
def make_gate(
    logits,
    gate_weights_ptr,
    gate_experts_ptr,
    gate_rows_ptr,
    out_weights_ptr,
    out_experts_ptr,
    out_logits_ptr,
    tokens,
    tokens_in,
    sibling,
    G,
    temperature,
    n: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    FORM: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Return the gate [BLOCK_T, BLOCK_E] of these tokens.

    With FORM "router" the gate is computed from `logits` [BLOCK_T, BLOCK_E], and the logits, the
    weights and the experts are stored. Other forms load the gate that the caller passed.
    """
    if FORM == "router":
        experts = tl.arange(0, BLOCK_E)[None, :]
        in_bounds = tokens_in[:, None] & (experts < E)
        address = out_logits_ptr + tokens[:, None] * (n * E) + sibling * E + experts
        tl.store(address, logits, mask=in_bounds)
        gate, slot = topk_gate(logits, temperature, E, K, RENORMALIZE, BLOCK_E)
        store_topk(
            out_weights_ptr, out_experts_ptr, gate, slot, tokens, tokens_in, sibling, n, E, K,
            BLOCK_E,
        )  # fmt: skip
    else:
        gate, _ = dense_gate(
            gate_weights_ptr, gate_experts_ptr, gate_rows_ptr, tokens, tokens_in, sibling, G, n, E,
            K, FORM, BLOCK_E,
        )  # fmt: skip
    return gate


@triton.jit
def load_router_bias(bias_ptrs, sibling, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Return the bias of the sibling's router, [BLOCK_E] float32; zeros without a bias."""
    experts = tl.arange(0, BLOCK_E)
    if bias_ptrs is None:
        bias = tl.zeros((BLOCK_E,), tl.float32)
    else:
        address = select_from(bias_ptrs, sibling) + experts
        bias = tl.load(address, mask=experts < E, other=0.0).to(tl.float32)
    return bias


def gate_form(
    weights: Tensor, experts: Tensor | None, rows: Tensor | None, tokens: int, n: int
) -> tuple[int, str]:
    """Return (K, FORM) of a gate that the caller passes. K is 0 unless the gate is sparse."""
    if experts is not None:
        return weights.shape[1] // n, "sparse"
    if rows is not None:
        return 0, "rows"
    return 0, "dense" if weights.shape[0] == tokens else "one"
