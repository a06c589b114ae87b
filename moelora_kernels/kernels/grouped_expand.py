"""From the rank space of every expert to features: a pass over the tiles for each slot."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moelora_kernels.kernels.common import configs, launcher
from moelora_kernels.kernels.common.products import product
from moelora_kernels.kernels.common.tiles import load_ranks, load_tile
from moelora_kernels.kernels.dropout import keep_tile, threshold

# Columns of rank space that one step multiplies, by the bytes of an element: TF32 cores want each
# operand in two parts.
STEP = {2: 64, 4: 32}
# Passes that may add to a result of 16 bits, which each of them rounds: their errors together stay
# below twice that of one. More of them add to float32.
ROUNDINGS = 4


@triton.jit(do_not_specialize=["P", "M", "slot", "sibling", "scale"])
def grouped_expand_kernel(
    u_ptr,
    matrix_ptr,
    stride_o,
    stride_r,
    from_ptr,
    stride_from,
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
    scale,
    N: tl.constexpr,
    E: tl.constexpr,
    S: tl.constexpr,
    RANK: tl.constexpr,
    WIDEST: tl.constexpr,
    RANK_DIVISOR: tl.constexpr,
    PER_PAIR: tl.constexpr,
    IN_PLACE: tl.constexpr,
    DROPOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    PER_EXPERT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """y = from + the terms of one slot, for every token; PER_PAIR: of every pair.

    matrix [O, R] of the sibling that the slot belongs to. A token has one pair of the slot, so that
    one program alone touches a row of y. IN_PLACE: y and from are the same, and rows that are not
    routed stay. Programs: (tile, tile of O), the last fastest, so that u is read from L2.
    """
    o_tiles = tl.cdiv(O, BLOCK_O)
    first_o = tl.program_id(0) % o_tiles * BLOCK_O
    o = first_o + tl.arange(0, BLOCK_O)
    expert, first, end = load_tile(tiles_ptr, tl.program_id(0) // o_tiles, M, P)
    work = first < end
    if not PER_PAIR:
        # Places of an expert stand in the order of slots.
        low = tl.load(order_ptr + first, mask=work, other=0) % S
        high = tl.load(order_ptr + end - 1, mask=work, other=0) % S
        work = work & (low <= slot) & (slot <= high)
    if IN_PLACE:
        work = work & (expert < N)
    if work:
        of_sibling = expert - sibling * E
        places = first + tl.arange(0, BLOCK_P)
        inside = places < end
        pairs = tl.load(order_ptr + places, mask=inside, other=0)
        tokens = (pairs // S).to(tl.int64)
        rows = tokens
        if PER_PAIR:
            rows = pairs.to(tl.int64)
        else:
            inside = inside & (pairs % S == slot)
        real = inside[:, None] & (o < O)[None, :]
        y = tl.zeros((BLOCK_P, BLOCK_O), tl.float32)
        if expert < N:
            start, rank = load_ranks(ranks_ptr, of_sibling, RANK, RANK_DIVISOR)
            for first_r in range(0, rank, BLOCK_R):
                columns = first_r + tl.arange(0, BLOCK_R)
                some = columns < rank
                u = tl.load(
                    u_ptr + places.to(tl.int64)[:, None] * WIDEST + columns[None, :],
                    mask=inside[:, None] & some[None, :],
                    other=0.0,
                )
                at = (start + columns).to(tl.int64)[:, None] * stride_r
                matrix = tl.load(
                    matrix_ptr + at + o.to(tl.int64)[None, :] * stride_o,
                    mask=some[:, None] & (o < O)[None, :],
                    other=0.0,
                )
                y = product(u, matrix, y, UPCAST)
            if DROPOUT > 0:
                stream = of_sibling if PER_EXPERT else of_sibling * 0
                seed = tl.load(seed_ptr)
                kept = keep_tile(seed, stream, rows, first_o, O, DROPOUT, ALIGNED, BLOCK_O)
                y = tl.where(kept, y * scale, 0.0)
        if from_ptr is not None:
            at = tokens[:, None] * stride_from + o[None, :]
            y += tl.load(from_ptr + at, mask=real, other=0.0).to(tl.float32)
        tl.store(y_ptr + rows[:, None] * O + o[None, :], y.to(y_ptr.dtype.element_ty), mask=real)


def launch(
    u, matrices, start, order, offsets, tiles, ranks, tokens, first, per_pair, dropout,
    dropout_per_expert, seed,
):  # fmt: skip
    """`reference.grouped_expand` on a GPU: a launch for each slot."""
    P, O, E = order.shape[0], matrices[0].shape[0], len(ranks)  # noqa: E741
    of_tokens = start is not None and start.dim() == 2
    dtype = start.dtype if of_tokens else u.dtype
    y = u.new_empty((P if per_pair else tokens, O), dtype=dtype)
    if P == 0:
        return y
    N, S = len(offsets) - 1, P // tokens
    K = S // (N // E)
    slots = [(first + i, k) for i in range(len(matrices)) for k in range(1 if per_pair else K)]
    sums = y
    if len(slots) > ROUNDINGS and dtype.itemsize == 2:
        sums = y.new_empty(y.shape, dtype=torch.float32)
    block_r = min(launcher.block(max(ranks)), STEP[u.dtype.itemsize])
    tile = configs.tile("grouped_expand", u.device, u.dtype, block_r)
    u = u.contiguous()
    before, stride = start, 0
    if of_tokens:
        before = launcher.rows_dense(start)
        stride = before.stride(0)
    for number, (sibling, k) in enumerate(slots):
        matrix = matrices[sibling - first]
        after = y if number == len(slots) - 1 else sums
        launcher.run(
            grouped_expand_kernel,
            len(tiles) * launcher.ceil_div(O, tile.step),
            tile,
            dict(
                u_ptr=u,
                matrix_ptr=matrix,
                stride_o=matrix.stride(0),
                stride_r=matrix.stride(1),
                from_ptr=before,
                stride_from=stride,
                order_ptr=order,
                tiles_ptr=tiles,
                ranks_ptr=launcher.rank_table(tuple(ranks), order.device),
                seed_ptr=seed if dropout > 0 else None,
                y_ptr=after,
                P=P,
                M=len(tiles),
                O=O,
                slot=sibling * K + k,
                sibling=sibling,
                scale=1.0 / (1.0 - dropout),
            ),
            dict(
                N=N, E=E, S=S, **launcher.rank_constants(ranks), PER_PAIR=per_pair,
                IN_PLACE=after is before, DROPOUT=threshold(dropout), ALIGNED=O % 4 == 0,
                PER_EXPERT=dropout_per_expert, BLOCK_P=tile.tokens, BLOCK_O=tile.step,
                BLOCK_R=block_r, UPCAST=launcher.INTERPRET,
            ),
        )  # fmt: skip
        before, stride = after, O
    return y
