"""The Triton kernels of the grouped formulation: on the GPU where there is one, or interpreted."""

from __future__ import annotations

import pytest
import torch
from grouped_cases import CASES, OUTPUTS, Case, Inputs, check
from op_cases import KERNEL_DEVICE as DEVICE

from moelora_kernels.kernels import (
    grouped_expand,
    grouped_gram,
    grouped_shrink,
    grouped_shrink_backward,
    router,
)

# Who serves `route` on a GPU is no kernel of Triton.
LAUNCHERS = {
    "router_logits": router.launch_logits,
    "grouped_shrink": grouped_shrink.launch,
    "grouped_shrink_backward": grouped_shrink_backward.launch,
    "grouped_expand": grouped_expand.launch,
    "grouped_gram": grouped_gram.launch,
    "router_gram": router.launch_gram,
}
FP16 = torch.float16


def test_every_op_has_a_launcher() -> None:
    assert {*LAUNCHERS, "route"} == set(OUTPUTS)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("name", LAUNCHERS)
def test_op(name: str, case: Case) -> None:
    check(name, LAUNCHERS[name], Inputs(case, FP16, device=DEVICE), FP16)
