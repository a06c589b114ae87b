"""The gradients of all parameters: every product that sums over the tokens, in one launch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from moelora_kernels.kernels.common import configs, launcher, tables
from moelora_kernels.kernels.common.memory import load_rows, store_rows, store_transposed
from moelora_kernels.kernels.common.products import exact_product, product, select_from
from moelora_kernels.kernels.common.reduce_partials import Partials
from moelora_kernels.kernels.common.splits import num_splits
from moelora_kernels.kernels.dropout import keep_tile, num_counters
from moelora_kernels.numerics import dropout_threshold, keep_probability
from moelora_kernels.types import Dropout

# Columns of rank space, and of dlogits beside them, that one program sums: more do not fit into the
# registers.
COLUMNS = 128
MAX_ROUTER_COLUMNS = 32


@triton.jit
def weight_grad_of_x(
    x_ptr,
    stride_x,
    dh_ptr,
    dlogits_ptr,
    seed_ptr,
    column_tiles_ptr,
    da_ptr,
    drouter_ptr,
    dbias_ptr,
    tile,
    start_t,
    end_t,
    T,
    I,  # noqa: E741
    row_counters,
    dropout_scale,
    H: tl.constexpr,
    L: tl.constexpr,
    DROPOUT: tl.constexpr,
    PER_EXPERT: tl.constexpr,
    RANK_DIVISOR: tl.constexpr,
    A_TILES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_L: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Store one tile of dA, dWr and dbr, summed over the tokens from start_t to end_t."""
    column_tile = tile % A_TILES
    first_i = tile // A_TILES * BLOCK_W
    start = column_tile * BLOCK_A
    end = H
    stream = 0
    if PER_EXPERT:
        # A tile holds columns of one expert, because another expert has another dropout mask.
        start = tl.multiple_of(tl.load(column_tiles_ptr + column_tile * 4), RANK_DIVISOR)
        end = tl.multiple_of(tl.load(column_tiles_ptr + column_tile * 4 + 1), RANK_DIVISOR)
        stream = tl.load(column_tiles_ptr + column_tile * 4 + 2)
    i = first_i + tl.arange(0, BLOCK_W)
    columns = start + tl.arange(0, BLOCK_A)
    # Column tile c of dA also has the columns of dlogits from c BLOCK_L on.
    logit_columns = column_tile * BLOCK_L + tl.arange(0, BLOCK_L)
    if DROPOUT > 0:
        seed = tl.load(seed_ptr)
    # Whether the product with dlogits converts x to float32 (`exact_product`).
    CONVERTED: tl.constexpr = L > 0 and x_ptr.dtype.element_ty == tl.float16

    # Products: the experts read x after dropout, the router reads x itself.
    da = tl.zeros((BLOCK_W, BLOCK_A), tl.float32)
    drouter = tl.zeros((BLOCK_W, BLOCK_L), tl.float32)
    dbias = tl.zeros((BLOCK_L,), tl.float32)
    for first in range(start_t, end_t, BLOCK_T):
        tokens = tl.arange(0, BLOCK_T).to(tl.int64) + first
        tokens_in = tokens < T
        x = load_rows(x_ptr, stride_x, tokens, i, tokens_in, i < I)  # [BLOCK_T, BLOCK_W]
        dh = load_rows(dh_ptr, H, tokens, columns, tokens_in, columns < end)
        if L > 0:
            dlogits = load_rows(dlogits_ptr, L, tokens, logit_columns, tokens_in, logit_columns < L)
            if first_i == 0:
                dbias += tl.sum(dlogits, axis=0)
            drouter = exact_product(tl.trans(x), dlogits, drouter, UPCAST)
        if DROPOUT > 0:
            kept = keep_tile(seed, stream, tokens, first_i, row_counters, DROPOUT, BLOCK_W)
            x = tl.where(kept, x, 0.0).to(x.dtype)
        da = product(tl.trans(x), dh, da, UPCAST, COMPUTED=DROPOUT > 0, WAIT=CONVERTED)
    da *= dropout_scale

    # Store. The programs of the first tile of I store the bias.
    store_transposed(da_ptr, I, columns, i, columns < end, i < I, da)
    if L > 0:
        logits_in = logit_columns < L
        store_transposed(drouter_ptr, I, logit_columns, i, logits_in, i < I, drouter)
        if first_i == 0:
            out = dbias.to(dbias_ptr.dtype.element_ty)
            tl.store(dbias_ptr + logit_columns, out, mask=logits_in)


