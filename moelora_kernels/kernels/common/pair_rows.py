"""Tiles whose rows are the pairs of a tile of tokens, each with the rank space of its expert.

Row i of a tile is slot i % SLOTS of token i // SLOTS of the tile; SLOTS is the power of two that
holds K slots. The rank space of a pair is spread over the R columns of all experts: it is in the
columns of the pair's expert, and 0 elsewhere. So one product with B of all experts, [F, R], gives
every row the product with B of its expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from moelora_kernels.kernels.common import launcher
from moelora_kernels.kernels.common.configs import TileConfig
from moelora_kernels.kernels.common.products import product
from moelora_kernels.kernels.common.tiles import load_pairs, load_ranks, load_tile
from moelora_kernels.types import FFN_SLOTS, TILE, Routing

# Most columns of rank space: more do not fit into the registers of a program.
COLUMNS = 128
# Most rows of a tile if the rank space of a pair is not aligned to 16 bytes: addresses of single
# elements take registers.
ROWS_NOT_ALIGNED = 32


@triton.jit(do_not_specialize=["P", "M"])
def pair_table_kernel(table_ptr, order_ptr, tiles_ptr, P, M, BLOCK_P: tl.constexpr):
    """table[pair] = (sorted position, expert), [P, 2] int32.

    order, tiles [P] and [M, 2] int32, see `types.Routing`. Programs: tiles.
    """
    expert, first, end = load_tile(tiles_ptr, tl.program_id(0), M, P)
    positions, positions_in, pairs, _ = load_pairs(order_ptr, first, end, 1, BLOCK_P)
    row = table_ptr + pairs.to(tl.int64) * 2
    tl.store(row, positions, mask=positions_in)
    tl.store(row + 1, positions * 0 + expert, mask=positions_in)


def pair_table(routing: Routing, x: Tensor) -> Tensor:
    """Return the sorted position and the expert of every pair, [P, 2] int32 on the device of x."""
    P, M = len(routing.order), len(routing.tiles)
    table = x.new_empty((P, 2), dtype=torch.int32)
    launcher.run(
        pair_table_kernel,
        M,
        TileConfig(tokens=TILE, step=1, warps=2, stages=1),
        dict(table_ptr=table, order_ptr=routing.order, tiles_ptr=routing.tiles, P=P, M=M),
        dict(BLOCK_P=TILE),
    )
    return table


@triton.jit
def load_pair_rows(
    table_ptr,
    ranks_ptr,
    first_token,
    T,
    E: tl.constexpr,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    RANK: tl.constexpr,
    RANK_DIVISOR: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Return nine tiles [BLOCK_P] for the pairs of the tokens from `first_token` on.

    tokens (int64), rows_in (which rows are pairs), pairs (int64), positions, experts, routed, the
    first column and the rank of the expert; rank 0 if the pair is not routed. table [P, 2] of
    `pair_table`; ranks [E, 2] of `rank_table`, or None.
    """
    rows = tl.arange(0, BLOCK_P)
    tokens = (first_token + rows // SLOTS).to(tl.int64)
    slots = rows % SLOTS
    rows_in = (tokens < T) & (slots < K)
    pairs = tokens * K + slots
    positions = tl.load(table_ptr + pairs * 2, mask=rows_in, other=0)
    experts = tl.load(table_ptr + pairs * 2 + 1, mask=rows_in, other=E)
    routed = experts < E
    experts = tl.where(routed, experts, 0)
    starts, ranks = load_ranks(ranks_ptr, experts, RANK, RANK_DIVISOR)
    ranks = tl.multiple_of(tl.where(routed, ranks, 0), RANK_DIVISOR)
    return tokens, rows_in, pairs, positions, experts, routed, starts, ranks


@triton.jit
def spread_offsets(positions, starts, ranks, columns, MAX_RANK: tl.constexpr):
    """Return the offsets in [P, MAX_RANK] of the R columns of every row, and which of them exist.

    Both [BLOCK_P, BLOCK_R]. columns [BLOCK_R] count over all experts.
    """
    local = columns[None, :] - starts[:, None]
    offsets = positions.to(tl.int64)[:, None] * MAX_RANK + local
    return offsets, (local >= 0) & (local < ranks[:, None])


@triton.jit
def load_spread(ptr, positions, starts, ranks, columns, MAX_RANK: tl.constexpr):
    """Return the rank space [P, MAX_RANK] of every row, spread over R columns."""
    offsets, in_bounds = spread_offsets(positions, starts, ranks, columns, MAX_RANK)
    return tl.load(ptr + offsets, mask=in_bounds, other=0.0)


@triton.jit
def store_picked(ptr, tile, positions, rows_in, starts, ranks, columns, MAX_RANK: tl.constexpr):
    """Store the columns of each row's expert to [P, MAX_RANK], and 0 beyond its rank.

    tile [BLOCK_P, BLOCK_R], one row for each pair over R columns.
    """
    dtype = ptr.dtype.element_ty
    offsets, in_bounds = spread_offsets(positions, starts, ranks, columns, MAX_RANK)
    tl.store(ptr + offsets, tile.to(dtype), mask=in_bounds)
    beyond = rows_in[:, None] & (columns[None, :] >= ranks[:, None]) & (columns < MAX_RANK)[None, :]
    offsets = positions.to(tl.int64)[:, None] * MAX_RANK + columns[None, :]
    tl.store(ptr + offsets, tl.zeros_like(tile).to(dtype), mask=beyond)


@triton.jit
def load_weights(weights_ptr, pairs, routed):
    """Return the gate weight of every row, [BLOCK_P] float32; 0 if the pair is not routed."""
    return tl.load(weights_ptr + pairs, mask=routed, other=0.0).to(tl.float32)


@triton.jit
def rank_product(u, matrix, UPCAST: tl.constexpr):
    """Return u matrix, float32. u [BLOCK_P, BLOCK_R], matrix [BLOCK_R, BLOCK_F].

    WAIT keeps the product apart from a sum with the result. Otherwise Triton begins the product
    with the other term, and on sm_90 writes it to registers behind the fence of the wgmma.
    """
    zeros = tl.zeros((u.shape[0], matrix.shape[1]), tl.float32)
    return product(u, matrix, zeros, UPCAST, WAIT=True)


@triton.jit
def sum_slots(tile, SLOTS: tl.constexpr):
    """Return the sums over the slots of every token, [BLOCK_P / SLOTS, COLUMNS]."""
    if SLOTS > 1:
        rows: tl.constexpr = tile.shape[0] // SLOTS
        tile = tl.sum(tl.reshape(tile, (rows, SLOTS, tile.shape[1])), axis=1)
    return tile


def rank_columns(ranks: Sequence[int], x: Tensor) -> int:
    """Return BLOCK_R, the columns of a tile that holds the rank space of all experts.

    x: a tensor in x's dtype. float32 operands would take twice the registers, because tf32x3 splits
    each into two parts.

    Raises:
        TypeError: x has no 16-bit dtype.
        ValueError: there are more than COLUMNS ranks.
    """
    if x.dtype.itemsize != 2:
        raise TypeError(f"x: fused FFNs on a GPU expect bfloat16 or float16, got {x.dtype}")
    if sum(ranks) > COLUMNS:
        raise ValueError(
            f"ranks: fused FFNs on a GPU expect a sum of at most {COLUMNS}, got {sum(ranks)}"
        )
    return launcher.block(sum(ranks))


def row_constants(slots: int, rows: int, divisor: int, x: Tensor) -> dict[str, int]:
    """Return the constants K, SLOTS and BLOCK_P of tiles with `rows` rows.

    divisor: RANK_DIVISOR, which divides the first column and the rank of every expert.
    x: a tensor in x's dtype.

    Raises:
        ValueError: a token has more than FFN_SLOTS slots.
    """
    if slots > FFN_SLOTS:
        raise ValueError(
            f"weights: fused FFNs on a GPU expect at most {FFN_SLOTS} experts of a token, "
            f"got {slots}"
        )
    padded = launcher.block(slots, 1)
    is_aligned = divisor * x.itemsize % launcher.ALIGNMENT == 0
    rows = rows if is_aligned else min(rows, ROWS_NOT_ALIGNED)
    return dict(K=slots, SLOTS=padded, BLOCK_P=max(rows, padded))
