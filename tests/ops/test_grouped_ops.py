"""The ops of the grouped form on every case: native library and Triton kernels.

router_logits, route, grouped_shrink, grouped_shrink_backward, grouped_expand, grouped_weight_grad,
router_grad
"""

from __future__ import annotations

import pytest
import torch

from support.backends import DTYPES, GPU, HALF, NATIVE, PTX, TRITON, Backend, parameters
from support.cases import GROUPED, Case
from support.large_cases import LARGE_GROUPED
from support.op_checks import GROUPED_OPS, check

# The Triton kernels run by default in float16 on these cases: tails, empty experts and tokens,
# ranks and sizes past a tile, each form of an id, start and mask.
IN_FLOAT16 = (
    "plain", "one_slot", "eight_slots", "mostly_one", "empty", "long", "mixed_ranks", "wide",
    "no_token", "one_token", "nothing_routed_int64", "siblings", "dropout_per_expert",
    "float32_adapters",
)  # fmt: skip
# Other dtypes change casts and products, and no addresses. Two passes at most: Triton's interpreter
# cuts a float32 down to bfloat16, which a GPU rounds, in every pass.
IN_OTHER_DTYPES = ("mixed_ranks", "dropout_per_pair", "float32_adapters")
# Sizes and numbers of experts that make no other loads or products than their neighbours.
PTX_OF_ONE_ARCHITECTURE = {
    "one_expert": "sm_80", "rank_1": "sm_90", "few_pairs": "sm_80", "full": "sm_90",
    "four_slots": "sm_80", "empty": "sm_90",
}  # fmt: skip


def triton_by_default(case: str, dtype: str) -> bool:
    return case in IN_FLOAT16 if dtype == "fp16" else case == "mixed_ranks"


def ptx_by_default(case: str, dtype: str) -> bool:
    return case == "mixed_ranks" and dtype == "bf16"


def ptx_parameters() -> list:
    """Every case in bfloat16. Another dtype changes casts and products, and no addresses."""
    names = {
        "bf16": GROUPED,
        "fp16": ("mixed_ranks", "float32_adapters"),
        "fp32": ("mixed_ranks", "dropout_per_pair"),
    }
    return [
        parameter
        for ptx in PTX
        for dtype in names
        for parameter in parameters(
            ptx,
            {
                name: GROUPED[name]
                for name in names[dtype]
                if PTX_OF_ONE_ARCHITECTURE.get(name, ptx.ptx) == ptx.ptx
            },
            {dtype: DTYPES[dtype]},
            ptx_by_default,
        )
    ]


PARAMETERS = [
    *parameters(NATIVE, GROUPED, DTYPES),
    *parameters(TRITON, GROUPED, {"fp16": torch.float16}, triton_by_default),
    *parameters(
        TRITON,
        {name: GROUPED[name] for name in IN_OTHER_DTYPES},
        {name: DTYPES[name] for name in ("bf16", "fp32")},
        triton_by_default,
    ),
    *ptx_parameters(),
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
