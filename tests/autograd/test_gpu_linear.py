"""Layers of linears on a GPU at real sizes, through the autograd Function, against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moelora_kernels.functional import run_layer
from moelora_kernels.testing import assert_within_budget, reference_step
from moelora_kernels.types import LinearTensors, Mixture
from support.backends import GPU, HALF, require_gpu_memory
from support.cases import Case
from support.gpu_cases import assert_equal
from support.inputs import assert_layer_within_budget
from support.large_cases import LARGE_LAYERS, LARGE_WIDE

pytestmark = pytest.mark.gpu

CASES = {"wide": LARGE_WIDE, "grouped": LARGE_LAYERS}


@pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)
@pytest.mark.parametrize(
    ("case", "impl"),
    [
        pytest.param(case, impl, id=f"{name}-{impl}")
        for impl, cases in CASES.items()
        for name, case in cases.items()
    ],
)
def test_outputs_and_gradients(case: Case, impl: str, dtype: torch.dtype) -> None:
    """The ops one after the other with cuBLAS between them; twice, the same bits."""
    inputs = GPU.inputs(case, dtype)
    result = assert_layer_within_budget(inputs, impl)
    assert_equal([*inputs.step(impl).values()], [*result.values()])


@pytest.mark.parametrize("wide_side", ("in", "out"))
def test_more_than_2_to_the_31_elements(wide_side: str) -> None:
    """Offsets past 2^31 in x and dx, or in y and dy: the last rows, and the sums over the tokens.

    dy is zero but in the last rows, so that these alone make the gradients of the parameters.
    """
    T, many, few, last = 262_400, 8192, 64, 300
    assert T * many > 2**31
    I, O = (many, few) if wide_side == "in" else (few, many)  # noqa: E741
    require_gpu_memory(3 * T * many * 2)

    def normal(*shape: int, std: float = 1.0) -> Tensor:
        return torch.empty(shape, device="cuda", dtype=torch.float16).normal_(std=std)

    # Every expert is selected, so that no rounding of a logit changes the routing.
    mixture = Mixture((4, 4), (0.5, 0.75), router_top_k=2)
    weight, a, router = (normal(rows, I, std=I**-0.5) for rows in (O, 8, 2))
    linear = LinearTensors(weight, None, None, a, normal(O, 8, std=0.3), router, None)
    x, dy = normal(T, I), normal(T, O).zero_()
    dy[-last:] = normal(last, O)
    last_x, last_dy = x[-last:].clone(), dy[-last:].clone()

    for leaf in (x, linear.lora_a, linear.lora_b, router):
        leaf.requires_grad_()
    (y,), _ = run_layer(mixture, x, [linear], impl="wide")
    y.backward(dy)
    result = {"y0": y[-last:], "dx": x.grad[-last:], "dA0": a.grad, "dB0": linear.lora_b.grad}
    result["drouter0"] = router.grad
    doubled = LinearTensors(*(None if t is None else t.double() for t in linear))
    with torch.no_grad():
        truth = reference_step(mixture, last_x.double(), [doubled], [last_dy.double()])
        baseline = reference_step(mixture, last_x, [linear], [last_dy])
    assert_within_budget(result, truth, baseline, torch.float16)
