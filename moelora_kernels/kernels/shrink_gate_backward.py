"""du = dy B, gated: dh, the gradient of the gate or of the router's logits, and u again.

Backward needs u for dB. It recomputes u from h instead of saving it. Like in `shrink_gate`, one
launch does everything if the columns of rank space fit into one program and the sum over O is not
split. Otherwise the first launch stores partial sums of du, and the second computes the results.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from moelora_kernels.kernels.common import configs, gate_rows, launcher, tables
from moelora_kernels.kernels.common.gates import (
    dense_gate,
    gate_form,
    gate_per_column,
    load_expert_columns,
    load_scaling,
)
from moelora_kernels.kernels.common.gates_backward import gate_columns, store_dgate
from moelora_kernels.kernels.common.memory import load_rows
from moelora_kernels.kernels.common.products import product, select_from
from moelora_kernels.kernels.common.reduce_partials import load_partials, store_partial
from moelora_kernels.kernels.common.splits import num_splits
from moelora_kernels.kernels.shrink_gate import ONE_LAUNCH_EXPERTS
from moelora_kernels.numerics import compute_dtype
from moelora_kernels.types import Gate, Mixture

# Columns of rank space that are gated at a time: du, h, the gate, dh and u of 128 columns together
# do not fit into the registers. A program holds du of twice as many columns.
COLUMNS = 64
# The same for the second launch, whose programs have few tokens: more spill for R = 256 on sm_89.
PARTIAL_COLUMNS = 32


@triton.jit(do_not_specialize=["splits", "T", "G", "temperature"])
def shrink_gate_backward_kernel(
    dy_ptrs,
    stride_dy,
    b_ptrs,
    out_features,
    o_per_split,
    h_ptr,
    gate_weights_ptr,
    gate_experts_ptr,
    gate_rows_ptr,
    logits_ptr,
    dlogits_ptr,
    expert_columns_ptr,
    scaling_ptr,
    dh_ptr,
    u_ptr,
    dgate_ptr,
    partials_ptr,
    T,
    G,
    temperature,
    splits,
    n: tl.constexpr,
    A_ROWS: tl.constexpr,
    R: tl.constexpr,
    B_COLUMNS: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    FORM: tl.constexpr,
    ROUTER: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    ONE_LAUNCH: tl.constexpr,
    COLUMN_TILES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    COLUMN_BLOCKS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """du = dy B, dh = scale * gate (.) du, u = scale * gate (.) h, dgate = scale * <du, h>.

    dy             n x [T, O_i], rows stride_dy[i] apart
    b              n x [O_i, B_COLUMNS]: R columns, and zeros up to a multiple of 16 bytes
    out_features, o_per_split: n numbers each, O_i and how much of it one split sums
    h              [T, n A_ROWS]; A_ROWS is R, or r if the experts share A
    gate_weights, gate_experts, gate_rows: the gate, as FORM says (`gates`)
    logits         [T, n E] float32; read with ROUTER and without RENORMALIZE
    dlogits        [T, n E] float32, added to the gradient of the logits; None: nothing to add
    expert_columns [E, R] bfloat16, scaling [E] float32
    dh, u          [T, n A_ROWS] and [T, n R], in the dtype of h
    dgate          float32, see `store_dgate`
    partials       [splits, T, n R] float32, stored unless ONE_LAUNCH

    ONE_LAUNCH: this kernel computes all outputs, and A_ROWS is R. Otherwise it stores du to
    `partials` only, and `gate_partials_backward_kernel` computes the outputs.
    Programs: (token tile, split of O, column tile of a sibling), the last fastest. A column tile
    has COLUMN_BLOCKS (1 or 2) times BLOCK_R columns.
    """
    pid = tl.program_id(0)
    sibling = pid % COLUMN_TILES // (COLUMN_TILES // n)
    columns = pid % (COLUMN_TILES // n) * (COLUMN_BLOCKS * BLOCK_R) + tl.arange(0, BLOCK_R)
    columns_2 = columns + BLOCK_R
    split = pid // COLUMN_TILES % splits
    tokens = (pid // (COLUMN_TILES * splits)).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    tokens_in = tokens < T
    dy_ptr = select_from(dy_ptrs, sibling)
    stride = select_from(stride_dy, sibling)
    b_ptr = select_from(b_ptrs, sibling)
    O = select_from(out_features, sibling)  # noqa: E741
    part = select_from(o_per_split, sibling)

    # Product: du of the first column block, and of the second if there is one.
    du = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    du_2 = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for first in range(split * part, tl.minimum((split + 1) * part, O), BLOCK_O):
        o = first + tl.arange(0, BLOCK_O)
        dy = load_rows(dy_ptr, stride, tokens, o, tokens_in, o < O)  # [BLOCK_T, BLOCK_O]
        b = load_rows(b_ptr, B_COLUMNS, o, columns, o < O, columns < B_COLUMNS)
        du = product(dy, b, du, UPCAST)
        if COLUMN_BLOCKS == 2:
            b = load_rows(b_ptr, B_COLUMNS, o, columns_2, o < O, columns_2 < B_COLUMNS)
            du_2 = product(dy, b, du_2, UPCAST)

    if ONE_LAUNCH:
        # Gate, one column block after the other, then the gradient of the gate.
        gate, routed = dense_gate(
            gate_weights_ptr, gate_experts_ptr, gate_rows_ptr, tokens, tokens_in, sibling, G, n, E,
            K, FORM, BLOCK_E,
        )  # fmt: skip
        scaling = load_scaling(scaling_ptr, E, BLOCK_E)
        dgate = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
        dgate = gate_columns(
            du, gate * scaling, dgate, h_ptr, dh_ptr, u_ptr, expert_columns_ptr, tokens, tokens_in,
            sibling, columns, n, A_ROWS, R, E, BLOCK_E, UPCAST,
        )  # fmt: skip
        if COLUMN_BLOCKS == 2:
            dgate = gate_columns(
                du_2, gate * scaling, dgate, h_ptr, dh_ptr, u_ptr, expert_columns_ptr, tokens,
                tokens_in, sibling, columns_2, n, A_ROWS, R, E, BLOCK_E, UPCAST,
            )  # fmt: skip
        store_dgate(
            dgate, gate, routed, scaling, gate_experts_ptr, logits_ptr, dlogits_ptr, dgate_ptr,
            tokens, tokens_in, sibling, temperature, n, E, K, FORM, ROUTER, RENORMALIZE, BLOCK_E,
        )  # fmt: skip
    else:
        store_partial(
            partials_ptr, split, tokens, tokens_in, sibling, columns, columns < R, du, T, n, R
        )
        if COLUMN_BLOCKS == 2:
            store_partial(
                partials_ptr, split, tokens, tokens_in, sibling, columns_2, columns_2 < R, du_2, T,
                n, R,
            )  # fmt: skip


@triton.jit(do_not_specialize=["splits", "T", "G", "temperature"])
def gate_partials_backward_kernel(
    partials_ptr,
    h_ptr,
    gate_weights_ptr,
    gate_experts_ptr,
    gate_rows_ptr,
    logits_ptr,
    dlogits_ptr,
    expert_columns_ptr,
    scaling_ptr,
    dh_ptr,
    u_ptr,
    dgate_ptr,
    T,
    G,
    temperature,
    splits,
    n: tl.constexpr,
    A_ROWS: tl.constexpr,
    R: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    FORM: tl.constexpr,
    ROUTER: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The outputs of `shrink_gate_backward_kernel` from its partial sums, added in their order.

    The arguments are as in `shrink_gate_backward_kernel`. If A_ROWS < R, all experts share the
    rows of A, and dh is a sum over the experts. Programs: (token tile, sibling), the last fastest.
    """
    sibling = tl.program_id(0) % n
    tokens = (tl.program_id(0) // n).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    tokens_in = tokens < T

    # Gate.
    gate, routed = dense_gate(
        gate_weights_ptr, gate_experts_ptr, gate_rows_ptr, tokens, tokens_in, sibling, G, n, E, K,
        FORM, BLOCK_E,
    )  # fmt: skip
    scaling = load_scaling(scaling_ptr, E, BLOCK_E)
    scaled_gate = gate * scaling

    # dh and u, BLOCK_R columns at a time, then the gradient of the gate.
    dgate = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    for first in range(0, R, BLOCK_R):
        columns = first + tl.arange(0, BLOCK_R)
        du = load_partials(
            partials_ptr, tokens, tokens_in, sibling, columns, columns < R, T, n, R, splits
        )
        dgate = gate_columns(
            du, scaled_gate, dgate, h_ptr, dh_ptr, u_ptr, expert_columns_ptr, tokens, tokens_in,
            sibling, columns, n, A_ROWS, R, E, BLOCK_E, UPCAST,
        )  # fmt: skip
    store_dgate(
        dgate, gate, routed, scaling, gate_experts_ptr, logits_ptr, dlogits_ptr, dgate_ptr, tokens,
        tokens_in, sibling, temperature, n, E, K, FORM, ROUTER, RENORMALIZE, BLOCK_E,
    )  # fmt: skip

    # dh of a shared A.
    if A_ROWS < R:
        for first in range(0, A_ROWS, BLOCK_R):
            a_columns = first + tl.arange(0, BLOCK_R)
            dh = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
            for e in range(E):
                columns = tl.where(a_columns < A_ROWS, e * A_ROWS + a_columns, R)
                du = load_partials(
                    partials_ptr, tokens, tokens_in, sibling, columns, columns < R, T, n, R, splits
                )
                expert_columns = load_expert_columns(expert_columns_ptr, columns, E, R, BLOCK_E)
                column_gate = gate_per_column(scaled_gate, expert_columns, UPCAST)
                dh += tl.where(column_gate == 0, 0.0, column_gate * du)
            offsets = tokens[:, None] * (n * A_ROWS) + sibling * A_ROWS + a_columns[None, :]
            in_bounds = tokens_in[:, None] & (a_columns < A_ROWS)[None, :]
            tl.store(dh_ptr + offsets, dh.to(dh_ptr.dtype.element_ty), mask=in_bounds)


def launch(
    dy: Sequence[Tensor],
    lora_b: Sequence[Tensor],
    h: Tensor,
    gate: Gate,
    dlogits: Tensor | None,
    mixture: Mixture,
    *,
    split: int | None = None,
):
    """Return dh, u and dgate, like `reference.shrink_gate_backward`.

    split: number of parts that O is cut into; None balances the programs.
    """
    gate_weights, experts, rows, logits = gate
    ranks, scaling, _share_a, top_k, renormalize, temperature = mixture
    T, n, E, R = h.shape[0], len(dy), len(ranks), sum(ranks)
    A_ROWS = h.shape[1] // n
    has_router = top_k > 0
    K, form = gate_form(gate_weights, experts, rows, T, n)

    # Outputs.
    dtype = compute_dtype(h)
    dh, u = h.new_empty(h.shape), h.new_empty((T, n * R))
    if T == 0:
        return dh, u, h.new_zeros((0, n * E) if has_router else gate_weights.shape, dtype=dtype)
    by_slot = form == "sparse" and not has_router
    dgate = h.new_empty((T, n * (K if by_slot else E)), dtype=dtype)

    # Tiles: a program holds one or two blocks of COLUMNS columns.
    width, block_e = min(launcher.block(R), 2 * COLUMNS), launcher.block(E)
    block_r = min(width, COLUMNS)
    tile_config = configs.tile_config("shrink_gate_backward", h.device, h.dtype, width)
    column_tiles = n * launcher.ceil_div(R, width)
    token_tiles = launcher.ceil_div(T, tile_config.tokens)

    dy = [launcher.rows_dense(g) for g in dy]
    b_columns = launcher.aligned_columns(lora_b[0])
    out_features = [g.shape[1] for g in dy]
    steps = [launcher.ceil_div(O, tile_config.step) for O in out_features]  # noqa: E741
    # Rows of h and u at any multiple of 2 or 4 bytes take more registers than the gate leaves.
    fits = A_ROWS == R <= width and block_e <= ONE_LAUNCH_EXPERTS and R * h.itemsize % 8 == 0
    # A dense gate takes more registers than a large tile leaves.
    is_large = tile_config.tokens * width >= configs.LARGE_TILE
    fits = fits and (not is_large or has_router or form == "sparse")
    if split is None:
        split = num_splits(
            h.device, tile_config, token_tiles * column_tiles, max(steps), stores_partials=not fits
        )
    one_launch = fits and split == 1
    partials = None if one_launch else h.new_empty((split, T, n * R), dtype=dtype)

    # Arguments that both launches take.
    arguments = dict(
        h_ptr=launcher.aligned(h),
        gate_weights_ptr=launcher.aligned(gate_weights),
        gate_experts_ptr=launcher.aligned_or_none(experts),
        gate_rows_ptr=launcher.aligned_or_none(rows),
        logits_ptr=None if renormalize or not has_router else launcher.aligned(logits),
        dlogits_ptr=launcher.aligned_or_none(dlogits),
        expert_columns_ptr=tables.expert_columns(tuple(ranks), h.device),
        scaling_ptr=tables.scaling_table(tuple(scaling), h.device),
        dh_ptr=dh,
        u_ptr=u,
        dgate_ptr=dgate,
        partials_ptr=partials,
        T=T,
        G=gate_weights.shape[0],
        temperature=float(temperature),
        splits=split,
    )
    constants = dict(
        n=n,
        A_ROWS=A_ROWS,
        R=R,
        E=E,
        K=K,
        FORM=form,
        ROUTER=has_router,
        RENORMALIZE=bool(renormalize),
        BLOCK_E=block_e,
        UPCAST=launcher.INTERPRET,
    )
    launcher.run(
        shrink_gate_backward_kernel,
        token_tiles * split * column_tiles,
        tile_config,
        arguments
        | dict(
            dy_ptrs=tuple(dy),
            stride_dy=tuple(g.stride(0) for g in dy),
            b_ptrs=tuple(
                [
                    launcher.padded(b, rows, b_columns)
                    for b, rows in zip(lora_b, out_features, strict=True)
                ]
            ),
            out_features=tuple(out_features),
            o_per_split=tuple(launcher.ceil_div(s, split) * tile_config.step for s in steps),
        ),
        constants
        | dict(
            B_COLUMNS=b_columns,
            ONE_LAUNCH=one_launch,
            COLUMN_TILES=column_tiles,
            BLOCK_T=tile_config.tokens,
            BLOCK_O=tile_config.step,
            BLOCK_R=block_r,
            COLUMN_BLOCKS=width // block_r,
        ),
    )
    if not one_launch:
        row_tile = configs.PARTIALS_TILE
        block_r = min(launcher.block(R), PARTIAL_COLUMNS)
        launcher.run(
            gate_partials_backward_kernel,
            launcher.ceil_div(T, row_tile.tokens) * n,
            row_tile,
            arguments,
            constants | dict(BLOCK_T=row_tile.tokens, BLOCK_R=block_r),
        )
    if form in ("rows", "one") and not has_router:
        # Several tokens share a gate row: sum over them.
        dgate = gate_rows.launch(dgate, rows, gate_weights.shape[0])
    return dh, u, dgate
