"""The Triton kernels of ffn_inner and its backward: the values of the reference, on every case."""

from __future__ import annotations

import pytest
import torch

from moelora_kernels import reference
from moelora_kernels.ops import registration
from moelora_kernels.types import FFN_ACTIVATIONS
from support.backends import (
    GPU,
    HALF,
    SM_90,
    TRITON,
    Backend,
    each_backend,
    parameters,
    ptx_parameters,
)
from support.ffn_inner_cases import FFN_INNER, LARGE_FFN, FfnCase, FfnInputs
from support.inputs import moved
from support.op_checks import compare

OPS = ("ffn_inner", "ffn_inner_backward")
each_op = pytest.mark.parametrize("op", OPS)
# The kernels take up to 128 columns of rank space.
CASES = {name: case for name, case in FFN_INNER.items() if sum(case.ranks) <= 128}
# The most columns of rank space: fewer rows with dropout, and if the ranks are not aligned.
CASES["rank_16"] = FfnCase(T=77, F=77, ranks=(16,) * 8)
CASES["rank_16_dropout"] = CASES["rank_16"]._replace(dropout=0.25)
CASES["rank_17"] = FfnCase(F=77, ranks=(17,) * 7)
# A sum of many steps in one part.
CASES["wide"] = CASES["wide"]._replace(F=9 * 128 + 1)
PTX_NAMES = {"bf16": tuple(CASES), "fp16": ("float32_adapters",)}
# They make no other loads or products than their neighbours.
PTX_ON_ONE_ARCHITECTURE = {
    "gelu-bf16": "sm_90", "relu-bf16": "sm_80", "no_token-bf16": "sm_80",
    "one_expert-bf16": "sm_90", "wide-bf16": "sm_90", "skew-bf16": "sm_80", "empty-bf16": "sm_90",
    "nothing_routed-bf16": "sm_80", "dropout-bf16": "sm_80",
}  # fmt: skip


def triton_by_default(case: str, dtype: str) -> bool:
    return case != "many_experts"


def ptx_by_default(case: str, dtype: str) -> bool:
    return case in ("mixed_ranks", "rank_16_dropout") and dtype == "bf16"


PARAMETERS = [
    *parameters(TRITON, CASES, {"fp16": torch.float16}, triton_by_default),
    *ptx_parameters(CASES, PTX_NAMES, PTX_ON_ONE_ARCHITECTURE, ptx_by_default),
    *parameters(GPU, LARGE_FFN, HALF),
]


def arguments_of(op: str, inputs: FfnInputs, device: str = "cpu") -> list:
    """Return the arguments of an op, on a device."""
    arguments = inputs.forward() if op == "ffn_inner" else inputs.backward()
    return moved(arguments, device)


@pytest.mark.parametrize(
    ("op", "backend", "case", "dtype"),
    [
        pytest.param(op, *parameter.values, id=f"{op}-{parameter.id}", marks=parameter.marks)
        for op in OPS
        for parameter in PARAMETERS
    ],
)
def test_op(op: str, backend: Backend, case: FfnCase, dtype: torch.dtype) -> None:
    arguments = arguments_of(op, FfnInputs(case, dtype), backend.device)
    for implementation in backend.implementations(op):
        compare(op, implementation, arguments, dtype)


@each_backend(TRITON, SM_90)
@each_op
def test_a_nan_of_an_expert_stays_away_from_slots_without_weight(op: str, backend: Backend) -> None:
    """No slot of half of the tokens is routed with a weight: their results are finite."""
    inputs = FfnInputs(FFN_INNER["plain"]._replace(T=40), torch.float16)
    inputs.weights[::2] = 0
    for matrix in inputs.adapters:
        matrix.fill_(torch.nan)
    arguments = arguments_of(op, inputs, backend.device)
    results = backend.implementation(op)(*arguments)
    of_tokens = results[:1] if op == "ffn_inner" else results[:2]
    for result in of_tokens:
        assert torch.isfinite(result[::2]).all()
        assert (result[::2] == 0).all()
    assert not torch.isfinite(of_tokens[0][1::2]).all()


