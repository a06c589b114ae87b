"""Compiled kernels on a CPU: pointers and widths that no tile is made for, and sums that are cut.

`tests/ops` executes every case of the ops. These tests add what a GPU would meet, and the
interpreter does not distinguish.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from support.arguments import calls
from support.backends import (
    DTYPES,
    PTX,
    SPLIT,
    Backend,
    in_parts,
    needs_triton,
    on_ptx,
    op_launcher,
)
from support.cases import WIDE, Case, grouped_case
from support.inputs import Inputs, map_tensors
from support.op_checks import GROUPED_OPS, WIDE_OPS, check, compare
from support.selection import exhaustive

OPS = (*WIDE_OPS, *(op for op in GROUPED_OPS if op != "route"))
each_op = pytest.mark.parametrize("op", OPS)
each_architecture = pytest.mark.parametrize(
    "backend", [pytest.param(backend, id=backend.name, marks=backend.marks) for backend in PTX]
)


def case_of(op: str, **options) -> Case:
    """Return a case with several tokens tiles and steps, and a router that has a bias."""
    options = dict(T=70, router_bias=True, start="bias", **options)
    if op in WIDE_OPS:
        return Case(**options)
    return grouped_case(**{"tile": 64, "chunk": 96, **options})


def in_flat_buffers(value: Tensor) -> Tensor:
    """Return a copy that begins one element behind the start of a buffer, like a flat parameter."""
    if not isinstance(value, Tensor) or value.dim() == 0:
        return value
    buffer = value.new_zeros(value.numel() + 9)
    return buffer[1 : 1 + value.numel()].view(value.shape).copy_(value)


@exhaustive
@each_architecture
@each_op
def test_tensors_that_begin_at_no_multiple_of_16_bytes(op: str, backend: Backend) -> None:
    inputs = Inputs(case_of(op, I=136, O=136, n=2), torch.bfloat16)
    for arguments in calls(op, inputs):
        arguments = map_tensors(in_flat_buffers, arguments)
        compare(op, backend.implementation(op), arguments, torch.bfloat16)


@exhaustive
@each_architecture
@each_op
def test_odd_widths_of_several_steps(op: str, backend: Backend) -> None:
    check(op, backend.implementation(op), Inputs(case_of(op, I=301, O=275), torch.bfloat16))


@exhaustive
@each_architecture
@pytest.mark.parametrize("dtype", ("bf16", "fp32"))
@each_op
def test_sums_that_are_cut_like_those_of_tensor_cores(
    op: str, dtype: str, backend: Backend
) -> None:
    """Within the budget that tests on a GPU have. The longest sums have 1100 terms."""
    inputs = Inputs(case_of(op, I=1100, O=300, ranks=(8,) * 8), DTYPES[dtype])
    options = {"split": 1} if op in SPLIT else {}
    implementation = backend.implementation(op, sums="cut", **options)
    for arguments in calls(op, inputs):
        compare(op, implementation, arguments, DTYPES[dtype], truncates=True)


# float32 cases whose cut sums miss the budget of sums that are rounded.
LONG_SUMS = {
    "mixed_ranks": ("shrink_gate_backward", WIDE["mixed_ranks"]),
    "mixed_ranks_dense": ("shrink_gate_backward", WIDE["mixed_ranks_dense"]),
    "siblings_sparse": ("weight_grad", WIDE["siblings_sparse"]),
    "siblings_dense": ("weight_grad", WIDE["siblings_dense"]),
}


@exhaustive
@each_architecture
@pytest.mark.parametrize(("op", "case"), LONG_SUMS.values(), ids=LONG_SUMS)
def test_float32_sums_that_are_cut(op: str, case: Case, backend: Backend) -> None:
    implementation = backend.implementation(op, sums="cut", split=1)
    for arguments in calls(op, Inputs(case, torch.float32)):
        compare(op, implementation, arguments, torch.float32, truncates=True)


@exhaustive
@each_architecture
def test_a_sum_over_a_thousand_tokens_that_is_cut(backend: Backend) -> None:
    inputs = Inputs(Case(T=1000, I=64, O=64, ranks=(4,) * 4), torch.bfloat16)
    implementation = backend.implementation("weight_grad", sums="cut", split=1)
    for arguments in calls("weight_grad", inputs):
        compare("weight_grad", implementation, arguments, torch.bfloat16, truncates=True)


# name -> op, options of its case, dtype. Triton 3.6 compiles all of them wrong, and Triton 3.9 the
# last one, if `kernels/common/products.py` does not help.
PRODUCTS = {
    "copies": ("shrink_gate", {}, torch.bfloat16),
    "computed_in_the_loop": ("shrink_gate", dict(gate="dense", dropout=0.1), torch.bfloat16),
    "computed_behind_the_loop": ("shrink_gate_backward", dict(ranks=(4,) * 4), torch.bfloat16),
    "read_by_two_products": ("weight_grad", dict(T=200, router_bias=True), torch.float16),
}


@needs_triton
@pytest.mark.ptx
@pytest.mark.parametrize(("op", "options", "dtype"), PRODUCTS.values(), ids=PRODUCTS)
def test_operands_of_wgmma_stay_until_it_has_read_them(
    op: str, options: dict, dtype: torch.dtype
) -> None:
    (arguments,) = calls(op, Inputs(Case(I=400, O=400, **options), dtype))
    compare(op, on_ptx(in_parts(op_launcher(op), 1), "sm_90"), arguments, dtype)
