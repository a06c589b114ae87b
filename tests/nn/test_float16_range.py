"""h = x At is stored in x's dtype: in float16 it ends at 65504, in every implementation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moelora_kernels import MoeLoraLinear

IMPLS = ("reference", "wide", "grouped")


def make_layer(impl, dtype, a):
    """Return a layer whose every h is 6400 a for an x of 100."""
    layer = MoeLoraLinear(
        64, 8, num_experts=4, rank=2, top_k=2, adapter_dtype="float32", dtype=dtype, impl=impl,
        scaling=1.0,
    )  # fmt: skip
    nn.init.constant_(layer.lora_A, a)
    nn.init.constant_(layer.lora_B, 1e-3)
    return layer


def output(layer, dtype):
    return layer(torch.full((3, 64), 100.0, dtype=dtype))


@pytest.mark.parametrize("impl", IMPLS)
def test_the_end_of_the_range(impl):
    assert output(make_layer(impl, torch.float16, 10.0), torch.float16).isfinite().all()
    assert output(make_layer(impl, torch.float16, 10.5), torch.float16).isinf().all()
    assert output(make_layer(impl, torch.bfloat16, 10.5), torch.bfloat16).isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_smaller_a_and_a_larger_b_give_the_same_y(impl):
    layer = make_layer(impl, torch.float16, 10.5)
    with torch.no_grad():
        layer.lora_A /= 16
        layer.lora_B *= 16
    base = layer.base_layer(torch.full((3, 64), 100.0, dtype=torch.float16)).float()
    # Two experts of rank 2 with gates that sum to 1: y - base = 2 h B.
    assert (output(layer, torch.float16).float() - base - 134.4).abs().max() < 1.0
