"""What may a base do that a layer calls, and which errors name a bad one?"""

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
    """A base that needs its output, or its buffer, unchanged after it has returned it."""

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
def test_the_output_of_a_base_is_left_as_it_is(kind, impl):
    """In-place sums into it would spoil what the base saved, its buffer, or x itself."""
    base = Keeping(kind, OUT, OUT)
    layer = make_layer(base=base, impl=impl)
    x = torch.randn(2, 4, OUT)
    given = x.clone()
    y = layer(x)
    assert torch.equal(x, given)
    if kind == "workspace":
        assert torch.equal(base.workspace, base.linear(x))
        assert y.untyped_storage().data_ptr() != base.workspace.untyped_storage().data_ptr()
        return
    dy = torch.randn(2, 4, OUT)
    found, expected = training_step(layer, x, dy), linear_formula(layer, x, dy)
    for name, want in expected.items():
        # float32 sums of at most 32 terms of size 1 against float64.
        torch.testing.assert_close(found[name].double(), want, rtol=1e-5, atol=2e-5, msg=name)
    leaf = x.clone().requires_grad_()
    # And the layer's own output may be changed, as that of nn.Linear may.
    layer(leaf).add_(1.0).backward(dy)
    assert_same({"dx": leaf.grad}, {"dx": found["dx"]})


@pytest.mark.parametrize("kind", ("saved", "view"))
def test_an_ffn_leaves_the_outputs_of_its_bases(kind):
    mlp = GatedMlp(HIDDEN, INNER)
    dtype = torch.float64
    mlp.gate_proj, mlp.up_proj = (Keeping(kind, HIDDEN, INNER, dtype) for _ in range(2))
    mlp.down_proj = Keeping("view", INNER, HIDDEN, dtype)
    # The offset of a down projection must be in its `bias`; this one has none.
    mlp.down_proj.linear.bias = None
    layer = MoeLoraFFN.from_mlp(mlp, num_experts=4, rank=2, top_k=2, adapter_dtype="float64")
    with torch.no_grad():
        for parameter in adapter_parameters(layer):
            parameter.normal_(std=0.2)
    x, dy = inputs(5, out_features=HIDDEN, dtype=dtype)
    found = training_step(layer, x, dy)
    expected = training_step(layer, x, dy, forward=lambda leaf: ffn_formula(layer, leaf))
    assert_same(found, expected, rtol=1e-10, atol=1e-9)


class WithoutGradient(GptqLinear):
    """A kernel for inference: no gradient comes back through it."""

    def forward(self, x):
        with torch.no_grad():
            return super().forward(x)


def test_a_lost_gradient_is_named():
    """dx without the base's part would train the layers below wrongly, without a word."""
    layer = make_layer(base=WithoutGradient(nn.Linear(IN, OUT)))
    x, dy = inputs(3)
    with pytest.warns(UserWarning, match=r"base: .*WithoutGradient.* without a gradient"):
        found = training_step(layer, x, dy)
    truth = linear_formula(make_layer(base=GptqLinear(nn.Linear(IN, OUT))), x, dy)
    assert found.keys() == truth.keys()
    assert all(found[n].abs().sum() > 0 for n in trained_parameters(layer))
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


def test_what_a_base_returns_is_checked():
    """Megatron's linears return a pair, tensor parallel ones a part; integers are no output."""
    x = torch.randn(3, IN)
    for make, error, message in (
        (lambda x: (x[:, :OUT], None), TypeError, "float tensor, got .*tuple"),
        (lambda x: x[:, :OUT].long(), TypeError, "float tensor, got torch.int64"),
        (lambda x: x[:, : OUT // 2], ValueError, r"\[3, 32\], got \[3, 16\]"),
        (lambda x: x[:1, :OUT], ValueError, r"\[3, 32\], got \[1, 32\]"),
    ):
        with pytest.raises(error, match=rf"base: expected .*Returning.* to return .*{message}"):
            make_layer(base=Returning(make))(x)


def test_sizes_go_by_the_names_of_nn_linear():
    """Old GPTQ linears call them infeatures and outfeatures: named, and taken once they are set."""
    base = GptqLinear(nn.Linear(IN, OUT))
    base.infeatures, base.outfeatures = base.in_features, base.out_features
    del base.in_features, base.out_features
    with pytest.raises(TypeError, match=r"linear: expected a module with in_features, got .*Gptq"):
        MoeLoraLinear.from_linear(base, **MING)
    base.in_features, base.out_features = base.infeatures, base.outfeatures
    assert make_layer(base=base)(torch.randn(2, IN)).shape == (2, OUT)


def test_a_base_without_a_weight_has_none():
    layer = make_layer(base=GptqLinear(nn.Linear(IN, OUT, bias=False)))
    assert not hasattr(layer, "weight")
    with pytest.raises(AttributeError, match=r"MoeLoraLinear.* 'weight'"):
        layer.weight  # noqa: B018
    assert layer.bias is None


def test_autocast_leaves_the_dtype_to_the_base():
    """A base with kernels of its own need not follow autocast: y is what it returns."""
    layer = make_layer(base=GptqLinear(nn.Linear(IN, OUT)))
    x = torch.randn(3, IN)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.base_layer(x).dtype == layer(x).dtype == torch.float32
        dense = make_layer(base=nn.Linear(IN, OUT))
        assert dense(x).dtype == torch.bfloat16
