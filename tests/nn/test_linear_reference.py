"""Does a layer match the reference, for every gate, dtype and base, in both formulations?"""

from __future__ import annotations

import copy

import pytest
import torch

from moelora_kernels import MoeLoraGroup
from moelora_kernels.testing import assert_within_budget
from support.compare import training_step
from support.linears import IN, make_layer

GATES = {
    # name -> options
    "linear": dict(router_bias=False),
    "linear with bias": {},
    "softmax before top-k": dict(normalize="none", temperature=0.7),
    "raw logits": dict(score="identity", normalize="softmax"),
    "mlp": dict(router="mlp"),
    "shared expert": dict(shared_expert="always", shared_rank=5),
    "shared expert with the rest": dict(shared_expert="complement"),
    "ranks that differ": dict(rank=(1, 3, 2, 7)),
    "rank 1": dict(rank=1, top_k=3),
    "dropout": dict(dropout=0.3),
    "dropout per expert": dict(dropout=0.3, dropout_mask="per_expert", router="mlp"),
}
FORMS = {
    # name -> dtype of x and base, dtype of the adapters, autocast
    "fp32": (torch.float32, None, False),
    "bf16": (torch.bfloat16, None, False),
    "fp16": (torch.float16, None, False),
    "bf16, adapters fp32": (torch.bfloat16, "float32", False),
    "autocast": (torch.float32, None, True),
}


def reference_copy(layer):
    """Return a copy of the layer with impl="reference"."""
    plain = copy.deepcopy(layer)
    for module in (plain, *plain.modules()):
        if hasattr(module, "config"):
            module.config = module.config.replace(impl="reference")
    return plain


def keep_apart(layer, x, least=0.05):
    """Return the tokens of x whose logits differ by more than `least`.

    The other tokens could get other experts by the rounding of a 16-bit router.
    """
    with torch.no_grad():
        logits = copy.deepcopy(layer).double().router(x.double())
    gaps = logits.sort(dim=1).values.diff(dim=1).amin(dim=1)
    clear = x[gaps > least]
    assert len(clear) > 20
    return clear


def assert_layer(layer, x, dtype, autocast=False):
    """Assert that y and the gradients match the float64 reference within the budget of dtype."""
    x, plain = keep_apart(layer, x), reference_copy(layer)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        actual, baseline = training_step(layer, x), training_step(plain, x)
    truth = training_step(plain.double(), x.double())
    low = torch.bfloat16 if autocast else dtype
    assert_within_budget(actual, truth, baseline, low)


def random_x(dtype, tokens=80):
    return torch.randn(tokens, IN).bfloat16().to(dtype)


def layer_in(form, **options):
    """Return a layer in a form of FORMS. bfloat16 holds its parameters, so no cast rounds them."""
    dtype, adapters, _ = FORMS[form]
    layer = make_layer(torch.bfloat16, **options).to(dtype)
    if adapters is not None:
        base = layer.base_layer
        layer = layer.float()
        layer.base_layer = base.to(dtype)
    return layer


@pytest.mark.parametrize("impl", ("wide", "grouped"))
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", GATES)
def test_every_gate_is_the_reference(name, form, impl):
    layer = layer_in(form, impl=impl, **GATES[name])
    assert_layer(layer, random_x(FORMS[form][0]), FORMS[form][0], FORMS[form][2])


@pytest.mark.parametrize("impl", ("wide", "grouped"))
@pytest.mark.parametrize("form", FORMS)
def test_a_called_base(form, impl):
    """A base with a hook is called, and the experts are added to its output."""
    layer = layer_in(form, impl=impl)
    calls = []
    layer.base_layer.register_forward_hook(lambda *arguments: calls.append(1))
    assert_layer(layer, random_x(FORMS[form][0]), FORMS[form][0], FORMS[form][2])
    assert calls


@pytest.mark.parametrize("impl", ("wide", "grouped"))
@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_three_siblings_of_different_widths(dtype, bias, impl):
    """Each sibling has its own router."""
    layers = {}
    for seed, (name, width) in enumerate({"q": 10, "k": 3, "v": 17}.items()):
        base = torch.nn.Linear(IN, width, bias=bias, dtype=dtype)
        layers[name] = make_layer(base=base, seed=seed, impl=impl)
    group, x = MoeLoraGroup(**layers), random_x(dtype)
    y_all = training_step(group, x, forward=lambda leaf: torch.cat(group(leaf), dim=1))
    plain = reference_copy(group)
    truth = copy.deepcopy(plain).double()
    for layer in layers.values():
        x = keep_apart(layer, x, 0.01)
    steps = [
        training_step(g, x.to(d), forward=lambda leaf, g=g: torch.cat(g(leaf), dim=1))
        for g, d in ((group, dtype), (truth, torch.float64), (plain, dtype))
    ]
    assert_within_budget(*steps, dtype)
    assert y_all["y"].shape == (80, 30)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", ("linear", "mlp", "ranks that differ", "softmax before top-k"))
def test_every_gate_on_a_gpu(name, dtype):
    """y and the gradients match float64."""
    from support.gpu_cases import assert_module_within_budget, make_layer

    layer = make_layer(dtype=dtype, impl="grouped", **{"top_k": 2, "rank": 16, **widths(name)})
    x = torch.randn(300, 512, device="cuda").to(dtype)
    dy = torch.randn(300, 768, device="cuda").to(dtype)
    assert_module_within_budget(layer, x, lambda y: y.backward(dy), dtype)


def widths(name):
    """Return the options of a gate of GATES for eight experts."""
    options = dict(GATES[name])
    return options | ({"rank": (16, 4) * 4} if "rank" in options else {})
