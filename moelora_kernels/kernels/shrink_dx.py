"""dx of the shrink: dropout(dh A) + dlogits Wr, summed over the siblings."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from moelora_kernels.kernels.common import configs, launcher, tables
from moelora_kernels.kernels.common.memory import load_rows, store_rows
from moelora_kernels.kernels.common.products import product, select_from
from moelora_kernels.kernels.dropout import keep_tile, num_counters
from moelora_kernels.numerics import dropout_threshold, keep_probability
from moelora_kernels.types import Dropout

# Columns of dh and of dlogits that one step multiplies. dlogits are float32: more than 16 of their
# columns do not fit beside 64 columns of dh on an L40S.
STEP = 64
ROUTER_STEP = 16


@triton.jit
def add_columns(
    dx,
    dh_ptr,
    stride_dh,
    a_ptr,
    tokens,
    tokens_in,
    i,
    i_in,
    I,  # noqa: E741
    start,
    end,
    BLOCK_R: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Return dx + dh[:, start:end] A[start:end, i], [BLOCK_T, BLOCK_I].

    dh_ptr points at column 0 of dh, whose rows are stride_dh apart; a_ptr at row 0 of A [*, I].
    """
    for first in range(start, end, BLOCK_R):
        columns = first + tl.arange(0, BLOCK_R)
        columns_in = columns < end
        dh = load_rows(dh_ptr, stride_dh, tokens, columns, tokens_in, columns_in)
        a = load_rows(a_ptr, I, columns, i, columns_in, i_in)
        dx = product(dh, a, dx, UPCAST)
    return dx


