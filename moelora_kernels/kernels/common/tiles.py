"""Device functions of the grouped kernels: the pairs of one tile, and the ranks of its expert.

`order`, `tiles` and `chunks` are the arrays of `types.Routing`. Expert i E + e is expert e of
sibling i; expert N = n E stands for pairs that are not routed.
"""

import triton
import triton.language as tl


@triton.jit
def load_tile(tiles_ptr, tile, M, P):
    """Return the expert of a tile, its first sorted position, and the position where it ends.

    tiles [M, 2]. A tile ends where the next one begins, and the last one at P.
    """
    expert = tl.load(tiles_ptr + tile * 2)
    first = tl.load(tiles_ptr + tile * 2 + 1)
    end = tl.load(tiles_ptr + tile * 2 + 3, mask=tile + 1 < M, other=P)
    return expert, first, end


@triton.jit
def load_pairs(order_ptr, first, end, PAIRS_PER_ROW: tl.constexpr, BLOCK_P: tl.constexpr):
    """Return four tiles [BLOCK_P] for the sorted positions from `first` on.

    positions, positions_in (which of them lie before `end`), the pair at every position, and the
    row of x or dy that the pair reads (int64). PAIRS_PER_ROW pairs read the same row.
    """
    positions = first + tl.arange(0, BLOCK_P)
    positions_in = positions < end
    pairs = tl.load(order_ptr + positions, mask=positions_in, other=0)
    matrix_rows = (pairs // PAIRS_PER_ROW).to(tl.int64)
    return positions, positions_in, pairs, matrix_rows


@triton.jit
def load_ranks(ranks_ptr, local_expert, RANK: tl.constexpr, RANK_DIVISOR: tl.constexpr):
    """Return the first column and the rank of expert `local_expert` of any sibling.

    ranks [E, 2] int32; None if all experts have rank RANK. RANK_DIVISOR divides both numbers.
    """
    if ranks_ptr is None:
        start = local_expert * RANK
        rank = tl.full((), RANK, tl.int32)
    else:
        start = tl.multiple_of(tl.load(ranks_ptr + local_expert * 2), RANK_DIVISOR)
        rank = tl.multiple_of(tl.load(ranks_ptr + local_expert * 2 + 1), RANK_DIVISOR)
    return start, rank


@triton.jit
def load_pair_gate(weights_ptr, scaling_ptr, local_expert, pairs, routed):
    """Return scale * weight of every pair [BLOCK_P] float32; 0 for pairs that are not `routed`.

    weights [P] by pair; None if every weight is 1. scaling [E].
    """
    gate = tl.where(routed, tl.load(scaling_ptr + local_expert), 0.0)
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + pairs, mask=routed, other=0.0).to(tl.float32)
        gate = tl.where(routed, gate * weight, 0.0)
    return gate
