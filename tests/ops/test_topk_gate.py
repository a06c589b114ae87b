"""topk_gate and its backward: values on every backend, ties, infinite logits, gradient, errors."""

from __future__ import annotations

import pytest
import torch

from moelora_kernels import ops, reference
from support.backends import (
    DTYPES,
    GPU,
    HALF,
    KERNEL_DTYPES,
    NATIVE,
    PTX,
    TRITON,
    Backend,
    each_cpu_backend,
    each_cpu_backend_and_sm_90,
    parameters,
)
from support.op_checks import compare

SMALL = {
    f"K={K}-{'renormalized' if renormalize else 'softmax'}": (101, 7, K, renormalize)
    for K in (1, 3, 7)
    for renormalize in (True, False)
}
LARGE = {
    f"{T}x{E}-K={K}": (T, E, K, True) for T, E, K in ((8192, 8, 2), (1000, 64, 6), (17, 200, 8))
}


@pytest.mark.parametrize(
    ("backend", "sizes", "dtype"),
    (
        *parameters(NATIVE, SMALL, DTYPES),
        *parameters(TRITON, SMALL, KERNEL_DTYPES),
        *(
            parameter
            for ptx in PTX
            for parameter in parameters(
                ptx, SMALL, {name: DTYPES[name] for name in ("fp32", "bf16")}, lambda *_: False
            )
        ),
        *parameters(GPU, LARGE, HALF),
    ),
)
def test_topk_gate_and_its_backward(
    backend: Backend, sizes: tuple[int, int, int, bool], dtype: torch.dtype
) -> None:
    """In bfloat16 many logits are equal, and the lower expert comes first."""
    T, E, K, renormalize = sizes
    logits = torch.randn(T, E, dtype=torch.float64).to(backend.device, dtype)
    arguments = [logits, K, renormalize, 0.8]
    compare("topk_gate", backend.implementation("topk_gate"), arguments, dtype)
    weights, experts = reference.topk_gate(*arguments)
    arguments = [torch.randn_like(weights), weights, experts, logits, renormalize, 0.8]
    compare("topk_gate_backward", backend.implementation("topk_gate_backward"), arguments, dtype)


def assert_same_choice(backend: Backend, logits: torch.Tensor, K: int, renormalize: bool) -> None:
    """Assert the experts of the reference, and its weights with NaN in the same entries."""
    expected_weights, expected = reference.topk_gate(logits, K, renormalize, 1.0)
    topk_gate = backend.implementation("topk_gate")
    weights, experts = topk_gate(logits.to(backend.device), K, renormalize, 1.0)
    assert torch.equal(experts.cpu(), expected)
    torch.testing.assert_close(weights.cpu(), expected_weights, equal_nan=True)
    assert all(len(set(row)) == K for row in experts.tolist())


@each_cpu_backend
@pytest.mark.parametrize("K", (1, 3, 5, 6))
def test_ties_go_to_the_lower_expert(K: int, backend: Backend) -> None:
    logits = torch.randint(0, 3, (257, 6), generator=torch.Generator().manual_seed(1)).float()
    assert_same_choice(backend, logits, K, True)


@each_cpu_backend_and_sm_90
@pytest.mark.parametrize("bad", (torch.nan, torch.inf, -torch.inf))
def test_bad_logits_choose_valid_and_different_experts(bad: float, backend: Backend) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(200, 9, generator=generator)
    logits[torch.rand(200, 9, generator=generator) < 0.4] = bad
    logits[0] = bad
    for K in (1, 4, 9):
        for renormalize in (True, False):
            assert_same_choice(backend, logits, K, renormalize)


@each_cpu_backend_and_sm_90
@pytest.mark.parametrize("renormalize", (True, False))
@pytest.mark.parametrize("K", (1, 2, 4))
def test_logits_that_are_equal_infinite_or_nan(K: int, renormalize: bool, backend: Backend) -> None:
    inf, nan = torch.inf, torch.nan
    logits = torch.tensor(
        [
            [1.0, 1.0, 1.0, 1.0],
            [0.0, 2.0, 2.0, -1.0],
            [-inf, -inf, 0.5, -inf],
            [-inf, -inf, -inf, -inf],
            [inf, 0.0, inf, 1.0],
            [0.0, nan, 1.0, 2.0],
        ]
    )
    assert_same_choice(backend, logits, K, renormalize)


@pytest.mark.parametrize("renormalize", (True, False))
@pytest.mark.parametrize("K", (1, 2, 5))
def test_gradient(K: int, renormalize: bool) -> None:
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)

    def weights(logits):
        return ops.topk_gate(logits, K, renormalize, 0.8)[0]

    assert torch.autograd.gradcheck(weights, (logits,))
    if K == 1 and renormalize:
        assert torch.equal(weights(logits), torch.ones(6, 1).double())


def test_errors_name_the_argument() -> None:
    logits = torch.randn(3, 4)
    for arguments, name in (
        ((logits[0], 1), "logits"),
        ((logits.int(), 1), "logits"),
        ((logits, 5), "top_k"),
        ((logits, 0), "top_k"),
        ((logits, 1, True, 0.0), "temperature"),
    ):
        with pytest.raises(ValueError, match=f"^{name}"):
            ops.topk_gate(*arguments)
