"""dx of the shrink: dropout(dh A) + dlogits Wr, summed over the siblings.

On sm_90 and sm_100 a program keeps its columns of A in shared memory, if all rows of A fit there,
and goes over many tokens. Otherwise every program loads A for one tile of tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import pad

from moelora_kernels.kernels.common import configs, launcher, tables
from moelora_kernels.kernels.common.memory import load_rows, store_rows
from moelora_kernels.kernels.common.products import exact_left_product, product, select_from
from moelora_kernels.kernels.dropout import keep_tile, num_counters
from moelora_kernels.numerics import dropout_threshold, keep_probability
from moelora_kernels.types import Dropout

# Columns of dh and of dlogits that one step multiplies. dlogits are float32: more than 16 of their
# columns do not fit beside 64 columns of dh on an L40S.
STEP = 64
ROUTER_STEP = 16
# Rows of all A, and of all routers, that fit into the shared memory of one program. A of at most
# STEP rows is a small part of the bytes.
RESIDENT_ROWS = 256
RESIDENT_ROUTER_ROWS = 32


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
        for sibling in tl.static_range(n):
            dx = add_columns(
                dx, dh_ptr + sibling * A_ROWS, n * A_ROWS, a_ptrs[sibling], tokens, tokens_in,
                i, i_in, I, 0, A_ROWS, BLOCK_R, UPCAST,
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


@triton.jit
def stacked_tiles(
    matrix_ptrs,
    i,
    i_in,
    I,  # noqa: E741
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Return the columns i of all matrices [ROWS, I], one below the other, as a tuple of tiles.

    Each tile is [BLOCK, BLOCK_I]; rows below the last matrix are 0.
    """
    tiles = ()
    for first in tl.static_range(0, len(matrix_ptrs) * ROWS, BLOCK):
        tile = tl.zeros((BLOCK, i.shape[0]), matrix_ptrs[0].dtype.element_ty)
        for sibling in tl.static_range(len(matrix_ptrs)):
            if first < (sibling + 1) * ROWS and first + BLOCK > sibling * ROWS:
                rows = first - sibling * ROWS + tl.arange(0, BLOCK)
                rows_in = (rows >= 0) & (rows < ROWS)
                part = load_rows(matrix_ptrs[sibling], I, rows, i, rows_in, i_in)
                tile = tl.where(rows_in[:, None], part, tile)
        tiles = tiles + (tile,)  # noqa: RUF005
    return tiles


@triton.jit
def add_stacked(
    dx, left_ptr, tiles, tokens, tokens_in, COLUMNS: tl.constexpr, UPCAST: tl.constexpr
):
    """Return dx + left M. left [T, COLUMNS]; `tiles` are those of `stacked_tiles` for M."""
    BLOCK: tl.constexpr = tiles[0].shape[0]
    for j in tl.static_range(len(tiles)):
        columns = j * BLOCK + tl.arange(0, BLOCK)
        left = load_rows(left_ptr, COLUMNS, tokens, columns, tokens_in, columns < COLUMNS)
        dx = exact_left_product(left, tiles[j], dx, UPCAST)
    return dx


