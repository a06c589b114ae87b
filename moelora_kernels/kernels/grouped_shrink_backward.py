"""P = dy B on the rows of every expert, gated: dh, the gradient of the weights, u once more."""

from __future__ import annotations

import triton
import triton.language as tl

from moelora_kernels import reference
from moelora_kernels.kernels.common import configs, launcher
from moelora_kernels.kernels.common.products import pick, product
from moelora_kernels.kernels.common.tiles import load_gate, load_ranks, load_tile
from moelora_kernels.kernels.grouped_shrink import COLUMNS


@triton.jit(do_not_specialize=["P", "M"])
def grouped_shrink_backward_kernel(
    dy_ptrs,
    stride_dy,
    b_ptrs,
    outputs,
    h_ptr,
    weights_ptr,
    scaling_ptr,
    order_ptr,
    tiles_ptr,
    ranks_ptr,
    dh_ptr,
    u_ptr,
    dweights_ptr,
    P,
    M,
    n: tl.constexpr,
    E: tl.constexpr,
    R: tl.constexpr,
    PAIRS: tl.constexpr,
    RANK: tl.constexpr,
    WIDEST: tl.constexpr,
    RANK_DIVISOR: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """dh and u [P, WIDEST] and the gradient of the weights of a tile of places. Programs: tiles.

    outputs: O of every sibling. PAIRS: pairs that read the same row of dy.
    """
    expert, first, end = load_tile(tiles_ptr, tl.program_id(0), M, P)
    sibling = expert // E
    of_sibling = expert % E
    start, rank = load_ranks(ranks_ptr, of_sibling, RANK, RANK_DIVISOR)
    places = first + tl.arange(0, BLOCK_P)
    inside = places < end
    pairs = tl.load(order_ptr + places, mask=inside, other=0)
    rows = (pairs // PAIRS).to(tl.int64)
    dy_ptr = pick(dy_ptrs, sibling) + rows[:, None] * pick(stride_dy, sibling)
    b_ptr = pick(b_ptrs, sibling) + start
    O = pick(outputs, sibling)  # noqa: E741
    routed = places < tl.where(expert < n * E, end, first)
    gate = load_gate(weights_ptr, scaling_ptr, of_sibling, pairs, routed)
    gate = gate[:, None]
    inner = tl.zeros((BLOCK_P,), tl.float32)
    for first_r in range(0, WIDEST, BLOCK_R):
        columns = first_r + tl.arange(0, BLOCK_R)
        p = tl.zeros((BLOCK_P, BLOCK_R), tl.float32)
        if expert < n * E:
            for first_o in range(0, O, BLOCK_O):
                o = first_o + tl.arange(0, BLOCK_O)
                some_o = o < O
                dy = tl.load(dy_ptr + o[None, :], mask=inside[:, None] & some_o[None, :], other=0.0)
                b = tl.load(
                    b_ptr + o.to(tl.int64)[:, None] * R + columns[None, :],
                    mask=some_o[:, None] & (columns < rank)[None, :],
                    other=0.0,
                )
                p = product(dy, b, p, UPCAST)
        at = places.to(tl.int64)[:, None] * WIDEST + columns[None, :]
        real = inside[:, None] & (columns < WIDEST)[None, :]
        h = tl.load(h_ptr + at, mask=real, other=0.0).to(tl.float32)
        inner += tl.sum(p * h, axis=1)
        dh = tl.where(gate == 0, 0.0, gate * p)
        tl.store(dh_ptr + at, dh.to(dh_ptr.dtype.element_ty), mask=real)
        u = tl.where(gate == 0, 0.0, gate * h)
        tl.store(u_ptr + at, u.to(u_ptr.dtype.element_ty), mask=real)
    if weights_ptr is not None:
        # Pairs that are not routed have the sum of no product.
        inner *= tl.load(scaling_ptr + of_sibling)
        tl.store(dweights_ptr + pairs, inner, mask=inside)


def launch(dy, lora_b, h, weights, order, offsets, tiles, ranks, scaling):
    """`reference.grouped_shrink_backward` on a GPU."""
    P = order.shape[0]
    dh, u = (h.new_empty(h.shape) for _ in range(2))
    shape = 0 if weights is None else weights.shape
    dweights = h.new_empty(shape, dtype=reference.compute_dtype(h))
    if P == 0:
        return dh, u, dweights
    block_r = min(launcher.block(max(ranks)), COLUMNS)
    tile = configs.tile("grouped_shrink_backward", h.device, h.dtype, block_r)
    dy = [launcher.rows_dense(g) for g in dy]
    launcher.run(
        grouped_shrink_backward_kernel,
        len(tiles),
        tile,
        dict(
            dy_ptrs=tuple(dy),
            stride_dy=tuple(g.stride(0) for g in dy),
            b_ptrs=launcher.contiguous(lora_b),
            outputs=tuple(g.shape[1] for g in dy),
            h_ptr=h.contiguous(),
            weights_ptr=None if weights is None else weights.contiguous(),
            scaling_ptr=launcher.scaling_of(tuple(scaling), h.device),
            order_ptr=order,
            tiles_ptr=tiles,
            ranks_ptr=launcher.rank_table(tuple(ranks), order.device),
            dh_ptr=dh,
            u_ptr=u,
            dweights_ptr=None if weights is None else dweights,
            P=P,
            M=len(tiles),
        ),
        dict(
            n=len(dy), E=len(ranks), R=sum(ranks), PAIRS=P // dy[0].shape[0],
            **launcher.rank_constants(ranks), BLOCK_P=tile.tokens, BLOCK_O=tile.step,
            BLOCK_R=block_r, UPCAST=launcher.INTERPRET,
        ),
    )  # fmt: skip
    return dh, u, dweights
