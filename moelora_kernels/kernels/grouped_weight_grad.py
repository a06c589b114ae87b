"""The gradients of A and B: sums over the pairs of each expert, in chunks of bounded length.

If one chunk holds all pairs of an expert, its sum is the gradient. Otherwise each chunk writes a
float32 partial sum, and a second launch adds them in their order. A short last chunk is merged into
the one before it, so there are at most P / CHUNK partial sums, however the pairs are routed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from moelora_kernels.kernels.common import configs, launcher, tables
from moelora_kernels.kernels.common.configs import TileConfig
from moelora_kernels.kernels.common.memory import load_rows
from moelora_kernels.kernels.common.products import product, select_from
from moelora_kernels.kernels.common.tiles import load_pairs, load_ranks, load_tile
from moelora_kernels.kernels.dropout import keep_tile, num_counters
from moelora_kernels.kernels.grouped_shrink import COLUMNS
from moelora_kernels.numerics import dropout_threshold, keep_probability
from moelora_kernels.types import NO_DROPOUT, Dropout, Routing

# `step` elements of a gradient per program of the second launch: 16 for each thread.
REDUCE_TILE = TileConfig(tokens=1, step=4096, warps=8, stages=1)


@triton.jit
def load_chunk_range(chunks_ptr, offsets_ptr, chunk, expert, first, end, N):
    """Return the end of the partial sum that begins with a chunk, the chunk size, and `is_first`.

    The end is `first`, so that there is nothing to sum, if the chunk is merged into the one before
    it or has no expert. is_first: the chunk is the first one of its expert.
    """
    has_expert = expert < N
    expert_first = tl.load(offsets_ptr + expert, mask=has_expert, other=first)
    expert_end = tl.load(offsets_ptr + expert + 1, mask=has_expert, other=first)
    # All chunks of an expert have the size of the first, but for the last.
    previous = tl.load(chunks_ptr + chunk * 2 - 1, mask=first > expert_first, other=first)
    size = tl.where(first > expert_first, first - previous, end - first)
    end = tl.where(end - first < size, first, end)
    end = tl.where((end > first) & (expert_end - end < size), expert_end, end)
    return tl.where(has_expert, end, first), size, first == expert_first


@triton.jit
def store_tile(out_ptr, stride_w, stride_c, tile, w, w_in, columns, columns_in):
    """Store the tile [BLOCK_W, BLOCK_R] to out[w, columns], for an `out` of any strides."""
    offsets = w.to(tl.int64)[:, None] * stride_w + columns.to(tl.int64)[None, :] * stride_c
    in_bounds = w_in[:, None] & columns_in[None, :]
    tl.store(out_ptr + offsets, tile.to(out_ptr.dtype.element_ty), mask=in_bounds)


@triton.jit
def store_zeros(
    out_ptrs,
    widths,
    stride_w,
    stride_c,
    ranks_ptr,
    low,
    high,
    w,
    columns,
    E: tl.constexpr,
    RANK: tl.constexpr,
    RANK_DIVISOR: tl.constexpr,
):
    """Store zeros to a tile of the gradient of experts [low, high), which have no pairs."""
    zeros = tl.zeros((w.shape[0], columns.shape[0]), tl.float32)
    for expert in range(low, high):
        start, rank = load_ranks(ranks_ptr, expert % E, RANK, RANK_DIVISOR)
        store_tile(
            select_from(out_ptrs, expert // E), stride_w, stride_c, zeros, w,
            w < select_from(widths, expert // E), start + columns, columns < rank,
        )  # fmt: skip


@triton.jit(do_not_specialize=["P", "M", "row_counters", "dropout_scale"])
def grouped_weight_grad_kernel(
    wide_ptrs,
    stride_wide,
    widths,
    narrow_ptr,
    order_ptr,
    offsets_ptr,
    chunks_ptr,
    ranks_ptr,
    seed_ptr,
    out_ptrs,
    stride_w,
    stride_c,
    partials_ptr,
    partial_stride,
    partial_w,
    partial_c,
    P,
    M,
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
    TILES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """out_e = sum over the pairs of expert e of dropout(wide)^T narrow, or its partial sums.

    For dA, wide is x and narrow is dh; for dB, wide is dy and narrow is u.

    wide         n x [P / PAIRS_PER_ROW, W_i], rows stride_wide[i] apart
    widths       n numbers: W_i
    narrow       [P, MAX_RANK] by sorted position
    order, offsets, chunks: [P], [N + 1] and [M, 2] int32, see `types.Routing`
    ranks        [E, 2] of `rank_table`, or None
    seed         [1] int64; None without dropout
    out          n x [W_i, R], strides stride_w and stride_c
    partials     [P / CHUNK, W, MAX_RANK] float32, strides partial_stride, partial_w and partial_c;
                 None if no expert can have two chunks

    Experts without pairs are filled with zeros by the programs of the next chunk. Programs: (chunk,
    tile of W, column tile), the last fastest; TILES of a chunk.
    """
    chunk = tl.program_id(0) // TILES
    first_w = tl.program_id(0) % TILES // COLUMN_TILES * BLOCK_W
    w = first_w + tl.arange(0, BLOCK_W)
    columns = tl.program_id(0) % COLUMN_TILES * BLOCK_R + tl.arange(0, BLOCK_R)
    expert, first, end = load_tile(chunks_ptr, chunk, M, P)

    # Zeros for the experts between the previous chunk's and this one's, and after the last chunk's.
    previous_expert = tl.load(chunks_ptr + chunk * 2 - 2, mask=chunk > 0, other=-1)
    store_zeros(
        out_ptrs, widths, stride_w, stride_c, ranks_ptr, previous_expert + 1, expert, w, columns, E,
        RANK, RANK_DIVISOR,
    )  # fmt: skip
    if chunk == M - 1:
        store_zeros(
            out_ptrs, widths, stride_w, stride_c, ranks_ptr, expert + 1, n * E, w, columns, E,
            RANK, RANK_DIVISOR,
        )  # fmt: skip

    end, size, is_first = load_chunk_range(
        chunks_ptr, offsets_ptr, chunk, expert, first, end, n * E
    )
    sibling = expert // E
    local_expert = expert % E
    W = select_from(widths, sibling)
    if (end > first) & (first_w < W):
        start, rank = load_ranks(ranks_ptr, local_expert, RANK, RANK_DIVISOR)
        wide_ptr = select_from(wide_ptrs, sibling)
        stride = select_from(stride_wide, sibling)
        columns_in = columns < rank
        w_in = w < W
        if DROPOUT > 0:
            seed = tl.load(seed_ptr)
            stream = local_expert if PER_EXPERT else local_expert * 0

        # Sum over the pairs of the range.
        total = tl.zeros((BLOCK_W, BLOCK_R), tl.float32)
        for position in range(first, end, BLOCK_P):
            positions, positions_in, _, wide_rows = load_pairs(
                order_ptr, position, end, PAIRS_PER_ROW, BLOCK_P
            )
            # [BLOCK_P, BLOCK_W]
            wide = load_rows(wide_ptr, stride, wide_rows, w, positions_in, w_in)
            narrow = load_rows(
                narrow_ptr, MAX_RANK, positions, columns, positions_in, columns_in
            )  # [BLOCK_P, BLOCK_R]
            if DROPOUT > 0:
                kept = keep_tile(seed, stream, wide_rows, first_w, row_counters, DROPOUT, BLOCK_W)
                wide = tl.where(kept, wide, 0.0).to(wide.dtype)
            total = product(tl.trans(wide), narrow, total, UPCAST, COMPUTED=DROPOUT > 0)
        total *= dropout_scale

        # Store the gradient, or a partial sum if the expert has more pairs.
        expert_end = tl.load(offsets_ptr + expert + 1)
        if is_first & (end == expert_end):
            out_ptr = select_from(out_ptrs, sibling)
            store_tile(out_ptr, stride_w, stride_c, total, w, w_in, start + columns, columns_in)
        elif partials_ptr is not None:
            partial_ptr = partials_ptr + (first // size).to(tl.int64) * partial_stride
            store_tile(partial_ptr, partial_w, partial_c, total, w, w_in, columns, columns_in)


@triton.jit(do_not_specialize=["P", "M"])
def reduce_chunks_kernel(
    partials_ptr,
    partial_stride,
    partial_w,
    partial_c,
    offsets_ptr,
    chunks_ptr,
    ranks_ptr,
    widths,
    out_ptrs,
    stride_w,
    stride_c,
    P,
    M,
    n: tl.constexpr,
    E: tl.constexpr,
    RANK: tl.constexpr,
    MAX_RANK: tl.constexpr,
    RANK_DIVISOR: tl.constexpr,
    COLUMN_TILES: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """out_e = the partial sums of expert e, added in their order, if it has several.

    The arguments are as in `grouped_weight_grad_kernel`. Programs: (chunk, tile of W, column
    tile), the last fastest. Only the programs of an expert's first chunk work.
    """
    chunk = tl.program_id(0) // TILES
    w = tl.program_id(0) % TILES // COLUMN_TILES * BLOCK_W + tl.arange(0, BLOCK_W)
    columns = tl.program_id(0) % COLUMN_TILES * BLOCK_R + tl.arange(0, BLOCK_R)
    expert, first, end = load_tile(chunks_ptr, chunk, M, P)
    end, size, is_first = load_chunk_range(
        chunks_ptr, offsets_ptr, chunk, expert, first, end, n * E
    )
    expert_end = tl.load(offsets_ptr + expert + 1, mask=expert < n * E, other=0)
    if is_first & (first < end) & (end < expert_end):
        start, rank = load_ranks(ranks_ptr, expert % E, RANK, RANK_DIVISOR)
        w_in = w < select_from(widths, expert // E)
        columns_in = columns < rank
        in_bounds = w_in[:, None] & columns_in[None, :]
        offsets = w.to(tl.int64)[:, None] * partial_w + columns.to(tl.int64)[None, :] * partial_c
        total = tl.zeros((BLOCK_W, BLOCK_R), tl.float32)
        for position in range(first, expert_end - size + 1, size):
            partial_ptr = partials_ptr + (position // size).to(tl.int64) * partial_stride
            total += tl.load(partial_ptr + offsets, mask=in_bounds, other=0.0)
        out_ptr = select_from(out_ptrs, expert // E)
        store_tile(out_ptr, stride_w, stride_c, total, w, w_in, start + columns, columns_in)


def sum_pairs(
    wide: Sequence[Tensor],
    narrow: Tensor,
    outputs: Sequence[Tensor],
    routing: Routing,
    ranks: Sequence[int],
    dropout: Dropout = NO_DROPOUT,
    row_counters: int = 0,
) -> None:
    """Fill `outputs` n x [W_i, R], which have the same strides, with the sums of all experts.

    wide n x [P / PAIRS_PER_ROW, W_i], as `launcher.rows_dense` returns it, and narrow
    [P, max(ranks)]: see `grouped_weight_grad_kernel`. row_counters: of wide, with dropout.
    """
    order, offsets, _, chunks = routing
    P, N = order.shape[0], len(offsets) - 1
    widths = tuple(matrix.shape[1] for matrix in wide)

    # Tiles.
    block_r = min(launcher.block(max(ranks)), COLUMNS)
    rank_constants = tables.rank_constants(ranks)
    divisor = rank_constants["RANK_DIVISOR"]
    tile_config = configs.tile_config(
        "grouped_weight_grad", narrow.device, narrow.dtype, block_r, divisor
    )
    column_tiles = launcher.ceil_div(max(ranks), block_r)
    tiles = launcher.ceil_div(max(widths), tile_config.step) * column_tiles

    # Workspace: one partial sum for every whole chunk of P pairs. `types.count_tiles` is that
    # number plus min(N + 1, P).
    whole_chunks = len(chunks) - min(N + 1, P)
    partials, strides = None, (0, 1, 1)
    if whole_chunks > 1:
        # Columns and W lie in the order in which the gradient has them.
        partials = narrow.new_empty((whole_chunks, max(ranks), max(widths)), dtype=torch.float32)
        strides = partials.stride(0), partials.stride(2), partials.stride(1)
        if outputs[0].stride(1) == 1:
            partials = partials.view(whole_chunks, max(widths), max(ranks))
            strides = partials.stride()

    # Arguments that both launches take.
    arguments = dict(
        partials_ptr=partials,
        partial_stride=strides[0],
        partial_w=strides[1],
        partial_c=strides[2],
        out_ptrs=tuple(outputs),
        stride_w=outputs[0].stride(0),
        stride_c=outputs[0].stride(1),
        widths=widths,
        offsets_ptr=offsets,
        chunks_ptr=chunks,
        ranks_ptr=tables.rank_table(tuple(ranks), order.device),
        P=P,
        M=len(chunks),
    )
    constants = dict(
        n=len(wide),
        E=len(ranks),
        **rank_constants,
        COLUMN_TILES=column_tiles,
        BLOCK_R=block_r,
    )
    launcher.run(
        grouped_weight_grad_kernel,
        len(chunks) * tiles,
        tile_config,
        arguments
        | dict(
            wide_ptrs=tuple(wide),
            stride_wide=tuple(matrix.stride(0) for matrix in wide),
            narrow_ptr=launcher.aligned(narrow),
            order_ptr=order,
            seed_ptr=dropout.seed if dropout.p > 0 else None,
            row_counters=row_counters,
            dropout_scale=1.0 / keep_probability(dropout.p),
        ),
        constants
        | dict(
            PAIRS_PER_ROW=P // wide[0].shape[0],
            DROPOUT=dropout_threshold(dropout.p),
            PER_EXPERT=dropout.per_expert,
            TILES=tiles,
            BLOCK_P=tile_config.tokens,
            BLOCK_W=tile_config.step,
            UPCAST=launcher.INTERPRET,
        ),
    )
    if partials is not None:
        block_w = REDUCE_TILE.step // block_r
        tiles = launcher.ceil_div(max(widths), block_w) * column_tiles
        launcher.run(
            reduce_chunks_kernel,
            len(chunks) * tiles,
            REDUCE_TILE,
            arguments,
            constants | dict(TILES=tiles, BLOCK_W=block_w),
        )


def launch(
    x: Tensor,
    dh: Tensor,
    dy: Sequence[Tensor],
    u: Tensor,
    routing: Routing,
    ranks: Sequence[int],
    dropout: Dropout,
    lora_dtype: torch.dtype,
):
    """Return da [n R, I] and n x db [O_i, R], like `reference.grouped_weight_grad`."""
    n, R, width = len(dy), sum(ranks), x.shape[1]
    x, padded_dy = launcher.rows_dense(x), [launcher.rows_dense(g) for g in dy]
    new = x.new_empty if routing.order.shape[0] else x.new_zeros
    da = new((n * R, x.shape[1]), dtype=lora_dtype)
    db = [new((g.shape[1], R), dtype=lora_dtype) for g in padded_dy]
    if routing.order.shape[0] > 0:
        da_by_sibling = [da_i.t() for da_i in da.split(R)]
        sum_pairs([x] * n, dh, da_by_sibling, routing, ranks, dropout, num_counters(width))
        sum_pairs(padded_dy, u, db, routing, ranks)
    db = [launcher.cropped(b, g.shape[1], R) for b, g in zip(db, dy, strict=True)]
    return launcher.cropped(da, n * R, width), db