@triton.jit
def weight_grad_of_dy(
    dy_ptr,
    stride_dy,
    u_ptr,
    db_ptr,
    tile,
    start_t,
    end_t,
    T,
    O,  # noqa: E741
    stride_u: tl.constexpr,
    R: tl.constexpr,
    B_TILES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_B: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Store one tile of dB of one sibling, summed over the tokens from start_t to end_t."""
    o = tile // B_TILES * BLOCK_W + tl.arange(0, BLOCK_W)
    columns = tile % B_TILES * BLOCK_B + tl.arange(0, BLOCK_B)
    db = tl.zeros((BLOCK_W, BLOCK_B), tl.float32)
    for first in range(start_t, end_t, BLOCK_T):
        tokens = tl.arange(0, BLOCK_T).to(tl.int64) + first
        tokens_in = tokens < T
        dy = load_rows(dy_ptr, stride_dy, tokens, o, tokens_in, o < O)  # [BLOCK_T, BLOCK_W]
        u = load_rows(u_ptr, stride_u, tokens, columns, tokens_in, columns < R)
        db = product(tl.trans(dy), u, db, UPCAST)
    store_rows(db_ptr, R, o, columns, o < O, columns < R, db)


@triton.jit(do_not_specialize=["T", "row_counters", "dropout_scale"])
def weight_grad_kernel(
    x_ptr,
    stride_x,
    dh_ptr,
    dlogits_ptr,
    dy_ptrs,
    stride_dy,
    u_ptr,
    seed_ptr,
    column_tiles_ptr,
    da_ptr,
    drouter_ptr,
    dbias_ptr,
    db_ptrs,
    T,
    I,  # noqa: E741
    out_features,
    t_per_split,
    partial_stride,
    row_counters,
    dropout_scale,
    n: tl.constexpr,
    H: tl.constexpr,
    L: tl.constexpr,
    R: tl.constexpr,
    DROPOUT: tl.constexpr,
    PER_EXPERT: tl.constexpr,
    RANK_DIVISOR: tl.constexpr,
    A_TILES: tl.constexpr,
    B_TILES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_L: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """dA = dh^T dropout(x), dWr = dlogits^T x, dbr = sum of dlogits, dB_i = dy_i^T u_i.

    x            [T, I], rows stride_x apart
    dh           [T, H]; H is n R, or n r if the experts share A
    dlogits      [T, L] float32, L = n E; None and L = 0 without a router
    dy           n x [T, O_i], rows stride_dy[i] apart
    u            [T, n R]
    seed         [1] int64; None without dropout
    column_tiles [A_TILES, 4] of `column_tile_table`; None without PER_EXPERT
    da, drouter, dbias, db: [H, I], [L, I], [L] and n x [O_i, R]; if split over T, float32 partial
                 sums, partial_stride elements apart
    out_features n numbers: O_i

    Programs: (split of T, tile of a wide side, column tile), the last fastest. The wide sides are
    I, with A_TILES column tiles, and then O of every sibling, with B_TILES column tiles.
    """
    # Compute the split, the tile of a wide side and the column tile from the program's number.
    pid = tl.program_id(0)
    x_tiles = tl.cdiv(I, BLOCK_W) * A_TILES
    tiles = x_tiles
    for j in tl.static_range(n):
        tiles += tl.cdiv(out_features[j], BLOCK_W) * B_TILES
    split = pid // tiles
    tile = pid % tiles
    partial = split.to(tl.int64) * partial_stride
    start_t = split * t_per_split
    end_t = tl.minimum(start_t + t_per_split, T)

    if tile < x_tiles:
        if L > 0:
            drouter_ptr += partial
            dbias_ptr += partial
        weight_grad_of_x(
            x_ptr, stride_x, dh_ptr, dlogits_ptr, seed_ptr, column_tiles_ptr, da_ptr + partial,
            drouter_ptr, dbias_ptr, tile, start_t, end_t, T, I, row_counters, dropout_scale, H, L,
            DROPOUT, PER_EXPERT, RANK_DIVISOR, A_TILES, BLOCK_T, BLOCK_W, BLOCK_A, BLOCK_L, UPCAST,
        )  # fmt: skip
    else:
        # The tiles of sibling i begin where those of sibling i - 1 end.
        sibling = tile * 0
        end_of_previous = x_tiles
        first_tile = x_tiles
        for i in tl.static_range(n - 1):
            end_of_previous += tl.cdiv(out_features[i], BLOCK_W) * B_TILES
            sibling = tl.where(tile >= end_of_previous, i + 1, sibling)
            first_tile = tl.where(tile >= end_of_previous, end_of_previous, first_tile)
        weight_grad_of_dy(
            select_from(dy_ptrs, sibling), select_from(stride_dy, sibling), u_ptr + sibling * R,
            select_from(db_ptrs, sibling) + partial, tile - first_tile, start_t, end_t, T,
            select_from(out_features, sibling), n * R, R, B_TILES, BLOCK_T, BLOCK_W, BLOCK_B,
            UPCAST,
        )  # fmt: skip


def launch(
    x: Tensor,
    dh: Tensor,
    dlogits: Tensor | None,
    dy: Sequence[Tensor],
    u: Tensor,
    ranks: Sequence[int],
    dropout: Dropout,
    lora_dtype: torch.dtype,
    router_dtype: torch.dtype,
    *,
    split: int | None = None,
):
    """Return da, drouter, dbias and n x db, like `reference.weight_grad`.

    split: number of parts that T is cut into; None balances the programs.
    """
    (T, width), n, H = x.shape, len(dy), dh.shape[1]
    x, padded_dy = launcher.rows_dense(x), [launcher.rows_dense(g) for g in dy]
    R, I, out_features = u.shape[1] // n, x.shape[1], [g.shape[1] for g in padded_dy]  # noqa: E741
    L = 0 if dlogits is None else dlogits.shape[1]

    # Outputs, as wide as x and dy are after padding.
    new = x.new_zeros if T == 0 else x.new_empty
    da = new((H, I), dtype=lora_dtype)
    drouter = new((L, I), dtype=router_dtype)
    dbias = new(L, dtype=router_dtype)
    db = [new((O, R), dtype=lora_dtype) for O in out_features]  # noqa: E741
    if T == 0:
        return _cropped(da, drouter, dbias, db, width, dy)

    # Tiles.
    per_expert = dropout.p > 0 and dropout.per_expert
    block_a = min(launcher.block(max(ranks) if per_expert else H), COLUMNS)
    block_b = min(launcher.block(R), COLUMNS)
    columns, row = max(block_a, block_b), math.gcd(H, R)
    # A mask takes registers, and so do x in float32, which float16 needs beside dlogits, the sums
    # of many routers, and the addresses of rows of dh and u that are not aligned.
    is_simple = dropout.p == 0 and (L == 0 or x.dtype != torch.float16) and L <= 64
    is_simple = is_simple and row * x.itemsize % 16 == 0
    tile_config = configs.tile_config(
        "weight_grad", x.device, x.dtype, columns, row, T * n, is_simple
    )
    column_tiles = None
    if per_expert:
        column_tiles = tables.column_tile_table(tuple(ranks), n, block_a, x.device)
        a_tiles = len(column_tiles)
    else:
        num_router_tiles = launcher.ceil_div(L, MAX_ROUTER_COLUMNS)
        a_tiles = max(launcher.ceil_div(H, block_a), num_router_tiles)
    b_tiles = launcher.ceil_div(R, block_b)
    block_l = launcher.block(launcher.ceil_div(L, a_tiles)) if L else 16

    programs = launcher.ceil_div(I, tile_config.step) * a_tiles
    programs += sum(launcher.ceil_div(O, tile_config.step) for O in out_features) * b_tiles  # noqa: E741
    steps = launcher.ceil_div(T, tile_config.tokens)
    if split is None:
        split = num_splits(x.device, tile_config, programs, steps)

    partials = Partials([da, drouter, dbias, *db] if L else [da, *db], split)
    da_target, *router_targets = partials.targets[:-n]
    drouter_target, dbias_target = router_targets or (None, None)
    launcher.run(
        weight_grad_kernel,
        programs * split,
        tile_config,
        dict(
            x_ptr=x,
            stride_x=x.stride(0),
            dh_ptr=launcher.aligned(dh),
            dlogits_ptr=launcher.aligned_or_none(dlogits),
            dy_ptrs=tuple(padded_dy),
            stride_dy=tuple(g.stride(0) for g in padded_dy),
            u_ptr=launcher.aligned(u),
            seed_ptr=dropout.seed if dropout.p > 0 else None,
            column_tiles_ptr=column_tiles,
            da_ptr=da_target,
            drouter_ptr=drouter_target,
            dbias_ptr=dbias_target,
            db_ptrs=tuple(partials.targets[-n:]),
            T=T,
            I=I,
            out_features=tuple(out_features),
            t_per_split=launcher.ceil_div(steps, split) * tile_config.tokens,
            partial_stride=partials.stride,
            row_counters=num_counters(width),
            dropout_scale=1.0 / keep_probability(dropout.p),
        ),
        dict(
            n=n,
            H=H,
            L=L,
            R=R,
            DROPOUT=dropout_threshold(dropout.p),
            PER_EXPERT=per_expert,
            RANK_DIVISOR=tables.rank_divisor(ranks),
            A_TILES=a_tiles,
            B_TILES=b_tiles,
            BLOCK_T=tile_config.tokens,
            BLOCK_W=tile_config.step,
            BLOCK_A=block_a,
            BLOCK_B=block_b,
            BLOCK_L=block_l,
            UPCAST=launcher.INTERPRET,
        ),
    )
    partials.reduce()
    return _cropped(da, drouter, dbias, db, width, dy)


def _cropped(
    da: Tensor,
    drouter: Tensor,
    dbias: Tensor,
    db: list[Tensor],
    width: int,
    dy: Sequence[Tensor],
):
    """Return the gradients of the features of x [T, width] and dy, without those of the padding.

    drouter is [0] without a router.
    """
    L = len(dbias)
    da = launcher.cropped(da, len(da), width)
    drouter = launcher.cropped(drouter, L, width) if L else drouter.flatten()
    db = [launcher.cropped(b, g.shape[1], b.shape[1]) for b, g in zip(db, dy, strict=True)]
    return da, drouter, dbias, db
