"""The gradients of `ffn_inner`, whose z and a are computed again.

One launch goes over the tokens; `ffn_inner_weight_grad` computes the gradients of the adapters.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moelora_kernels.kernels import ffn_inner_weight_grad
from moelora_kernels.kernels.common import configs, launcher, tables
from moelora_kernels.kernels.common.activation import activation, activation_slope
from moelora_kernels.kernels.common.memory import load_rows, store_rows
from moelora_kernels.kernels.common.pair_rows import (
    load_pair_rows,
    load_spread,
    load_weights,
    pair_table,
    rank_columns,
    rank_product,
    row_constants,
    store_picked,
    sum_slots,
)
from moelora_kernels.kernels.common.products import product
from moelora_kernels.kernels.common.reduce_partials import Partials
from moelora_kernels.kernels.common.splits import num_splits
from moelora_kernels.kernels.dropout import keep_tile, num_counters
from moelora_kernels.numerics import absent, cast_all, dropout_threshold, keep_probability
from moelora_kernels.types import InnerAdapters, InnerGrads, InnerInputs, InnerOptions, Routing


@triton.jit(do_not_specialize=["T", "steps", "row_counters", "dropout_scale"])
def ffn_inner_backward_kernel(
    dsummed_ptr,
    stride_dsummed,
    gate_out_ptr,
    stride_gate,
    up_out_ptr,
    stride_up,
    u_gate_ptr,
    u_up_ptr,
    dh_ptr,
    gate_b_ptr,
    up_b_ptr,
    down_a_ptr,
    weights_ptr,
    scaling_ptr,
    table_ptr,
    ranks_ptr,
    seed_ptr,
    dgate_out_ptr,
    dup_out_ptr,
    dh_gate_ptr,
    dh_up_ptr,
    dweights_ptr,
    partial_stride,
    T,
    F,
    steps,
    row_counters,
    dropout_scale,
    E: tl.constexpr,
    R: tl.constexpr,
    B_COLUMNS: tl.constexpr,
    K: tl.constexpr,
    SLOTS: tl.constexpr,
    RANK: tl.constexpr,
    MAX_RANK: tl.constexpr,
    RANK_DIVISOR: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DROPOUT: tl.constexpr,
    PER_EXPERT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_R: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """da = dropout(dh Ad_e) + w dsummed, dz_up = da act(z), dz_gate = da z_up act'(z), and

        dgate_out = sum_k dz_gate             dup_out = sum_k dz_up
        dh_gate   = scale_e dz_gate Bg_e      dh_up   = scale_e dz_up Bu_e
        dweight   = <dsummed, a>

    dsummed          [T, F], rows stride_dsummed apart
    gate_out, up_out [T, F], rows stride_gate and stride_up apart
    u_gate, u_up, dh [P, MAX_RANK] by sorted position
    gate_b, up_b     [F, B_COLUMNS]; the first R columns are those of B
    down_a           [R, F]
    weights          [P] by pair
    scaling          [E] float32
    table            [P, 2] of `pair_table`
    ranks            [E, 2] of `rank_table`, or None
    seed             [1] int64; None without dropout
    dgate_out        [T, F], and dup_out
    dh_gate, dh_up   [P, MAX_RANK] by sorted position; a split stores its partial sum
                     `partial_stride` elements behind that of the split before
    dweights         [P] float32 by pair, split in the same way

    Programs: (split, tile of tokens), the last fastest, so that B and A are read from L2. A split
    takes `steps` steps of BLOCK_F columns. The rows of a tile are pairs, see `pair_rows`.
    """
    BLOCK_T: tl.constexpr = BLOCK_P // SLOTS
    token_tiles = tl.cdiv(T, BLOCK_T)
    split = tl.program_id(0) // token_tiles
    first_token = tl.program_id(0) % token_tiles * BLOCK_T
    tokens, rows_in, pairs, positions, experts, routed, starts, ranks = load_pair_rows(
        table_ptr, ranks_ptr, first_token, T, E, K, SLOTS, RANK, RANK_DIVISOR, BLOCK_P
    )
    columns = tl.arange(0, BLOCK_R)
    columns_in = columns < R
    # The columns of B behind the last are 0.
    b_in = columns < B_COLUMNS
    u_gate = load_spread(u_gate_ptr, positions, starts, ranks, columns, MAX_RANK)
    u_up = load_spread(u_up_ptr, positions, starts, ranks, columns, MAX_RANK)
    dh = load_spread(dh_ptr, positions, starts, ranks, columns, MAX_RANK)
    out_tokens = first_token.to(tl.int64) + tl.arange(0, BLOCK_T)
    if DROPOUT > 0:
        seed = tl.load(seed_ptr)
        stream = experts[:, None] if PER_EXPERT else 0

    dh_gate = tl.zeros((BLOCK_P, BLOCK_R), tl.float32)
    dh_up = tl.zeros((BLOCK_P, BLOCK_R), tl.float32)
    dweights = tl.zeros((BLOCK_P,), tl.float32)
    begin_f = split * steps * BLOCK_F
    for first_f in range(begin_f, tl.minimum(begin_f + steps * BLOCK_F, F), BLOCK_F):
        f = first_f + tl.arange(0, BLOCK_F)
        f_in = f < F

        # da and z.
        gate_out = load_rows(gate_out_ptr, stride_gate, tokens, f, rows_in, f_in)
        up_out = load_rows(up_out_ptr, stride_up, tokens, f, rows_in, f_in)
        dsummed = load_rows(dsummed_ptr, stride_dsummed, tokens, f, rows_in, f_in)
        gate_b = load_rows(gate_b_ptr, B_COLUMNS, f, columns, f_in, b_in)
        up_b = load_rows(up_b_ptr, B_COLUMNS, f, columns, f_in, b_in)
        down_a = load_rows(down_a_ptr, F, columns, f, columns_in, f_in)
        da = rank_product(dh, down_a, UPCAST)
        if DROPOUT > 0:
            kept = keep_tile(seed, stream, pairs, first_f, row_counters, DROPOUT, BLOCK_F)
            da = tl.where(kept, da * dropout_scale, 0.0)
        dsummed = dsummed.to(tl.float32)
        # Loaded in every step: what stays in registers over the loop makes it spill.
        weights = load_weights(weights_ptr, pairs, routed)
        selected = (weights != 0)[:, None]
        da += weights[:, None] * dsummed
        z_gate = rank_product(u_gate, tl.trans(gate_b), UPCAST) + gate_out.to(tl.float32)
        z_up = rank_product(u_up, tl.trans(up_b), UPCAST) + up_out.to(tl.float32)

        # Gradients of z and of the weights.
        value = activation(z_gate, ACTIVATION)
        dweights += tl.sum(dsummed * (value * z_up), axis=1)
        dz_up = tl.where(selected, da * value, 0.0)
        dz_gate = tl.where(selected, da * z_up * activation_slope(z_gate, ACTIVATION), 0.0)
        tokens_in = out_tokens < T
        sums = sum_slots(dz_gate, SLOTS)
        store_rows(dgate_out_ptr, F, out_tokens, f, tokens_in, f_in, sums)
        sums = sum_slots(dz_up, SLOTS)
        store_rows(dup_out_ptr, F, out_tokens, f, tokens_in, f_in, sums)

        # Rank space of gate and up.
        dh_gate = product(dz_gate.to(dh.dtype), gate_b, dh_gate, UPCAST, COMPUTED=True)
        dh_up = product(dz_up.to(dh.dtype), up_b, dh_up, UPCAST, COMPUTED=True)

    # Loaded again, for the same reason.
    tokens, rows_in, pairs, positions, experts, routed, starts, ranks = load_pair_rows(
        table_ptr, ranks_ptr, first_token, T, E, K, SLOTS, RANK, RANK_DIVISOR, BLOCK_P
    )
    partial = split.to(tl.int64) * partial_stride
    scale = tl.load(scaling_ptr + experts)[:, None]
    store_picked(
        dh_gate_ptr + partial, dh_gate * scale, positions, rows_in, starts, ranks, columns, MAX_RANK
    )
    store_picked(
        dh_up_ptr + partial, dh_up * scale, positions, rows_in, starts, ranks, columns, MAX_RANK
    )
    dweights = tl.where(routed, dweights, 0.0)
    tl.store(dweights_ptr + partial + pairs, dweights, mask=rows_in)


def launch(
    dsummed: Tensor,
    inner: InnerInputs,
    adapters: InnerAdapters,
    dh: Tensor,
    weights: Tensor,
    routing: Routing,
    options: InnerOptions,
    needs_adapters: bool = True,
    split: int | None = None,
):
    """Return the gradients, like `reference.ffn_inner_backward`, for 16-bit x, R <= 128.

    float32 adapters are cast first: their tiles would take registers.

    split: the parts of the sums over F, and of the sums over tokens.
    """
    ranks, scaling, dropout = options.ranks, options.scaling, options.dropout
    (T, K), width = weights.shape, inner.gate_out.shape[1]
    P, R, x = T * K, sum(ranks), inner.gate_out
    block_r = rank_columns(ranks, x)
    dh_gate, dh_up = (x.new_empty(inner.u_gate.shape) for _ in range(2))
    dweights = x.new_empty((T, K), dtype=torch.float32)
    adapter_grads = [
        matrix.new_empty(matrix.shape) if needs_adapters else absent(x, matrix.dtype)
        for matrix in adapters
    ]
    if P == 0:
        outputs = [x.new_empty((T, width)) for _ in range(2)]
        zeros = [grad.zero_() for grad in adapter_grads]
        return InnerGrads(*[*outputs, dh_gate, dh_up, dweights, *zeros])
    gate_out, up_out, dsummed = (
        launcher.rows_dense(each) for each in (x, inner.up_out, dsummed.to(x.dtype))
    )
    F = gate_out.shape[1]
    dgate_out, dup_out = (x.new_empty((T, F)) for _ in range(2))
    rank_constants = tables.rank_constants(ranks)
    row = rank_constants["RANK_DIVISOR"]
    is_simple = dropout.p == 0 and row * x.itemsize % launcher.ALIGNMENT == 0
    tile_config = configs.tile_config(
        "ffn_inner_backward", x.device, x.dtype, block_r, row, is_simple=is_simple
    )
    rows = row_constants(K, tile_config.tokens, row, x)
    token_tiles = launcher.ceil_div(T, rows["BLOCK_P"] // rows["SLOTS"])
    f_tiles = launcher.ceil_div(F, tile_config.step)
    parts = split or num_splits(x.device, tile_config, token_tiles, f_tiles)
    steps = launcher.ceil_div(f_tiles, parts)
    parts = launcher.ceil_div(f_tiles, steps)
    partials = Partials([dh_gate, dh_up, dweights], parts)
    adapters = InnerAdapters(*cast_all(adapters, [x.dtype] * len(adapters)))
    b_columns = launcher.aligned_columns(adapters.gate_b)
    tensors = dict(
        dsummed_ptr=dsummed,
        stride_dsummed=dsummed.stride(0),
        gate_out_ptr=gate_out,
        stride_gate=gate_out.stride(0),
        up_out_ptr=up_out,
        stride_up=up_out.stride(0),
        u_gate_ptr=launcher.aligned(inner.u_gate),
        u_up_ptr=launcher.aligned(inner.u_up),
        dh_ptr=launcher.aligned(dh.to(x.dtype)),
        gate_b_ptr=launcher.padded(adapters.gate_b, F, b_columns),
        up_b_ptr=launcher.padded(adapters.up_b, F, b_columns),
        down_a_ptr=launcher.padded(adapters.down_a, R, F),
        weights_ptr=launcher.aligned(weights),
        scaling_ptr=tables.scaling_table(tuple(scaling), x.device),
        table_ptr=pair_table(routing, x),
        ranks_ptr=tables.rank_table(tuple(ranks), routing.order.device),
        seed_ptr=dropout.seed if dropout.p > 0 else None,
    )
    sizes = dict(
        T=T,
        F=F,
        row_counters=num_counters(width),
        dropout_scale=1.0 / keep_probability(dropout.p),
    )
    constants = dict(
        E=len(ranks),
        R=R,
        B_COLUMNS=b_columns,
        **rank_constants,
        K=K,
        SLOTS=rows["SLOTS"],
        ACTIVATION=options.activation,
        DROPOUT=dropout_threshold(dropout.p),
        PER_EXPERT=dropout.per_expert,
        BLOCK_R=block_r,
        UPCAST=launcher.INTERPRET,
    )
    launcher.run(
        ffn_inner_backward_kernel,
        token_tiles * parts,
        tile_config,
        dict(
            **tensors,
            dgate_out_ptr=dgate_out,
            dup_out_ptr=dup_out,
            dh_gate_ptr=partials.targets[0],
            dh_up_ptr=partials.targets[1],
            dweights_ptr=partials.targets[2],
            partial_stride=partials.stride,
            **sizes,
            steps=steps,
        ),
        dict(**constants, BLOCK_P=rows["BLOCK_P"], BLOCK_F=tile_config.step),
    )
    partials.reduce()
    if needs_adapters:
        ffn_inner_weight_grad.launch(tensors, sizes, constants, adapter_grads, split)
    outputs = [launcher.cropped(each, T, width) for each in (dgate_out, dup_out)]
    return InnerGrads(*[*outputs, dh_gate, dh_up, dweights, *adapter_grads])
