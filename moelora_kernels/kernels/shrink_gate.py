"""Shrink x to rank space, compute the gate from logits of the same read of x, and apply it.

If all columns of rank space fit into one program, one launch does everything (ONE_LAUNCH).
Otherwise, or if the sum over I is split, the first launch stores partial sums of the products, and
the second adds them and applies the gate.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from moelora_kernels.kernels.common import configs, launcher, tables
from moelora_kernels.kernels.common.gates import (
    apply_gate,
    gate_form,
    gate_per_column,
    load_expert_columns,
    load_router_bias,
    load_scaling,
    make_gate,
)
from moelora_kernels.kernels.common.memory import load_rows, load_transposed
from moelora_kernels.kernels.common.products import exact_product, product, select_from
from moelora_kernels.kernels.common.reduce_partials import load_partials, store_partial
from moelora_kernels.kernels.common.splits import num_splits
from moelora_kernels.kernels.dropout import keep_tile, num_counters
from moelora_kernels.numerics import compute_dtype, dropout_threshold, keep_probability
from moelora_kernels.types import Dropout, Gate, Mixture, RouterTensors

# One launch does everything up to this many columns and experts: more do not fit into the registers
# together with the gate. With 32 experts the gate of 128 columns spills on sm_80.
ONE_LAUNCH_RANK = 128
ONE_LAUNCH_EXPERTS = 16
# Logits that one program of the product sums beside its columns, if there are two launches.
MAX_ROUTER_COLUMNS = 32


@triton.jit(do_not_specialize=["splits", "T", "G", "temperature", "row_counters", "dropout_scale"])
def shrink_gate_kernel(
    x_ptr,
    stride_x,
    a_ptrs,
    router_ptrs,
    bias_ptrs,
    gate_weights_ptr,
    gate_experts_ptr,
    gate_rows_ptr,
    expert_columns_ptr,
    scaling_ptr,
    seed_ptr,
    column_tiles_ptr,
    h_ptr,
    u_ptr,
    out_weights_ptr,
    out_experts_ptr,
    out_logits_ptr,
    partials_ptr,
    T,
    I,  # noqa: E741
    G,
    i_per_split,
    temperature,
    row_counters,
    dropout_scale,
    splits,
    n: tl.constexpr,
    A_ROWS: tl.constexpr,
    R: tl.constexpr,
    E: tl.constexpr,
    K: tl.constexpr,
    FORM: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    ONE_LAUNCH: tl.constexpr,
    DROPOUT: tl.constexpr,
    PER_EXPERT: tl.constexpr,
    RANK_DIVISOR: tl.constexpr,
    COLUMN_TILES: tl.constexpr,
    ROUTER_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """h = dropout(x) At, logits = x Wrt + br, u = scale * gate (.) h, for one sibling.

    x              [T, I], rows stride_x apart
    a              n x [A_ROWS, I]; A_ROWS is R, or r if the experts share A
    router, bias   n x [E, I] and n x [E]; None without
    gate_weights, gate_experts, gate_rows: the gate, as FORM says (`gates`); None with a router
    expert_columns [E, R] bfloat16, scaling [E] float32
    seed           [1] int64; None without dropout
    column_tiles   [COLUMN_TILES, 4] of `column_tile_table`; None without PER_EXPERT
    h, u           [T, n A_ROWS] and [T, n R], in the dtype of x
    out_weights, out_experts, out_logits: the gate of a router, [T, n K], [T, n K] int32 and
                   [T, n E]; None without a router; out_experts is None if K = E
    partials       [splits, T, n (A_ROWS + ROUTER_E)] float32, stored unless ONE_LAUNCH
    i_per_split    how many features of x one split sums, a multiple of BLOCK_I
    ROUTER_E       E with a router, else 0
    BLOCK_E        the experts whose logits one program computes: all of them if ONE_LAUNCH

    `kernels/__init__.py` explains the other constants. ONE_LAUNCH: this kernel computes all
    outputs, and A_ROWS is R. Otherwise it stores the products h and logits to `partials` only.
    Programs: (token tile, split of I, column tile of a sibling), the last fastest, so that programs
    which read the same x run together.
    """
    pid = tl.program_id(0)
    column_tile = pid % COLUMN_TILES
    split = pid // COLUMN_TILES % splits
    tokens = (pid // (COLUMN_TILES * splits)).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    tokens_in = tokens < T

    # Columns of rank space, and the experts whose logits are computed beside them.
    if PER_EXPERT:
        # A tile holds columns of one expert, because another expert has another dropout mask: the
        # stream is the expert. A row of the table is (first column, end, expert, sibling).
        sibling = tl.load(column_tiles_ptr + column_tile * 4 + 3)
        stream = tl.load(column_tiles_ptr + column_tile * 4 + 2)
        start = tl.load(column_tiles_ptr + column_tile * 4) - sibling * A_ROWS
        end = tl.load(column_tiles_ptr + column_tile * 4 + 1) - sibling * A_ROWS
        start, end = tl.multiple_of(start, RANK_DIVISOR), tl.multiple_of(end, RANK_DIVISOR)
        column_block = column_tile - sibling * (COLUMN_TILES // n)
    else:
        sibling = column_tile // (COLUMN_TILES // n)
        column_block = column_tile % (COLUMN_TILES // n)
        start = column_block * BLOCK_R
        end = A_ROWS
        stream = 0
    columns = start + tl.arange(0, BLOCK_R)
    columns_in = columns < end
    a_ptr = select_from(a_ptrs, sibling)
    if ROUTER_E:
        # Column block c also computes the logits of the experts from c BLOCK_E on. With ONE_LAUNCH
        # there is one block, and it has all experts.
        experts = column_block * BLOCK_E + tl.arange(0, BLOCK_E)
        router_ptr = select_from(router_ptrs, sibling)
    if DROPOUT > 0:
        seed = tl.load(seed_ptr)

    # Products: the experts read x after dropout, the router reads x itself. `product` rounds A to
    # the dtype of x; `exact_product` does not round the router's weight. Dropout takes x through
    # registers, and so does the conversion of a float16 x for a float32 router.
    h = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    logits = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    CONVERTED: tl.constexpr = ROUTER_E > 0 and x_ptr.dtype.element_ty == tl.float16
    for first in range(split * i_per_split, tl.minimum((split + 1) * i_per_split, I), BLOCK_I):
        i = first + tl.arange(0, BLOCK_I)
        x = load_rows(x_ptr, stride_x, tokens, i, tokens_in, i < I)  # [BLOCK_T, BLOCK_I]
        a = load_transposed(a_ptr, I, columns, i, columns_in, i < I)
        if ROUTER_E:
            router = load_transposed(router_ptr, I, experts, i, experts < E, i < I)
            logits = exact_product(x, router, logits, UPCAST, WAIT=DROPOUT > 0)
        if DROPOUT > 0:
            kept = keep_tile(seed, stream, tokens, first, row_counters, DROPOUT, BLOCK_I)
            x = tl.where(kept, x, 0.0).to(x.dtype)
        h = product(x, a, h, UPCAST, COMPUTED=DROPOUT > 0, WAIT=CONVERTED)
    h *= dropout_scale

    if ONE_LAUNCH:
        # Gate.
        logits += load_router_bias(bias_ptrs, sibling, E, BLOCK_E)[None, :]
        gate = make_gate(
            logits, gate_weights_ptr, gate_experts_ptr, gate_rows_ptr, out_weights_ptr,
            out_experts_ptr, out_logits_ptr, tokens, tokens_in, sibling, G, temperature, n, E, K,
            FORM, RENORMALIZE, BLOCK_E,
        )  # fmt: skip
        gate *= load_scaling(scaling_ptr, E, BLOCK_E)
        expert_columns = load_expert_columns(expert_columns_ptr, columns, E, R, BLOCK_E)
        column_gate = gate_per_column(gate, expert_columns, UPCAST)  # [BLOCK_T, BLOCK_R]

        # Compute u from the rounded h, because backward has only the rounded h.
        h = h.to(h_ptr.dtype.element_ty)
        in_bounds = tokens_in[:, None] & columns_in[None, :]
        offsets = tokens[:, None] * (n * R) + sibling * R + columns[None, :]
        tl.store(h_ptr + offsets, h, mask=in_bounds)
        u = apply_gate(column_gate, h.to(tl.float32))
        tl.store(u_ptr + offsets, u.to(u_ptr.dtype.element_ty), mask=in_bounds)
    else:
        WIDTH: tl.constexpr = A_ROWS + ROUTER_E
        store_partial(
            partials_ptr, split, tokens, tokens_in, sibling, columns, columns_in, h, T, n, WIDTH
        )
        if ROUTER_E:
            store_partial(
                partials_ptr, split, tokens, tokens_in, sibling, A_ROWS + experts, experts < E,
                logits, T, n, WIDTH,
            )  # fmt: skip


@triton.jit(do_not_specialize=["splits", "T", "G", "temperature"])
def gate_partials_kernel(
    partials_ptr,
    bias_ptrs,
    gate_weights_ptr,
    gate_experts_ptr,
    gate_rows_ptr,
    expert_columns_ptr,
    scaling_ptr,
    h_ptr,
    u_ptr,
    out_weights_ptr,
    out_experts_ptr,
    out_logits_ptr,
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
    RENORMALIZE: tl.constexpr,
    ROUTER_E: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """The outputs of `shrink_gate_kernel` from its partial sums, which are added in their order.

    The arguments are as in `shrink_gate_kernel`. If A_ROWS < R, all experts share the rows of A:
    column c of u reads column c % A_ROWS of h. Programs: (token tile, sibling), the last fastest.
    """
    sibling = tl.program_id(0) % n
    tokens = (tl.program_id(0) // n).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    tokens_in = tokens < T
    WIDTH: tl.constexpr = A_ROWS + ROUTER_E

    # Gate.
    experts = tl.arange(0, BLOCK_E)
    logits = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    if ROUTER_E:
        logits = load_partials(
            partials_ptr, tokens, tokens_in, sibling, A_ROWS + experts, experts < E, T, n, WIDTH,
            splits,
        )  # fmt: skip
        logits += load_router_bias(bias_ptrs, sibling, E, BLOCK_E)[None, :]
    gate = make_gate(
        logits, gate_weights_ptr, gate_experts_ptr, gate_rows_ptr, out_weights_ptr, out_experts_ptr,
        out_logits_ptr, tokens, tokens_in, sibling, G, temperature, n, E, K, FORM, RENORMALIZE,
        BLOCK_E,
    )  # fmt: skip
    gate *= load_scaling(scaling_ptr, E, BLOCK_E)

    # h and u, BLOCK_R columns at a time.
    for first in range(0, R, BLOCK_R):
        columns = first + tl.arange(0, BLOCK_R)
        a_columns = columns % A_ROWS
        in_bounds = tokens_in[:, None] & (columns < R)[None, :]
        h = load_partials(
            partials_ptr, tokens, tokens_in, sibling, a_columns, columns < R, T, n, WIDTH, splits
        )
        h = h.to(h_ptr.dtype.element_ty)
        tl.store(
            h_ptr + tokens[:, None] * (n * A_ROWS) + sibling * A_ROWS + a_columns[None, :],
            h,
            mask=in_bounds & (columns < A_ROWS)[None, :],
        )
        expert_columns = load_expert_columns(expert_columns_ptr, columns, E, R, BLOCK_E)
        u = apply_gate(gate_per_column(gate, expert_columns, UPCAST), h.to(tl.float32))
        tl.store(
            u_ptr + tokens[:, None] * (n * R) + sibling * R + columns[None, :],
            u.to(u_ptr.dtype.element_ty),
            mask=in_bounds,
        )


def launch(
    x: Tensor,
    lora_a: Sequence[Tensor],
    router: RouterTensors,
    gate: Gate,
    mixture: Mixture,
    dropout: Dropout,
    *,
    split: int | None = None,
):
    """Return h, u and the gate of the routers, like `reference.shrink_gate`.

    split: number of parts that I is cut into; None balances the programs.
    """
    router_weight, router_bias = router
    gate_weights, experts, rows, _ = gate
    ranks, scaling, _, top_k, renormalize, temperature = mixture
    T, width = x.shape
    n, E, R, A_ROWS = len(lora_a), len(ranks), sum(ranks), lora_a[0].shape[0]
    has_router = len(router_weight) > 0
    router_e = E if has_router else 0

    # Outputs. Without a router, weights, experts and logits are empty.
    h, u = x.new_empty((T, n * A_ROWS)), x.new_empty((T, n * R))
    dtype = compute_dtype(x)
    out_weights = x.new_empty((T, n * top_k) if has_router else 0, dtype=dtype)
    out_logits = x.new_empty((T, n * E) if has_router else 0, dtype=dtype)
    is_sparse = has_router and top_k < E
    out_experts = x.new_empty((T, n * top_k) if is_sparse else 0, dtype=torch.int32)
    K, form = (top_k, "router") if has_router else gate_form(gate_weights, experts, rows, T, n)
    if T == 0:
        return h, u, out_weights, out_experts, out_logits

    # Tiles: columns of rank space, and as many column tiles as they or the experts need.
    per_expert = dropout.p > 0 and dropout.per_expert
    block_r = min(launcher.block(max(ranks) if per_expert else A_ROWS), ONE_LAUNCH_RANK)
    block_e = launcher.block(E)
    tile_config = configs.tile_config("shrink_gate", x.device, x.dtype, block_r)
    fits = not per_expert and A_ROWS == R <= ONE_LAUNCH_RANK and block_e <= ONE_LAUNCH_EXPERTS
    # Rows of h and u that are not aligned take more registers than a large tile leaves.
    is_large = tile_config.tokens * block_r >= configs.LARGE_TILE
    fits = fits and (not is_large or R * x.itemsize % 16 == 0)
    column_tile_table, column_tiles = None, n * launcher.ceil_div(A_ROWS, block_r)
    if per_expert:
        column_tile_table = tables.column_tile_table(tuple(ranks), n, block_r, x.device)
        column_tiles = len(column_tile_table)
    elif has_router and not fits:
        column_tiles = max(column_tiles, n * launcher.ceil_div(E, MAX_ROUTER_COLUMNS))

    x = launcher.rows_dense(x)
    I = x.shape[1]  # noqa: E741
    token_tiles = launcher.ceil_div(T, tile_config.tokens)
    steps = launcher.ceil_div(I, tile_config.step)
    if split is None:
        programs = token_tiles * column_tiles
        split = num_splits(x.device, tile_config, programs, steps, stores_partials=not fits)
    one_launch = fits and split == 1

    # Without ONE_LAUNCH, the experts of the router are spread over the column tiles of a sibling.
    router_block, partials = block_e, None
    if not one_launch:
        if has_router:
            router_block = launcher.block(launcher.ceil_div(E, column_tiles // n))
        partials = x.new_empty((split, T, n * (A_ROWS + router_e)), dtype=dtype)

    # Arguments that both launches take.
    arguments = dict(
        bias_ptrs=launcher.all_aligned(router_bias),
        gate_weights_ptr=None if has_router else launcher.aligned(gate_weights),
        gate_experts_ptr=None if has_router else launcher.aligned_or_none(experts),
        gate_rows_ptr=launcher.aligned_or_none(rows),
        expert_columns_ptr=tables.expert_columns(tuple(ranks), x.device),
        scaling_ptr=tables.scaling_table(tuple(scaling), x.device),
        h_ptr=h,
        u_ptr=u,
        out_weights_ptr=out_weights if has_router else None,
        out_experts_ptr=out_experts if is_sparse else None,
        out_logits_ptr=out_logits if has_router else None,
        partials_ptr=partials,
        T=T,
        G=0 if has_router else gate_weights.shape[0],
        temperature=float(temperature),
        splits=split,
    )
    constants = dict(
        n=n, A_ROWS=A_ROWS, R=R, E=E, K=K, FORM=form, RENORMALIZE=bool(renormalize),
        ROUTER_E=router_e, UPCAST=launcher.INTERPRET,
    )  # fmt: skip
    launcher.run(
        shrink_gate_kernel,
        token_tiles * split * column_tiles,
        tile_config,
        arguments
        | dict(
            x_ptr=x,
            stride_x=x.stride(0),
            a_ptrs=launcher.all_padded(lora_a, A_ROWS, I),
            router_ptrs=launcher.all_padded(router_weight, E, I),
            seed_ptr=dropout.seed if dropout.p > 0 else None,
            column_tiles_ptr=column_tile_table,
            I=I,
            i_per_split=launcher.ceil_div(steps, split) * tile_config.step,
            row_counters=num_counters(width),
            dropout_scale=1.0 / keep_probability(dropout.p),
        ),
        constants
        | dict(
            ONE_LAUNCH=one_launch,
            DROPOUT=dropout_threshold(dropout.p),
            PER_EXPERT=per_expert,
            RANK_DIVISOR=tables.rank_divisor(ranks),
            COLUMN_TILES=column_tiles,
            BLOCK_T=tile_config.tokens,
            BLOCK_I=tile_config.step,
            BLOCK_R=block_r,
            BLOCK_E=router_block,
        ),
    )
    if not one_launch:
        row_tile = configs.PARTIALS_TILE
        block_r = min(launcher.block(R), row_tile.step)
        launcher.run(
            gate_partials_kernel, launcher.ceil_div(T, row_tile.tokens) * n, row_tile, arguments,
            constants | dict(BLOCK_T=row_tile.tokens, BLOCK_R=block_r, BLOCK_E=block_e),
        )  # fmt: skip
    return h, u, out_weights, out_experts, out_logits
