"""Shrink x to rank space, route by the logits of the same read, gate: h, u and the routing."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moelora_kernels import reference
from moelora_kernels.kernels.common import configs, launcher
from moelora_kernels.kernels.common.gates import (
    dense_gate,
    gate_form,
    gated,
    load_experts,
    load_scaling,
    rank_gate,
    store_routing,
    topk_gate,
)
from moelora_kernels.kernels.common.products import exact_product, pick, product
from moelora_kernels.kernels.common.reduce_partials import load_partials
from moelora_kernels.kernels.dropout import keep_tile, threshold

# Up to these columns and experts one program holds h, the logits and the gate of its tokens; beyond
# them, products and gate are two launches. With 32 experts the gate of 128 columns spills on sm_80.
FUSED_RANK = 128
FUSED_EXPERTS = 16
# Logits that one program of the product sums beside its columns.
ROUTER_COLUMNS = 32


@triton.jit
def gate_tile(
    logits,
    gates_ptr,
    indices_ptr,
    rows_ptr,
    weights_ptr,
    chosen_ptr,
    logits_ptr,
    tokens,
    inside,
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
    """The gate [BLOCK_T, BLOCK_E]: given, or that of a router, which is stored with its logits."""
    if FORM == "router":
        experts = tl.arange(0, BLOCK_E)[None, :]
        real = inside[:, None] & (experts < E)
        tl.store(logits_ptr + tokens[:, None] * (n * E) + sibling * E + experts, logits, mask=real)
        gate, place = topk_gate(logits, temperature, E, K, RENORMALIZE, BLOCK_E)
        store_routing(
            weights_ptr, chosen_ptr, gate, place, tokens, inside, sibling, n, E, K, BLOCK_E
        )
    else:
        gate, _ = dense_gate(
            gates_ptr, indices_ptr, rows_ptr, tokens, inside, sibling, G, n, E, K, FORM, BLOCK_E
        )
    return gate


@triton.jit
def load_bias(bias_ptrs, sibling, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """The router's bias, [BLOCK_E]; 0 without one."""
    experts = tl.arange(0, BLOCK_E)
    if bias_ptrs is None:
        bias = tl.zeros((BLOCK_E,), tl.float32)
    else:
        address = pick(bias_ptrs, sibling) + experts
        bias = tl.load(address, mask=experts < E, other=0.0).to(tl.float32)
    return bias


