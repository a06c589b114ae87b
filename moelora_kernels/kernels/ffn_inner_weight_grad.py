"""The gradients of the adapters in `ffn_inner_backward`: sums over the pairs of all tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from moelora_kernels.kernels.common import configs, launcher
from moelora_kernels.kernels.common.activation import activation, activation_slope
from moelora_kernels.kernels.common.memory import (
    load_rows,
    load_transposed,
    store_rows,
    store_transposed,
)
from moelora_kernels.kernels.common.pair_rows import (
    load_pair_rows,
    load_spread,
    load_weights,
    rank_product,
    row_constants,
)
from moelora_kernels.kernels.common.products import product
from moelora_kernels.kernels.common.reduce_partials import Partials
from moelora_kernels.kernels.common.splits import num_splits
from moelora_kernels.kernels.dropout import keep_tile


@triton.jit(do_not_specialize=["T", "range_t", "row_counters", "dropout_scale"])
def ffn_inner_weight_grad_kernel(
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
    table_ptr,
    ranks_ptr,
    seed_ptr,
    dgate_b_ptr,
    dup_b_ptr,
    ddown_a_ptr,
    partial_stride,
    T,
    F,
    WIDTH,
    range_t,
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
    """dBg = dz_gate^T u_gate, dBu = dz_up^T u_up and dAd = dh^T dropout(a), over all pairs.

    The gradients of z are those of `ffn_inner_backward_kernel`, whose tensors the first arguments
    are. A column of rank space gets the terms of its expert alone, because u and dh are 0 in the
    columns of other experts.

    dgate_b, dup_b [WIDTH, R]; ddown_a [R, WIDTH]; WIDTH is F before padding. A split stores its
    partial sum `partial_stride` elements behind that of the split before.

    Programs: (split, tile of F), the last fastest. A split sums `range_t` tokens in their order.
    """
    BLOCK_T: tl.constexpr = BLOCK_P // SLOTS
    f_tiles = tl.cdiv(F, BLOCK_F)
    split = tl.program_id(0) // f_tiles
    first_f = tl.program_id(0) % f_tiles * BLOCK_F
    f = first_f + tl.arange(0, BLOCK_F)
    f_in = f < F
    columns = tl.arange(0, BLOCK_R)
    columns_in = columns < R
    # The columns of B behind the last are 0.
    b_in = columns < B_COLUMNS
    gate_b = load_transposed(gate_b_ptr, B_COLUMNS, f, columns, f_in, b_in)
    up_b = load_transposed(up_b_ptr, B_COLUMNS, f, columns, f_in, b_in)
    down_a = load_rows(down_a_ptr, F, columns, f, columns_in, f_in)
    if DROPOUT > 0:
        seed = tl.load(seed_ptr)

    dgate_b = tl.zeros((BLOCK_F, BLOCK_R), tl.float32)
    dup_b = tl.zeros((BLOCK_F, BLOCK_R), tl.float32)
    ddown_a = tl.zeros((BLOCK_F, BLOCK_R), tl.float32)
    begin_t = split * range_t
    for first_token in range(begin_t, tl.minimum(begin_t + range_t, T), BLOCK_T):
        tokens, rows_in, pairs, positions, experts, routed, starts, ranks = load_pair_rows(
            table_ptr, ranks_ptr, first_token, T, E, K, SLOTS, RANK, RANK_DIVISOR, BLOCK_P
        )
        weights = load_weights(weights_ptr, pairs, routed)
        selected = (weights != 0)[:, None]
        u_gate = load_spread(u_gate_ptr, positions, starts, ranks, columns, MAX_RANK)
        u_up = load_spread(u_up_ptr, positions, starts, ranks, columns, MAX_RANK)
        dh = load_spread(dh_ptr, positions, starts, ranks, columns, MAX_RANK)
        gate_out = load_rows(gate_out_ptr, stride_gate, tokens, f, rows_in, f_in)
        up_out = load_rows(up_out_ptr, stride_up, tokens, f, rows_in, f_in)
        dsummed = load_rows(dsummed_ptr, stride_dsummed, tokens, f, rows_in, f_in)

        # z and da.
        z_gate = rank_product(u_gate, gate_b, UPCAST) + gate_out.to(tl.float32)
        z_up = rank_product(u_up, up_b, UPCAST) + up_out.to(tl.float32)
        da = rank_product(dh, down_a, UPCAST)
        value = activation(z_gate, ACTIVATION)
        a = value * z_up
        if DROPOUT > 0:
            stream = experts[:, None] if PER_EXPERT else 0
            kept = keep_tile(seed, stream, pairs, first_f, row_counters, DROPOUT, BLOCK_F)
            da = tl.where(kept, da * dropout_scale, 0.0)
            a = tl.where(kept, a * dropout_scale, 0.0)
        da += weights[:, None] * dsummed.to(tl.float32)
        dz_up = tl.where(selected, da * value, 0.0)
        dz_gate = tl.where(selected, da * z_up * activation_slope(z_gate, ACTIVATION), 0.0)

        # Gradients.
        dtype = dh.dtype
        ddown_a = product(tl.trans(a.to(dtype)), dh, ddown_a, UPCAST, COMPUTED=True)
        dup_b = product(tl.trans(dz_up.to(dtype)), u_up, dup_b, UPCAST, COMPUTED=True)
        dgate_b = product(tl.trans(dz_gate.to(dtype)), u_gate, dgate_b, UPCAST, COMPUTED=True)

    partial = split.to(tl.int64) * partial_stride
    f_in = f < WIDTH
    store_rows(dgate_b_ptr + partial, R, f, columns, f_in, columns_in, dgate_b)
    store_rows(dup_b_ptr + partial, R, f, columns, f_in, columns_in, dup_b)
    store_transposed(ddown_a_ptr + partial, WIDTH, columns, f, columns_in, f_in, ddown_a)


def launch(
    tensors: dict[str, Any],
    sizes: dict[str, Any],
    constants: dict[str, Any],
    gradients: Sequence[Tensor],
    split: int | None = None,
) -> None:
    """Fill dgate_b, dup_b [F, R] and ddown_a [R, F].

    tensors, sizes, constants: arguments of `ffn_inner_backward_kernel` that the kernels share.
    split: the parts of the sums over tokens.
    """
    x, T, F = tensors["gate_out_ptr"], sizes["T"], sizes["F"]
    row = constants["RANK_DIVISOR"]
    tile_config = configs.tile_config(
        "ffn_inner_weight_grad", x.device, x.dtype, constants["BLOCK_R"], row
    )
    rows = row_constants(constants["K"], tile_config.tokens, row, x)
    block_t = rows["BLOCK_P"] // rows["SLOTS"]
    f_tiles = launcher.ceil_div(F, tile_config.step)
    steps = launcher.ceil_div(T, block_t)
    split = split or num_splits(x.device, tile_config, f_tiles, steps)
    range_t = launcher.ceil_div(steps, split) * block_t
    split = launcher.ceil_div(T, range_t)
    partials = Partials(gradients, split)
    launcher.run(
        ffn_inner_weight_grad_kernel,
        f_tiles * split,
        tile_config,
        dict(
            **{name: value for name, value in tensors.items() if name != "scaling_ptr"},
            dgate_b_ptr=partials.targets[0],
            dup_b_ptr=partials.targets[1],
            ddown_a_ptr=partials.targets[2],
            partial_stride=partials.stride,
            **sizes,
            WIDTH=gradients[0].shape[0],
            range_t=range_t,
        ),
        dict(**constants, BLOCK_P=rows["BLOCK_P"], BLOCK_F=tile_config.step),
    )
    partials.reduce()