@triton.jit(do_not_specialize=["T", "row_counters", "dropout_scale"])
def shrink_dx_kernel(
    dh_ptr,
    dlogits_ptr,
    a_ptrs,
    router_ptrs,
    seed_ptr,
    column_tiles_ptr,
    dx_ptr,
    T,
    I,  # noqa: E741
    num_column_tiles,
    row_counters,
    dropout_scale,
    n: tl.constexpr,
    A_ROWS: tl.constexpr,
    E: tl.constexpr,
    DROPOUT: tl.constexpr,
    PER_EXPERT: tl.constexpr,
    RANK_DIVISOR: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """dx = sum over siblings i of dropout(dh_i A_i) + dlogits_i Wr_i.

    dh           [T, n A_ROWS]; A_ROWS is R, or r if the experts share A
    dlogits      [T, n E] float32; None without a router
    a            n x [A_ROWS, I]
    router       n x [E, I]; None without a router
    seed         [1] int64; None without dropout
    column_tiles [num_column_tiles, 4] of `column_tile_table`; None without PER_EXPERT
    dx           [T, I]

    Dropout multiplies the kept elements by dropout_scale. PER_EXPERT: every expert has a separate
    mask. Programs: (token tile, tile of I), the last fastest, so that dh is read from L2.
    """
    i_tiles = tl.cdiv(I, BLOCK_I)
    first_i = tl.program_id(0) % i_tiles * BLOCK_I
    i = first_i + tl.arange(0, BLOCK_I)
    tokens = (tl.program_id(0) // i_tiles).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    tokens_in = tokens < T
    i_in = i < I
    dx = tl.zeros((BLOCK_T, BLOCK_I), tl.float32)

    # The experts' part, and dropout.
    if PER_EXPERT:
        seed = tl.load(seed_ptr)
        for tile in range(num_column_tiles):
            start = tl.multiple_of(tl.load(column_tiles_ptr + tile * 4), RANK_DIVISOR)
            end = tl.multiple_of(tl.load(column_tiles_ptr + tile * 4 + 1), RANK_DIVISOR)
            stream = tl.load(column_tiles_ptr + tile * 4 + 2)
            sibling = tl.load(column_tiles_ptr + tile * 4 + 3)
            # start and end count the columns of all siblings.
            a_ptr = select_from(a_ptrs, sibling) - sibling.to(tl.int64) * A_ROWS * I
            expert_dx = tl.zeros((BLOCK_T, BLOCK_I), tl.float32)
            expert_dx = add_columns(
                expert_dx, dh_ptr, n * A_ROWS, a_ptr, tokens, tokens_in, i, i_in, I, start, end,
                BLOCK_R, UPCAST,
            )  # fmt: skip
            kept = keep_tile(seed, stream, tokens, first_i, row_counters, DROPOUT, BLOCK_I)
            dx += tl.where(kept, expert_dx, 0.0)
    else:
        for sibling in range(n):
            dx = add_columns(
                dx, dh_ptr + sibling * A_ROWS, n * A_ROWS, select_from(a_ptrs, sibling), tokens,
                tokens_in, i, i_in, I, 0, A_ROWS, BLOCK_R, UPCAST,
            )  # fmt: skip
        if DROPOUT > 0:
            seed = tl.load(seed_ptr)
            kept = keep_tile(seed, 0, tokens, first_i, row_counters, DROPOUT, BLOCK_I)
            dx = tl.where(kept, dx, 0.0)
    dx *= dropout_scale

    # The routers' part: a router reads x without dropout.
    if router_ptrs is not None:
        for sibling in range(n):
            dx = add_columns(
                dx, dlogits_ptr + sibling * E, n * E, select_from(router_ptrs, sibling), tokens,
                tokens_in, i, i_in, I, 0, E, BLOCK_E, UPCAST,
            )  # fmt: skip
    store_rows(dx_ptr, I, tokens, i, tokens_in, i_in, dx)


def launch(
    dh: Tensor,
    dlogits: Tensor | None,
    lora_a: Sequence[Tensor],
    router_weight: Sequence[Tensor],
    ranks: Sequence[int],
    dropout: Dropout,
):
    """Return dx [T, I] in the dtype of dh, like `reference.shrink_dx`."""
    T, n = dh.shape[0], len(lora_a)
    A_ROWS, width = lora_a[0].shape
    per_expert = dropout.p > 0 and dropout.per_expert
    if A_ROWS * dh.itemsize % launcher.ALIGNMENT and not per_expert:
        # Zeros between the columns of the siblings: then all rows of dh are aligned.
        rows = launcher.padded_width(A_ROWS)
        dh = pad(dh.view(T, n, A_ROWS), (0, rows - A_ROWS)).view(T, n * rows)
        A_ROWS = rows
    I = launcher.padded_width(width)  # noqa: E741
    dx = dh.new_empty((T, I))

    # Tiles.
    widest = max(ranks) if per_expert else A_ROWS
    block_r = min(launcher.block(widest), STEP)
    tile_config = configs.tile_config("shrink_dx", dh.device, dh.dtype, block_r)
    column_tiles = None
    if per_expert:
        column_tiles = tables.column_tile_table(tuple(ranks), n, widest, dh.device)

    launcher.run(
        shrink_dx_kernel,
        launcher.ceil_div(T, tile_config.tokens) * launcher.ceil_div(I, tile_config.step),
        tile_config,
        dict(
            dh_ptr=launcher.aligned(dh),
            dlogits_ptr=launcher.aligned_or_none(dlogits),
            a_ptrs=launcher.all_padded(lora_a, A_ROWS, I),
            router_ptrs=launcher.all_padded(router_weight, len(ranks), I),
            seed_ptr=dropout.seed if dropout.p > 0 else None,
            column_tiles_ptr=column_tiles,
            dx_ptr=dx,
            T=T,
            I=I,
            num_column_tiles=0 if column_tiles is None else len(column_tiles),
            row_counters=num_counters(width),
            dropout_scale=1.0 / keep_probability(dropout.p),
        ),
        dict(
            n=n,
            A_ROWS=A_ROWS,
            E=len(ranks),
            DROPOUT=dropout_threshold(dropout.p),
            PER_EXPERT=per_expert,
            RANK_DIVISOR=tables.rank_divisor(ranks),
            BLOCK_T=tile_config.tokens,
            BLOCK_I=tile_config.step,
            BLOCK_R=block_r,
            BLOCK_E=ROUTER_STEP,
            UPCAST=launcher.INTERPRET,
        ),
    )
    return launcher.cropped(dx, T, width)
