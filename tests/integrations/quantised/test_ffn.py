"""Whole-FFN experts over a quantised MLP compute their formula."""

import pytest
import torch

from moelora_kernels import (
    MoeLoraFFN,
    adapter_parameters,
)
from support.compare import training_step
from support.ffns import GatedMlp
from support.quantised import HIDDEN, INNER, KINDS, ffn_formula, inputs, make_base, quantised_mlp

pytestmark = pytest.mark.filterwarnings(
    "ignore:MatMul8bitLt", "ignore:.*deprecated:DeprecationWarning"
)


@pytest.mark.parametrize("kind", KINDS)
def test_ffn_over_a_quantised_mlp(kind):
    torch.manual_seed(0)
    options = dict(num_experts=4, rank=(1, 2, 3, 2), alpha=3.0, top_k=2)
    mlp = quantised_mlp(kind)
    layer = MoeLoraFFN.from_mlp(mlp, **options)
    assert {p.dtype for p in adapter_parameters(layer)} == {torch.float32}
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.3)
    x, dy = inputs(6, out_features=HIDDEN)
    actual = training_step(layer, x, dy.half() if kind == "gptq_fp16" else dy)
    expected = training_step(layer, x, dy, forward=lambda leaf: ffn_formula(layer, leaf))
    assert actual.keys() == expected.keys()
    # The layer calls down_proj once on the weighted sum, the formula once per expert. So a base of
    # 16 or 8 bits rounds different tensors. The others differ by float32 sums.
    steps = {"bnb_4bit_bf16": 2**-8, "gptq_fp16": 2**-9, "bnb_8bit": 2**-6}
    for name, tensor in expected.items():
        largest = tensor.abs().max().item()
        limit = (4 * steps[kind] if kind in steps else 2e-5) * max(largest, 1.0)
        torch.testing.assert_close(actual[name].float(), tensor, rtol=0, atol=limit, msg=name)


def test_an_ffn_computes_in_the_dtype_of_x():
    """The experts and the activation are float32, also over bases that return fp16."""
    mlp = GatedMlp(HIDDEN, INNER)
    for name, kind in (("gate_proj", "gptq_fp16"), ("up_proj", "gptq_fp16"), ("down_proj", "gptq")):
        old = getattr(mlp, name)
        setattr(mlp, name, make_base(kind, old.in_features, old.out_features))
    layer = MoeLoraFFN.from_mlp(mlp, num_experts=4, rank=2, top_k=2)
    with torch.no_grad():
        for parameter in adapter_parameters(layer):
            parameter.normal_(std=0.1)
    x, dy = inputs(5, out_features=HIDDEN)
    actual = training_step(layer, x, dy)["y"]
    expected = training_step(layer, x, dy, forward=lambda leaf: ffn_formula(layer, leaf))["y"]
    # float32 sums of at most 96 terms. One rounding to fp16 would be 5e-4 of the largest.
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())
