"""ffn_inner and its backward: the values of the reference, on every case."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from moelora_kernels import ops, reference
from moelora_kernels.ops import registration
from moelora_kernels.types import FFN_ACTIVATIONS, InnerAdapters, InnerInputs, InnerOptions
from support.backends import DTYPES, needs_library
from support.ffn_inner_cases import FFN_INNER, FfnCase, FfnInputs
from support.op_checks import compare, opcheck

each_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
each_case = pytest.mark.parametrize("case", FFN_INNER.values(), ids=FFN_INNER)


@needs_library
@each_dtype
@each_case
def test_forward(case: FfnCase, dtype: torch.dtype) -> None:
    inputs = FfnInputs(case, dtype)
    compare("ffn_inner", ops.ffn_inner, inputs.forward(), dtype)


@needs_library
@each_dtype
@each_case
def test_backward(case: FfnCase, dtype: torch.dtype) -> None:
    inputs = FfnInputs(case, dtype)
    compare("ffn_inner_backward", ops.ffn_inner_backward, inputs.backward(), dtype)


def differentiable(inputs: FfnInputs, *tensors: Tensor) -> tuple[Tensor, Tensor]:
    """Return summed and h of the reference for other gate_out, up_out, u, adapters and weights."""
    inner, adapters = InnerInputs(*tensors[:4]), InnerAdapters(*tensors[4:7])
    options = inputs.forward()[3:]
    return reference.ffn_inner(inner, adapters, tensors[7], *options)[:2]


@pytest.mark.parametrize("activation", FFN_ACTIVATIONS)
@pytest.mark.parametrize("name", ("plain", "one_token", "dropout_per_expert", "mixed_ranks"))
def test_the_backward_is_that_of_autograd(name: str, activation: str) -> None:
    """Float64: the formulas of the reference's backward against autograd through its forward."""
    case = FFN_INNER[name]._replace(activation=activation)
    inputs = FfnInputs(case, torch.float64)
    tensors = [*inputs.inner, *inputs.adapters, inputs.weights]
    leaves = [t.clone().requires_grad_() for t in tensors]
    summed, h = differentiable(inputs, *leaves)
    expected = torch.autograd.grad([summed, h], leaves, [inputs.dsummed, inputs.dh])
    actual = reference.ffn_inner_backward(*inputs.backward())
    # The op returns the gradient of A x, which is scaled on the way to u.
    scale = reference.grouped.gate_rank_space(
        torch.ones_like(inputs.dh), None, inputs.routing, case.ranks, inputs.scaling
    )
    grads = [*expected[:2], *(scale * g for g in expected[2:4]), expected[7], *expected[4:7]]
    # The forward skips a weight of zero, so autograd sees no gradient of it. The op returns it.
    actual = actual._replace(dweights=torch.where(inputs.weights == 0, 0, actual.dweights))
    for one, other in zip(actual, grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_a_weight_of_zero_has_a_gradient() -> None:
    """The gradient of a weight does not depend on the weight."""
    inputs = FfnInputs(FFN_INNER["plain"], torch.float64)
    expected = reference.ffn_inner_backward(*inputs.backward()).dweights
    inputs.weights = torch.ones_like(inputs.weights)
    actual = reference.ffn_inner_backward(*inputs.backward()).dweights
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    assert (expected[::3, -1] != 0).any()


@pytest.mark.parametrize("activation", FFN_ACTIVATIONS)
def test_slopes_are_those_of_autograd(activation: str) -> None:
    z = torch.linspace(-12, 12, 4001, dtype=torch.float64).requires_grad_()
    (slope,) = torch.autograd.grad(reference.ffn_activation(z, activation).sum(), z)
    actual = reference.ffn_activation_slope(z.detach(), activation)
    torch.testing.assert_close(actual, slope, rtol=1e-12, atol=1e-12)


@needs_library
@pytest.mark.parametrize("activation", FFN_ACTIVATIONS)
def test_activations_of_extreme_values(activation: str) -> None:
    """Float32, elementwise: both signs, zeros, numbers near the ends of exp, and NaN."""
    ends = [0.0, 1e-30, 1e-6, 0.3, 0.65, 0.66, 1.3, 3.0, 5.5, 9.3, 20.0, 87.0, 90.0, 1e4, 1e18]
    z = torch.cat([torch.tensor(ends), -torch.tensor(ends), torch.linspace(-12, 12, 1001)])
    inputs = FfnInputs(FfnCase(T=1, F=len(z), K=1, ranks=(1,), routing="all"), torch.float32)
    ones = torch.ones(1, len(z))
    zeros = torch.zeros_like(inputs.inner.u_gate)
    inner = InnerInputs(z[None], ones, zeros, zeros)
    weights = torch.ones(1, 1)
    options = InnerOptions((1,), (1.0,), *inputs.dropout, activation)
    arguments = [weights, inputs.routing, options]
    summed = ops.ffn_inner(inner, inputs.adapters, *arguments)[0]
    expected = reference.ffn_activation(z.double(), activation)
    tolerance = dict(rtol=2e-6, atol=1e-7)
    torch.testing.assert_close(summed[0].double(), expected, **tolerance)
    grads = ops.ffn_inner_backward(ones, inner, inputs.adapters, zeros, *arguments)
    slope = reference.ffn_activation_slope(z.double(), activation)
    torch.testing.assert_close(grads.dgate_out[0].double(), slope, **tolerance)
    broken = inner._replace(gate_out=torch.full_like(z, torch.nan)[None])
    assert ops.ffn_inner(broken, inputs.adapters, *arguments)[0].isnan().all()


def without_nan(*tensors: Tensor) -> bool:
    return all(torch.isfinite(t).all() for t in tensors)


@needs_library
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_nan_of_an_expert_stays_with_its_tokens(dtype: torch.dtype) -> None:
    """A token whose slots do not name the expert, or weigh it with zero, has finite results."""
    inputs = FfnInputs(FFN_INNER["plain"]._replace(T=40), dtype)
    inputs.weights[:, 0] = 0
    rank = inputs.case.ranks[0]
    for matrix in inputs.adapters[:2]:
        matrix[:, :rank] = torch.nan
    inputs.adapters.down_a[:rank] = torch.nan
    uses = ((inputs.experts == 0) & (inputs.weights != 0)).any(dim=1)
    assert 0 < uses.sum() < 40
    summed, *_ = ops.ffn_inner(*inputs.forward())
    assert without_nan(summed[~uses])
    assert not torch.isfinite(summed[uses]).any()
    grads = ops.ffn_inner_backward(*inputs.backward())
    assert without_nan(grads.dgate_out[~uses], grads.dup_out[~uses])
    assert without_nan(grads.dgate_b[:, rank:], grads.dup_b[:, rank:], grads.ddown_a[rank:])


@needs_library
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_strides_do_not_matter(dtype: torch.dtype) -> None:
    inputs = FfnInputs(FFN_INNER["long"]._replace(T=40), dtype)
    forward, backward = ops.ffn_inner(*inputs.forward()), ops.ffn_inner_backward(*inputs.backward())

    def strided(matrix: Tensor) -> Tensor:
        return torch.stack([matrix, matrix], dim=2)[:, :, 0]

    inputs.inner = InnerInputs(*map(strided, inputs.inner))
    inputs.adapters = InnerAdapters(*(t.t().contiguous().t() for t in inputs.adapters))
    inputs.weights = strided(inputs.weights)
    inputs.dh = strided(inputs.dh)
    inputs.dsummed = torch.cat([inputs.dsummed, inputs.dsummed], dim=1)[:, : inputs.case.F]
    again = ops.ffn_inner(*inputs.forward()), ops.ffn_inner_backward(*inputs.backward())
    for one, other in zip([*forward, *backward], [*again[0], *again[1]], strict=True):
        assert torch.equal(one, other)


@needs_library
def test_gradients_that_are_not_needed_are_empty() -> None:
    inputs = FfnInputs(FFN_INNER["plain"], torch.bfloat16)
    everything = ops.ffn_inner_backward(*inputs.backward())
    rest = ops.ffn_inner_backward(*inputs.backward(), needs_adapters=False)
    for one, other in itertools.islice(zip(everything, rest, strict=True), 5):
        assert torch.equal(one, other)
    assert [t.numel() for t in rest[5:]] == [0, 0, 0]


OPCHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


@pytest.mark.parametrize("name", ("plain", "no_token", "dropout_per_expert", "float32_adapters"))
def test_opcheck(name: str) -> None:
    inputs = FfnInputs(FFN_INNER[name], torch.bfloat16)
    opcheck("ffn_inner", inputs.forward(), test_utils=OPCHECKS)
    for needs in (True, False):
        opcheck("ffn_inner_backward", [*inputs.backward(), needs], test_utils=OPCHECKS)


def test_errors_name_the_argument() -> None:
    inputs = FfnInputs(FFN_INNER["plain"], torch.float32)
    flat = registration.flat(inputs.forward())
    with pytest.raises(RuntimeError, match="activation: expected silu, gelu, gelu_tanh or relu"):
        torch.ops.moelora.ffn_inner(*flat[:-1], "tanh")
    inputs.adapters = inputs.adapters._replace(up_b=inputs.adapters.up_b[1:])
    with pytest.raises(RuntimeError, match="up_b: expected size 45, got 44"):
        ops.ffn_inner(*inputs.forward())


THREADS = """
import sys, torch
torch.set_num_threads(int(sys.argv[1]))
from moelora_kernels import ops
from support.ffn_inner_cases import FFN_INNER, FfnInputs
inputs = FfnInputs(FFN_INNER["long"], torch.bfloat16)
results = [*ops.ffn_inner(*inputs.forward()), *ops.ffn_inner_backward(*inputs.backward())]
torch.save(results, sys.argv[2])
"""


@needs_library
def test_the_bits_do_not_depend_on_the_number_of_threads(tmp_path) -> None:
    results = []
    for threads in (1, 3):
        path = str(tmp_path / f"{threads}.pt")
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        subprocess.run(
            [sys.executable, "-c", THREADS, str(threads), path], check=True, env=environment
        )
        results.append(torch.load(path))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