@triton.jit(do_not_specialize=["T"])
def resident_dx_kernel(
    dh_ptr,
    dlogits_ptr,
    a_ptrs,
    router_ptrs,
    dx_ptr,
    T,
    I,  # noqa: E741
    t_per_program,
    n: tl.constexpr,
    A_ROWS: tl.constexpr,
    E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The same as `shrink_dx_kernel`, without dropout, for 16-bit dh, and routers in bfloat16.

    A program loads its columns of all A and routers once, and goes over t_per_program tokens. So A
    is read once per range of tokens, not once per tile of tokens.
    Programs: (range of tokens, tile of I), the last fastest.
    """
    i_tiles = tl.cdiv(I, BLOCK_I)
    i = tl.program_id(0) % i_tiles * BLOCK_I + tl.arange(0, BLOCK_I)
    start_t = tl.program_id(0) // i_tiles * t_per_program
    i_in = i < I
    a_tiles = stacked_tiles(a_ptrs, i, i_in, I, A_ROWS, BLOCK_R)
    if router_ptrs is not None:
        router_tiles = stacked_tiles(router_ptrs, i, i_in, I, E, BLOCK_E)

    for first in range(start_t, tl.minimum(start_t + t_per_program, T), BLOCK_T):
        tokens = tl.arange(0, BLOCK_T).to(tl.int64) + first
        tokens_in = tokens < T
        dx = tl.zeros((BLOCK_T, BLOCK_I), tl.float32)
        dx = add_stacked(dx, dh_ptr, a_tiles, tokens, tokens_in, n * A_ROWS, UPCAST)
        if router_ptrs is not None:
            dx = add_stacked(dx, dlogits_ptr, router_tiles, tokens, tokens_in, n * E, UPCAST)
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

    # Tiles. The rows of all A, one below the other, stay in shared memory if they fit.
    block_r = min(launcher.block(max(ranks) if per_expert else A_ROWS), STEP)
    block_e, columns = ROUTER_STEP, block_r
    router_rows = len(router_weight) * len(ranks)
    is_resident = (
        STEP < n * A_ROWS <= RESIDENT_ROWS
        and router_rows <= RESIDENT_ROUTER_ROWS
        and dh.itemsize == 2
        and dh.dtype == lora_a[0].dtype
        # dlogits are float32: two bfloat16 hold them, but not two float16.
        and (not router_weight or router_weight[0].dtype == dh.dtype == torch.bfloat16)
        and dropout.p == 0
        and configs.processors(dh.device)[0] in configs.SHARED_OPERANDS
    )
    if is_resident:
        block_r, block_e = STEP, launcher.block(router_rows)
        columns = launcher.ceil_div(n * A_ROWS, STEP) * STEP
    tile_config = configs.tile_config("shrink_dx", dh.device, dh.dtype, columns)
    token_tiles = launcher.ceil_div(T, tile_config.tokens)
    i_tiles = launcher.ceil_div(I, tile_config.step)

    # Arguments and constants of both kernels.
    arguments = dict(
        dh_ptr=launcher.aligned(dh),
        dlogits_ptr=launcher.aligned_or_none(dlogits),
        a_ptrs=launcher.all_padded(lora_a, A_ROWS, I),
        router_ptrs=launcher.all_padded(router_weight, len(ranks), I),
        dx_ptr=dx,
        T=T,
        I=I,
    )
    constants = dict(
        n=n,
        A_ROWS=A_ROWS,
        E=len(ranks),
        BLOCK_T=tile_config.tokens,
        BLOCK_I=tile_config.step,
        BLOCK_R=block_r,
        BLOCK_E=block_e,
        UPCAST=launcher.INTERPRET,
    )
    if is_resident:
        # As many ranges of tokens as let all programs run at the same time.
        ranges = max(1, configs.processors(dh.device)[1] // i_tiles)
        tiles = max(1, launcher.ceil_div(token_tiles, ranges))
        arguments["t_per_program"] = tiles * tile_config.tokens
        programs = launcher.ceil_div(token_tiles, tiles) * i_tiles
        launcher.run(resident_dx_kernel, programs, tile_config, arguments, constants)
        return launcher.cropped(dx, T, width)

    column_tiles = None
    if per_expert:
        column_tiles = tables.column_tile_table(tuple(ranks), n, max(ranks), dh.device)
    arguments |= dict(
        seed_ptr=dropout.seed if dropout.p > 0 else None,
        column_tiles_ptr=column_tiles,
        num_column_tiles=0 if column_tiles is None else len(column_tiles),
        row_counters=num_counters(width),
        dropout_scale=1.0 / keep_probability(dropout.p),
    )
    constants |= dict(
        DROPOUT=dropout_threshold(dropout.p),
        PER_EXPERT=per_expert,
        RANK_DIVISOR=tables.rank_divisor(ranks),
    )
    launcher.run(shrink_dx_kernel, token_tiles * i_tiles, tile_config, arguments, constants)
    return launcher.cropped(dx, T, width)
