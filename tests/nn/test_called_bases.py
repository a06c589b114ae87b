"""A layer calls its base: the base may keep its output, and a wrong output raises an error."""

import warnings

import pytest
import torch
from torch import nn

from moelora_kernels import (
    MoeLoraFFN,
    MoeLoraLinear,
    adapter_parameters,
)
from support.compare import assert_same, training_step
from support.ffns import GatedMlp
from support.linears import MING, make_layer
from support.quantised import (
    HIDDEN,
    IN,
    INNER,
    OUT,
    GptqLinear,
    ffn_formula,
    inputs,
    linear_formula,
    trained_parameters,
)


class Keeping(nn.Module):
    """A base whose output must not be changed in place.

    kind: "saved": backward needs the output. "view": the output is a view. "input": the output is
    x. "workspace": the base returns the same buffer again.
    """

    def __init__(self, kind, in_features=IN, out_features=OUT, dtype=torch.float32):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.linear = nn.Linear(in_features, out_features, dtype=dtype)
        self.kind, self.workspace = kind, None

    def forward(self, x):
        if self.kind == "input":
            return x
        y = self.linear(x)
        if self.kind == "saved":
            # tanh saves its output for backward.
            return y.tanh()
        if self.kind == "view":
            return torch.cat([y, y], dim=-1)[..., : self.out_features]
        self.workspace = y.detach().clone()
        return self.workspace


@pytest.mark.parametrize("impl", ("wide", "grouped", "reference"))
@pytest.mark.parametrize("kind", ("saved", "view", "input", "workspace"))
@pytest.mark.filterwarnings("ignore:base. .*without a gradient")
def test_the_output_of_a_base_is_not_changed(kind, impl):
    """A sum into it in place would change what the base saved, its buffer, or x."""
    base = Keeping(kind, OUT, OUT)
    layer = make_layer(base=base, impl=impl)
    x = torch.randn(2, 4, OUT)
    unchanged = x.clone()
    y = layer(x)
    assert torch.equal(x, unchanged)
    if kind == "workspace":
        assert torch.equal(base.workspace, base.linear(x))
        assert y.untyped_storage().data_ptr() != base.workspace.untyped_storage().data_ptr()
        return
    dy = torch.randn(2, 4, OUT)
    actual, expected = training_step(layer, x, dy), linear_formula(layer, x, dy)
    for name, tensor in expected.items():
        # float32 sums of at most 32 terms of size 1 against float64.
        torch.testing.assert_close(actual[name].double(), tensor, rtol=1e-5, atol=2e-5, msg=name)
    leaf = x.clone().requires_grad_()
    # The output of the layer may be changed in place, like that of nn.Linear.
    layer(leaf).add_(1.0).backward(dy)
    assert_same({"dx": leaf.grad}, {"dx": actual["dx"]})


@pytest.mark.parametrize("kind", ("saved", "view"))
def test_an_ffn_does_not_change_the_outputs_of_its_bases(kind):
    mlp = GatedMlp(HIDDEN, INNER)
    dtype = torch.float64
    mlp.gate_proj, mlp.up_proj = (Keeping(kind, HIDDEN, INNER, dtype) for _ in range(2))
    mlp.down_proj = Keeping("view", INNER, HIDDEN, dtype)
    # A MoeLoraFFN reads the bias of a down projection from `bias`, and Keeping has no `bias`.
    mlp.down_proj.linear.bias = None
    layer = MoeLoraFFN.from_mlp(mlp, num_experts=4, rank=2, top_k=2, adapter_dtype="float64")
    with torch.no_grad():
        for parameter in adapter_parameters(layer):
            parameter.normal_(std=0.2)
    x, dy = inputs(5, out_features=HIDDEN, dtype=dtype)
    actual = training_step(layer, x, dy)
    expected = training_step(layer, x, dy, forward=lambda leaf: ffn_formula(layer, leaf))
    assert_same(actual, expected, rtol=1e-10, atol=1e-9)


class WithoutGradient(GptqLinear):
    """A kernel for inference, whose output has no gradient."""

    def forward(self, x):
        with torch.no_grad():
            return super().forward(x)


def test_a_base_without_a_gradient_warns():
    """dx without the part of the base would be wrong, so the layer warns."""
    layer = make_layer(base=WithoutGradient(nn.Linear(IN, OUT)))
    x, dy = inputs(3)
    with pytest.warns(UserWarning, match=r"base: .*WithoutGradient.* without a gradient"):
        actual = training_step(layer, x, dy)
    expected = linear_formula(make_layer(base=GptqLinear(nn.Linear(IN, OUT))), x, dy)
    assert actual.keys() == expected.keys()
    assert all(actual[n].abs().sum() > 0 for n in trained_parameters(layer))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(x).sum().backward()
        with torch.no_grad():
            layer(x.requires_grad_())
        make_layer(base=GptqLinear(nn.Linear(IN, OUT)))(x).sum().backward()


class Returning(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.in_features, self.out_features, self.make = IN, OUT, make

    def forward(self, x):
        return self.make(x)


def test_a_wrong_output_of_a_base_is_named():
    """Megatron's linears return a pair, tensor parallel linears a part of y."""
    x = torch.randn(3, IN)
    for make, error, message in (
        (lambda x: (x[:, :OUT], None), TypeError, "float tensor, got .*tuple"),
        (lambda x: x[:, :OUT].long(), TypeError, "float tensor, got torch.int64"),
        (lambda x: x[:, : OUT // 2], ValueError, r"\[3, 32\], got \[3, 16\]"),
        (lambda x: x[:1, :OUT], ValueError, r"\[3, 32\], got \[1, 32\]"),
    ):
        with pytest.raises(error, match=rf"base: expected .*Returning.* to return .*{message}"):
            make_layer(base=Returning(make))(x)


def test_a_base_without_in_features_is_named():
    """Old GPTQ linears have infeatures and outfeatures: the error says what to set."""
    base = GptqLinear(nn.Linear(IN, OUT))
    base.infeatures, base.outfeatures = base.in_features, base.out_features
    del base.in_features, base.out_features
    with pytest.raises(TypeError, match=r"linear: expected a module with in_features, got .*Gptq"):
        MoeLoraLinear.from_linear(base, **MING)
    base.in_features, base.out_features = base.infeatures, base.outfeatures
    assert make_layer(base=base)(torch.randn(2, IN)).shape == (2, OUT)


def test_a_layer_over_a_base_without_a_weight_has_no_weight():
    layer = make_layer(base=GptqLinear(nn.Linear(IN, OUT, bias=False)))
    assert not hasattr(layer, "weight")
    with pytest.raises(AttributeError, match=r"MoeLoraLinear.* 'weight'"):
        layer.weight  # noqa: B018
    assert layer.bias is None


def test_under_autocast_the_base_decides_the_dtype():
    """The kernels of a base need not follow autocast. y has the dtype that the base returns."""
    layer = make_layer(base=GptqLinear(nn.Linear(IN, OUT)))
    x = torch.randn(3, IN)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.base_layer(x).dtype == layer(x).dtype == torch.float32
        dense = make_layer(base=nn.Linear(IN, OUT))
        assert dense(x).dtype == torch.bfloat16
