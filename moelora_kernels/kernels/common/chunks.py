"""Device functions of the sums over the pairs of each expert, in chunks of bounded length.

If one chunk holds all pairs of an expert, its sum is the gradient. Otherwise each chunk writes a
float32 partial sum, and a second launch adds them in their order. A short last chunk is merged into
the one before it, so there are at most P / CHUNK partial sums, however the pairs are routed.
"""

import triton
import triton.language as tl

from moelora_kernels.kernels.common.memory import load_rows
from moelora_kernels.kernels.common.products import product, select_from
from moelora_kernels.kernels.common.tiles import load_pairs, load_ranks, load_tile
from moelora_kernels.kernels.dropout import keep_tile


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


@triton.jit
def store_sums(
    wide_ptrs,
    stride_wide,
    widths,
    narrow_ptr,
    out_ptrs,
    stride_w,
    stride_c,
    partials_ptr,
    partial_stride,
    partial_w,
    partial_c,
    order_ptr,
    offsets_ptr,
    chunks_ptr,
    ranks_ptr,
    seed_ptr,
    chunk,
    tile,
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
    BLOCK_P: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UPCAST: tl.constexpr,
    HAS_FROZEN: tl.constexpr,
):
    """Store one tile of out_e = dropout(wide)^T narrow over the pairs of a chunk of expert e.

    wide n x [P / PAIRS_PER_ROW, W_i], rows stride_wide[i] apart; widths: n numbers W_i; narrow
    [P, MAX_RANK] by sorted position; out n x [W_i, R], strides stride_w and stride_c; partials
    [P / CHUNK, W, MAX_RANK] float32, strides partial_stride, partial_w and partial_c, or None if no
    expert can have two chunks. Experts without pairs are filled with zeros with the next chunk.
    With HAS_FROZEN the pairs of experts of rank 0 are skipped, and nothing is stored for them.
    """
    first_w = tile // COLUMN_TILES * BLOCK_W
    w = first_w + tl.arange(0, BLOCK_W)
    columns = tile % COLUMN_TILES * BLOCK_R + tl.arange(0, BLOCK_R)
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
    if HAS_FROZEN:
        # Not `_`, which has another type in the loop below.
        _start, frozen_rank = load_ranks(ranks_ptr, local_expert, RANK, RANK_DIVISOR)
        end = tl.where(frozen_rank > 0, end, first)
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


@triton.jit
def reduce_expert(
    partials_ptr,
    partial_stride,
    partial_w,
    partial_c,
    out_ptr,
    stride_w,
    stride_c,
    W,
    part,
    first,
    expert_end,
    size,
    start,
    rank,
    COLUMN_TILES: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Store every PARTS-th tile of W of out = the sum of the partial sums of one expert."""
    columns = part % COLUMN_TILES * BLOCK_R + tl.arange(0, BLOCK_R)
    columns_in = columns < rank
    for first_w in range(part // COLUMN_TILES * BLOCK_W, W, PARTS * BLOCK_W):
        w = first_w + tl.arange(0, BLOCK_W)
        w_in = w < W
        in_bounds = w_in[:, None] & columns_in[None, :]
        offsets = w.to(tl.int64)[:, None] * partial_w + columns.to(tl.int64)[None, :] * partial_c
        total = tl.zeros((BLOCK_W, BLOCK_R), tl.float32)
        for position in range(first, expert_end - size + 1, size):
            partial_ptr = partials_ptr + (position // size).to(tl.int64) * partial_stride
            total += tl.load(partial_ptr + offsets, mask=in_bounds, other=0.0)
        store_tile(out_ptr, stride_w, stride_c, total, w, w_in, start + columns, columns_in)
