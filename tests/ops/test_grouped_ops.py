"""The ops of the grouped form on every case: native library and Triton kernels.

router_logits, route, grouped_shrink, grouped_shrink_backward, grouped_expand, grouped_dx,
grouped_weight_grad, router_grad
"""

from __future__ import annotations

import pytest
import torch

from support.backends import (
    DTYPES,
    GPU,
    HALF,
    NATIVE,
    TRITON,
    Backend,
    parameters,
    ptx_parameters,
)
from support.cases import GROUPED, Case
from support.large_cases import LARGE_GROUPED
from support.op_checks import GROUPED_OPS, check

# The Triton kernels run by default in float16 on these cases: tails, empty experts and tokens,
# ranks and sizes past a tile, each form of an id, start and mask.
IN_FLOAT16 = (
    "plain", "one_slot", "eight_slots", "distinct_experts", "mostly_one", "empty", "long",
    "mixed_ranks", "wide", "no_token", "one_token", "nothing_routed_int64", "siblings",
    "dropout_per_expert", "float32_adapters",
)  # fmt: skip
# Other dtypes change casts and products, and no addresses. Two passes at most: Triton's interpreter
# cuts a float32 down to bfloat16, which a GPU rounds, in every pass.
IN_OTHER_DTYPES = ("mixed_ranks", "dropout_per_pair", "float32_adapters")
# PTX runs in every case in bfloat16.
PTX_NAMES = {
    "bf16": tuple(GROUPED),
    "fp16": ("mixed_ranks", "float32_adapters"),
    "fp32": ("mixed_ranks", "dropout_per_pair"),
}
# They make no other loads or products than their neighbours.
PTX_ON_ONE_ARCHITECTURE = {
    "one_expert-bf16": "sm_80", "rank_1-bf16": "sm_90", "few_pairs-bf16": "sm_80",
    "full-bf16": "sm_90", "four_slots-bf16": "sm_80", "empty-bf16": "sm_90",
    "mixed_ranks-fp16": "sm_90", "float32_adapters-fp16": "sm_80", "dropout_per_pair-fp32": "sm_80",
}  # fmt: skip


def triton_by_default(case: str, dtype: str) -> bool:
    return case in IN_FLOAT16 if dtype == "fp16" else case == "mixed_ranks"


def ptx_by_default(case: str, dtype: str) -> bool:
    return case == "mixed_ranks" and dtype == "bf16"


PARAMETERS = [
    *parameters(NATIVE, GROUPED, DTYPES),
    *parameters(TRITON, GROUPED, {"fp16": torch.float16}, triton_by_default),
    *parameters(
        TRITON,
        {name: GROUPED[name] for name in IN_OTHER_DTYPES},
        {name: DTYPES[name] for name in ("bf16", "fp32")},
        triton_by_default,
    ),
    *ptx_parameters(GROUPED, PTX_NAMES, PTX_ON_ONE_ARCHITECTURE, ptx_by_default),
    *parameters(GPU, LARGE_GROUPED, HALF),
]


@pytest.mark.parametrize(
    ("op", "backend", "case", "dtype"),
    [
        pytest.param(op, *parameter.values, id=f"{op}-{parameter.id}", marks=parameter.marks)
        for op in GROUPED_OPS
        for parameter in PARAMETERS
        # `route` has no Triton kernel.
        if op != "route" or parameter.values[0] in (NATIVE, GPU)
    ],
)
def test_op(op: str, backend: Backend, case: Case, dtype: torch.dtype) -> None:
    check(op, backend.implementation(op), backend.inputs(case, dtype))
