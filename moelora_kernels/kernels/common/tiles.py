"""Device functions: the tiles of places that an expert works on, see `routing`, and its columns."""

import triton
import triton.language as tl


@triton.jit
def load_tile(tiles_ptr, tile, M, P):
    """Expert, first place and end of a tile of M over P places: the next tile begins at its end."""
    expert = tl.load(tiles_ptr + tile * 2)
    first = tl.load(tiles_ptr + tile * 2 + 1)
    end = tl.load(tiles_ptr + tile * 2 + 3, mask=tile + 1 < M, other=P)
    return expert, first, end


@triton.jit
def load_ranks(ranks_ptr, expert, RANK: tl.constexpr, RANK_DIVISOR: tl.constexpr):
    """First column and rank of an expert of a sibling; without a table all have RANK."""
    if ranks_ptr is None:
        start = expert * RANK
        rank = tl.full((), RANK, tl.int32)
    else:
        start = tl.multiple_of(tl.load(ranks_ptr + expert * 2), RANK_DIVISOR)
        rank = tl.multiple_of(tl.load(ranks_ptr + expert * 2 + 1), RANK_DIVISOR)
    return start, rank


@triton.jit
def load_gate(weights_ptr, scaling_ptr, expert, pairs, real):
    """scale * weight of these pairs of an expert of a sibling, zero where they are not real."""
    gate = tl.where(real, tl.load(scaling_ptr + expert), 0.0)
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + pairs, mask=real, other=0.0).to(tl.float32)
        gate = tl.where(real, gate * weight, 0.0)
    return gate
