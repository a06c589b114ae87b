"""Shrink the rows of every expert to its ranks and gate them: h and u in the order of places."""

from __future__ import annotations

import triton
import triton.language as tl

from moelora_kernels.kernels.common import configs, launcher
from moelora_kernels.kernels.common.products import pick, product
from moelora_kernels.kernels.common.tiles import load_gate, load_ranks, load_tile
from moelora_kernels.kernels.dropout import keep_tile, threshold

# Columns of rank space that one program sums: more experts have too few rows to share the reads.
COLUMNS = 64


@triton.jit(do_not_specialize=["P", "M", "scale"])
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
    BLOCK_P: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """h and u [P, WIDEST] of a tile of places. PAIRS: pairs that read the same row of x.

    Programs: (tile, column tile), the last fastest, so that those which read the same x run
    together.
    """
    expert, first, end = load_tile(tiles_ptr, tl.program_id(0) // COLUMN_TILES, M, P)
    columns = tl.program_id(0) % COLUMN_TILES * BLOCK_R + tl.arange(0, BLOCK_R)
    sibling = expert // E
    of_sibling = expert % E
    start, rank = load_ranks(ranks_ptr, of_sibling, RANK, RANK_DIVISOR)
    places = first + tl.arange(0, BLOCK_P)
    inside = places < end
    pairs = tl.load(order_ptr + places, mask=inside, other=0)
    rows = (pairs // PAIRS).to(tl.int64)
    x_ptr += rows[:, None] * stride_x
    a_ptr = pick(a_ptrs, sibling) + (start + columns).to(tl.int64)[None, :] * I
    h = tl.zeros((BLOCK_P, BLOCK_R), tl.float32)
    if expert < n * E:
        if DROPOUT > 0:
            seed = tl.load(seed_ptr)
            stream = of_sibling if PER_EXPERT else of_sibling * 0
        for first_i in range(0, I, BLOCK_I):
            i = first_i + tl.arange(0, BLOCK_I)
            some_i = i < I
            x = tl.load(x_ptr + i[None, :], mask=inside[:, None] & some_i[None, :], other=0.0)
            a = tl.load(
                a_ptr + i[:, None], mask=some_i[:, None] & (columns < rank)[None, :], other=0.0
            )
            if DROPOUT > 0:
                kept = keep_tile(seed, stream, rows, first_i, I, DROPOUT, ALIGNED, BLOCK_I)
                x = tl.where(kept, x, 0.0).to(x.dtype)
            h = product(x, a, h, UPCAST)
    h = (h * scale).to(h_ptr.dtype.element_ty)
    routed = places < tl.where(expert < n * E, end, first)
    gate = load_gate(weights_ptr, scaling_ptr, of_sibling, pairs, routed)
    u = tl.where(gate[:, None] == 0, 0.0, gate[:, None] * h.to(tl.float32))
    at = places.to(tl.int64)[:, None] * WIDEST + columns[None, :]
    real = inside[:, None] & (columns < WIDEST)[None, :]
    tl.store(h_ptr + at, h, mask=real)
    tl.store(u_ptr + at, u.to(u_ptr.dtype.element_ty), mask=real)


def launch(
    x, lora_a, weights, order, offsets, tiles, ranks, scaling, dropout, dropout_per_expert, seed
):
    """`reference.grouped_shrink` on a GPU."""
    P, I = order.shape[0], x.shape[1]  # noqa: E741
    h, u = (x.new_empty((P, max(ranks))) for _ in range(2))
    if P == 0:
        return h, u
    block_r = min(launcher.block(max(ranks)), COLUMNS)
    tile = configs.tile("grouped_shrink", x.device, x.dtype, block_r)
    column_tiles = launcher.ceil_div(max(ranks), block_r)
    x = launcher.rows_dense(x)
    launcher.run(
        grouped_shrink_kernel,
        len(tiles) * column_tiles,
        tile,
        dict(
            x_ptr=x,
            stride_x=x.stride(0),
            a_ptrs=launcher.contiguous(lora_a),
            weights_ptr=None if weights is None else weights.contiguous(),
            scaling_ptr=launcher.scaling_of(tuple(scaling), x.device),
            order_ptr=order,
            tiles_ptr=tiles,
            ranks_ptr=launcher.rank_table(tuple(ranks), order.device),
            seed_ptr=seed if dropout > 0 else None,
            h_ptr=h,
            u_ptr=u,
            P=P,
            M=len(tiles),
            I=I,
            scale=1.0 / (1.0 - dropout),
        ),
        dict(
            n=len(lora_a), E=len(ranks), PAIRS=P // x.shape[0], **launcher.rank_constants(ranks),
            DROPOUT=threshold(dropout), ALIGNED=I % 4 == 0, PER_EXPERT=dropout_per_expert,
            COLUMN_TILES=column_tiles, BLOCK_P=tile.tokens, BLOCK_I=tile.step, BLOCK_R=block_r,
            UPCAST=launcher.INTERPRET,
        ),
    )  # fmt: skip
    return h, u
