"""The ops of the grouped formulation as they are registered for the CPU, against float64."""

from __future__ import annotations

import pytest
import torch

from moelora_kernels import ops
from support.grouped_cases import CASES, OUTPUTS, Inputs, check, check_what_is_not_chosen
from support.op_cases import DTYPES

IMPLEMENTATIONS = {name: getattr(ops, name) for name in OUTPUTS}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", OUTPUTS)
def test_op(name: str, case, dtype: torch.dtype) -> None:
    check(name, IMPLEMENTATIONS[name], Inputs(case, dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_what_is_not_chosen_adds_nothing(dtype: torch.dtype) -> None:
    check_what_is_not_chosen(IMPLEMENTATIONS, dtype)
