"""What experts and a linear router add to dx: dropout(dh A) + dlogits Wr, summed over siblings."""

from __future__ import annotations

import triton
import triton.language as tl

from moelora_kernels.kernels.common import configs, launcher
from moelora_kernels.kernels.common.products import pick, product
from moelora_kernels.kernels.dropout import keep_tile, threshold

# Columns of dh and of dlogits that one step multiplies. More of the second, which are float32, do
# not fit beside the first on an L40S.
STEP = 64
ROUTER_STEP = 16


@triton.jit
def add_columns(
    dx,
    dh_ptr,
    stride_dh,
    a_ptr,
    tokens,
    inside,
    i,
    I,  # noqa: E741
    start,
    end,
    BLOCK_R: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Dx + dh[:, start:end] A[start:end]; dh_ptr and a_ptr point at the column and row 0."""
    for first in range(start, end, BLOCK_R):
        columns = first + tl.arange(0, BLOCK_R)
        some = columns < end
        dh = tl.load(
            dh_ptr + tokens[:, None] * stride_dh + columns[None, :],
            mask=inside[:, None] & some[None, :],
            other=0.0,
        )
        a = tl.load(
            a_ptr + columns.to(tl.int64)[:, None] * I + i[None, :],
            mask=some[:, None] & (i < I)[None, :],
            other=0.0,
        )
        dx = product(dh, a, dx, UPCAST)
    return dx


@triton.jit(do_not_specialize=["T", "scale"])
def shrink_dx_kernel(
    dh_ptr,
    dlogits_ptr,
    a_ptrs,
    router_ptrs,
    seed_ptr,
    tiles_ptr,
    dx_ptr,
    T,
    I,  # noqa: E741
    tiles,
    scale,
    n: tl.constexpr,
    A_ROWS: tl.constexpr,
    E: tl.constexpr,
    DROPOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    PER_EXPERT: tl.constexpr,
    RANK_DIVISOR: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Programs: (token tile, tile of I), the last fastest, so that dh is read from L2."""
    i_tiles = tl.cdiv(I, BLOCK_I)
    first_i = tl.program_id(0) % i_tiles * BLOCK_I
    i = first_i + tl.arange(0, BLOCK_I)
    tokens = (tl.program_id(0) // i_tiles).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    inside = tokens < T
    dx = tl.zeros((BLOCK_T, BLOCK_I), tl.float32)
    if PER_EXPERT:
        seed = tl.load(seed_ptr)
        for tile in range(tiles):
            start = tl.multiple_of(tl.load(tiles_ptr + tile * 4), RANK_DIVISOR)
            end = tl.multiple_of(tl.load(tiles_ptr + tile * 4 + 1), RANK_DIVISOR)
            stream = tl.load(tiles_ptr + tile * 4 + 2)
            sibling = tl.load(tiles_ptr + tile * 4 + 3)
            a_ptr = pick(a_ptrs, sibling) - sibling.to(tl.int64) * A_ROWS * I
            part = tl.zeros((BLOCK_T, BLOCK_I), tl.float32)
            part = add_columns(
                part, dh_ptr, n * A_ROWS, a_ptr, tokens, inside, i, I, start, end, BLOCK_R, UPCAST
            )
            kept = keep_tile(seed, stream, tokens, first_i, I, DROPOUT, ALIGNED, BLOCK_I)
            dx += tl.where(kept, part, 0.0)
    else:
        for sibling in range(n):
            dx = add_columns(
                dx, dh_ptr + sibling * A_ROWS, n * A_ROWS, pick(a_ptrs, sibling), tokens, inside,
                i, I, 0, A_ROWS, BLOCK_R, UPCAST,
            )  # fmt: skip
        if DROPOUT > 0:
            seed = tl.load(seed_ptr)
            kept = keep_tile(seed, 0, tokens, first_i, I, DROPOUT, ALIGNED, BLOCK_I)
            dx = tl.where(kept, dx, 0.0)
    dx *= scale
    if router_ptrs is not None:
        for sibling in range(n):
            dx = add_columns(
                dx, dlogits_ptr + sibling * E, n * E, pick(router_ptrs, sibling), tokens, inside,
                i, I, 0, E, BLOCK_E, UPCAST,
            )  # fmt: skip
    address = dx_ptr + tokens[:, None] * I + i[None, :]
    tl.store(address, dx.to(dx_ptr.dtype.element_ty), mask=inside[:, None] & (i < I)[None, :])


def launch(dh, dlogits, lora_a, router_weight, ranks, dropout, dropout_per_expert, seed):
    """`reference.shrink_dx` on a GPU."""
    T, n = dh.shape[0], len(lora_a)
    A_ROWS, I = lora_a[0].shape  # noqa: E741
    dx = dh.new_empty((T, I))
    per_expert = dropout > 0 and dropout_per_expert
    widest = max(ranks) if per_expert else A_ROWS
    block_r = min(launcher.block(widest), STEP)
    tile = configs.tile("shrink_dx", dh.device, dh.dtype, block_r)
    tiles = None
    if per_expert:
        tiles = launcher.expert_tiles(tuple(ranks), n, widest, dh.device)
    launcher.run(
        shrink_dx_kernel,
        launcher.ceil_div(T, tile.tokens) * launcher.ceil_div(I, tile.step),
        tile,
        dict(
            dh_ptr=dh.contiguous(),
            dlogits_ptr=None if dlogits is None else dlogits.contiguous(),
            a_ptrs=launcher.contiguous(lora_a),
            router_ptrs=launcher.contiguous(router_weight),
            seed_ptr=seed if dropout > 0 else None,
            tiles_ptr=tiles,
            dx_ptr=dx,
            T=T,
            I=I,
            tiles=0 if tiles is None else len(tiles),
            scale=1.0 / (1.0 - dropout),
        ),
        dict(
            n=n, A_ROWS=A_ROWS, E=len(ranks), DROPOUT=threshold(dropout), ALIGNED=I % 4 == 0,
            PER_EXPERT=per_expert, RANK_DIVISOR=launcher.rank_divisor(ranks),
            BLOCK_T=tile.tokens, BLOCK_I=tile.step, BLOCK_R=block_r,
            BLOCK_E=ROUTER_STEP, UPCAST=launcher.INTERPRET,
        ),
    )  # fmt: skip
    return dx
