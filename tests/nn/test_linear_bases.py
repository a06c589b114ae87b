"""MoeLoraLinear over a base: plain, or with hooks, a patched forward, a subclass, packed codes."""

import pytest
import torch
from torch import nn

from moelora_kernels import MoeLoraLinear, adapter_parameters
from support.compare import assert_same, training_step
from support.linears import IN, MING, OUT, PackedLinear, make_layer


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize(
    "dtype", (torch.float64, torch.float32, torch.bfloat16, torch.float16), ids=str
)
def test_a_new_layer_is_its_base(dtype, bias):
    """B = 0, so training starts from the frozen model, for any A and router."""
    torch.manual_seed(0)
    layer = MoeLoraLinear(IN, OUT, bias, dtype=dtype, **MING)
    x = torch.randn(7, IN, dtype=dtype)
    expected = nn.functional.linear(x.double(), layer.weight.double(), None)
    expected = expected + layer.bias.double() if bias else expected
    # Two roundings: the sum may be rounded to the dtype of y twice.
    band = 2 * torch.finfo(dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(layer(x).double(), expected, rtol=0, atol=band)
    assert (layer.bias is None) == (not bias)
    assert layer(x).dtype == dtype


@pytest.mark.parametrize("training", (True, False))
def test_from_linear_keeps_the_module(training):
    """Tied weights, offload hooks and quantisation state belong to the module object."""
    base = nn.Linear(IN, OUT).train(training)
    layer = MoeLoraLinear.from_linear(base, **MING)
    assert layer.base_layer is base
    assert layer.weight is base.weight
    assert not any(q.requires_grad for q in base.parameters())
    assert {m.training for m in layer.modules()} == {training}
    names = [n for n, q in layer.named_parameters() if q.requires_grad]
    assert names == ["lora_A", "lora_B", "router.weight", "router.bias"]


def test_from_linear_needs_a_linear():
    with pytest.raises(TypeError, match=r"linear: .*in_features.*LayerNorm"):
        MoeLoraLinear.from_linear(nn.LayerNorm(4), **MING)


@pytest.mark.parametrize("config", ("ming", dict(rank=4)), ids=str)
def test_a_bad_config_is_named(config):
    with pytest.raises(TypeError, match="config: expected a MoeLoraConfig, got "):
        MoeLoraLinear(IN, OUT, config=config)


class Doubling(nn.Linear):
    """A subclass with another forward. A product with its weight would miss the factor 2."""

    def forward(self, x):
        return 2.0 * super().forward(x)


def changed_base(kind):
    base = nn.Linear(IN, OUT, dtype=torch.float64)
    if kind == "forward":
        base.register_forward_hook(lambda module, args, y: 2.0 * y)
    elif kind == "pre":
        base.register_forward_pre_hook(lambda module, args: (2.0 * args[0],))
    elif kind == "patched":
        # accelerate and some LoRA tools replace forward on the instance.
        plain = base.forward
        base.forward = lambda x: 2.0 * plain(x)
    elif kind == "parametrized":
        nn.utils.parametrize.register_parametrization(base, "weight", Twice())
    elif kind == "subclass":
        return Doubling(IN, OUT, dtype=torch.float64)
    elif kind == "packed":
        return PackedLinear(base)
    return base


class Twice(nn.Module):
    def forward(self, weight):
        return 2.0 * weight


@pytest.mark.parametrize(
    "kind", ("forward", "pre", "patched", "parametrized", "subclass", "packed")
)
def test_a_base_that_is_more_than_a_weight_is_called(kind):
    """The layer adds its experts to the base's output, and their dx to the base's dx."""
    base = changed_base(kind)
    layer = make_layer(base=base, adapter_dtype="float64")
    bare = make_layer(base=nn.Linear(IN, OUT, dtype=torch.float64))
    bare.load_state_dict({**bare.state_dict(), **adapter_state(layer)})
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    dy = torch.randn(2, 3, OUT, dtype=torch.float64)
    actual = training_step(layer, x, dy)

    leaf = x.clone().requires_grad_()
    base_y = base(leaf)
    (base_dx,) = torch.autograd.grad(base_y, leaf, dy)
    without = training_step(bare, x, dy)
    plain = nn.functional.linear(x, bare.weight, bare.bias)
    expected = dict(without, y=without["y"] - plain + base_y.detach())
    expected["dx"] = without["dx"] - dy @ bare.weight + base_dx
    assert_same(actual, expected, rtol=1e-12, atol=1e-12)


def adapter_state(layer):
    return {k: v for k, v in layer.state_dict().items() if not k.startswith("base_layer.")}


def test_adapters_over_a_packed_base_are_float32():
    """A and B cannot be int8. y has the dtype that the base returns."""
    base = PackedLinear(nn.Linear(IN, OUT)).to(torch.bfloat16)
    layer = MoeLoraLinear.from_linear(base, **MING)
    assert {q.dtype for q in adapter_parameters(layer)} == {torch.float32}
    x = torch.randn(3, IN, dtype=torch.bfloat16)
    assert layer(x).dtype == torch.bfloat16


def test_a_called_base_compiles():
    """torch.compile traces the forward of the base."""
    layer = make_layer(base=changed_base("packed"), adapter_dtype="float64")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, IN, dtype=torch.float64)
    assert_same(
        training_step(layer, x, forward=compiled), training_step(layer, x), rtol=1e-11, atol=1e-11
    )
