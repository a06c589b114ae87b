"""The native CPU library against the reference: every op on every form of the gate."""

from __future__ import annotations

import pytest
import torch

from moelora_kernels import ops, reference
from support.op_cases import CASES, DTYPES, Case, Inputs, compare, forward_of, needs_library


@needs_library
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_op_shrink_gate(case: Case, dtype: torch.dtype) -> None:
    arguments = Inputs(case, dtype).shrink()
    names = "h u weights experts logits"
    compare(names, ops.shrink_gate, reference.shrink_gate, arguments, dtype)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_op_shrink_gate_backward(case: Case, dtype: torch.dtype) -> None:
    inputs = Inputs(case, dtype)
    arguments = inputs.backward(forward_of(inputs))
    compare(
        "dh u dgate", ops.shrink_gate_backward, reference.shrink_gate_backward, arguments, dtype
    )


@needs_library
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_op_gram_and_shrink_dx(case: Case, dtype: torch.dtype) -> None:
    if case.share_a:
        case = case._replace(dropout=0.0)
    inputs = Inputs(case, dtype)
    forward = forward_of(inputs)
    back = reference.shrink_gate_backward(*inputs.backward(forward))
    arguments = inputs.weight_grad(forward, back)
    compare("da drouter dbias db", ops.weight_grad, reference.weight_grad, arguments, dtype)
    compare("dx", ops.shrink_dx, reference.shrink_dx, inputs.shrink_dx(back), dtype)


@needs_library
@pytest.mark.parametrize("renormalize", (True, False))
@pytest.mark.parametrize("top_k", (1, 3, 7))
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_op_topk_gate(dtype: torch.dtype, top_k: int, renormalize: bool) -> None:
    logits = torch.randn(101, 7, dtype=torch.float64).to(dtype)
    arguments = [logits, top_k, renormalize, 0.8]
    compare("weights indices", ops.topk_gate, reference.topk_gate, arguments, dtype)
    weights, indices = reference.topk_gate(*arguments)
    arguments = [torch.randn_like(weights), weights, indices, logits, renormalize, 0.8]
    compare(
        "dlogits",
        lambda *given: [ops.topk_gate_backward(*given)],
        lambda *given: [reference.topk_gate_backward(*given)],
        arguments,
        dtype,
    )


@needs_library
@pytest.mark.parametrize("shape", ((0, 5), (1, 1), (3, 7), (129, 131)))
@pytest.mark.parametrize("p", (0.0, 0.1, 0.5, 0.999))
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_op_dropout_is_bitwise_the_reference(
    dtype: torch.dtype, p: float, shape: tuple[int, int]
) -> None:
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    for seed in (0, -1, 2**62 + 12345):
        for stream in (0, 3):
            arguments = (x, p, torch.tensor([seed]), stream)
            assert torch.equal(ops.dropout(*arguments), reference.dropout(*arguments))
    strided = torch.randn(shape[1], shape[0], dtype=torch.float64).to(dtype).t()
    arguments = (strided, p, torch.tensor([7]), 0)
    assert torch.equal(ops.dropout(*arguments), reference.dropout(*arguments))


@needs_library
def test_dropout_drops_a_nan() -> None:
    x = torch.full((64, 64), torch.nan)
    dropped = ops.dropout(x, 0.5, torch.tensor([1]), 0)
    expected = reference.dropout(x, 0.5, torch.tensor([1]), 0)
    assert torch.equal(dropped.isnan(), expected.isnan())
    assert (dropped[~dropped.isnan()] == 0).all()
