"""The gradients of all parameters: every product that sums over the tokens, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moelora_kernels.kernels.common import configs, launcher
from moelora_kernels.kernels.common.products import exact_product, pick, product
from moelora_kernels.kernels.common.reduce_partials import reduce_partials
from moelora_kernels.kernels.dropout import keep_tile, threshold

# Columns of rank space, and of dlogits beside them, that one program sums: what the registers hold.
COLUMNS = 128
ROUTER_COLUMNS = 32


@triton.jit
def store_transposed(out_ptr, stride_out, total, rows, some_rows, columns, some_columns):
    """out[columns, rows] = total[rows, columns], for out with contiguous rows."""
    address = out_ptr + columns.to(tl.int64)[None, :] * stride_out + rows[:, None]
    mask = some_rows[:, None] & some_columns[None, :]
    tl.store(address, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def weight_grad_of_x(
    x_ptr,
    stride_x,
    dh_ptr,
    dlogits_ptr,
    seed_ptr,
    tiles_ptr,
    da_ptr,
    drouter_ptr,
    dbias_ptr,
    tile,
    start_t,
    end_t,
    T,
    I,  # noqa: E741
    scale,
    H: tl.constexpr,
    L: tl.constexpr,
    DROPOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    PER_EXPERT: tl.constexpr,
    RANK_DIVISOR: tl.constexpr,
    A_TILES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_A: tl.constexpr,
    BLOCK_L: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """A tile of dA, dWr and dbr from the tokens of one split."""
    column_tile = tile % A_TILES
    first_w = tile // A_TILES * BLOCK_W
    start = column_tile * BLOCK_A
    end = H
    stream = 0
    if PER_EXPERT:
        start = tl.multiple_of(tl.load(tiles_ptr + column_tile * 4), RANK_DIVISOR)
        end = tl.multiple_of(tl.load(tiles_ptr + column_tile * 4 + 1), RANK_DIVISOR)
        stream = tl.load(tiles_ptr + column_tile * 4 + 2)
    w = first_w + tl.arange(0, BLOCK_W)
    columns = start + tl.arange(0, BLOCK_A)
    # Column tile c of dA also has the columns of dlogits from c BLOCK_L.
    of_logits = column_tile * BLOCK_L + tl.arange(0, BLOCK_L)
    if DROPOUT > 0:
        seed = tl.load(seed_ptr)
    total = tl.zeros((BLOCK_W, BLOCK_A), tl.float32)
    of_router = tl.zeros((BLOCK_W, BLOCK_L), tl.float32)
    of_bias = tl.zeros((BLOCK_L,), tl.float32)
    for first in range(start_t, end_t, BLOCK_T):
        tokens = tl.arange(0, BLOCK_T).to(tl.int64) + first
        inside = tokens < T
        x = tl.load(
            x_ptr + tokens[:, None] * stride_x + w[None, :],
            mask=inside[:, None] & (w < I)[None, :],
            other=0.0,
        )
        dh = tl.load(
            dh_ptr + tokens[:, None] * H + columns[None, :],
            mask=inside[:, None] & (columns < end)[None, :],
            other=0.0,
        )
        if L > 0:
            dlogits = tl.load(
                dlogits_ptr + tokens[:, None] * L + of_logits[None, :],
                mask=inside[:, None] & (of_logits < L)[None, :],
                other=0.0,
            )
            of_bias += tl.sum(dlogits, axis=0)
            of_router = exact_product(tl.trans(x), dlogits, of_router, UPCAST)
        if DROPOUT > 0:
            kept = keep_tile(seed, stream, tokens, first_w, I, DROPOUT, ALIGNED, BLOCK_W)
            x = tl.where(kept, x, 0.0).to(x.dtype)
        total = product(tl.trans(x), dh, total, UPCAST)
    total *= scale
    store_transposed(da_ptr, I, total, w, w < I, columns, columns < end)
    if L > 0:
        some = of_logits < L
        store_transposed(drouter_ptr, I, of_router, w, w < I, of_logits, some)
        if first_w == 0:
            tl.store(dbias_ptr + of_logits, of_bias.to(dbias_ptr.dtype.element_ty), mask=some)


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
    """A tile of dB of one sibling from the tokens of one split."""
    w = tile // B_TILES * BLOCK_W + tl.arange(0, BLOCK_W)
    columns = tile % B_TILES * BLOCK_B + tl.arange(0, BLOCK_B)
    total = tl.zeros((BLOCK_W, BLOCK_B), tl.float32)
    for first in range(start_t, end_t, BLOCK_T):
        tokens = tl.arange(0, BLOCK_T).to(tl.int64) + first
        inside = tokens < T
        dy = tl.load(
            dy_ptr + tokens[:, None] * stride_dy + w[None, :],
            mask=inside[:, None] & (w < O)[None, :],
            other=0.0,
        )
        u = tl.load(
            u_ptr + tokens[:, None] * stride_u + columns[None, :],
            mask=inside[:, None] & (columns < R)[None, :],
            other=0.0,
        )
        total = product(tl.trans(dy), u, total, UPCAST)
    address = db_ptr + w.to(tl.int64)[:, None] * R + columns[None, :]
    mask = (w < O)[:, None] & (columns < R)[None, :]
    tl.store(address, total.to(db_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T", "scale"])
def weight_grad_kernel(
    x_ptr,
    stride_x,
    dh_ptr,
    dlogits_ptr,
    dy_ptrs,
    stride_dy,
    u_ptr,
    seed_ptr,
    tiles_ptr,
    da_ptr,
    drouter_ptr,
    dbias_ptr,
    db_ptrs,
    T,
    I,  # noqa: E741
    outputs,
    per_split,
    stride_plane,
    scale,
    n: tl.constexpr,
    H: tl.constexpr,
    L: tl.constexpr,
    R: tl.constexpr,
    DROPOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
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
    """dA [H, I], dWr [L, I], dbr [L] and n x dB [O, R], or their parts, stride_plane apart.

    H = n R columns of dh, L = n E columns of dlogits. Programs: (split of T, tile of a wide side,
    column tile), the last fastest; the wide sides are I, then O of every sibling.
    """
    pid = tl.program_id(0)
    x_tiles = tl.cdiv(I, BLOCK_W) * A_TILES
    tiles = x_tiles
    for j in tl.static_range(n):
        tiles += tl.cdiv(outputs[j], BLOCK_W) * B_TILES
    split = pid // tiles
    tile = pid % tiles
    plane = split.to(tl.int64) * stride_plane
    start_t = split * per_split
    end_t = tl.minimum(start_t + per_split, T)
    if tile < x_tiles:
        if L > 0:
            drouter_ptr += plane
            dbias_ptr += plane
        weight_grad_of_x(
            x_ptr, stride_x, dh_ptr, dlogits_ptr, seed_ptr, tiles_ptr, da_ptr + plane, drouter_ptr,
            dbias_ptr, tile, start_t, end_t, T, I, scale, H, L, DROPOUT, ALIGNED, PER_EXPERT,
            RANK_DIVISOR, A_TILES, BLOCK_T, BLOCK_W, BLOCK_A, BLOCK_L, UPCAST,
        )  # fmt: skip
    else:
        # LinearTensors i begins where those before it end.
        sibling = tile * 0
        before = x_tiles
        first_tile = x_tiles
        for i in tl.static_range(n - 1):
            before += tl.cdiv(outputs[i], BLOCK_W) * B_TILES
            sibling = tl.where(tile >= before, i + 1, sibling)
            first_tile = tl.where(tile >= before, before, first_tile)
        weight_grad_of_dy(
            pick(dy_ptrs, sibling), pick(stride_dy, sibling), u_ptr + sibling * R,
            pick(db_ptrs, sibling) + plane, tile - first_tile, start_t, end_t, T,
            pick(outputs, sibling), n * R, R, B_TILES, BLOCK_T, BLOCK_W, BLOCK_B, UPCAST,
        )  # fmt: skip


def launch(
    x, dh, dlogits, dy, u, lora_dtype, router_dtype, ranks, dropout, dropout_per_expert, seed,
    *, split=None,
):  # fmt: skip
    """`reference.weight_grad` on a GPU. `split`: parts of T, None: what fills the chip."""
    (T, I), n, H = x.shape, len(dy), dh.shape[1]  # noqa: E741
    R, outputs = u.shape[1] // n, [g.shape[1] for g in dy]
    L = 0 if dlogits is None else dlogits.shape[1]
    make = x.new_zeros if T == 0 else x.new_empty
    da = make((H, I), dtype=lora_dtype)
    drouter = make((L, I) if L else 0, dtype=router_dtype)
    dbias = make(L, dtype=router_dtype)
    db = [make((O, R), dtype=lora_dtype) for O in outputs]  # noqa: E741
    if T == 0:
        return da, drouter, dbias, db

    per_expert = dropout > 0 and dropout_per_expert
    block_a = min(launcher.block(max(ranks) if per_expert else H), COLUMNS)
    block_b = min(launcher.block(R), COLUMNS)
    tile = configs.tile("weight_grad", x.device, x.dtype, max(block_a, block_b))
    tiles = None
    if per_expert:
        tiles = launcher.expert_tiles(tuple(ranks), n, block_a, x.device)
    of_router = launcher.ceil_div(L, ROUTER_COLUMNS)
    a_tiles = len(tiles) if per_expert else max(launcher.ceil_div(H, block_a), of_router)
    b_tiles = launcher.ceil_div(R, block_b)
    of_outputs = sum(launcher.ceil_div(O, tile.step) for O in outputs)  # noqa: E741
    programs = launcher.ceil_div(I, tile.step) * a_tiles + of_outputs * b_tiles
    steps = launcher.ceil_div(T, tile.tokens)
    if split is None:
        split = configs.splits(x.device, programs, steps)
    made = [da, drouter, dbias, *db] if L else [da, *db]
    partials, starts, parts = None, [0] * len(made), made
    if split > 1:
        # Every part starts at a multiple of 16 bytes.
        sizes = [launcher.ceil_div(out.numel(), 16) * 16 for out in made]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]
        partials = x.new_empty((split, sum(sizes)), dtype=torch.float32)
        parts = [partials[0, start:] for start in starts]
    router_parts = (parts[1], parts[2]) if L else (None, None)
    x, dy = launcher.rows_dense(x), [launcher.rows_dense(g) for g in dy]
    launcher.run(
        weight_grad_kernel,
        programs * split,
        tile,
        dict(
            x_ptr=x,
            stride_x=x.stride(0),
            dh_ptr=dh.contiguous(),
            dlogits_ptr=None if dlogits is None else dlogits.contiguous(),
            dy_ptrs=tuple(dy),
            stride_dy=tuple(g.stride(0) for g in dy),
            u_ptr=u.contiguous(),
            seed_ptr=seed if dropout > 0 else None,
            tiles_ptr=tiles,
            da_ptr=parts[0],
            drouter_ptr=router_parts[0],
            dbias_ptr=router_parts[1],
            db_ptrs=tuple(parts[-n:]),
            T=T,
            I=I,
            outputs=tuple(outputs),
            per_split=launcher.ceil_div(steps, split) * tile.tokens,
            stride_plane=0 if partials is None else partials.stride(0),
            scale=1.0 / (1.0 - dropout),
        ),
        dict(
            n=n, H=H, L=L, R=R, DROPOUT=threshold(dropout), ALIGNED=I % 4 == 0,
            PER_EXPERT=per_expert, RANK_DIVISOR=launcher.rank_divisor(ranks), A_TILES=a_tiles,
            B_TILES=b_tiles, BLOCK_T=tile.tokens, BLOCK_W=tile.step,
            BLOCK_A=block_a, BLOCK_B=block_b,
            BLOCK_L=launcher.block(launcher.ceil_div(L, a_tiles)) if L else 16,
            UPCAST=launcher.INTERPRET,
        ),
    )  # fmt: skip
    if split > 1:
        reduce_partials(partials, made, starts)
    return da, drouter, dbias, db
