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
from moelora_kernels.types import NO_DROPOUT, TILE, Dropout, Routing

# Columns of rank space that one step multiplies, by the bytes of an element. float32 operands take
# twice the space, because tf32x3 splits each into two parts.
STEP = {2: 64, 4: 32}
# Columns of O that a program walks over: enough to hide the loads before its loop, and few enough
# to fill the GPU many times. With few tiles it is as many more as let all programs run at the same
# time, AT_ONCE on a multiprocessor: a second round of few programs would take as long as the first.
WALK = 512
AT_ONCE = 3
# Most columns of dlogits that a program keeps.
LOGITS = 64
# Up to this many launches add to a 16-bit result, which each of them rounds: their errors together
# stay below twice the error of one launch. More launches add to a float32 result.
ROUNDINGS = 4


@triton.jit
def load_matrix(matrix_ptr, stride_o, stride_r, columns, columns_in, o, o_in):
    """Return matrix[o, columns] transposed, [BLOCK_R, BLOCK_O], for a matrix of any strides."""
    offsets = columns.to(tl.int64)[:, None] * stride_r + o.to(tl.int64)[None, :] * stride_o
    return tl.load(matrix_ptr + offsets, mask=columns_in[:, None] & o_in[None, :], other=0.0)


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
    dlogits_ptr,
    router_ptr,
    y_ptr,
    P,
    M,
    O,  # noqa: E741
    slot,
    sibling,
    walk,
    row_counters,
    dropout_scale,
    N: tl.constexpr,
    E: tl.constexpr,
    S: tl.constexpr,
    RANK: tl.constexpr,
    MAX_RANK: tl.constexpr,
    RANK_DIVISOR: tl.constexpr,
    L: tl.constexpr,
    SPARSE_DLOGITS: tl.constexpr,
    PER_PAIR: tl.constexpr,
    IN_PLACE: tl.constexpr,
    DROPOUT: tl.constexpr,
    PER_EXPERT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_L: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """y[t] = start[t] + dropout(u matrix_e^T) of the pair of token t and `slot`, for every token t.

    u            [P, MAX_RANK] by sorted position
    matrix       [O, R] of `sibling`, to which the slot belongs; strides stride_o and stride_r
    start        [T, O], rows stride_start apart; [O] with stride 0; or None
    order, tiles [P] and [M, 2] int32, see `types.Routing`
    ranks        [E, 2] of `rank_table`, or None
    seed         [1] int64; None without dropout
    dlogits      [T, L] float32, and router [L, O]: their product is added too; None without them
    y            [T, O]; with PER_PAIR [P, O]

    SPARSE_DLOGITS: a pair adds dlogits[t, expert] router[expert] alone. The launches of all slots
    then add the product, because the dlogits of other experts are 0.

    PER_PAIR: one row of y for every pair, of all slots. IN_PLACE: y is start, and the rows of pairs
    that are not routed stay as they are. A token has one pair of a slot, so that only one program
    writes an element of y.

    Programs: (tile, `walk` columns of O), the last fastest, so that u is read from L2. A program
    keeps its first BLOCK_R columns of u while it walks over its columns of O.
    """
    walks = tl.cdiv(O, walk)
    begin_o = tl.program_id(0) % walks * walk
    expert, first, end = load_tile(tiles_ptr, tl.program_id(0) // walks, M, P)

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
        positions, positions_in, pairs, tokens = load_pairs(order_ptr, first, end, S, BLOCK_P)
        y_rows = tokens
        if PER_PAIR:
            y_rows = pairs.to(tl.int64)
        else:
            positions_in = positions_in & (pairs % S == slot)

        # Pairs that are not routed (expert N) have rank 0, so that their product is 0.
        local_expert = tl.where(expert < N, expert - sibling * E, 0)
        first_column, rank = load_ranks(ranks_ptr, local_expert, RANK, RANK_DIVISOR)
        rank = tl.multiple_of(tl.where(expert < N, rank, 0), RANK_DIVISOR)
        columns = tl.arange(0, BLOCK_R)
        u = load_rows(u_ptr, MAX_RANK, positions, columns, positions_in, columns < rank)
        if DROPOUT > 0:
            stream = local_expert if PER_EXPERT else local_expert * 0
            seed = tl.load(seed_ptr)
        if dlogits_ptr is not None:
            if SPARSE_DLOGITS:
                routed = positions_in & (positions < tl.where(expert < N, end, first))
                logit_ptr = dlogits_ptr + tokens * L + expert
                dlogit = tl.load(logit_ptr, mask=routed, other=0.0)
            else:
                logits = tl.arange(0, BLOCK_L)
                dlogits = load_rows(dlogits_ptr, L, tokens, logits, positions_in, logits < L)
                dlogits = dlogits.to(u.dtype)

        for first_o in range(begin_o, tl.minimum(begin_o + walk, O), BLOCK_O):
            o = first_o + tl.arange(0, BLOCK_O)
            o_in = o < O

            # Product and dropout.
            matrix = load_matrix(
                matrix_ptr, stride_o, stride_r, first_column + columns, columns < rank, o, o_in
            )
            y = product(u, matrix, tl.zeros((BLOCK_P, BLOCK_O), tl.float32), UPCAST)
            if MAX_RANK > BLOCK_R:
                for first_r in range(BLOCK_R, rank, BLOCK_R):
                    more = first_r + columns
                    more_in = more < rank
                    matrix = load_matrix(
                        matrix_ptr, stride_o, stride_r, first_column + more, more_in, o, o_in
                    )
                    more_u = load_rows(u_ptr, MAX_RANK, positions, more, positions_in, more_in)
                    y = product(more_u, matrix, y, UPCAST)
            if DROPOUT > 0:
                kept = keep_tile(seed, stream, y_rows, first_o, row_counters, DROPOUT, BLOCK_O)
                y = tl.where(kept, y * dropout_scale, 0.0)
            if dlogits_ptr is not None:
                if SPARSE_DLOGITS:
                    router_row = router_ptr + expert.to(tl.int64) * O
                    router = tl.load(router_row + o, mask=o < tl.where(expert < N, O, 0), other=0.0)
                    y += dlogit[:, None] * router.to(tl.float32)[None, :]
                else:
                    router = load_rows(router_ptr, O, logits, o, logits < L, o_in)
                    y = product(dlogits, router, y, UPCAST)

            # Add the start and store.
            in_bounds = positions_in[:, None] & o_in[None, :]
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
    *,
    dlogits: Tensor | None = None,
    router: Tensor | None = None,
    sparse_dlogits: bool = False,
):
    """Return y, like `reference.grouped_expand`: a launch for each slot of the siblings.

    dlogits [T, L], router [L, O]: the first launch adds their product. With sparse_dlogits every
    launch adds the term of its pairs.
    """
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
    L = 0
    if dlogits is not None and router is not None:
        L, dlogits = dlogits.shape[1], launcher.aligned(dlogits)
        router = launcher.padded(router, router.shape[0], O)
    previous, stride = start, 0
    if start is not None:
        previous = launcher.rows_dense(start if start_is_matrix else start[None])
        stride = previous.stride(0) if start_is_matrix else 0
    dropout_scale, threshold = 1.0 / keep_probability(dropout.p), dropout_threshold(dropout.p)
    walk, walks = _walk(len(tiles), O, u.device)
    for number, (sibling, k) in enumerate(slots):
        matrix = _lines_dense(matrices[sibling - first_sibling], O)
        target = y if number == len(slots) - 1 else sums
        launcher.run(
            grouped_expand_kernel,
            len(tiles) * walks,
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
                dlogits_ptr=dlogits,
                router_ptr=router,
                y_ptr=target,
                P=P,
                M=len(tiles),
                O=O,
                slot=sibling * K + k,
                sibling=sibling,
                walk=walk,
                row_counters=row_counters,
                dropout_scale=dropout_scale,
            ),
            dict(
                N=N,
                E=E,
                S=S,
                **rank_constants,
                L=L,
                SPARSE_DLOGITS=sparse_dlogits and L > 0,
                PER_PAIR=per_pair,
                IN_PLACE=target is previous,
                DROPOUT=threshold,
                PER_EXPERT=dropout.per_expert,
                BLOCK_P=tile_config.tokens,
                # Half as many columns leave registers for the product with Wr.
                BLOCK_O=tile_config.step // 2 if L and not sparse_dlogits else tile_config.step,
                BLOCK_R=block_r,
                BLOCK_L=launcher.block(L) if L and not sparse_dlogits else 16,
                UPCAST=launcher.INTERPRET,
            ),
        )
        previous, stride = target, O
        if not sparse_dlogits:
            dlogits, router, L = None, None, 0
    return launcher.cropped(y, y.shape[0], width)


