"""The Triton kernels against the reference: on the GPU where there is one, else interpreted."""

from __future__ import annotations

import pytest
import torch

from moelora_kernels import reference
from moelora_kernels.kernels import (
    dropout,
    shrink_dx,
    shrink_gate,
    shrink_gate_backward,
    topk_gate,
    weight_grad,
)
from moelora_kernels.kernels.common import launcher
from moelora_kernels.types import NO_ROUTER, Dropout, Gate, Mixture
from support.op_cases import CASES, DTYPES, Case, Inputs, compare, forward_of
from support.op_cases import KERNEL_DEVICE as DEVICE
from support.selection import default_cases, exhaustive

HALF_AND_FLOAT = {name: dtype for name, dtype in DTYPES.items() if name != "fp64"}
each_dtype = pytest.mark.parametrize("dtype", HALF_AND_FLOAT.values(), ids=HALF_AND_FLOAT)
# In every dtype, and in float16 all others but the slowest: a dtype takes other casts and products,
# and no other addresses.
EVERY_DTYPE = ("plain", "float32_adapters")
SLOWEST = ("long", "many_experts", "rows_int64", "siblings_sparse")
each_case_and_dtype = pytest.mark.parametrize(
    ("case", "dtype"),
    [
        pytest.param(
            CASES[case],
            dtype,
            id=f"{case}-{name}",
            marks=()
            if case in EVERY_DTYPE or (name == "fp16" and case not in SLOWEST)
            else exhaustive,
        )
        for name, dtype in HALF_AND_FLOAT.items()
        for case in CASES
    ],
)


def split_of(launch, split):
    return lambda *arguments: launch(*arguments, split=split)


@each_case_and_dtype
def test_shrink_gate(case: Case, dtype: torch.dtype) -> None:
    arguments = Inputs(case, dtype).to(DEVICE).shrink()
    names = "h u weights indices logits"
    for split in (1, 3):
        compare(names, split_of(shrink_gate.launch, split), reference.shrink_gate, arguments, dtype)


@each_case_and_dtype
def test_shrink_gate_backward(case: Case, dtype: torch.dtype) -> None:
    inputs = Inputs(case, dtype).to(DEVICE)
    arguments = inputs.backward(forward_of(inputs))
    for split in (1, 3):
        compare(
            "dh u dgate",
            split_of(shrink_gate_backward.launch, split),
            reference.shrink_gate_backward,
            arguments,
            dtype,
        )


@each_case_and_dtype
def test_gram_and_shrink_dx(case: Case, dtype: torch.dtype) -> None:
    if case.share_a:
        case = case._replace(dropout=0.0)
    inputs = Inputs(case, dtype).to(DEVICE)
    forward = forward_of(inputs)
    back = reference.shrink_gate_backward(*inputs.backward(forward))
    arguments = inputs.weight_grad(forward, back)
    for split in (1, 3):
        compare(
            "da drouter dbias db",
            split_of(weight_grad.launch, split),
            reference.weight_grad,
            arguments,
            dtype,
        )
    compare("dx", shrink_dx.launch, reference.shrink_dx, inputs.shrink_dx(back), dtype)


@pytest.mark.parametrize("renormalize", (True, False))
@pytest.mark.parametrize("top_k", (1, 3, 7))
@each_dtype
def test_topk_gate(dtype: torch.dtype, top_k: int, renormalize: bool) -> None:
    logits = torch.randn(101, 7, dtype=torch.float64).to(DEVICE, dtype)
    arguments = [logits, top_k, renormalize, 0.8]
    compare("weights indices", topk_gate.launch, reference.topk_gate, arguments, dtype)
    weights, indices = reference.topk_gate(*arguments)
    arguments = [torch.randn_like(weights), weights, indices, logits, renormalize, 0.8]
    compare(
        "dlogits",
        lambda *given: [topk_gate.launch_backward(*given)],
        lambda *given: [reference.topk_gate_backward(*given)],
        arguments,
        dtype,
    )


@pytest.mark.parametrize("shape", ((0, 5), (1, 1), (3, 7), (129, 131)))
@pytest.mark.parametrize("p", default_cases((0.0, 0.1, 0.999), 0.1))
@each_dtype
def test_dropout_is_the_reference_bit_by_bit(dtype: torch.dtype, p: float, shape) -> None:
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    # Triton's interpreter cuts a float32 down to bfloat16 where a GPU rounds it.
    ulp = 2**-7 if launcher.INTERPRET and dtype == torch.bfloat16 else 0.0
    for seed in (0, -1, 2**62 + 12345):
        for stream in (0, 3):
            arguments = (x, p, torch.tensor([seed]), stream)
            # On a GPU torch divides by a number by multiplying with its reciprocal.
            expected = reference.dropout(*arguments)
            found = dropout.launch(x.to(DEVICE), p, arguments[2].to(DEVICE), stream).cpu()
            torch.testing.assert_close(found, expected, rtol=ulp, atol=0.0)


def test_the_smallest_word_that_is_kept() -> None:
    """An element is kept where its word is at least p 2^32: found by halving, for one element."""
    x, seed = torch.ones(1, 1), torch.tensor([3])
    low, high = 0, 2**32
    while high - low > 1:
        middle = (low + high) // 2
        kept = reference.dropout(x, middle / 2**32, seed).item() != 0
        low, high = (middle, high) if kept else (low, middle)
    x, seed = x.to(DEVICE), seed.to(DEVICE)
    assert dropout.launch(x, low / 2**32, seed, 0).item() != 0
    assert dropout.launch(x, high / 2**32, seed, 0).item() == 0
    # The mask inside another kernel is the same.
    weight = torch.ones(1, 1, device=DEVICE)
    gate = torch.ones(1, 1, device=DEVICE)
    for p, expected in ((low / 2**32, True), (high / 2**32, False)):
        h, *_ = shrink_gate.launch(
            x, [weight], NO_ROUTER, Gate(gate), Mixture((1,), (1.0,)), Dropout(p, False, seed)
        )
        assert (h.item() != 0) == expected
