"""du = dy B on the rows of each expert, gated: dh, the gradient of the weights, and u again.

Backward needs u for dB. It recomputes u from h instead of saving it.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from moelora_kernels.kernels.common import configs, launcher, tables
from moelora_kernels.kernels.common.memory import load_rows
from moelora_kernels.kernels.common.products import product, select_from
from moelora_kernels.kernels.common.tiles import load_pair_gate, load_pairs, load_ranks, load_tile
from moelora_kernels.kernels.grouped_shrink import COLUMNS
from moelora_kernels.numerics import compute_dtype
from moelora_kernels.types import Routing


@triton.jit(do_not_specialize=["P", "M"])
def grouped_shrink_backward_kernel(
    dy_ptrs,
    stride_dy,
    b_ptrs,
    out_features,
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
    PAIRS_PER_ROW: tl.constexpr,
    RANK: tl.constexpr,
    MAX_RANK: tl.constexpr,
    RANK_DIVISOR: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """du = dy B_e, dh = gate * du, u = gate * h, dweight = scale_e * <du, h>.

    gate = scale_e * weight.

    dy           n x [P / PAIRS_PER_ROW, O_i], rows stride_dy[i] apart
    b            n x [O_i, R]
    out_features n numbers: O_i
    h            [P, MAX_RANK] by sorted position
    weights      [P] by pair; None if every weight is 1
    scaling      [E] float32
    order, tiles [P] and [M, 2] int32, see `types.Routing`
    ranks        [E, 2] of `rank_table`, or None
    dh, u        [P, MAX_RANK] by sorted position, in the dtype of h
    dweights     [P] float32 by pair; None without weights

    Programs: tiles.
    """
    expert, first, end = load_tile(tiles_ptr, tl.program_id(0), M, P)
    sibling = expert // E
    local_expert = expert % E
    start, rank = load_ranks(ranks_ptr, local_expert, RANK, RANK_DIVISOR)
    positions, positions_in, pairs, dy_rows = load_pairs(
        order_ptr, first, end, PAIRS_PER_ROW, BLOCK_P
    )
    dy_ptr = select_from(dy_ptrs, sibling)
    stride = select_from(stride_dy, sibling)
    b_ptr = select_from(b_ptrs, sibling) + start
    O = select_from(out_features, sibling)  # noqa: E741

    # Gate. Pairs that are not routed (expert N = n E) have gate 0.
    routed = positions < tl.where(expert < n * E, end, first)
    gate = load_pair_gate(weights_ptr, scaling_ptr, local_expert, pairs, routed)
    gate = gate[:, None]

    # BLOCK_R columns of rank space at a time.
    inner = tl.zeros((BLOCK_P,), tl.float32)
    for first_r in range(0, MAX_RANK, BLOCK_R):
        columns = first_r + tl.arange(0, BLOCK_R)

        # Product.
        du = tl.zeros((BLOCK_P, BLOCK_R), tl.float32)
        if expert < n * E:
            for first_o in range(0, O, BLOCK_O):
                o = first_o + tl.arange(0, BLOCK_O)
                dy = load_rows(
                    dy_ptr, stride, dy_rows, o, positions_in, o < O
                )  # [BLOCK_P, BLOCK_O]
                b = load_rows(b_ptr, R, o, columns, o < O, columns < rank)
                du = product(dy, b, du, UPCAST)

        # Gate and store.
        offsets = positions.to(tl.int64)[:, None] * MAX_RANK + columns[None, :]
        # A NaN or infinity of dy or of the gate does not reach the columns beyond the rank, which
        # are 0, nor pairs that are not routed.
        columns_in = (columns < rank)[None, :]
        in_bounds = positions_in[:, None] & (columns < MAX_RANK)[None, :]
        h = tl.load(h_ptr + offsets, mask=in_bounds, other=0.0).to(tl.float32)
        inner += tl.sum(tl.where(columns_in & routed[:, None], du * h, 0.0), axis=1)
        selected = columns_in & (gate != 0)
        dh = tl.where(selected, gate * du, 0.0)
        tl.store(dh_ptr + offsets, dh.to(dh_ptr.dtype.element_ty), mask=in_bounds)
        u = tl.where(selected, gate * h, 0.0)
        tl.store(u_ptr + offsets, u.to(u_ptr.dtype.element_ty), mask=in_bounds)

    # Gradient of the weights; 0 for pairs that are not routed, whose du is 0.
    if weights_ptr is not None:
        inner *= tl.load(scaling_ptr + local_expert)
        tl.store(dweights_ptr + pairs, inner, mask=positions_in)


def launch(
    dy: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    h: Tensor,
    weights: Tensor | None,
    routing: Routing,
    ranks: Sequence[int],
    scaling: Sequence[float],
):
    """Return dh, u and dweights, like `reference.grouped_shrink_backward`."""
    order, _offsets, tiles, _ = routing
    P = order.shape[0]
    dh, u = (h.new_empty(h.shape) for _ in range(2))
    shape = 0 if weights is None else weights.shape
    dweights = h.new_empty(shape, dtype=compute_dtype(h))
    if P == 0:
        return dh, u, dweights
    block_r = min(launcher.block(max(ranks)), COLUMNS)
    rank_constants = tables.rank_constants(ranks)
    divisor = rank_constants["RANK_DIVISOR"]
    tile_config = configs.tile_config(
        "grouped_shrink_backward", h.device, h.dtype, block_r, divisor
    )
    dy = [launcher.rows_dense(g) for g in dy]
    R, out_features = sum(ranks), [g.shape[1] for g in dy]
    launcher.run(
        grouped_shrink_backward_kernel,
        len(tiles),
        tile_config,
        dict(
            dy_ptrs=tuple(dy),
            stride_dy=tuple(g.stride(0) for g in dy),
            b_ptrs=tuple(
                [launcher.padded(b, rows, R) for b, rows in zip(lora_b, out_features, strict=True)]
            ),
            out_features=tuple(out_features),
            h_ptr=launcher.aligned(h),
            weights_ptr=launcher.aligned_or_none(weights),
            scaling_ptr=tables.scaling_table(tuple(scaling), h.device),
            order_ptr=order,
            tiles_ptr=tiles,
            ranks_ptr=tables.rank_table(tuple(ranks), order.device),
            dh_ptr=dh,
            u_ptr=u,
            dweights_ptr=None if weights is None else dweights,
            P=P,
            M=len(tiles),
        ),
        dict(
            n=len(dy),
            E=len(ranks),
            R=R,
            PAIRS_PER_ROW=P // dy[0].shape[0],
            **rank_constants,
            BLOCK_P=tile_config.tokens,
            BLOCK_O=tile_config.step,
            BLOCK_R=block_r,
            UPCAST=launcher.INTERPRET,
        ),
    )
    return dh, u, dweights
