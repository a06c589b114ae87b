"""The gradients of A and B: sums over the pairs of each expert, cut into chunks of bounded length.

A chunk that is all of its expert's pairs is summed straight into the gradient. Others are parts in
float32, which a second launch adds in their order; an expert's last places, if fewer than a chunk
holds, belong to the part before. So there are at most P / CHUNK parts, whatever the experts are.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moelora_kernels.kernels.common import configs, launcher
from moelora_kernels.kernels.common.configs import Tile
from moelora_kernels.kernels.common.products import pick, product
from moelora_kernels.kernels.common.tiles import load_ranks, load_tile
from moelora_kernels.kernels.dropout import keep_tile, threshold
from moelora_kernels.kernels.grouped_shrink import COLUMNS

# Elements of a gradient that one program adds up from its parts: 16 for each thread.
SUM = Tile(1, 4096, 8, 1)


@triton.jit
def load_part(chunks_ptr, offsets_ptr, chunk, expert, first, end, N):
    """End of the part that begins with a chunk, places of a chunk, and whether it is a first part.

    The end is `first` where the chunk belongs to the part before, or to no expert.
    """
    real = expert < N
    begin = tl.load(offsets_ptr + expert, mask=real, other=first)
    stop = tl.load(offsets_ptr + expert + 1, mask=real, other=first)
    before = tl.load(chunks_ptr + chunk * 2 - 1, mask=first > begin, other=first)
    size = tl.where(first > begin, first - before, end - first)
    end = tl.where(end - first < size, first, end)
    end = tl.where((end > first) & (stop - end < size), stop, end)
    return tl.where(real, end, first), size, first == begin


@triton.jit
def store_tile(out_ptr, stride_w, stride_c, total, w, some_w, columns, some_columns):
    """out[w, columns] = total for out of any strides."""
    at = w.to(tl.int64)[:, None] * stride_w + columns.to(tl.int64)[None, :] * stride_c
    mask = some_w[:, None] & some_columns[None, :]
    tl.store(out_ptr + at, total.to(out_ptr.dtype.element_ty), mask=mask)


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
    """The tile of the experts from low to high, which have no pairs."""
    zeros = tl.zeros((w.shape[0], columns.shape[0]), tl.float32)
    for expert in range(low, high):
        start, rank = load_ranks(ranks_ptr, expert % E, RANK, RANK_DIVISOR)
        store_tile(
            pick(out_ptrs, expert // E), stride_w, stride_c, zeros, w,
            w < pick(widths, expert // E), start + columns, columns < rank,
        )  # fmt: skip


@triton.jit(do_not_specialize=["P", "M", "scale"])
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
    parts_ptr,
    stride_part,
    part_w,
    part_c,
    P,
    M,
    scale,
    n: tl.constexpr,
    E: tl.constexpr,
    PAIRS: tl.constexpr,
    RANK: tl.constexpr,
    WIDEST: tl.constexpr,
    RANK_DIVISOR: tl.constexpr,
    DROPOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    PER_EXPERT: tl.constexpr,
    COLUMN_TILES: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """out_e [W, r] = sum over the pairs of an expert of wide^T narrow, or the parts of it.

    wide n x [rows, W_i] by token or pair, narrow [P, WIDEST] by place. Programs: (chunk, tile of W,
    column tile), the last fastest. Experts without pairs are filled by the chunk behind them.
    """
    chunk = tl.program_id(0) // TILES
    first_w = tl.program_id(0) % TILES // COLUMN_TILES * BLOCK_W
    w = first_w + tl.arange(0, BLOCK_W)
    columns = tl.program_id(0) % COLUMN_TILES * BLOCK_R + tl.arange(0, BLOCK_R)
    expert, first, end = load_tile(chunks_ptr, chunk, M, P)
    before = tl.load(chunks_ptr + chunk * 2 - 2, mask=chunk > 0, other=-1)
    store_zeros(
        out_ptrs, widths, stride_w, stride_c, ranks_ptr, before + 1, expert, w, columns, E, RANK,
        RANK_DIVISOR,
    )  # fmt: skip
    if chunk == M - 1:
        store_zeros(
            out_ptrs, widths, stride_w, stride_c, ranks_ptr, expert + 1, n * E, w, columns, E,
            RANK, RANK_DIVISOR,
        )  # fmt: skip
    end, size, is_first = load_part(chunks_ptr, offsets_ptr, chunk, expert, first, end, n * E)
    sibling = expert // E
    of_sibling = expert % E
    W = pick(widths, sibling)
    if (end > first) & (first_w < W):
        start, rank = load_ranks(ranks_ptr, of_sibling, RANK, RANK_DIVISOR)
        wide_ptr = pick(wide_ptrs, sibling)
        stride = pick(stride_wide, sibling)
        some = columns < rank
        some_w = w < W
        if DROPOUT > 0:
            seed = tl.load(seed_ptr)
            stream = of_sibling if PER_EXPERT else of_sibling * 0
        total = tl.zeros((BLOCK_W, BLOCK_R), tl.float32)
        for first_place in range(first, end, BLOCK_P):
            places = first_place + tl.arange(0, BLOCK_P)
            inside = places < end
            pairs = tl.load(order_ptr + places, mask=inside, other=0)
            rows = (pairs // PAIRS).to(tl.int64)
            wide = tl.load(
                wide_ptr + rows[:, None] * stride + w[None, :],
                mask=inside[:, None] & some_w[None, :],
                other=0.0,
            )
            narrow = tl.load(
                narrow_ptr + places.to(tl.int64)[:, None] * WIDEST + columns[None, :],
                mask=inside[:, None] & some[None, :],
                other=0.0,
            )
            if DROPOUT > 0:
                kept = keep_tile(seed, stream, rows, first_w, W, DROPOUT, ALIGNED, BLOCK_W)
                wide = tl.where(kept, wide, 0.0).to(wide.dtype)
            total = product(tl.trans(wide), narrow, total, UPCAST)
        total *= scale
        stop = tl.load(offsets_ptr + expert + 1)
        if is_first & (end == stop):
            out_ptr = pick(out_ptrs, sibling)
            store_tile(out_ptr, stride_w, stride_c, total, w, some_w, start + columns, some)
        elif parts_ptr is not None:
            part_ptr = parts_ptr + (first // size).to(tl.int64) * stride_part
            store_tile(part_ptr, part_w, part_c, total, w, some_w, columns, some)


@triton.jit(do_not_specialize=["P", "M"])
def sum_parts_kernel(
    parts_ptr,
    stride_part,
    part_w,
    part_c,
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
    WIDEST: tl.constexpr,
    RANK_DIVISOR: tl.constexpr,
    COLUMN_TILES: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The gradient of an expert with several parts, added in their order.

    Programs: (chunk, tile of W, column tile); those of the first chunk of such an expert work.
    """
    chunk = tl.program_id(0) // TILES
    w = tl.program_id(0) % TILES // COLUMN_TILES * BLOCK_W + tl.arange(0, BLOCK_W)
    columns = tl.program_id(0) % COLUMN_TILES * BLOCK_R + tl.arange(0, BLOCK_R)
    expert, first, end = load_tile(chunks_ptr, chunk, M, P)
    end, size, is_first = load_part(chunks_ptr, offsets_ptr, chunk, expert, first, end, n * E)
    stop = tl.load(offsets_ptr + expert + 1, mask=expert < n * E, other=0)
    if is_first & (first < end) & (end < stop):
        start, rank = load_ranks(ranks_ptr, expert % E, RANK, RANK_DIVISOR)
        some_w = w < pick(widths, expert // E)
        mask = some_w[:, None] & (columns < rank)[None, :]
        at = w.to(tl.int64)[:, None] * part_w + columns.to(tl.int64)[None, :] * part_c
        total = tl.zeros((BLOCK_W, BLOCK_R), tl.float32)
        for place in range(first, stop - size + 1, size):
            part_ptr = parts_ptr + (place // size).to(tl.int64) * stride_part
            total += tl.load(part_ptr + at, mask=mask, other=0.0)
        store_tile(
            pick(out_ptrs, expert // E), stride_w, stride_c, total, w, some_w, start + columns,
            columns < rank,
        )  # fmt: skip


def sum_pairs(
    wide, narrow, outputs, order, offsets, chunks, ranks, dropout, dropout_per_expert, seed
) -> None:
    """Fill `outputs` n x [W_i, R], of the same strides, with the sums of all experts."""
    P, N = order.shape[0], len(offsets) - 1
    widths = tuple(matrix.shape[1] for matrix in wide)
    block_r = min(launcher.block(max(ranks)), COLUMNS)
    tile = configs.tile("grouped_weight_grad", narrow.device, narrow.dtype, block_r)
    column_tiles = launcher.ceil_div(max(ranks), block_r)
    tiles = launcher.ceil_div(max(widths), tile.step) * column_tiles
    # Whole chunks that P pairs may fill: the upper bound of `types.count_tiles` without the rest.
    whole = len(chunks) - min(N + 1, P)
    parts, strides = None, (0, 1, 1)
    if whole > 1:
        # Columns and W in the order in which the gradient has them.
        parts = narrow.new_empty((whole, max(ranks), max(widths)), dtype=torch.float32)
        strides = parts.stride(0), parts.stride(2), parts.stride(1)
        if outputs[0].stride(1) == 1:
            parts = parts.view(whole, max(widths), max(ranks))
            strides = parts.stride()
    wide = [launcher.rows_dense(matrix) for matrix in wide]
    shared = dict(
        parts_ptr=parts,
        stride_part=strides[0],
        part_w=strides[1],
        part_c=strides[2],
        out_ptrs=tuple(outputs),
        stride_w=outputs[0].stride(0),
        stride_c=outputs[0].stride(1),
        widths=widths,
        offsets_ptr=offsets,
        chunks_ptr=chunks,
        ranks_ptr=launcher.rank_table(tuple(ranks), order.device),
        P=P,
        M=len(chunks),
    )
    static = dict(
        n=len(wide),
        E=len(ranks),
        **launcher.rank_constants(ranks),
        COLUMN_TILES=column_tiles,
        BLOCK_R=block_r,
    )
    launcher.run(
        grouped_weight_grad_kernel,
        len(chunks) * tiles,
        tile,
        shared
        | dict(
            wide_ptrs=tuple(wide),
            stride_wide=tuple(matrix.stride(0) for matrix in wide),
            narrow_ptr=narrow.contiguous(),
            order_ptr=order,
            seed_ptr=seed if dropout > 0 else None,
            scale=1.0 / (1.0 - dropout),
        ),
        static
        | dict(
            PAIRS=P // wide[0].shape[0], DROPOUT=threshold(dropout),
            ALIGNED=all(W % 4 == 0 for W in widths), PER_EXPERT=dropout_per_expert,
            TILES=tiles, BLOCK_P=tile.tokens, BLOCK_W=tile.step, UPCAST=launcher.INTERPRET,
        ),
    )  # fmt: skip
    if parts is not None:
        block_w = SUM.step // block_r
        tiles = launcher.ceil_div(max(widths), block_w) * column_tiles
        launcher.run(
            sum_parts_kernel,
            len(chunks) * tiles,
            SUM,
            shared,
            static | dict(TILES=tiles, BLOCK_W=block_w),
        )


def launch(
    x, dh, dy, u, order, offsets, chunks, lora_dtype, ranks, dropout, dropout_per_expert, seed
):
    """`reference.grouped_weight_grad` on a GPU."""
    n, R, I = len(dy), sum(ranks), x.shape[1]  # noqa: E741
    make = x.new_empty if order.shape[0] else x.new_zeros
    da = make((n * R, I), dtype=lora_dtype)
    db = [make((g.shape[1], R), dtype=lora_dtype) for g in dy]
    if order.shape[0] == 0:
        return da, db
    routing = (order, offsets, chunks, ranks)
    of_a = [rows.t() for rows in da.split(R)]
    sum_pairs([x] * n, dh, of_a, *routing, dropout, dropout_per_expert, seed)
    sum_pairs(dy, u, db, *routing, 0.0, False, None)
    return da, db
