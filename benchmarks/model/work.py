"""The arithmetic of a recorded launch: operations of its products, and steps of its loops."""

from __future__ import annotations

from typing import NamedTuple

import torch

from benchmarks.model.sizes import Sizes
from moelora_kernels.kernels.common.launcher import Launch, ceil_div

# A product of two float32 tiles is three products of TF32, each at half the rate of bf16.
FLOAT32 = 6.0


class Work(NamedTuple):
    """The arithmetic of a launch.

    Attributes:
        flops: operations of all programs in products, at the cost of bf16.
        steps: steps of the loop of a program.
        dependent_loads: loads before the loop that need the result of the load before them.
        busy: the share of the programs that come to their loop.
        runs: the share of the instructions outside of the loop that a program runs.
    """

    flops: float
    steps: int
    dependent_loads: int = 0
    busy: float = 1.0
    runs: float = 1.0


def _precision(s: Sizes, pointer: str) -> float:
    return FLOAT32 if s.size(pointer) == 4 else 1.0


def _shrink_gate(s: Sizes) -> Work:
    steps = s.i_per_split // s.BLOCK_I
    columns = s.BLOCK_R + (s.BLOCK_E if s.ROUTER_E else 0)
    flops = 2.0 * s.programs * s.BLOCK_T * columns * s.i_per_split
    return Work(flops * _precision(s, "x_ptr"), steps)


def _shrink_gate_backward(s: Sizes) -> Work:
    o_per_split = max(s.o_per_split)
    flops = 2.0 * s.programs * s.BLOCK_T * s.COLUMN_BLOCKS * s.BLOCK_R * o_per_split
    return Work(flops * _precision(s, "dy_ptrs"), o_per_split // s.BLOCK_O)


def _shrink_dx(s: Sizes) -> Work:
    steps = s.num_column_tiles or s.n * ceil_div(s.A_ROWS, s.BLOCK_R)
    tile = 2.0 * s.programs * s.BLOCK_T * s.BLOCK_I
    flops = tile * steps * s.BLOCK_R * _precision(s, "dh_ptr")
    if s.router_ptrs is not None:
        # dlogits stay in float32.
        router_steps = s.n * ceil_div(s.E, s.BLOCK_E)
        flops += tile * router_steps * s.BLOCK_E * FLOAT32
        steps += router_steps
    return Work(flops, steps)


def _resident_dx(s: Sizes) -> Work:
    rows = ceil_div(s.n * s.A_ROWS, s.BLOCK_R) * s.BLOCK_R
    if s.router_ptrs is not None:
        # dlogits are two bfloat16.
        rows += 2 * s.BLOCK_E
    tokens = ceil_div(s.T, s.BLOCK_T) * s.BLOCK_T
    flops = 2.0 * tokens * ceil_div(s.I, s.BLOCK_I) * s.BLOCK_I * rows
    return Work(flops, s.t_per_program // s.BLOCK_T)


def _weight_grad(s: Sizes) -> Work:
    columns = max(s.BLOCK_A + s.BLOCK_L, s.BLOCK_B)
    flops = 2.0 * s.programs * s.t_per_split * s.BLOCK_W * columns
    return Work(flops * _precision(s, "x_ptr"), s.t_per_split // s.BLOCK_T)


def _router_logits(s: Sizes) -> Work:
    flops = 2.0 * s.programs * s.BLOCK_T * s.BLOCK_E * s.i_per_split
    return Work(flops * _precision(s, "x_ptr"), s.i_per_split // s.BLOCK_I)


def _router_grad(s: Sizes) -> Work:
    flops = 2.0 * s.programs * s.t_per_split * s.BLOCK_W * s.BLOCK_L
    # dlogits stay in float32: three products of bfloat16 (`exact_product`), else three of TF32.
    precision = 3.0 if s.x_ptr.dtype == torch.bfloat16 else FLOAT32
    return Work(flops * precision, s.t_per_split // s.BLOCK_T)


def _grouped_shrink(s: Sizes) -> Work:
    flops = 2.0 * s.programs * s.BLOCK_P * s.BLOCK_R * s.I
    return Work(flops * _precision(s, "x_ptr"), ceil_div(s.I, s.BLOCK_I))


def _grouped_shrink_backward(s: Sizes) -> Work:
    widest = max(s.out_features)
    flops = 2.0 * s.programs * s.BLOCK_P * s.MAX_RANK * widest
    return Work(flops * _precision(s, "dy_ptrs"), ceil_div(widest, s.BLOCK_O))


def _grouped_expand(s: Sizes) -> Work:
    o_tiles = ceil_div(min(s.O, s.walk), s.BLOCK_O)
    steps = o_tiles * ceil_div(s.MAX_RANK, s.BLOCK_R)
    # A tile of an expert holds the pairs of all slots in the order of slots, and a launch writes
    # those of one slot. Programs whose tile has none return before their product.
    busy = 1.0 if s.PER_PAIR else 1.0 / s.S
    columns = steps * s.BLOCK_R + (o_tiles * s.BLOCK_L if s.L and not s.SPARSE_DLOGITS else 0)
    flops = 2.0 * busy * s.programs * s.BLOCK_P * s.BLOCK_O * columns
    # The tile, its pairs, their rows: each load needs the one before.
    return Work(flops * _precision(s, "u_ptr"), steps, dependent_loads=2, busy=busy)


def _grouped_weight_grad(s: Sizes) -> Work:
    # The chunks of one expert hold as many positions as all others in balanced routing.
    positions = ceil_div(s.P, len(s.chunks_ptr))
    flops = 2.0 * s.programs * positions * s.BLOCK_W * s.BLOCK_R
    # A program runs the code for dA or the code for dB.
    return Work(flops * _precision(s, "x_ptrs"), ceil_div(positions, s.BLOCK_P), runs=0.5)


def _ffn(s: Sizes, products: int, steps: int) -> Work:
    flops = 2.0 * products * s.programs * steps * s.BLOCK_P * s.BLOCK_F * s.BLOCK_R
    # The pair of a row, its position, its rank space: each load needs the one before.
    return Work(flops * _precision(s, "gate_out_ptr"), steps, dependent_loads=2)


def _ffn_inner(s: Sizes) -> Work:
    return _ffn(s, 3, s.steps)


def _ffn_inner_backward(s: Sizes) -> Work:
    return _ffn(s, 5, s.steps)


def _ffn_inner_weight_grad(s: Sizes) -> Work:
    return _ffn(s, 6, ceil_div(s.range_t, s.BLOCK_P // s.SLOTS))


PRODUCTS = {
    "shrink_gate_kernel": _shrink_gate,
    "shrink_gate_backward_kernel": _shrink_gate_backward,
    "shrink_dx_kernel": _shrink_dx,
    "resident_dx_kernel": _resident_dx,
    "weight_grad_kernel": _weight_grad,
    "router_logits_kernel": _router_logits,
    "router_grad_kernel": _router_grad,
    "grouped_shrink_kernel": _grouped_shrink,
    "grouped_shrink_backward_kernel": _grouped_shrink_backward,
    "grouped_expand_kernel": _grouped_expand,
    "grouped_weight_grad_kernel": _grouped_weight_grad,
    "ffn_inner_kernel": _ffn_inner,
    "ffn_inner_backward_kernel": _ffn_inner_backward,
    "ffn_inner_weight_grad_kernel": _ffn_inner_weight_grad,
}


def work(launch: Launch) -> Work:
    """Return the work of a launch. Kernels without a product have no operations and one step."""
    name = launch.kernel.fn.__name__
    return PRODUCTS[name](Sizes(launch)) if name in PRODUCTS else Work(0.0, 1)
