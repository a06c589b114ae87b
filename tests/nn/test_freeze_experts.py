"""freeze_experts: frozen experts get zero gradients and keep their values, all others train."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moelora_kernels import (
    MoeLoraAdapter,
    MoeLoraConfig,
    MoeLoraGroup,
    freeze_experts,
    link_siblings,
    load_adapter,
    replace_linears,
    save_adapter,
    set_tasks,
    update_balance,
)
from moelora_kernels.autograd.ffn import TORCH
from support.compare import assert_same, backward_step
from support.copies import COPIERS
from support.ffns import HIDDEN, make_ffn
from support.linears import IN, make_layer, randomise
from support.siblings import NAMES, Attention, random_x

RANKS = (1, 3, 2, 4)
LAYERS = {
    "wide": dict(impl="wide"),
    "wide ranks": dict(impl="wide", rank=RANKS),
    "grouped": dict(impl="grouped"),
    "grouped ranks": dict(impl="grouped", rank=RANKS),
    "reference": dict(impl="reference", rank=RANKS),
    "dropout": dict(impl="grouped", dropout=0.4, dropout_mask="per_expert"),
    "wide dropout": dict(impl="wide", dropout=0.4, top_k=None),
    "sqrt": dict(impl="wide", grad_gate="sqrt"),
    "sqrt grouped": dict(impl="grouped", grad_gate="sqrt"),
    "sqrt reference": dict(impl="reference", grad_gate="sqrt"),
    "shared": dict(impl="wide", shared_expert="always"),
    "shared A": dict(impl="wide", share="A", freeze="A"),
    "shared A reference": dict(impl="reference", share="A", freeze="A"),
    "softmax first": dict(impl="grouped", normalize="none"),
    "sequence": dict(impl="wide", granularity="sequence"),
    "task": dict(impl="wide", router="task", num_tasks=3, top_k=None),
    "external": dict(impl="wide", router="external"),
    "mlp": dict(impl="grouped", router="mlp"),
}


def adapter():
    base = nn.Linear(IN, IN).double().requires_grad_(False)
    layer = MoeLoraAdapter(base, IN, MoeLoraConfig.preset("pesc", num_experts=4, rank=2))
    return randomise(layer.double())


FFNS = {
    "ffn fused": dict(),
    "ffn grouped": dict(impl="grouped"),
    "ffn reference": dict(impl="reference"),
    "ffn pairs": dict(activation=torch.tanh),
    "ffn recompute": dict(activation=torch.tanh, recompute=True, dropout=0.3),
    "ffn dropout": dict(dropout=0.3),
}


def build(name):
    """Return a layer with four experts (and maybe a shared one), and x for it."""
    torch.manual_seed(3)
    if name == "adapter":
        return adapter(), torch.randn(8, 3, IN, dtype=torch.float64)
    if name in FFNS:
        return make_ffn(**FFNS[name]), torch.randn(8, 3, HIDDEN, dtype=torch.float64)
    layer = make_layer(**LAYERS[name])
    if layer.config.router == "task":
        set_tasks(layer, [3, 1, 2, 3, 1, 2, 1, 3])
    if layer.config.router == "external":
        set_tasks(layer, torch.rand(8, 4, dtype=torch.float64))
    return layer, torch.randn(8, 3, IN, dtype=torch.float64)


def parts(layer, name, matrix):
    """Return the blocks of A or B by expert."""
    if layer.config.share == "A" and "lora_A" in name:
        return []
    return matrix.split(layer.config.ranks(), dim=int("lora_B" in name))


def check_gradients(layer, plain, frozen):
    """Compare a step with frozen experts with the step without."""
    assert frozen.keys() == plain.keys()
    for name, gradient in frozen.items():
        if "lora_" not in name:
            assert torch.equal(gradient, plain[name]), name
            continue
        pairs = zip(parts(layer, name, gradient), parts(layer, name, plain[name]), strict=True)
        for e, (actual, unfrozen) in enumerate(pairs):
            if e in layer.config.frozen_experts:
                assert unfrozen.any()
                assert not actual.any(), (name, e)
            else:
                assert torch.equal(actual, unfrozen), (name, e)


@pytest.mark.parametrize("experts", ([0, 1], [1, 3], [2], [0, 1, 2, 3]), ids=str)
@pytest.mark.parametrize("name", (*LAYERS, *FFNS, "adapter"))
def test_gradients_of_frozen_experts_are_zero_and_all_others_have_the_same_bits(name, experts):
    layer, x = build(name)
    plain = backward_step(layer, x)
    freeze_experts(layer, experts)
    check_gradients(layer, plain, backward_step(layer, x))
    freeze_experts(layer, [])
    assert_same(backward_step(layer, x), plain)


def test_a_shared_expert_can_be_frozen():
    layer, x = build("shared")
    plain = backward_step(layer, x)
    freeze_experts(layer, [4, 0])
    assert layer.config.frozen_experts == (0, 4)
    check_gradients(layer, plain, backward_step(layer, x))


@pytest.mark.parametrize("impl", ("wide", "grouped"))
def test_nan_in_the_gradient_of_a_frozen_expert_is_zero(impl):
    """A gradient that is multiplied by zero would stay NaN."""
    layer, x = build(impl)
    freeze_experts(layer, [0, 1])
    with torch.no_grad():
        x[0, 0] = torch.nan
    grads = backward_step(layer, x)
    assert not parts(layer, "lora_A", grads["lora_A"])[0].any()
    assert not parts(layer, "lora_B", grads["lora_B"])[1].any()


@pytest.mark.parametrize("name", ("wide", "grouped", "ffn fused", "ffn grouped", "reference"))
@pytest.mark.parametrize("reentrant", (False, True))
def test_activation_checkpointing(name, reentrant):
    layer, x = build(name)
    plain = backward_step(layer, x)
    freeze_experts(layer, [1, 2])

    def call(x):
        return checkpoint(layer, x, use_reentrant=reentrant)

    check_gradients(layer, plain, backward_step(layer, x, forward=call))


needs_torch_2_13 = pytest.mark.skipif(TORCH < (2, 13), reason="compiles whole-FFN experts")


@pytest.mark.parametrize(
    "name",
    (
        "wide", "grouped", "reference", "adapter", "shared A",
        *[pytest.param(ffn, marks=needs_torch_2_13) for ffn in ("ffn reference", "ffn grouped")],
    ),
)  # fmt: skip
def test_compiled(name):
    """The compiled layer has the gradients of the eager one, and follows a change."""
    torch._dynamo.reset()
    layer, x = build(name)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for experts in ([0, 3], [1], []):
        freeze_experts(layer, experts)
        eager, actual = backward_step(layer, x), backward_step(layer, x, forward=compiled)
        assert_same(actual, eager, rtol=1e-11, atol=1e-11)
        for key in actual:
            for e in experts if "lora_" in key else ():
                assert not parts(layer, key, actual[key])[e].any()


@pytest.mark.parametrize("linked", (False, True))
def test_siblings(linked):
    """A group, and linked siblings, freeze like single layers. One that differs runs alone."""
    model = Attention().double()
    replace_linears(model, MoeLoraConfig(num_experts=4, rank=2, top_k=2), list(NAMES))
    randomise(model)
    x = random_x(2, 7)
    layers = [getattr(model, name) for name in NAMES]
    if linked:
        link_siblings(model)
        call = lambda x: torch.cat([layer(x) for layer in layers], dim=-1)  # noqa: E731
    else:
        group = MoeLoraGroup(**dict(zip(NAMES, layers, strict=True)))
        call = lambda x: torch.cat(group(x), dim=-1)  # noqa: E731
    plain = backward_step(model, x, forward=call)
    for target, experts in ((model, [0, 2]), (model.k_proj, [1])):
        freeze_experts(target, experts)
        frozen = backward_step(model, x, forward=call)
        torch.testing.assert_close(frozen["y"], plain["y"])
        for key, gradient in frozen.items():
            if "lora_" not in key:
                continue
            layer = getattr(model, key.split(".")[0])
            pairs = zip(parts(layer, key, gradient), parts(layer, key, plain[key]), strict=True)
            for e, (actual, unfrozen) in enumerate(pairs):
                is_frozen = e in layer.config.frozen_experts
                torch.testing.assert_close(actual, 0 * unfrozen if is_frozen else unfrozen)
                assert bool(actual.any()) != is_frozen


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5, foreach=True),
}


def trained(layer):
    return [p for p in layer.parameters() if p.requires_grad]


def train(layer, x, optimizer, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("name", ("wide", "grouped ranks", "ffn fused", "reference", "adapter"))
def test_three_steps_leave_frozen_experts_untouched(name, make):
    """With averages of steps before the freeze, and weight decay; all other blocks move."""
    layer, x = build(name)
    optimizer = make(trained(layer))
    train(layer, x, optimizer)
    freeze_experts(layer, [0, 2], optimizer)
    before = copy.deepcopy(layer.state_dict())
    train(layer, x, optimizer)
    for key, parameter in layer.named_parameters():
        if not parameter.requires_grad:
            continue
        if "lora_" not in key:
            assert not torch.equal(parameter, before[key]), key
            continue
        blocks = zip(parts(layer, key, parameter), parts(layer, key, before[key]), strict=True)
        for e, (actual, start) in enumerate(blocks):
            assert torch.equal(actual, start) == (e in (0, 2)), (key, e)


def test_a_new_optimizer_without_weight_decay_needs_no_argument():
    layer, x = build("wide")
    freeze_experts(layer, [1])
    before = layer.lora_A.detach().clone()
    train(layer, x, torch.optim.AdamW(trained(layer), lr=0.1, weight_decay=0.0))
    same = [torch.equal(a, b) for a, b in zip(
        parts(layer, "lora_A", layer.lora_A), parts(layer, "lora_A", before), strict=True
    )]  # fmt: skip
    assert same == [False, True, False, False]


def test_the_optimizer_keeps_what_later_calls_freeze():
    layer, x = build("wide")
    optimizer = torch.optim.AdamW(trained(layer), lr=0.1, weight_decay=0.5)
    freeze_experts(layer, [], optimizer)
    freeze_experts(layer, [], optimizer)
    assert len(optimizer._optimizer_step_post_hooks) == 1
    train(layer, x, optimizer)
    freeze_experts(layer, [3])
    before = layer.lora_A.detach().clone()
    train(layer, x, optimizer)
    assert torch.equal(layer.lora_A[9:], before[9:])
    assert not torch.equal(layer.lora_A[:9], before[:9])


def test_copies_and_pickles_keep_frozen_experts_and_state_dicts_have_the_same_names():
    layer, x = build("grouped")
    names = [*layer.state_dict()]
    freeze_experts(layer, [1])
    assert [*layer.state_dict()] == names
    expected = backward_step(layer, x)
    for copier in COPIERS.values():
        other = copier(layer)
        assert other.config.frozen_experts == (1,)
        assert_same(backward_step(other, x), expected)


def test_a_file_of_an_adapter_loads_into_frozen_and_other_layers(tmp_path):
    """The file holds values. Whether experts are frozen is up to the model that loads it."""
    layer, _ = build("wide")
    freeze_experts(layer, [0])
    save_adapter(layer, tmp_path / "a.safetensors")
    for experts in ([], [0], [2, 3]):
        other = make_layer(seed=9, impl="wide")
        freeze_experts(other, experts)
        load_adapter(other, tmp_path / "a.safetensors")
        assert torch.equal(other.lora_A, layer.lora_A)
        assert other.config.frozen_experts == tuple(experts)


def test_options_of_a_config_freeze():
    layer = make_layer(frozen_experts=[2, 0])
    assert layer.config.frozen_experts == (0, 2)
    assert "frozen_experts" not in MoeLoraConfig().to_dict()
    assert layer.config.to_dict()["frozen_experts"] == [0, 2]


def test_balance_and_frozen_experts():
    """The selection bias moves for all experts: the router trains."""
    layer = make_layer(balance_rate=0.1)
    freeze_experts(layer, [0])
    backward_step(layer, torch.randn(9, IN, dtype=torch.float64))
    update_balance(layer)
    assert layer.router.balance.bias.any()


BAD = [
    ([4], ValueError, "from 0 to 3"),
    ([-1], ValueError, "from 0 to 5"),
    ([1, 1], ValueError, "different"),
    ([True], TypeError, "different numbers"),
    ([1.0], TypeError, "different numbers"),
    (["0"], TypeError, "different numbers"),
    ("01", TypeError, "list"),
    (1, TypeError, "list"),
    (None, TypeError, "list"),
]


@pytest.mark.parametrize(("experts", "error", "message"), BAD)
def test_bad_experts_name_the_layer_and_change_nothing(experts, error, message):
    model = nn.Sequential(make_layer(num_experts=6), make_layer())
    freeze_experts(model, [0])
    with pytest.raises(error, match=f"^experts: .*{message}") as caught:
        freeze_experts(model, experts)
    if error is ValueError and experts == [4]:
        assert "1: " in str(caught.value)
    assert all(layer.config.frozen_experts == (0,) for layer in model)


def test_other_bad_input():
    with pytest.raises(ValueError, match=r"model: .*got none"):
        freeze_experts(nn.Linear(2, 2), [0])
    with pytest.raises(TypeError, match="model"):
        freeze_experts([make_layer()], [0])
    with pytest.raises(TypeError, match="optimizer"):
        freeze_experts(make_layer(), [0], "adamw")
    with pytest.raises(ValueError, match="share"):
        freeze_experts(make_layer(share="A", impl="wide"), [0])
    layer = make_layer()
    nn.utils.parametrizations.weight_norm(layer, "lora_A")
    with pytest.raises(ValueError, match="lora_A"):
        freeze_experts(layer, [0], torch.optim.SGD(trained(layer), lr=0.1))
    assert layer.config.frozen_experts == ()
    freeze_experts(layer, torch.tensor([1, 0]))
    assert layer.config.frozen_experts == (0, 1)
