"""The ops of the wide form on every case: native library and Triton kernels.

shrink_gate, shrink_gate_backward, weight_grad, shrink_dx
"""

from __future__ import annotations

import pytest
import torch

from support.backends import (
    DTYPES,
    GPU,
    HALF,
    KERNEL_DTYPES,
    NATIVE,
    TRITON,
    Backend,
    parameters,
    ptx_parameters,
)
from support.cases import WIDE, Case
from support.large_cases import LARGE_WIDE
from support.op_checks import WIDE_OPS, check

# The Triton kernels run by default in every dtype on these cases, and in float16 on all others but
# the slowest: another dtype changes casts and products, and no addresses.
EVERY_DTYPE = ("plain", "float32_adapters", "float32_routers")
SLOWEST = ("long", "many_experts", "rows_int64", "siblings_sparse")
# Interpreted for a minute per op and dtype: in float16 alone, since dtypes share addresses.
INTERPRETED_ONCE = ("long",)

# PTX runs in every case in bfloat16. Another dtype changes casts and products, and no addresses; in
# float32 sums over ranks, tokens and shared rows in several launches, and wide masks.
PTX_NAMES = {
    "bf16": tuple(WIDE),
    "fp16": EVERY_DTYPE,
    "fp32": (
        "many_experts", "mixed_ranks", "mixed_ranks_dense", "siblings_sparse", "siblings_dense",
        "rows", "one_row", "share_a_dense", "dropout_per_expert",
    ),
}  # fmt: skip
# They differ from others in a few instructions, which are the same on each architecture.
PTX_ON_ONE_ARCHITECTURE = {
    "one_token-bf16": "sm_90", "one_expert-bf16": "sm_80", "one_expert_dense-bf16": "sm_90",
    "all_experts-bf16": "sm_80", "all_experts_softmax-bf16": "sm_90",
    "softmax_before_topk-bf16": "sm_80", "sparse_int64-bf16": "sm_90", "rows_int64-bf16": "sm_80",
    "plain-fp16": "sm_90", "float32_adapters-fp16": "sm_80",
    "float32_routers-fp16": "sm_90",
    "many_experts-fp32": "sm_80", "rows-fp32": "sm_90", "one_row-fp32": "sm_80",
    "share_a_dense-fp32": "sm_90", "dropout_per_expert-fp32": "sm_90",
}  # fmt: skip

ONE_DTYPE = {name: case for name, case in WIDE.items() if name in INTERPRETED_ONCE}
ALL_DTYPES = {name: case for name, case in WIDE.items() if name not in ONE_DTYPE}


def triton_by_default(case: str, dtype: str) -> bool:
    return case in EVERY_DTYPE or (dtype == "fp16" and case not in SLOWEST)


def ptx_by_default(case: str, dtype: str) -> bool:
    return case == "siblings" and dtype == "bf16"


@pytest.mark.parametrize(
    ("backend", "case", "dtype"),
    (
        *parameters(NATIVE, WIDE, DTYPES),
        *parameters(TRITON, ALL_DTYPES, KERNEL_DTYPES, triton_by_default),
        *parameters(TRITON, ONE_DTYPE, {"fp16": torch.float16}, triton_by_default),
        *ptx_parameters(WIDE, PTX_NAMES, PTX_ON_ONE_ARCHITECTURE, ptx_by_default),
        *parameters(GPU, LARGE_WIDE, HALF),
    ),
)
@pytest.mark.parametrize("op", WIDE_OPS)
def test_op(op: str, backend: Backend, case: Case, dtype: torch.dtype) -> None:
    for implementation in backend.implementations(op):
        check(op, implementation, backend.inputs(case, dtype))
