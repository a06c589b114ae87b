"""Map each expert's rank-space rows to the output width: one launch per slot of a token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from moelora_kernels.kernels.common import configs, launcher, tables
from moelora_kernels.kernels.common.memory import load_rows
from moelora_kernels.kernels.common.products import product
from moelora_kernels.kernels.common.tiles import load_pairs, load_ranks, load_tile
from moelora_kernels.kernels.dropout import keep_tile, num_counters
from moelora_kernels.numerics import dropout_threshold, keep_probability
from moelora_kernels.types import NO_DROPOUT, Dropout, Routing

# Columns of rank space that one step multiplies, by the bytes of an element. float32 operands take
# twice the space, because tf32x3 splits each into two parts.
STEP = {2: 64, 4: 32}
# Up to this many launches add to a 16-bit result, which each of them rounds: their errors together
# stay below twice the error of one launch. More launches add to a float32 result.
ROUNDINGS = 4


@triton.jit(do_not_specialize=["P", "M", "slot", "sibling", "row_counters", "dropout_scale"])
def grouped_expand_kernel(
    u_ptr,
    matrix_ptr,
    stride_o,
    stride_r,
    start_ptr,
    stride_start,
    order_ptr,
    tiles_ptr,
    ranks_ptr,
    seed_ptr,
    y_ptr,
    P,
    M,
    O,  # noqa: E741
    slot,
    sibling,
    row_counters,
    dropout_scale,
    N: tl.constexpr,
    E: tl.constexpr,
    S: tl.constexpr,
    RANK: tl.constexpr,
    MAX_RANK: tl.constexpr,
    RANK_DIVISOR: tl.constexpr,
    PER_PAIR: tl.constexpr,
    IN_PLACE: tl.constexpr,
    DROPOUT: tl.constexpr,
    PER_EXPERT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """y[t] = start[t] + dropout(u matrix_e^T) of the pair of token t and `slot`, for every token t.

    u            [P, MAX_RANK] by sorted position
    matrix       [O, R] of `sibling`, to which the slot belongs; strides stride_o and stride_r
    start        [T, O], rows stride_start apart; [O] with stride 0; or None
    order, tiles [P] and [M, 2] int32, see `types.Routing`
    ranks        [E, 2] of `rank_table`, or None
    seed         [1] int64; None without dropout
    y            [T, O]; with PER_PAIR [P, O]

    PER_PAIR: one row of y for every pair, of all slots. IN_PLACE: y is start, and the rows of pairs
    that are not routed stay as they are. A token has one pair of a slot, so that only one program
    writes an element of y.

    Programs: (tile, tile of O), the last fastest, so that u is read from L2.
    """
    o_tiles = tl.cdiv(O, BLOCK_O)
    first_o = tl.program_id(0) % o_tiles * BLOCK_O
    o = first_o + tl.arange(0, BLOCK_O)
    expert, first, end = load_tile(tiles_ptr, tl.program_id(0) // o_tiles, M, P)

    # Most tiles have no pair of this slot. Their programs return early.
    has_work = first < end
    if not PER_PAIR:
        # The positions of an expert are sorted by slot.
        lowest = tl.load(order_ptr + first, mask=has_work, other=0) % S
        highest = tl.load(order_ptr + end - 1, mask=has_work, other=0) % S
        has_work = has_work & (lowest <= slot) & (slot <= highest)
    if IN_PLACE:
        has_work = has_work & (expert < N)
    if has_work:
        local_expert = expert - sibling * E
        positions, positions_in, pairs, tokens = load_pairs(order_ptr, first, end, S, BLOCK_P)
        y_rows = tokens
        if PER_PAIR:
            y_rows = pairs.to(tl.int64)
        else:
            positions_in = positions_in & (pairs % S == slot)
        in_bounds = positions_in[:, None] & (o < O)[None, :]

        # Product and dropout. Pairs that are not routed (expert N) have none.
        y = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
        if expert < N:
            first_column, rank = load_ranks(ranks_ptr, local_expert, RANK, RANK_DIVISOR)
            for first_r in range(0, rank, BLOCK_R):
                columns = first_r + tl.arange(0, BLOCK_R)
                columns_in = columns < rank
                u = load_rows(
                    u_ptr, MAX_RANK, positions, columns, positions_in, columns_in
                )  # [BLOCK_P, BLOCK_R]
                matrix_row = (first_column + columns).to(tl.int64)[:, None] * stride_r
                matrix = tl.load(
                    matrix_ptr + matrix_row + o.to(tl.int64)[None, :] * stride_o,
                    mask=columns_in[:, None] & (o < O)[None, :],
                    other=0.0,
                )  # [BLOCK_R, BLOCK_O]
                y = product(u, matrix, y, UPCAST)
            if DROPOUT > 0:
                stream = local_expert if PER_EXPERT else local_expert * 0
                seed = tl.load(seed_ptr)
                kept = keep_tile(seed, stream, y_rows, first_o, row_counters, DROPOUT, BLOCK_O)
                y = tl.where(kept, y * dropout_scale, 0.0)

        # Add the start and store.
        if start_ptr is not None:
            offsets = tokens[:, None] * stride_start + o[None, :]
            y += tl.load(start_ptr + offsets, mask=in_bounds, other=0.0).to(tl.float32)
        address = y_ptr + y_rows[:, None] * O + o[None, :]
        tl.store(address, y.to(y_ptr.dtype.element_ty), mask=in_bounds)


def launch(
    u: Tensor,
    matrices: Sequence[Tensor],
    start: Tensor | None,
    routing: Routing,
    ranks: Sequence[int],
    dropout: Dropout = NO_DROPOUT,
    tokens: int = 0,
    first_sibling: int = 0,
    per_pair: bool = False,
):
    """Return y, like `reference.grouped_expand`: a launch for each slot of the siblings."""
    order, offsets, tiles, _ = routing
    P, width, E = order.shape[0], matrices[0].shape[0], len(ranks)
    O = launcher.padded_width(width)  # noqa: E741
    start_is_matrix = start is not None and start.dim() == 2
    dtype = start.dtype if start_is_matrix else u.dtype
    y = u.new_empty((P if per_pair else tokens, O), dtype=dtype)
    if P == 0:
        return launcher.cropped(y, y.shape[0], width)

    # The slots of every sibling: one launch each, and one for all slots with per_pair.
    N, S = len(offsets) - 1, P // tokens
    K = S // (N // E)
    slots = [
        (first_sibling + i, k) for i in range(len(matrices)) for k in range(1 if per_pair else K)
    ]

    # Launches before the last one write `sums`, and the last one writes y.
    sums = y
    if len(slots) > ROUNDINGS and dtype.itemsize == 2:
        sums = y.new_empty(y.shape, dtype=torch.float32)

    block_r = min(launcher.block(max(ranks)), STEP[u.dtype.itemsize])
    rank_constants = tables.rank_constants(ranks)
    row = rank_constants["RANK_DIVISOR"]
    tile_config = configs.tile_config("grouped_expand", u.device, u.dtype, block_r, row)
    u, row_counters = launcher.aligned(u), num_counters(width)
    previous, stride = start, 0
    if start is not None:
        previous = launcher.rows_dense(start if start_is_matrix else start[None])
        stride = previous.stride(0) if start_is_matrix else 0
    for number, (sibling, k) in enumerate(slots):
        matrix = _lines_dense(matrices[sibling - first_sibling], O)
        target = y if number == len(slots) - 1 else sums
        launcher.run(
            grouped_expand_kernel,
            len(tiles) * launcher.ceil_div(O, tile_config.step),
            tile_config,
            dict(
                u_ptr=u,
                matrix_ptr=matrix,
                stride_o=matrix.stride(0),
                stride_r=matrix.stride(1),
                start_ptr=previous,
                stride_start=stride,
                order_ptr=order,
                tiles_ptr=tiles,
                ranks_ptr=tables.rank_table(tuple(ranks), order.device),
                seed_ptr=dropout.seed if dropout.p > 0 else None,
                y_ptr=target,
                P=P,
                M=len(tiles),
                O=O,
                slot=sibling * K + k,
                sibling=sibling,
                row_counters=row_counters,
                dropout_scale=1.0 / keep_probability(dropout.p),
            ),
            dict(
                N=N,
                E=E,
                S=S,
                **rank_constants,
                PER_PAIR=per_pair,
                IN_PLACE=target is previous,
                DROPOUT=dropout_threshold(dropout.p),
                PER_EXPERT=dropout.per_expert,
                BLOCK_P=tile_config.tokens,
                BLOCK_O=tile_config.step,
                BLOCK_R=block_r,
                UPCAST=launcher.INTERPRET,
            ),
        )
        previous, stride = target, O
    return launcher.cropped(y, y.shape[0], width)


def _lines_dense(matrix: Tensor, rows: int) -> Tensor:
    """Return the matrix [rows, R], copied unless its rows or its columns are contiguous.

    Like `launcher.rows_dense` for the side that is contiguous; rows that it adds are 0.
    """
    if matrix.stride(1) == 1:
        return launcher.padded(matrix, rows, matrix.shape[1])
    return launcher.rows_dense(matrix.t()).t()
