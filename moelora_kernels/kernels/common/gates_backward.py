"""Device functions: the backward of the gate of a tile of tokens."""

import triton
import triton.language as tl

from moelora_kernels.kernels.common.gates import gate_per_column, load_expert_columns
from moelora_kernels.kernels.common.products import exact_sum


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
    """Return the gradient of the logits of `topk_gate`, [BLOCK_T, BLOCK_E].

    dlogits = s (.) (dgate - <gate, dgate>) / temperature, where s is the softmax: the gate itself
    with RENORMALIZE, else the softmax over all experts. `logits` are read without RENORMALIZE only.
    """
    dgate = tl.where(routed, dgate, 0.0)
    mean = tl.sum(tl.where(routed, gate * dgate, 0.0), axis=1)[:, None]
    if RENORMALIZE:
        dlogits = tl.where(routed, gate * (dgate - mean), 0.0)
    else:
        is_expert = tl.arange(0, BLOCK_E)[None, :] < E
        scaled = tl.where(is_expert, tl.div_rn(logits, temperature), float("-inf"))
        largest = tl.max(scaled, axis=1)[:, None]
        exponential = tl.where(is_expert, tl.exp(scaled - largest), 0.0)
        dlogits = exponential / tl.sum(exponential, axis=1)[:, None] * (dgate - mean)
    return tl.div_rn(dlogits, temperature)


@triton.jit
def gate_columns(
    du,
    scaled_gate,
    dgate,
    h_ptr,
    dh_ptr,
    u_ptr,
    expert_columns_ptr,
    tokens,
    tokens_in,
    sibling,
    columns,
    n: tl.constexpr,
    A_ROWS: tl.constexpr,
    R: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Store dh and u of these columns, and return dgate + <du, h> over the columns of every expert.

    du [BLOCK_T, BLOCK_R]; scaled_gate = scale * gate and dgate [BLOCK_T, BLOCK_E]. dh is not stored
    if A_ROWS < R, because it is then a sum over all experts.
    """
    expert_columns = load_expert_columns(expert_columns_ptr, columns, E, R, BLOCK_E)
    column_gate = gate_per_column(scaled_gate, expert_columns, UPCAST)  # [BLOCK_T, BLOCK_R]
    in_bounds = tokens_in[:, None] & (columns < R)[None, :]
    offsets = tokens[:, None] * (n * R) + sibling * R + columns[None, :]
    h_offsets = tokens[:, None] * (n * A_ROWS) + sibling * A_ROWS + (columns % A_ROWS)[None, :]
    h = tl.load(h_ptr + h_offsets, mask=in_bounds, other=0.0).to(tl.float32)
    u = tl.where(column_gate == 0, 0.0, column_gate * h)
    tl.store(u_ptr + offsets, u.to(u_ptr.dtype.element_ty), mask=in_bounds)
    if A_ROWS == R:
        dh = tl.where(column_gate == 0, 0.0, column_gate * du)
        tl.store(dh_ptr + offsets, dh.to(dh_ptr.dtype.element_ty), mask=in_bounds)
    return exact_sum(du * h, tl.trans(expert_columns), dgate, UPCAST)


@triton.jit
def store_dgate(
    dgate,
    gate,
    routed,
    scaling,
    gate_experts_ptr,
    logits_ptr,
    dlogits_ptr,
    dgate_ptr,
    tokens,
    tokens_in,
    sibling,
    temperature,
    n: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    FORM: tl.constexpr,
    ROUTER: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Store the gradient of the gate or of the router's logits. dgate is <du, h> by expert.

    With ROUTER, it is the gradient of the logits [T, n E], plus dlogits (None: nothing to add).
    With FORM "sparse", of the weights [T, n K]. Otherwise, of the gate of every token [T, n E].
    """
    experts = tl.arange(0, BLOCK_E)
    dgate *= scaling
    in_bounds = tokens_in[:, None] & (experts < E)[None, :]
    offsets = tokens[:, None] * (n * E) + sibling * E + experts[None, :]
    if ROUTER:
        logits = dgate
        if not RENORMALIZE:
            logits = tl.load(logits_ptr + offsets, mask=in_bounds, other=0.0)
        dlogits = topk_gate_backward(
            dgate, gate, routed, logits, temperature, E, RENORMALIZE, BLOCK_E
        )
        if dlogits_ptr is not None:
            dlogits += tl.load(dlogits_ptr + offsets, mask=in_bounds, other=0.0)
        tl.store(dgate_ptr + offsets, dlogits, mask=in_bounds)
    elif FORM == "sparse":
        for k in range(K):
            slot = tokens * (n * K) + sibling * K + k
            expert = tl.load(gate_experts_ptr + slot, mask=tokens_in, other=-1)
            matches = (expert[:, None] == experts[None, :]) & (experts < E)[None, :]
            dweight = tl.sum(tl.where(matches, dgate, 0.0), axis=1)
            tl.store(dgate_ptr + slot, dweight, mask=tokens_in)
    else:
        tl.store(dgate_ptr + offsets, dgate, mask=in_bounds)
