"""Whole-FFN experts between their frozen products: the weighted sum of activations, h and u."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moelora_kernels.kernels.common import configs, launcher, tables
from moelora_kernels.kernels.common.activation import activation
from moelora_kernels.kernels.common.memory import load_rows, load_transposed, store_rows
from moelora_kernels.kernels.common.pair_rows import (
    load_pair_rows,
    load_spread,
    load_weights,
    pair_table,
    rank_columns,
    rank_product,
    row_constants,
    spread_offsets,
    sum_slots,
)
from moelora_kernels.kernels.common.products import product
from moelora_kernels.kernels.common.splits import num_splits
from moelora_kernels.kernels.common.tiles import load_pair_gate, load_pairs, load_ranks, load_tile
from moelora_kernels.kernels.dropout import keep_tile, num_counters
from moelora_kernels.numerics import cast_all, dropout_threshold, keep_probability
from moelora_kernels.types import TILE, InnerAdapters, InnerInputs, InnerOptions, Routing


@triton.jit(do_not_specialize=["T", "P", "steps", "row_counters"])
def ffn_inner_kernel(
    gate_out_ptr,
    stride_gate,
    up_out_ptr,
    stride_up,
    u_gate_ptr,
    u_up_ptr,
    gate_b_ptr,
    up_b_ptr,
    down_a_ptr,
    weights_ptr,
    table_ptr,
    ranks_ptr,
    seed_ptr,
    summed_ptr,
    partials_ptr,
    T,
    P,
    F,
    steps,
    row_counters,
    E: tl.constexpr,
    R: tl.constexpr,
    B_COLUMNS: tl.constexpr,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    RANK: tl.constexpr,
    MAX_RANK: tl.constexpr,
    RANK_DIVISOR: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DROPOUT: tl.constexpr,
    PER_EXPERT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """summed = sum_k w a, and partial sums of h = Ad_e kept(a), for a = act(z_gate) * z_up.

    gate_out, up_out [T, F], rows stride_gate and stride_up apart
    u_gate, u_up     [P, MAX_RANK] by sorted position
    gate_b, up_b     [F, B_COLUMNS]; the first R columns are those of B
    down_a           [R, F]
    weights          [P] by pair
    table            [P, 2] of `pair_table`
    ranks            [E, 2] of `rank_table`, or None
    seed             [1] int64; None without dropout
    summed           [T, F]
    partials         [splits, P, MAX_RANK] float32, by sorted position; what lies beyond the rank of
                     an expert, or belongs to a pair that is not routed, is not stored

    Programs: (split, tile of tokens), the last fastest, so that B and A are read from L2. A split
    takes `steps` steps of BLOCK_F columns. The rows of a tile are pairs, see `pair_rows`.
    """
    BLOCK_T: tl.constexpr = BLOCK_P // SLOTS
    token_tiles = tl.cdiv(T, BLOCK_T)
    split = tl.program_id(0) // token_tiles
    first_token = tl.program_id(0) % token_tiles * BLOCK_T
    tokens, rows_in, pairs, positions, experts, routed, starts, ranks = load_pair_rows(
        table_ptr, ranks_ptr, first_token, T, E, K, SLOTS, RANK, RANK_DIVISOR, BLOCK_P
    )
    weights = load_weights(weights_ptr, pairs, routed)
    columns = tl.arange(0, BLOCK_R)
    columns_in = columns < R
    # The columns of B behind the last are 0.
    b_in = columns < B_COLUMNS
    u_gate = load_spread(u_gate_ptr, positions, starts, ranks, columns, MAX_RANK)
    u_up = load_spread(u_up_ptr, positions, starts, ranks, columns, MAX_RANK)
    out_tokens = first_token.to(tl.int64) + tl.arange(0, BLOCK_T)
    if DROPOUT > 0:
        seed = tl.load(seed_ptr)
        stream = experts[:, None] if PER_EXPERT else 0

    h = tl.zeros((BLOCK_P, BLOCK_R), tl.float32)
    begin_f = split * steps * BLOCK_F
    for first_f in range(begin_f, tl.minimum(begin_f + steps * BLOCK_F, F), BLOCK_F):
        f = first_f + tl.arange(0, BLOCK_F)
        f_in = f < F

        # z and a.
        gate_out = load_rows(gate_out_ptr, stride_gate, tokens, f, rows_in, f_in)
        up_out = load_rows(up_out_ptr, stride_up, tokens, f, rows_in, f_in)
        gate_b = load_transposed(gate_b_ptr, B_COLUMNS, f, columns, f_in, b_in)
        up_b = load_transposed(up_b_ptr, B_COLUMNS, f, columns, f_in, b_in)
        z_gate = rank_product(u_gate, gate_b, UPCAST) + gate_out.to(tl.float32)
        z_up = rank_product(u_up, up_b, UPCAST) + up_out.to(tl.float32)
        a = activation(z_gate, ACTIVATION) * z_up

        # The weighted sum. A weight of zero selects nothing.
        terms = tl.where((weights != 0)[:, None], weights[:, None] * a, 0.0)
        summed = sum_slots(terms, SLOTS)
        store_rows(summed_ptr, F, out_tokens, f, out_tokens < T, f_in, summed)

        # Rank space of down.
        if DROPOUT > 0:
            kept = keep_tile(seed, stream, pairs, first_f, row_counters, DROPOUT, BLOCK_F)
            a = tl.where(kept, a, 0.0)
        down_a = load_transposed(down_a_ptr, F, columns, f, columns_in, f_in)
        h = product(a.to(u_gate.dtype), down_a, h, UPCAST, COMPUTED=True)

    # Loaded again: what stays in registers over the loop makes it spill.
    tokens, rows_in, pairs, positions, experts, routed, starts, ranks = load_pair_rows(
        table_ptr, ranks_ptr, first_token, T, E, K, SLOTS, RANK, RANK_DIVISOR, BLOCK_P
    )
    offsets, in_bounds = spread_offsets(positions, starts, ranks, columns, MAX_RANK)
    partials_ptr += split.to(tl.int64) * P * MAX_RANK
    tl.store(partials_ptr + offsets, h, mask=in_bounds)


@triton.jit(do_not_specialize=["P", "M", "splits", "dropout_scale"])
def ffn_inner_rank_kernel(
    partials_ptr,
    weights_ptr,
    scaling_ptr,
    order_ptr,
    tiles_ptr,
    ranks_ptr,
    h_ptr,
    u_ptr,
    P,
    M,
    splits,
    dropout_scale,
    E: tl.constexpr,
    RANK: tl.constexpr,
    MAX_RANK: tl.constexpr,
    RANK_DIVISOR: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """h = dropout_scale * the sum of the partial sums, and u = scale_e * weight * h.

    partials     [splits, P, MAX_RANK] of `ffn_inner_kernel`
    weights      [P] by pair
    scaling      [E] float32
    order, tiles [P] and [M, 2] int32, see `types.Routing`
    ranks        [E, 2] of `rank_table`, or None
    h, u         [P, MAX_RANK] by sorted position; 0 beyond an expert's rank

    Programs: tiles.
    """
    expert, first, end = load_tile(tiles_ptr, tl.program_id(0), M, P)
    positions, positions_in, pairs, _ = load_pairs(order_ptr, first, end, 1, BLOCK_P)
    has_expert = expert < E
    expert = tl.where(has_expert, expert, 0)
    _, rank = load_ranks(ranks_ptr, expert, RANK, RANK_DIVISOR)
    routed = positions < tl.where(has_expert, end, first)
    columns = tl.arange(0, BLOCK_R)
    stored = routed[:, None] & (columns < rank)[None, :]
    offsets = positions.to(tl.int64)[:, None] * MAX_RANK + columns[None, :]

    h = tl.zeros((BLOCK_P, BLOCK_R), tl.float32)
    for _ in range(splits):
        h += tl.load(partials_ptr + offsets, mask=stored, other=0.0)
        partials_ptr += P.to(tl.int64) * MAX_RANK
    h = (h * dropout_scale).to(h_ptr.dtype.element_ty)

    gate = load_pair_gate(weights_ptr, scaling_ptr, expert, pairs, routed)[:, None]
    u = tl.where(stored & (gate != 0), gate * h.to(tl.float32), 0.0)
    in_bounds = positions_in[:, None] & (columns < MAX_RANK)[None, :]
    tl.store(h_ptr + offsets, h, mask=in_bounds)
    tl.store(u_ptr + offsets, u.to(u_ptr.dtype.element_ty), mask=in_bounds)


def launch(
    inner: InnerInputs,
    adapters: InnerAdapters,
    weights: Tensor,
    routing: Routing,
    options: InnerOptions,
    split: int | None = None,
):
    """Return summed, h and u, like `reference.ffn_inner`, for 16-bit x and R up to 128.

    float32 adapters are cast first: their tiles would take registers.

    split: the parts of the sum over F.
    """
    ranks, scaling, dropout = options.ranks, options.scaling, options.dropout
    (T, K), width = weights.shape, inner.gate_out.shape[1]
    P, R, block_r = T * K, sum(ranks), rank_columns(ranks, inner.gate_out)
    h, u = (inner.u_gate.new_empty(inner.u_gate.shape) for _ in range(2))
    gate_out, up_out = launcher.rows_dense(inner.gate_out), launcher.rows_dense(inner.up_out)
    F = gate_out.shape[1]
    summed = gate_out.new_empty((T, F))
    if P == 0:
        return launcher.cropped(summed, T, width), h, u
    rank_constants = tables.rank_constants(ranks)
    row = rank_constants["RANK_DIVISOR"]
    tile_config = configs.tile_config("ffn_inner", gate_out.device, gate_out.dtype, block_r, row)
    rows = row_constants(K, tile_config.tokens, row, gate_out)
    token_tiles = launcher.ceil_div(T, rows["BLOCK_P"] // rows["SLOTS"])
    f_tiles = launcher.ceil_div(F, tile_config.step)
    split = split or num_splits(gate_out.device, tile_config, token_tiles, f_tiles, True)
    steps = launcher.ceil_div(f_tiles, split)
    split = launcher.ceil_div(f_tiles, steps)
    partials = gate_out.new_empty((split, *h.shape), dtype=torch.float32)
    adapters = InnerAdapters(*cast_all(adapters, [gate_out.dtype] * len(adapters)))
    b_columns = launcher.aligned_columns(adapters.gate_b)
    weights = launcher.aligned(weights)
    ranks_ptr = tables.rank_table(tuple(ranks), routing.order.device)
    launcher.run(
        ffn_inner_kernel,
        token_tiles * split,
        tile_config,
        dict(
            gate_out_ptr=gate_out,
            stride_gate=gate_out.stride(0),
            up_out_ptr=up_out,
            stride_up=up_out.stride(0),
            u_gate_ptr=launcher.aligned(inner.u_gate),
            u_up_ptr=launcher.aligned(inner.u_up),
            gate_b_ptr=launcher.padded(adapters.gate_b, F, b_columns),
            up_b_ptr=launcher.padded(adapters.up_b, F, b_columns),
            down_a_ptr=launcher.padded(adapters.down_a, R, F),
            weights_ptr=weights,
            table_ptr=pair_table(routing, gate_out),
            ranks_ptr=ranks_ptr,
            seed_ptr=dropout.seed if dropout.p > 0 else None,
            summed_ptr=summed,
            partials_ptr=partials,
            T=T,
            P=P,
            F=F,
            steps=steps,
            row_counters=num_counters(width),
        ),
        dict(
            E=len(ranks),
            R=R,
            B_COLUMNS=b_columns,
            **rows,
            **rank_constants,
            ACTIVATION=options.activation,
            DROPOUT=dropout_threshold(dropout.p),
            PER_EXPERT=dropout.per_expert,
            BLOCK_F=tile_config.step,
            BLOCK_R=block_r,
            UPCAST=launcher.INTERPRET,
        ),
    )
    launcher.run(
        ffn_inner_rank_kernel,
        len(routing.tiles),
        configs.PARTIALS_TILE,
        dict(
            partials_ptr=partials,
            weights_ptr=weights,
            scaling_ptr=tables.scaling_table(tuple(scaling), gate_out.device),
            order_ptr=routing.order,
            tiles_ptr=routing.tiles,
            ranks_ptr=ranks_ptr,
            h_ptr=h,
            u_ptr=u,
            P=P,
            M=len(routing.tiles),
            splits=split,
            dropout_scale=1.0 / keep_probability(dropout.p),
        ),
        dict(
            E=len(ranks),
            **rank_constants,
            BLOCK_P=TILE,
            BLOCK_R=launcher.block(max(ranks)),
        ),
    )
    return launcher.cropped(summed, T, width), h, u
