"""Shrink the rows of each expert to rank space and gate them: h and u by sorted position."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from moelora_kernels.kernels.common import configs, launcher, tables
from moelora_kernels.kernels.common.memory import load_rows, load_transposed
from moelora_kernels.kernels.common.products import product, select_from
from moelora_kernels.kernels.common.tiles import load_pair_gate, load_pairs, load_ranks, load_tile
from moelora_kernels.kernels.dropout import keep_tile, num_counters
from moelora_kernels.numerics import dropout_threshold, keep_probability
from moelora_kernels.types import Dropout, Routing

# Columns of rank space that one program sums: an expert has too few rows to share the reads of
# more columns.
COLUMNS = 64


@triton.jit(do_not_specialize=["P", "M", "row_counters", "dropout_scale"])
def grouped_shrink_kernel(
    x_ptr,
    stride_x,
    a_ptrs,
    weights_ptr,
    scaling_ptr,
    order_ptr,
    tiles_ptr,
    ranks_ptr,
    seed_ptr,
    h_ptr,
    u_ptr,
    P,
    M,
    I,  # noqa: E741
    row_counters,
    dropout_scale,
    n: tl.constexpr,
    E: tl.constexpr,
    PAIRS_PER_ROW: tl.constexpr,
    RANK: tl.constexpr,
    MAX_RANK: tl.constexpr,
    RANK_DIVISOR: tl.constexpr,
    DROPOUT: tl.constexpr,
    PER_EXPERT: tl.constexpr,
    COLUMN_TILES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """h = dropout(x) A_e^T and u = scale_e * weight * h, for the pairs of every expert e.

    x            [P / PAIRS_PER_ROW, I], rows stride_x apart
    a            n x [R, I]
    weights      [P] by pair; None if every weight is 1
    scaling      [E] float32
    order, tiles [P] and [M, 2] int32, see `types.Routing`
    ranks        [E, 2] of `rank_table`, or None
    seed         [1] int64; None without dropout
    h, u         [P, MAX_RANK] by sorted position, in the dtype of x; 0 beyond an expert's rank

    Programs: (tile, column tile), the last fastest, so that programs which read the same x run
    together.
    """
    expert, first, end = load_tile(tiles_ptr, tl.program_id(0) // COLUMN_TILES, M, P)
    columns = tl.program_id(0) % COLUMN_TILES * BLOCK_R + tl.arange(0, BLOCK_R)
    sibling = expert // E
    local_expert = expert % E
    start, rank = load_ranks(ranks_ptr, local_expert, RANK, RANK_DIVISOR)
    positions, positions_in, pairs, x_rows = load_pairs(
        order_ptr, first, end, PAIRS_PER_ROW, BLOCK_P
    )
    a_ptr = select_from(a_ptrs, sibling)
    a_rows = (start + columns).to(tl.int64)

    # Product. Pairs that are not routed (expert N = n E) have none.
    h = tl.zeros((BLOCK_P, BLOCK_R), tl.float32)
    if expert < n * E:
        if DROPOUT > 0:
            seed = tl.load(seed_ptr)
            stream = local_expert if PER_EXPERT else local_expert * 0
        for first_i in range(0, I, BLOCK_I):
            i = first_i + tl.arange(0, BLOCK_I)
            x = load_rows(x_ptr, stride_x, x_rows, i, positions_in, i < I)  # [BLOCK_P, BLOCK_I]
            a = load_transposed(a_ptr, I, a_rows, i, columns < rank, i < I)
            if DROPOUT > 0:
                kept = keep_tile(seed, stream, x_rows, first_i, row_counters, DROPOUT, BLOCK_I)
                x = tl.where(kept, x, 0.0).to(x.dtype)
            h = product(x, a, h, UPCAST, COMPUTED=DROPOUT > 0)
    # A NaN or infinity of x or of the gate does not reach the columns beyond the rank, which are 0.
    columns_in = (columns < rank)[None, :]
    h = tl.where(columns_in, h * dropout_scale, 0.0).to(h_ptr.dtype.element_ty)

    # Gate.
    routed = positions < tl.where(expert < n * E, end, first)
    gate = load_pair_gate(weights_ptr, scaling_ptr, local_expert, pairs, routed)
    selected = columns_in & (gate != 0)[:, None]
    u = tl.where(selected, gate[:, None] * h.to(tl.float32), 0.0)

    # Store.
    offsets = positions.to(tl.int64)[:, None] * MAX_RANK + columns[None, :]
    in_bounds = positions_in[:, None] & (columns < MAX_RANK)[None, :]
    tl.store(h_ptr + offsets, h, mask=in_bounds)
    tl.store(u_ptr + offsets, u.to(u_ptr.dtype.element_ty), mask=in_bounds)


def launch(
    x: Tensor,
    lora_a: Sequence[Tensor],
    weights: Tensor | None,
    routing: Routing,
    ranks: Sequence[int],
    scaling: Sequence[float],
    dropout: Dropout,
):
    """Return h and u [P, max(ranks)] by sorted position, like `reference.grouped_shrink`."""
    order, _offsets, tiles, _ = routing
    P, width = order.shape[0], x.shape[1]
    h, u = (x.new_empty((P, max(ranks))) for _ in range(2))
    if P == 0:
        return h, u
    block_r = min(launcher.block(max(ranks)), COLUMNS)
    rank_constants = tables.rank_constants(ranks)
    row = rank_constants["RANK_DIVISOR"]
    tile_config = configs.tile_config("grouped_shrink", x.device, x.dtype, block_r, row)
    column_tiles = launcher.ceil_div(max(ranks), block_r)
    x = launcher.rows_dense(x)
    I = x.shape[1]  # noqa: E741
    launcher.run(
        grouped_shrink_kernel,
        len(tiles) * column_tiles,
        tile_config,
        dict(
            x_ptr=x,
            stride_x=x.stride(0),
            a_ptrs=launcher.all_padded(lora_a, sum(ranks), I),
            weights_ptr=launcher.aligned_or_none(weights),
            scaling_ptr=tables.scaling_table(tuple(scaling), x.device),
            order_ptr=order,
            tiles_ptr=tiles,
            ranks_ptr=tables.rank_table(tuple(ranks), order.device),
            seed_ptr=dropout.seed if dropout.p > 0 else None,
            h_ptr=h,
            u_ptr=u,
            P=P,
            M=len(tiles),
            I=I,
            row_counters=num_counters(width),
            dropout_scale=1.0 / keep_probability(dropout.p),
        ),
        dict(
            n=len(lora_a),
            E=len(ranks),
            PAIRS_PER_ROW=P // x.shape[0],
            **rank_constants,
            DROPOUT=dropout_threshold(dropout.p),
            PER_EXPERT=dropout.per_expert,
            COLUMN_TILES=column_tiles,
            BLOCK_P=tile_config.tokens,
            BLOCK_I=tile_config.step,
            BLOCK_R=block_r,
            UPCAST=launcher.INTERPRET,
        ),
    )
    return h, u
