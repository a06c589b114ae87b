"""P = dy B, gated: dh, the gradient of the gate or of the router's logits, and u once more."""

from __future__ import annotations

import triton
import triton.language as tl

from moelora_kernels import reference
from moelora_kernels.kernels.common import configs, gate_rows, launcher
from moelora_kernels.kernels.common.gates import (
    dense_gate,
    finite,
    gate_form,
    load_experts,
    load_scaling,
    rank_gate,
    topk_gate_backward,
)
from moelora_kernels.kernels.common.products import exact_sum, pick, product
from moelora_kernels.kernels.common.reduce_partials import load_partials
from moelora_kernels.kernels.shrink_gate import FUSED_EXPERTS

# Columns of rank space that are gated at a time, because P, h, the gate, dh and u of 128 columns
# together do not fit the registers. A program holds P of twice as many.
COLUMNS = 64


@triton.jit
def gate_columns(
    p,
    scaled,
    dgate,
    h_ptr,
    dh_ptr,
    u_ptr,
    experts_ptr,
    tokens,
    inside,
    sibling,
    columns,
    n: tl.constexpr,
    A_ROWS: tl.constexpr,
    R: tl.constexpr,
    E: tl.constexpr,
    BLOCK_E: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Store dh and u of these columns; dgate plus their <P, h>. (A_ROWS < R: without dh.)

    scaled is scale * gate [BLOCK_T, BLOCK_E].
    """
    of_experts = load_experts(experts_ptr, columns, E, R, BLOCK_E)
    scaled = rank_gate(scaled, of_experts, UPCAST)
    real = inside[:, None] & (columns < R)[None, :]
    at = tokens[:, None] * (n * R) + sibling * R + columns[None, :]
    at_h = tokens[:, None] * (n * A_ROWS) + sibling * A_ROWS + (columns % A_ROWS)[None, :]
    h = tl.load(h_ptr + at_h, mask=real, other=0.0).to(tl.float32)
    u = tl.where(scaled == 0, 0.0, scaled * h)
    tl.store(u_ptr + at, u.to(u_ptr.dtype.element_ty), mask=real)
    if A_ROWS == R:
        dh = tl.where(scaled == 0, 0.0, scaled * p)
        tl.store(dh_ptr + at, dh.to(dh_ptr.dtype.element_ty), mask=real)
    # An expert without a gate must not reach the sums of the others: 0 * NaN is NaN.
    inner = p * h
    inner = tl.where((scaled == 0) & (finite(inner) == 0), 0.0, inner)
    return exact_sum(inner, tl.trans(of_experts), dgate, UPCAST)


@triton.jit
def store_dgate(
    dgate,
    gate,
    routed,
    scaling,
    indices_ptr,
    logits_ptr,
    dlogits_ptr,
    dgate_ptr,
    tokens,
    inside,
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
    """The gradient of what the gate came from: logits, weights [T, n K], or the gate itself.

    dgate is <P, h> over the ranks of every expert.
    """
    experts = tl.arange(0, BLOCK_E)
    dgate *= scaling
    real = inside[:, None] & (experts < E)[None, :]
    at = tokens[:, None] * (n * E) + sibling * E + experts[None, :]
    if ROUTER:
        logits = dgate
        if not RENORMALIZE:
            logits = tl.load(logits_ptr + at, mask=real, other=0.0)
        dlogits = topk_gate_backward(
            dgate, gate, routed, logits, temperature, E, RENORMALIZE, BLOCK_E
        )
        if dlogits_ptr is not None:
            dlogits += tl.load(dlogits_ptr + at, mask=real, other=0.0)
        tl.store(dgate_ptr + at, dlogits, mask=real)
    elif FORM == "sparse":
        for k in range(K):
            slot = tokens * (n * K) + sibling * K + k
            index = tl.load(indices_ptr + slot, mask=inside, other=-1)
            here = (index[:, None] == experts[None, :]) & (experts < E)[None, :]
            tl.store(dgate_ptr + slot, tl.sum(tl.where(here, dgate, 0.0), axis=1), mask=inside)
    else:
        tl.store(dgate_ptr + at, dgate, mask=real)


@triton.jit(do_not_specialize=["T", "G", "temperature"])
def shrink_gate_backward_kernel(
    dy_ptrs,
    stride_dy,
    b_ptrs,
    outputs,
    per_split,
    h_ptr,
    gates_ptr,
    indices_ptr,
    rows_ptr,
    logits_ptr,
    dlogits_ptr,
    experts_ptr,
    scaling_ptr,
    dh_ptr,
    u_ptr,
    dgate_ptr,
    partials_ptr,
    T,
    G,
    temperature,
    n: tl.constexpr,
    A_ROWS: tl.constexpr,
    R: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    FORM: tl.constexpr,
    ROUTER: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    FUSED: tl.constexpr,
    COLUMN_TILES: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """FUSED: all of a token tile and sibling; else sums of products to partials [SPLIT, T, n R].

    Programs: (token tile, split of O, column tile of a sibling), the last fastest; a column tile
    has PARTS (1 or 2) times BLOCK_R columns. outputs and per_split are n numbers: O of a sibling
    and the part of it that one split sums.
    """
    pid = tl.program_id(0)
    sibling = pid % COLUMN_TILES // (COLUMN_TILES // n)
    columns = pid % (COLUMN_TILES // n) * (PARTS * BLOCK_R) + tl.arange(0, BLOCK_R)
    others = columns + BLOCK_R
    split = pid // COLUMN_TILES % SPLIT
    tokens = (pid // (COLUMN_TILES * SPLIT)).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = tokens < T
    dy_ptr = pick(dy_ptrs, sibling) + tokens[:, None] * pick(stride_dy, sibling)
    b_ptr = pick(b_ptrs, sibling)
    O = pick(outputs, sibling)  # noqa: E741
    part = pick(per_split, sibling)
    p = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    q = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for first in range(split * part, tl.minimum((split + 1) * part, O), BLOCK_O):
        o = first + tl.arange(0, BLOCK_O)
        some_o = o < O
        dy = tl.load(dy_ptr + o[None, :], mask=inside[:, None] & some_o[None, :], other=0.0)
        row = b_ptr + o.to(tl.int64)[:, None] * R
        b = tl.load(
            row + columns[None, :], mask=some_o[:, None] & (columns < R)[None, :], other=0.0
        )
        p = product(dy, b, p, UPCAST)
        if PARTS == 2:
            b = tl.load(
                row + others[None, :], mask=some_o[:, None] & (others < R)[None, :], other=0.0
            )
            q = product(dy, b, q, UPCAST)
    if FUSED:
        gate, routed = dense_gate(
            gates_ptr, indices_ptr, rows_ptr, tokens, inside, sibling, G, n, E, K, FORM, BLOCK_E
        )
        scaling = load_scaling(scaling_ptr, E, BLOCK_E)
        dgate = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
        dgate = gate_columns(
            p, gate * scaling, dgate, h_ptr, dh_ptr, u_ptr, experts_ptr, tokens, inside, sibling,
            columns, n, A_ROWS, R, E, BLOCK_E, UPCAST,
        )  # fmt: skip
        if PARTS == 2:
            dgate = gate_columns(
                q, gate * scaling, dgate, h_ptr, dh_ptr, u_ptr, experts_ptr, tokens, inside,
                sibling, others, n, A_ROWS, R, E, BLOCK_E, UPCAST,
            )  # fmt: skip
        store_dgate(
            dgate, gate, routed, scaling, indices_ptr, logits_ptr, dlogits_ptr, dgate_ptr, tokens,
            inside, sibling, temperature, n, E, K, FORM, ROUTER, RENORMALIZE, BLOCK_E,
        )  # fmt: skip
    else:
        plane = partials_ptr + (split * T + tokens)[:, None] * (n * R) + sibling * R
        tl.store(plane + columns[None, :], p, mask=inside[:, None] & (columns < R)[None, :])
        if PARTS == 2:
            tl.store(plane + others[None, :], q, mask=inside[:, None] & (others < R)[None, :])


@triton.jit(do_not_specialize=["T", "G", "temperature"])
def gate_partials_backward_kernel(
    partials_ptr,
    h_ptr,
    gates_ptr,
    indices_ptr,
    rows_ptr,
    logits_ptr,
    dlogits_ptr,
    experts_ptr,
    scaling_ptr,
    dh_ptr,
    u_ptr,
    dgate_ptr,
    T,
    G,
    temperature,
    n: tl.constexpr,
    A_ROWS: tl.constexpr,
    R: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    FORM: tl.constexpr,
    ROUTER: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The same from the partials, added in their order. Programs: (tokens, sibling).

    With A_ROWS < R all experts share the rows of A, and dh sums over the experts.
    """
    sibling = tl.program_id(0) % n
    tokens = (tl.program_id(0) // n).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = tokens < T
    gate, routed = dense_gate(
        gates_ptr, indices_ptr, rows_ptr, tokens, inside, sibling, G, n, E, K, FORM, BLOCK_E
    )
    scaling = load_scaling(scaling_ptr, E, BLOCK_E)
    scaled = gate * scaling
    dgate = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for first in range(0, R, BLOCK_R):
        columns = first + tl.arange(0, BLOCK_R)
        p = load_partials(
            partials_ptr, tokens, inside, sibling, columns, columns < R, T, n, R, SPLIT
        )
        dgate = gate_columns(
            p, scaled, dgate, h_ptr, dh_ptr, u_ptr, experts_ptr, tokens, inside, sibling, columns,
            n, A_ROWS, R, E, BLOCK_E, UPCAST,
        )  # fmt: skip
    store_dgate(
        dgate, gate, routed, scaling, indices_ptr, logits_ptr, dlogits_ptr, dgate_ptr, tokens,
        inside, sibling, temperature, n, E, K, FORM, ROUTER, RENORMALIZE, BLOCK_E,
    )  # fmt: skip
    if A_ROWS < R:
        for first in range(0, A_ROWS, BLOCK_R):
            of_a = first + tl.arange(0, BLOCK_R)
            dh = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
            for e in range(E):
                columns = tl.where(of_a < A_ROWS, e * A_ROWS + of_a, R)
                p = load_partials(
                    partials_ptr, tokens, inside, sibling, columns, columns < R, T, n, R, SPLIT
                )
                of_experts = load_experts(experts_ptr, columns, E, R, BLOCK_E)
                by_rank = rank_gate(scaled, of_experts, UPCAST)
                dh += tl.where(by_rank == 0, 0.0, by_rank * p)
            at = tokens[:, None] * (n * A_ROWS) + sibling * A_ROWS + of_a[None, :]
            real = inside[:, None] & (of_a < A_ROWS)[None, :]
            tl.store(dh_ptr + at, dh.to(dh_ptr.dtype.element_ty), mask=real)


def launch(
    dy, lora_b, h, gates, indices, rows, logits, dlogits, ranks, scaling, share_a, top_k,
    renormalize, temperature, *, split=None,
):  # fmt: skip
    """`reference.shrink_gate_backward` on a GPU. `split`: parts of O, None: what fills the chip."""
    T, n, E, R = h.shape[0], len(dy), len(ranks), sum(ranks)
    A_ROWS = h.shape[1] // n
    dtype = reference.compute_dtype(h)
    dh, u = h.new_empty(h.shape), h.new_empty((T, n * R))
    K, form = gate_form(gates, indices, rows, T, n)
    summed = form in ("rows", "one")
    G = gates.shape[0]
    if T == 0:
        made = h.new_zeros((0, n * E) if top_k else gates.shape, dtype=dtype)
        return dh, u, made
    dgate = h.new_empty((T, n * (K if form == "sparse" and not top_k else E)), dtype=dtype)

    width, block_e = min(launcher.block(R), 2 * COLUMNS), launcher.block(E)
    block_r = min(width, COLUMNS)
    tile = configs.tile("shrink_gate_backward", h.device, h.dtype, width)
    column_tiles = n * launcher.ceil_div(R, width)
    token_tiles = launcher.ceil_div(T, tile.tokens)
    outputs = [g.shape[1] for g in dy]
    steps = [launcher.ceil_div(O, tile.step) for O in outputs]  # noqa: E741
    if split is None:
        split = configs.splits(h.device, token_tiles * column_tiles, max(steps))
    fusable = A_ROWS == R <= width and block_e <= FUSED_EXPERTS
    fused = fusable and split == 1
    partials = None if fused else h.new_empty((split, T, n * R), dtype=dtype)
    dy = [launcher.rows_dense(g) for g in dy]
    given = dict(
        h_ptr=h.contiguous(),
        gates_ptr=gates.contiguous(),
        indices_ptr=None if indices is None else indices.contiguous(),
        rows_ptr=None if rows is None else rows.contiguous(),
        logits_ptr=None if renormalize or not top_k else logits.contiguous(),
        dlogits_ptr=None if dlogits is None else dlogits.contiguous(),
        experts_ptr=launcher.expert_columns(tuple(ranks), h.device),
        scaling_ptr=launcher.scaling_of(tuple(scaling), h.device),
        dh_ptr=dh,
        u_ptr=u,
        dgate_ptr=dgate,
        partials_ptr=partials,
        T=T,
        G=G,
        temperature=float(temperature),
    )
    static = dict(
        n=n, A_ROWS=A_ROWS, R=R, E=E, K=K, FORM=form, ROUTER=top_k > 0,
        RENORMALIZE=bool(renormalize), SPLIT=split, BLOCK_E=block_e, UPCAST=launcher.INTERPRET,
    )  # fmt: skip
    launcher.run(
        shrink_gate_backward_kernel,
        token_tiles * split * column_tiles,
        tile,
        given
        | dict(
            dy_ptrs=tuple(dy),
            stride_dy=tuple(g.stride(0) for g in dy),
            b_ptrs=launcher.contiguous(lora_b),
            outputs=tuple(outputs),
            per_split=tuple(launcher.ceil_div(s, split) * tile.step for s in steps),
        ),
        static
        | dict(
            FUSED=fused, COLUMN_TILES=column_tiles, BLOCK_T=tile.tokens, BLOCK_O=tile.step,
            BLOCK_R=block_r, PARTS=width // block_r,
        ),
    )  # fmt: skip
    if not fused:
        rows_tile = configs.ROWS
        launcher.run(
            gate_partials_backward_kernel,
            launcher.ceil_div(T, rows_tile.tokens) * n,
            rows_tile,
            given,
            static | dict(BLOCK_T=rows_tile.tokens, BLOCK_R=min(launcher.block(R), rows_tile.step)),
        )
    if summed and not top_k:
        dgate = gate_rows.launch(dgate, rows, G)
    return dh, u, dgate
