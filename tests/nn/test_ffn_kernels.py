"""A whole MoeLoraFFN on the Triton kernels, forward and backward: router to down, on a CPU.

Interpreted in float16, and as the PTX of sm_90 in bfloat16. The reference computes the same layer
in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from moelora_kernels import MoeLoraFFN, dispatch
from moelora_kernels.kernels.common import launcher
from moelora_kernels.testing import assert_within_budget
from support.backends import SM_90, TRITON, Backend, each_backend, needs_triton
from support.compare import training_step
from support.ffns import GatedMlp, make_ffn
from support.kernels_on_cpu import kernels_on_cpu

pytestmark = [
    needs_triton,
    pytest.mark.skipif(not launcher.INTERPRET, reason="needs Triton's interpreter"),
]
# T is prime, and no width is a multiple of a tile. Expert 5 gets no token.
TOKENS, EMPTY = 29, 5
# name -> options of the layer; the comment says what it would catch.
CASES = MappingProxyType(
    {
        "plain": dict(rank=2),
        # A mask of every pair, made again in backward from its seed.
        "dropout": dict(rank=2, dropout=0.25),
        "dropout_per_expert": dict(rank=2, dropout=0.25, dropout_mask="per_expert"),
        # Addresses of single elements; a table of ranks.
        "mixed_ranks": dict(rank=(1, 2, 3, 5, 8, 1, 2, 3), adapter_dtype="float32"),
        # The most columns of rank space that a tile holds.
        "R=128": dict(rank=16),
    }
)


def make_layer(dtype: torch.dtype, hidden: int = 40, inner: int = 72, **options: Any) -> MoeLoraFFN:
    """Return a layer in training with 8 experts, of which expert EMPTY has no token."""
    mlp = GatedMlp(hidden, inner).to(dtype)
    layer = make_ffn(dtype, mlp, **{"num_experts": 8, "top_k": 2, "router_bias": True, **options})
    with torch.no_grad():
        layer.router.bias[EMPTY] = -100
    return layer.train()


@contextmanager
def on_kernels(backend: Backend) -> Iterator[list[str]]:
    """Run the ops and the choice of the formulation as on a GPU. Yield the names of the kernels."""
    choose, launched = dispatch.choose_ffn, []
    with ExitStack() as stack:
        stack.enter_context(kernels_on_cpu(plans=False))
        if backend.ptx:
            from ptx.launcher import executed

            stack.enter_context(executed(backend.ptx, copies="late"))
        run = launcher.run

        def watched(kernel, *arguments):
            launched.append(kernel.fn.__name__.removesuffix("_kernel"))
            return run(kernel, *arguments)

        rule = lambda _, **sizes: choose("cuda", **sizes)  # noqa: E731
        stack.enter_context(mock.patch.object(dispatch, "choose_ffn", rule))
        stack.enter_context(mock.patch.object(launcher, "run", watched))
        yield launched


def reference_step(layer: MoeLoraFFN, x: Tensor, dy: Tensor, dtype: torch.dtype) -> dict:
    reference = copy.deepcopy(layer).to(dtype)
    reference.config = layer.config.replace(impl="reference", adapter_dtype=None)
    return training_step(reference, x.to(dtype), dy.to(dtype))


def check(layer: MoeLoraFFN, x: Tensor, dy: Tensor, backend: Backend) -> dict[str, Tensor]:
    """Return the step of the layer on the kernels, which is within its budget."""
    with on_kernels(backend) as launched:
        actual = training_step(layer, x, dy)
    assert {"ffn_inner", "ffn_inner_backward", "ffn_inner_weight_grad"} <= {*launched}
    assert {"router_logits", "grouped_shrink", "grouped_expand", "router_grad"} <= {*launched}
    expected = reference_step(layer, x, dy, torch.float64)
    assert actual.keys() == expected.keys()
    assert_within_budget(actual, expected, reference_step(layer, x, dy, x.dtype), x.dtype)
    return actual


@each_backend(TRITON, SM_90)
@pytest.mark.parametrize("name", CASES)
def test_a_layer_on_the_kernels_is_the_reference(name: str, backend: Backend) -> None:
    # The interpreter computes bfloat16 wrongly.
    dtype = torch.bfloat16 if backend.ptx else torch.float16
    layer = make_layer(dtype, **CASES[name])
    x, dy = (torch.randn(TOKENS, 40).to(dtype) for _ in range(2))
    actual = check(layer, x, dy, backend)
    # An expert without tokens has gradients of exactly zero.
    columns = sum(layer.config.ranks()[:EMPTY]), sum(layer.config.ranks()[: EMPTY + 1])
    for gradient, dimension in (
        ("gate_lora_A", 0), ("gate_lora_B", 1), ("up_lora_A", 0), ("up_lora_B", 1),
        ("down_lora_A", 0), ("down_lora_B", 1), ("router.weight", 0),
    ):  # fmt: skip
        first, end = (EMPTY, EMPTY + 1) if gradient.startswith("router") else columns
        of_expert = actual[gradient].narrow(dimension, first, end - first)
        assert (of_expert == 0).all(), gradient
        assert actual[gradient].any(), gradient