@each_backend(TRITON, SM_90)
@pytest.mark.parametrize("activation", FFN_ACTIVATIONS)
def test_activations_of_extreme_values(activation: str, backend: Backend) -> None:
    """Both signs, zeros, numbers near the ends of exp, and NaN; one column for each token.

    dweights is float32, and the activation itself; dgate_out is its slope in x's dtype.
    """
    # The interpreter computes bfloat16 wrongly.
    dtype = torch.bfloat16 if backend.ptx else torch.float16
    ends = [0.0, 1e-30, 1e-6, 0.3, 0.65, 0.66, 1.3, 3.0, 5.5, 9.3, 20.0, 87.0, 90.0, 1e4, 1e18]
    z = torch.cat([torch.tensor(ends), -torch.tensor(ends), torch.linspace(-12, 12, 101)])
    z = z.to(dtype)
    z = z[z.isfinite()][:, None]
    inputs = FfnInputs(FfnCase(T=len(z), F=1, K=1, ranks=(1,), routing="all"), dtype)
    inputs.weights = torch.ones(len(z), 1)
    ones, zeros = torch.ones_like(z), torch.zeros_like(z)
    inputs.dh, inputs.dsummed = zeros, ones
    inputs.inner = inputs.inner._replace(gate_out=z, up_out=ones, u_gate=zeros, u_up=zeros)
    inputs.case = inputs.case._replace(activation=activation)
    dgate_out, _, _, _, dweights, *_ = backend.implementation(OPS[1])(
        *arguments_of(OPS[1], inputs, backend.device), False
    )
    expected = reference.ffn_activation(z.double(), activation)
    torch.testing.assert_close(dweights.cpu().double(), expected, rtol=2e-6, atol=3e-7)
    slope = reference.ffn_activation_slope(z.double(), activation)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(dgate_out.cpu().double(), slope, rtol=rounding, atol=3e-7)
    inputs.inner = inputs.inner._replace(gate_out=torch.full_like(ones, torch.nan))
    broken, *_ = backend.implementation(OPS[0])(*arguments_of(OPS[0], inputs, backend.device))
    assert broken.isnan().all()


@each_backend(TRITON)
@each_op
def test_strides_do_not_matter(op: str, backend: Backend) -> None:
    inputs = FfnInputs(FFN_INNER["dropout"], torch.float16)
    expected = backend.implementation(op)(*arguments_of(op, inputs, backend.device))

    def strided(matrix: torch.Tensor) -> torch.Tensor:
        return torch.stack([matrix, matrix], dim=2)[:, :, 0]

    inputs.inner = type(inputs.inner)(*map(strided, inputs.inner))
    inputs.adapters = type(inputs.adapters)(*(t.t().contiguous().t() for t in inputs.adapters))
    inputs.weights, inputs.dh = strided(inputs.weights), strided(inputs.dh)
    inputs.dsummed = strided(inputs.dsummed)
    actual = backend.implementation(op)(*arguments_of(op, inputs, backend.device))
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@each_backend(TRITON)
def test_gradients_that_are_not_needed_are_empty(backend: Backend) -> None:
    arguments = arguments_of(OPS[1], FfnInputs(FFN_INNER["plain"], torch.float16), backend.device)
    launch = backend.implementation(OPS[1])
    everything, rest = launch(*arguments), launch(*arguments, False)
    for one, other in zip(everything[:5], rest[:5], strict=True):
        assert torch.equal(one, other)
    assert [t.numel() for t in rest[5:]] == [0, 0, 0]


@each_backend(TRITON)
@each_op
def test_the_op_of_a_gpu_is_the_launcher(op: str, backend: Backend) -> None:
    """The flat arguments of the dispatcher reach it as structures."""
    inputs = FfnInputs(FFN_INNER["dropout_per_expert"], torch.float16)
    arguments = arguments_of(op, inputs, backend.device)
    expected = backend.implementation(op)(*arguments)
    switches = [] if op == OPS[0] else [True]
    actual = registration.KERNELS[op](*registration.flat([*arguments, *switches]))
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@each_backend(TRITON)
@each_op
def test_ranks_beyond_128_columns_are_refused(op: str, backend: Backend) -> None:
    arguments = arguments_of(op, FfnInputs(FFN_INNER["large_ranks"], torch.float16), backend.device)
    with pytest.raises(ValueError, match="got 220"):
        backend.implementation(op)(*arguments)


@each_backend(TRITON)
@each_op
def test_float32_is_refused(op: str, backend: Backend) -> None:
    arguments = arguments_of(op, FfnInputs(FFN_INNER["plain"], torch.float32), backend.device)
    with pytest.raises(TypeError, match=r"x: .* got torch\.float32"):
        backend.implementation(op)(*arguments)


@each_backend(TRITON)
@each_op
def test_more_than_16_slots_are_refused(op: str, backend: Backend) -> None:
    inputs = FfnInputs(FfnCase(K=17, ranks=(2,) * 17, routing="all"), torch.float16)
    with pytest.raises(ValueError, match="at most 16 experts of a token, got 17"):
        backend.implementation(op)(*arguments_of(op, inputs, backend.device))
