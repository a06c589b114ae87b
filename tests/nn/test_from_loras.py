"""MoeLoraLinear.from_loras: existing LoRAs become frozen experts, and give prototypes."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from moelora_kernels import (
    MoeLoraConfig,
    MoeLoraLinear,
    set_prototypes,
)
from moelora_kernels.nn import (
    PrototypeRouter,
    lora_prototypes,
)
from support.formulas.family import (
    IN,
    LORAS,
    OUT,
    Model,
)


class Calls(TorchDispatchMode):
    """Records the ops that run: their names and arguments."""

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops.append((func.name(), args))
        return func(*args, **(kwargs or {}))


def test_frozen_experts_compute_no_gradient_of_a_and_b():
    """Backward computes dx and the gradient of the gates, but neither dA nor dB."""
    model = Model("xlora", (2, 3), torch.float32)
    x = torch.randn(2, 3, IN, requires_grad=True)
    optimizer = torch.optim.AdamW(model.parameters())
    y = model(x)
    with Calls() as calls:
        y.sum().backward()
    backward = [args for name, args in calls.ops if name.endswith("::wide_backward")]
    assert [args[-1] for args in backward] == [False]
    optimizer.step()
    assert {id(q) for q in optimizer.state} == {id(q) for q in model.classifier.parameters()}
    assert x.grad.abs().max() > 0


def test_trained_parameters():
    """FlyLoRA freezes A; X-LoRA and Arrow freeze A and B, and have no other parameter."""

    def trained(layer):
        return {n for n, q in layer.named_parameters() if q.requires_grad}

    assert trained(MoeLoraLinear(IN, OUT, freeze="A", top_k=2)) == {"lora_B", "router.weight"}
    for preset, expected in (("flylora", {"lora_B"}), ("xlora", set()), ("arrow", set())):
        assert trained(MoeLoraLinear(IN, OUT, config=MoeLoraConfig.preset(preset))) == expected


def test_from_loras_is_the_sum_of_peft_loras():
    """y = W x + sum_e scale_e B_e A_e x, with scale alpha / r or alpha / sqrt(r)."""
    torch.manual_seed(0)
    linear = nn.Linear(IN, OUT)
    loras = [(torch.randn(r, IN), torch.randn(OUT, r), alpha) for r, alpha in LORAS]
    x = torch.randn(4, IN)
    for scaling, power in (("alpha/r", 1.0), ("alpha/sqrt(r)", 0.5)):
        layer = MoeLoraLinear.from_loras(linear, loras, router=None, scaling=scaling)
        expected = linear(x) + sum(
            alpha / len(a) ** power * (x @ a.t()) @ b.t() for a, b, alpha in loras
        )
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
        assert layer.config.num_experts == len(loras)


BAD_LORAS = [
    ("loras", [], {}),
    ("loras", [(torch.zeros(2, IN + 1), torch.zeros(OUT, 2), 1.0)], {}),
    ("loras", [(torch.zeros(2, IN), torch.zeros(OUT, 3), 1.0)], {}),
    ("loras", [(torch.zeros(0, IN), torch.zeros(OUT, 0), 1.0)], {}),
    ("loras", [(torch.zeros(IN), torch.zeros(OUT, 1), 1.0)], {}),
    ("scaling", [(torch.zeros(2, IN), torch.zeros(OUT, 2), 1.0)], dict(scaling="alpha/R")),
    ("share", [(torch.zeros(2, IN), torch.zeros(OUT, 2), 1.0)], dict(share="A")),
    (
        "shared_expert",
        [(torch.zeros(2, IN), torch.zeros(OUT, 2), 1.0)],
        dict(shared_expert="always"),
    ),
    ("init", [(torch.zeros(2, IN), torch.zeros(OUT, 2), 1.0)], dict(init="svd_segments")),
    ("top_k", [(torch.zeros(2, IN), torch.zeros(OUT, 2), 1.0)], dict(top_k=3)),
]


@pytest.mark.parametrize(("name", "loras", "options"), BAD_LORAS, ids=range(len(BAD_LORAS)))
def test_loras_that_do_not_fit_are_named(name, loras, options):
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        MoeLoraLinear.from_loras(nn.Linear(IN, OUT), loras, **options)


@pytest.mark.parametrize("ranks", ((2, 5, 3), (1,), (20, 4)), ids=str)
def test_prototypes_are_the_first_right_singular_vectors(ranks):
    """Equal up to the sign; also if r is larger than I and O."""
    torch.manual_seed(0)
    a, b = torch.randn(sum(ranks), IN), torch.randn(OUT, sum(ranks))
    actual = lora_prototypes(a, b, ranks)
    start = 0
    for v, rank in zip(actual, ranks, strict=True):
        block = slice(start, start + rank)
        start += rank
        truth = torch.linalg.svd(b[:, block].double() @ a[block].double()).Vh[0]
        # float32 rounds each of the 12 components.
        assert abs(float(v.double() @ truth)) == pytest.approx(1.0, abs=1e-6)
    assert actual.dtype == a.dtype


def test_the_prototype_of_a_new_expert_is_zero():
    """If B = 0, the prototype is zero, not an arbitrary singular vector."""
    assert not lora_prototypes(torch.randn(4, IN), torch.zeros(OUT, 4), (2, 2)).any()
    layer = MoeLoraLinear(IN, OUT, config=MoeLoraConfig.preset("arrow"))
    x = torch.randn(3, IN)
    assert torch.equal(layer(x), layer.base_layer(x))


def test_prototypes_of_experts_that_share_a():
    """The prototype of expert e comes from B_e A, with one A for all."""
    layer = MoeLoraLinear(IN, OUT, num_experts=3, rank=2, router="prototype", share="A")
    torch.nn.init.normal_(layer.lora_B)
    set_prototypes(layer)
    for e, actual in enumerate(layer.router.prototypes):
        delta = layer.lora_B[:, 2 * e : 2 * e + 2] @ layer.lora_A
        expected = torch.linalg.svd(delta).Vh[0]
        # Its sign is arbitrary.
        torch.testing.assert_close((actual @ expected).abs(), torch.ones(()))


def test_set_prototypes_updates_the_prototypes():
    model = Model("arrow", (2, 3), torch.float64)
    before = model.layer.router.prototypes.clone()
    with torch.no_grad():
        model.layer.lora_A.normal_()
    assert torch.equal(model.layer.router.prototypes, before)
    set_prototypes(model)
    assert not torch.equal(model.layer.router.prototypes, before)
    with pytest.raises(ValueError, match=r"^model: no layer with router='prototype'"):
        set_prototypes(nn.Linear(2, 2))


def test_a_prototype_router_under_a_selection_bias():
    layer = MoeLoraLinear(IN, OUT, router="prototype", num_experts=4, top_k=2, balance_rate=0.1)
    torch.nn.init.normal_(layer.lora_B)
    set_prototypes(layer)
    assert isinstance(layer.router.gate, PrototypeRouter)
    assert layer.router.gate.prototypes.any()
