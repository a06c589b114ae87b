"""The gradients of A and B: sums over the pairs of each expert, both in one launch.

An expert with many pairs has several chunks. Each writes a partial sum, and a second launch adds
them: see `common/chunks.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from moelora_kernels.kernels.common import configs, launcher, tables
from moelora_kernels.kernels.common.chunks import load_chunk_range, reduce_expert, store_sums
from moelora_kernels.kernels.common.configs import TileConfig
from moelora_kernels.kernels.common.products import select_from
from moelora_kernels.kernels.common.tiles import load_ranks, load_tile
from moelora_kernels.kernels.dropout import num_counters
from moelora_kernels.kernels.grouped_shrink import COLUMNS
from moelora_kernels.numerics import dropout_threshold, keep_probability
from moelora_kernels.types import Dropout, Routing

# `step` elements of a gradient per step of the second launch: 16 for each thread. Without the limit
# that is written out, ptxas spills two registers on sm_100 after Triton 3.6.
REDUCE_TILE = TileConfig(tokens=1, step=4096, warps=8, stages=1, registers=255)
# Programs of the second launch that share the gradient of one expert's A or B. In balanced routing
# every program returns at once, and they all fit on a GPU at the same time.
REDUCE_PARTS = 3


@triton.jit(do_not_specialize=["P", "M", "row_counters", "dropout_scale"])
def grouped_weight_grad_kernel(
    x_ptrs,
    stride_x,
    in_features,
    dh_ptr,
    da_ptrs,
    da_partials_ptr,
    da_partial_stride,
    dy_ptrs,
    stride_dy,
    out_features,
    u_ptr,
    db_ptrs,
    db_partials_ptr,
    db_partial_stride,
    order_ptr,
    offsets_ptr,
    chunks_ptr,
    ranks_ptr,
    seed_ptr,
    P,
    M,
    row_counters,
    dropout_scale,
    n: tl.constexpr,
    E: tl.constexpr,
    R: tl.constexpr,
    PAIRS_PER_X: tl.constexpr,
    PAIRS_PER_DY: tl.constexpr,
    RANK: tl.constexpr,
    MAX_RANK: tl.constexpr,
    RANK_DIVISOR: tl.constexpr,
    DROPOUT: tl.constexpr,
    PER_EXPERT: tl.constexpr,
    COLUMN_TILES: tl.constexpr,
    X_TILES: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UPCAST: tl.constexpr,
    HAS_FROZEN: tl.constexpr,
):
    """dA_e = sum of dh^T dropout(x) and dB_e = sum of dy^T u over the pairs of expert e.

    x            n x [P / PAIRS_PER_X, I], rows stride_x[i] apart: the same tensor n times
    dh, u        [P, MAX_RANK] by sorted position
    da           n x [R, I]
    dy           n x [P / PAIRS_PER_DY, O_i], rows stride_dy[i] apart
    db           n x [O_i, R]
    in_features, out_features: n numbers I, and n numbers O_i
    order, offsets, chunks: [P], [N + 1] and [M, 2] int32, see `types.Routing`
    ranks        [E, 2] of `rank_table`, or None; 0 for a frozen expert, which is skipped
    seed         [1] int64; None without dropout
    partials     [P / CHUNK, MAX_RANK, I] of dA and [P / CHUNK, O, MAX_RANK] of dB, float32, the
                 first dimension partial_stride apart; None if no expert can have two chunks

    Programs: (chunk, tile of I or of O, column tile), the last fastest; TILES of a chunk, of which
    the first X_TILES are those of dA.
    """
    chunk = tl.program_id(0) // TILES
    tile = tl.program_id(0) % TILES
    if tile < X_TILES:
        I = in_features[0]  # noqa: E741
        store_sums(
            x_ptrs, stride_x, in_features, dh_ptr, da_ptrs, 1, I, da_partials_ptr,
            da_partial_stride, 1, I, order_ptr, offsets_ptr, chunks_ptr, ranks_ptr, seed_ptr, chunk,
            tile, P, M, row_counters, dropout_scale, n, E, PAIRS_PER_X, RANK, MAX_RANK,
            RANK_DIVISOR, DROPOUT, PER_EXPERT, COLUMN_TILES, BLOCK_P, BLOCK_W, BLOCK_R, UPCAST,
            HAS_FROZEN,
        )  # fmt: skip
    else:
        store_sums(
            dy_ptrs, stride_dy, out_features, u_ptr, db_ptrs, R, 1, db_partials_ptr,
            db_partial_stride, MAX_RANK, 1, order_ptr, offsets_ptr, chunks_ptr, ranks_ptr, seed_ptr,
            chunk, tile - X_TILES, P, M, row_counters, 1.0, n, E, PAIRS_PER_DY, RANK, MAX_RANK,
            RANK_DIVISOR, 0, PER_EXPERT, COLUMN_TILES, BLOCK_P, BLOCK_W, BLOCK_R, UPCAST,
            HAS_FROZEN,
        )  # fmt: skip


@triton.jit(do_not_specialize=["P", "M"])
def reduce_chunks_kernel(
    da_partials_ptr,
    da_partial_stride,
    da_ptrs,
    in_features,
    db_partials_ptr,
    db_partial_stride,
    db_ptrs,
    out_features,
    offsets_ptr,
    chunks_ptr,
    ranks_ptr,
    P,
    M,
    n: tl.constexpr,
    E: tl.constexpr,
    R: tl.constexpr,
    RANK: tl.constexpr,
    MAX_RANK: tl.constexpr,
    RANK_DIVISOR: tl.constexpr,
    COLUMN_TILES: tl.constexpr,
    PARTS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """dA_e and dB_e = the partial sums of expert e, added in their order, if it has several.

    The arguments are as in `grouped_weight_grad_kernel`. Programs: (chunk, dA or dB, part of I or
    O, column tile), the last fastest. Only the programs of an expert's first chunk work: in
    balanced routing none.
    """
    chunk = tl.program_id(0) // TILES
    tile = tl.program_id(0) % TILES
    expert, first, end = load_tile(chunks_ptr, chunk, M, P)
    end, size, is_first = load_chunk_range(
        chunks_ptr, offsets_ptr, chunk, expert, first, end, n * E
    )
    expert_end = tl.load(offsets_ptr + expert + 1, mask=expert < n * E, other=0)
    if is_first & (first < end) & (end < expert_end):
        start, rank = load_ranks(ranks_ptr, expert % E, RANK, RANK_DIVISOR)
        sibling = expert // E
        if tile < TILES // 2:
            I = in_features[0]  # noqa: E741
            reduce_expert(
                da_partials_ptr, da_partial_stride, 1, I, select_from(da_ptrs, sibling), 1, I, I,
                tile, first, expert_end, size, start, rank, COLUMN_TILES, PARTS, BLOCK_W, BLOCK_R,
            )  # fmt: skip
        else:
            reduce_expert(
                db_partials_ptr, db_partial_stride, MAX_RANK, 1, select_from(db_ptrs, sibling), R,
                1, select_from(out_features, sibling), tile - TILES // 2, first, expert_end, size,
                start, rank, COLUMN_TILES, PARTS, BLOCK_W, BLOCK_R,
            )  # fmt: skip


def launch(
    x: Tensor,
    dh: Tensor,
    dy: Sequence[Tensor],
    u: Tensor,
    routing: Routing,
    ranks: Sequence[int],
    dropout: Dropout,
    lora_dtype: torch.dtype,
    frozen: Sequence[int] = (),
):
    """Return da [n R, I] and n x db [O_i, R], like `reference.grouped_weight_grad`."""
    order, offsets, _, chunks = routing
    n, R, width = len(dy), sum(ranks), x.shape[1]
    P, N = order.shape[0], len(offsets) - 1
    x, padded_dy = launcher.rows_dense(x), [launcher.rows_dense(g) for g in dy]
    # Nothing is stored for a frozen expert.
    new = x.new_empty if P and not frozen else x.new_zeros
    da = new((n * R, x.shape[1]), dtype=lora_dtype)
    db = [new((g.shape[1], R), dtype=lora_dtype) for g in padded_dy]
    if P == 0:
        return launcher.cropped(da, n * R, width), _cropped(db, dy)

    # Tiles.
    block_r = min(launcher.block(max(ranks)), COLUMNS)
    rank_constants = tables.rank_constants(ranks) | ({"RANK": 0} if frozen else {})
    tile_config = configs.tile_config(
        "grouped_weight_grad", dh.device, dh.dtype, block_r, rank_constants["RANK_DIVISOR"]
    )
    column_tiles = launcher.ceil_div(max(ranks), block_r)
    in_features, out_features = (x.shape[1],) * n, tuple(g.shape[1] for g in padded_dy)
    x_tiles, dy_tiles = (
        launcher.ceil_div(max(widths), tile_config.step) * column_tiles
        for widths in (in_features, out_features)
    )

    # Workspace: one partial sum for every whole chunk of P pairs. `types.count_tiles` is that
    # number plus min(N + 1, P).
    whole_chunks = len(chunks) - min(N + 1, P)
    da_partials, db_partials = (
        dh.new_empty((whole_chunks, max(ranks) * max(widths)), dtype=torch.float32)
        if whole_chunks > 1
        else None
        for widths in (in_features, out_features)
    )

    # Arguments that both launches take.
    arguments = dict(
        in_features=in_features,
        da_ptrs=tuple(da.split(R)),
        da_partials_ptr=da_partials,
        da_partial_stride=max(ranks) * max(in_features),
        out_features=out_features,
        db_ptrs=tuple(db),
        db_partials_ptr=db_partials,
        db_partial_stride=max(ranks) * max(out_features),
        offsets_ptr=offsets,
        chunks_ptr=chunks,
        ranks_ptr=tables.rank_table(tuple(ranks), order.device, tuple(frozen)),
        P=P,
        M=len(chunks),
    )
    constants = dict(
        n=n,
        E=len(ranks),
        R=R,
        **rank_constants,
        COLUMN_TILES=column_tiles,
        BLOCK_R=block_r,
    )
    launcher.run(
        grouped_weight_grad_kernel,
        len(chunks) * (x_tiles + dy_tiles),
        tile_config,
        arguments
        | dict(
            x_ptrs=(x,) * n,
            stride_x=(x.stride(0),) * n,
            dh_ptr=launcher.aligned(dh),
            dy_ptrs=tuple(padded_dy),
            stride_dy=tuple(g.stride(0) for g in padded_dy),
            u_ptr=launcher.aligned(u),
            order_ptr=order,
            seed_ptr=dropout.seed if dropout.p > 0 else None,
            row_counters=num_counters(width),
            dropout_scale=1.0 / keep_probability(dropout.p),
        ),
        constants
        | dict(
            PAIRS_PER_X=P // x.shape[0],
            PAIRS_PER_DY=P // dy[0].shape[0],
            DROPOUT=dropout_threshold(dropout.p),
            PER_EXPERT=dropout.per_expert,
            X_TILES=x_tiles,
            TILES=x_tiles + dy_tiles,
            BLOCK_P=tile_config.tokens,
            BLOCK_W=tile_config.step,
            UPCAST=launcher.INTERPRET,
            HAS_FROZEN=bool(frozen),
        ),
    )
    if da_partials is not None:
        tiles = 2 * REDUCE_PARTS * column_tiles
        launcher.run(
            reduce_chunks_kernel,
            len(chunks) * tiles,
            REDUCE_TILE,
            arguments,
            constants | dict(PARTS=REDUCE_PARTS, TILES=tiles, BLOCK_W=REDUCE_TILE.step // block_r),
        )
    return launcher.cropped(da, n * R, width), _cropped(db, dy)


def _cropped(db: Sequence[Tensor], dy: Sequence[Tensor]) -> list[Tensor]:
    """Return every dB with as many rows as its dy has columns."""
    return [launcher.cropped(b, g.shape[1], b.shape[1]) for b, g in zip(db, dy, strict=True)]