def _walk(num_tiles: int, O: int, device: torch.device) -> tuple[int, int]:  # noqa: E741
    """Return how many columns of O a program walks over, and how many programs share a tile."""
    _, processors = configs.processors(device)
    walk, walks = WALK, -(-O // WALK)
    while walks > 1 and AT_ONCE * processors < num_tiles * walks < 8 * processors:
        walk *= 2
        walks = -(-O // walk)
    return walk, walks


def adds_router(tokens: int, num_experts: int, num_logits: int) -> bool:
    """Return whether the first launch of `launch_dx` adds the product of dense dlogits and Wr.

    A program keeps its tile of dlogits, of up to LOGITS columns. Every tile of tokens reads Wr from
    L2, and there is a tile for each expert at least. Another pass over dx would read and write it.
    """
    tiles = max(launcher.ceil_div(tokens, TILE), num_experts)
    return num_logits <= LOGITS and tiles * num_logits <= 4 * tokens


def launch_dx(
    dh: Tensor,
    dlogits: Tensor | None,
    lora_a: Sequence[Tensor],
    router_weight: Sequence[Tensor],
    routing: Routing,
    ranks: Sequence[int],
    dropout: Dropout,
    tokens: int,
    sparse_dlogits: bool,
) -> Tensor:
    """Return dx [T, I], like `reference.grouped_dx`."""
    transposed = [a.t() for a in lora_a]
    if dlogits is None:
        return launch(dh, transposed, None, routing, ranks, dropout, tokens)
    router = torch.cat([*router_weight]) if len(router_weight) > 1 else router_weight[0]
    if sparse_dlogits or adds_router(tokens, len(ranks), dlogits.shape[1]):
        return launch(
            dh, transposed, None, routing, ranks, dropout, tokens, dlogits=dlogits, router=router,
            sparse_dlogits=sparse_dlogits,
        )  # fmt: skip
    dx = launch(dh, transposed, None, routing, ranks, dropout, tokens)
    return dx.addmm_(dlogits.to(dx.dtype), router.to(dx.dtype))


def _lines_dense(matrix: Tensor, rows: int) -> Tensor:
    """Return the matrix [rows, R], copied unless its rows or its columns are contiguous.

    Like `launcher.rows_dense` for the side that is contiguous; rows that it adds are 0.
    """
    if matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]:
        return launcher.padded(matrix, rows, matrix.shape[1])
    return launcher.rows_dense(matrix.t()).t()