@triton.jit(do_not_specialize=["T", "G", "temperature", "scale"])
def shrink_gate_kernel(
    x_ptr,
    stride_x,
    a_ptrs,
    router_ptrs,
    bias_ptrs,
    gates_ptr,
    indices_ptr,
    rows_ptr,
    experts_ptr,
    scaling_ptr,
    seed_ptr,
    tiles_ptr,
    h_ptr,
    u_ptr,
    weights_ptr,
    chosen_ptr,
    logits_ptr,
    partials_ptr,
    T,
    I,  # noqa: E741
    G,
    per_split,
    temperature,
    scale,
    n: tl.constexpr,
    A_ROWS: tl.constexpr,
    R: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    FORM: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    FUSED: tl.constexpr,
    DROPOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    PER_EXPERT: tl.constexpr,
    RANK_DIVISOR: tl.constexpr,
    COLUMN_TILES: tl.constexpr,
    ROUTER_COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """FUSED: h, u and the routing of a token tile and sibling; else sums of products to partials.

    Programs: (token tile, split of I, column tile of a sibling), the last fastest, so that those
    which read the same x run together. partials [SPLIT, T, n (A_ROWS + ROUTER_COLUMNS)] float32.
    """
    pid = tl.program_id(0)
    column_tile = pid % COLUMN_TILES
    split = pid // COLUMN_TILES % SPLIT
    tokens = (pid // (COLUMN_TILES * SPLIT)).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = tokens < T
    if PER_EXPERT:
        # Columns of one expert, because another expert has another mask.
        sibling = tl.load(tiles_ptr + column_tile * 4 + 3)
        stream = tl.load(tiles_ptr + column_tile * 4 + 2)
        start = tl.load(tiles_ptr + column_tile * 4) - sibling * A_ROWS
        end = tl.load(tiles_ptr + column_tile * 4 + 1) - sibling * A_ROWS
        start = tl.multiple_of(start, RANK_DIVISOR)
        end = tl.multiple_of(end, RANK_DIVISOR)
        place = column_tile - sibling * (COLUMN_TILES // n)
    else:
        sibling = column_tile // (COLUMN_TILES // n)
        place = column_tile % (COLUMN_TILES // n)
        start = place * BLOCK_R
        end = A_ROWS
        stream = 0
    columns = start + tl.arange(0, BLOCK_R)
    a_ptr = pick(a_ptrs, sibling) + columns.to(tl.int64)[None, :] * I
    if ROUTER_COLUMNS:
        # Column tile c of a sibling also has the experts from c BLOCK_E; a fused one has all.
        experts = place * BLOCK_E + tl.arange(0, BLOCK_E)
        router_ptr = pick(router_ptrs, sibling) + experts.to(tl.int64)[None, :] * I
    if DROPOUT > 0:
        seed = tl.load(seed_ptr)

    h = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    logits = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for first in range(split * per_split, tl.minimum((split + 1) * per_split, I), BLOCK_I):
        i = first + tl.arange(0, BLOCK_I)
        some_i = i < I
        x = tl.load(
            x_ptr + tokens[:, None] * stride_x + i[None, :],
            mask=inside[:, None] & some_i[None, :],
            other=0.0,
        )
        a = tl.load(a_ptr + i[:, None], mask=some_i[:, None] & (columns < end)[None, :], other=0.0)
        if ROUTER_COLUMNS:
            w = tl.load(
                router_ptr + i[:, None], mask=some_i[:, None] & (experts < E)[None, :], other=0.0
            )
            logits = exact_product(x, w, logits, UPCAST)
        if DROPOUT > 0:
            kept = keep_tile(seed, stream, tokens, first, I, DROPOUT, ALIGNED, BLOCK_I)
            x = tl.where(kept, x, 0.0).to(x.dtype)
        h = product(x, a, h, UPCAST)
    h *= scale

    real = inside[:, None] & (columns < end)[None, :]
    if FUSED:
        logits += load_bias(bias_ptrs, sibling, E, BLOCK_E)[None, :]
        gate = gate_tile(
            logits, gates_ptr, indices_ptr, rows_ptr, weights_ptr, chosen_ptr, logits_ptr, tokens,
            inside, sibling, G, temperature, n, E, K, FORM, RENORMALIZE, BLOCK_E,
        )  # fmt: skip
        gate *= load_scaling(scaling_ptr, E, BLOCK_E)
        of_experts = load_experts(experts_ptr, columns, E, R, BLOCK_E)
        scaled = rank_gate(gate, of_experts, UPCAST)
        h = h.to(h_ptr.dtype.element_ty)
        place_h = tokens[:, None] * (n * R) + sibling * R + columns[None, :]
        tl.store(h_ptr + place_h, h, mask=real)
        u = gated(scaled, h.to(tl.float32))
        tl.store(u_ptr + place_h, u.to(u_ptr.dtype.element_ty), mask=real)
    else:
        width: tl.constexpr = A_ROWS + ROUTER_COLUMNS
        row = (split * T + tokens)[:, None] * (n * width) + sibling * width
        tl.store(partials_ptr + row + columns[None, :], h, mask=real)
        if ROUTER_COLUMNS:
            some = inside[:, None] & (experts < E)[None, :]
            tl.store(partials_ptr + row + A_ROWS + experts[None, :], logits, mask=some)


@triton.jit(do_not_specialize=["T", "G", "temperature"])
def gate_partials_kernel(
    partials_ptr,
    bias_ptrs,
    gates_ptr,
    indices_ptr,
    rows_ptr,
    experts_ptr,
    scaling_ptr,
    h_ptr,
    u_ptr,
    weights_ptr,
    chosen_ptr,
    logits_ptr,
    T,
    G,
    temperature,
    n: tl.constexpr,
    A_ROWS: tl.constexpr,
    R: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    FORM: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    ROUTER_COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """h, u and the routing from the partials, whose parts are added in their order.

    Programs: (token tile, sibling). With A_ROWS < R all experts share the rows of A.
    """
    sibling = tl.program_id(0) % n
    tokens = (tl.program_id(0) // n).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = tokens < T
    width: tl.constexpr = A_ROWS + ROUTER_COLUMNS
    experts = tl.arange(0, BLOCK_E)
    logits = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    if ROUTER_COLUMNS:
        logits = load_partials(
            partials_ptr, tokens, inside, sibling, A_ROWS + experts, experts < E, T, n, width, SPLIT
        )
        logits += load_bias(bias_ptrs, sibling, E, BLOCK_E)[None, :]
    gate = gate_tile(
        logits, gates_ptr, indices_ptr, rows_ptr, weights_ptr, chosen_ptr, logits_ptr, tokens,
        inside, sibling, G, temperature, n, E, K, FORM, RENORMALIZE, BLOCK_E,
    )  # fmt: skip
    gate *= load_scaling(scaling_ptr, E, BLOCK_E)
    for first in range(0, R, BLOCK_R):
        columns = first + tl.arange(0, BLOCK_R)
        of_a = columns % A_ROWS
        real = inside[:, None] & (columns < R)[None, :]
        h = load_partials(
            partials_ptr, tokens, inside, sibling, of_a, columns < R, T, n, width, SPLIT
        )
        h = h.to(h_ptr.dtype.element_ty)
        tl.store(
            h_ptr + tokens[:, None] * (n * A_ROWS) + sibling * A_ROWS + of_a[None, :],
            h,
            mask=real & (columns < A_ROWS)[None, :],
        )
        of_experts = load_experts(experts_ptr, columns, E, R, BLOCK_E)
        u = gated(rank_gate(gate, of_experts, UPCAST), h.to(tl.float32))
        tl.store(
            u_ptr + tokens[:, None] * (n * R) + sibling * R + columns[None, :],
            u.to(u_ptr.dtype.element_ty),
            mask=real,
        )


def launch(
    x, lora_a, gates, indices, rows, router_weight, router_bias, ranks, scaling, share_a, top_k,
    renormalize, temperature, dropout, dropout_per_expert, seed, *, split=None,
):  # fmt: skip
    """`reference.shrink_gate` on a GPU. `split`: parts of I, None: what fills the chip."""
    T, I = x.shape  # noqa: E741
    n, E, R, A_ROWS = len(lora_a), len(ranks), sum(ranks), lora_a[0].shape[0]
    router = len(router_weight) > 0
    h, u = x.new_empty((T, n * A_ROWS)), x.new_empty((T, n * R))
    dtype = reference.compute_dtype(x)
    weights, logits = x.new_empty(0, dtype=dtype), x.new_empty(0, dtype=dtype)
    chosen = x.new_empty(0, dtype=torch.int32)
    if router:
        weights = x.new_empty((T, n * top_k), dtype=dtype)
        logits = x.new_empty((T, n * E), dtype=dtype)
        if top_k < E:
            chosen = x.new_empty((T, n * top_k), dtype=chosen.dtype)
    K, form = (top_k, "router") if router else gate_form(gates, indices, rows, T, n)
    if T == 0:
        return h, u, weights, chosen, logits

    per_expert = dropout > 0 and dropout_per_expert
    block_r = min(launcher.block(max(ranks) if per_expert else A_ROWS), FUSED_RANK)
    block_e = launcher.block(E)
    tile = configs.tile("shrink_gate", x.device, x.dtype, block_r)
    tiles = None
    if per_expert:
        tiles = launcher.expert_tiles(tuple(ranks), n, block_r, x.device)
    fusable = not per_expert and A_ROWS == R <= FUSED_RANK and block_e <= FUSED_EXPERTS
    column_tiles = n * launcher.ceil_div(A_ROWS, block_r)
    if per_expert:
        column_tiles = len(tiles)
    elif router and not fusable:
        column_tiles = max(column_tiles, n * launcher.ceil_div(E, ROUTER_COLUMNS))
    token_tiles = launcher.ceil_div(T, tile.tokens)
    steps = launcher.ceil_div(I, tile.step)
    if split is None:
        split = configs.splits(x.device, token_tiles * column_tiles, steps)
    fused = fusable and split == 1
    # The experts are spread over the column tiles of a sibling.
    of_router = block_e
    if not fused and router:
        of_router = launcher.block(launcher.ceil_div(E, column_tiles // n))
    partial_columns = n * (A_ROWS + (E if router else 0))
    partials = None if fused else x.new_empty((split, T, partial_columns), dtype=dtype)
    x = launcher.rows_dense(x)
    given = dict(
        bias_ptrs=launcher.contiguous(router_bias),
        gates_ptr=None if router else gates.contiguous(),
        indices_ptr=None if router or indices is None else indices.contiguous(),
        rows_ptr=None if rows is None else rows.contiguous(),
        experts_ptr=launcher.expert_columns(tuple(ranks), x.device),
        scaling_ptr=launcher.scaling_of(tuple(scaling), x.device),
        h_ptr=h,
        u_ptr=u,
        weights_ptr=weights if router else None,
        chosen_ptr=chosen if router and top_k < E else None,
        logits_ptr=logits if router else None,
        partials_ptr=partials,
        T=T,
        G=0 if router else gates.shape[0],
        temperature=float(temperature),
    )
    static = dict(
        n=n, A_ROWS=A_ROWS, R=R, E=E, K=K, FORM=form, RENORMALIZE=bool(renormalize),
        ROUTER_COLUMNS=E if router else 0, SPLIT=split,
    )  # fmt: skip
    launcher.run(
        shrink_gate_kernel,
        token_tiles * split * column_tiles,
        tile,
        given
        | dict(
            x_ptr=x,
            stride_x=x.stride(0),
            a_ptrs=launcher.contiguous(lora_a),
            router_ptrs=launcher.contiguous(router_weight),
            seed_ptr=seed if dropout > 0 else None,
            tiles_ptr=tiles,
            I=I,
            per_split=launcher.ceil_div(steps, split) * tile.step,
            scale=1.0 / (1.0 - dropout),
        ),
        static
        | dict(
            FUSED=fused, DROPOUT=threshold(dropout), ALIGNED=I % 4 == 0, PER_EXPERT=per_expert,
            RANK_DIVISOR=launcher.rank_divisor(ranks),
            COLUMN_TILES=column_tiles, BLOCK_T=tile.tokens, BLOCK_I=tile.step, BLOCK_R=block_r,
            BLOCK_E=of_router, UPCAST=launcher.INTERPRET,
        ),
    )  # fmt: skip
    if not fused:
        rows_tile = configs.ROWS
        launcher.run(
            gate_partials_kernel,
            launcher.ceil_div(T, rows_tile.tokens) * n,
            rows_tile,
            given,
            static
            | dict(
                BLOCK_T=rows_tile.tokens,
                BLOCK_R=min(launcher.block(R), rows_tile.step),
                BLOCK_E=block_e,
                UPCAST=launcher.INTERPRET,
            ),
        )
    return h, u, weights, chosen, logits
