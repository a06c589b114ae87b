"""link_siblings: linked siblings run together and give what they give one by one."""

from __future__ import annotations

import copy
import pickle
import types

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moelora_kernels import MoeLoraConfig, link_siblings, replace_linears, set_tasks
from moelora_kernels.nn import forward, sibling_link
from moelora_kernels.nn.sibling_calls import called_alike
from support import linears
from support.compare import FLOAT64, assert_same, backward_step, training_step


class Attention(nn.Module):
    """Calls its projections one by one, as model code does."""

    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(12, o) for o in (12, 6, 6))

    def forward(self, x):
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1).sin()


@pytest.fixture
def models():
    """Return a model and a linked copy, in float64 and with a random B."""
    model = nn.Sequential(Attention(), nn.Linear(24, 12), Attention()).double()
    replace_linears(model, MoeLoraConfig.preset("ming", rank=2), ["q_proj", "k_proj", "v_proj"])
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter)
    linked = copy.deepcopy(model)
    assert link_siblings(linked) == ["0.{q_proj,k_proj,v_proj}", "2.{q_proj,k_proj,v_proj}"]
    return model, linked


def count_passes(monkeypatch):
    """Return a list that gets the number of siblings of each coming pass."""
    passes = []

    def counting_forward(layers, *args):
        passes.append(len(layers))
        return forward.run_siblings(layers, *args)

    monkeypatch.setattr(sibling_link, "run_siblings", counting_forward)
    return passes


def test_outputs_gradients_and_state_dict(models, monkeypatch):
    model, linked = models
    passes = count_passes(monkeypatch)
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    torch.testing.assert_close(linked(x), model(x))
    assert passes == [3, 3]
    assert_same(training_step(linked, x), training_step(model, x), **FLOAT64)
    assert linked.state_dict().keys() == model.state_dict().keys()
    assert all(m.link.stored.last is None for m in linked.modules() if hasattr(m, "link"))


def test_a_pass_compares_the_gate_rows_once(models, monkeypatch):
    counts = []

    def counting(layers):
        counts.append(len(layers))
        return False

    for module in (forward, sibling_link):
        monkeypatch.setattr(module, "gate_rows_differ", counting)
    models[1][0](torch.randn(3, 12, dtype=torch.float64))
    assert counts == [3]


@pytest.mark.parametrize("reentrant", (False, True))
def test_activation_checkpointing(models, reentrant):
    model, linked = models
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    recomputed = backward_step(
        linked, x, forward=lambda leaf: checkpoint(linked, leaf, use_reentrant=reentrant)
    )
    assert_same(recomputed, backward_step(model, x), **FLOAT64)


def test_the_order_of_calls_does_not_matter(models):
    # Siblings get different x, one is called twice, x changes in place, the grad mode changes.
    model, linked = (m[0] for m in models)
    x, other = torch.randn(2, 4, 12, dtype=torch.float64)
    for name, value in (("q_proj", x), ("k_proj", other), ("k_proj", other), ("v_proj", x)):
        torch.testing.assert_close(getattr(linked, name)(value), getattr(model, name)(value))
    linked.q_proj(x)
    x.mul_(2)
    torch.testing.assert_close(linked.k_proj(x), model.k_proj(x))
    with torch.no_grad():
        linked.q_proj(x)
    assert linked.v_proj(x).requires_grad
    linked.q_proj(x)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(linked.v_proj(x), model.v_proj(x))


def test_autocast_or_evaluation_between_siblings(models):
    """A sibling's output from an earlier call has another dtype or dropout: it is not used."""
    linked = models[1][0].float()
    x = torch.randn(5, 12)
    with torch.autocast("cpu", torch.bfloat16):
        linked.q_proj(x)
    assert linked.k_proj(x).dtype == torch.float32

    layers = nn.ModuleDict({n: nn.Linear(12, 6) for n in ("q_proj", "k_proj", "v_proj")})
    replace_linears(layers, MoeLoraConfig(rank=2, top_k=2, dropout=0.5), [*layers])
    for layer in layers.values():
        nn.init.normal_(layer.lora_B)
    link_siblings(layers)
    layers["q_proj"](x)
    layers.eval()
    actual = layers["k_proj"](x)
    assert torch.equal(actual, layers["k_proj"](x.clone()))


def test_inference_mode(models):
    """Tensors of inference mode have no version counter."""
    model, linked = models
    with torch.inference_mode():
        x = torch.randn(4, 12, dtype=torch.float64)
        torch.testing.assert_close(linked(x), model(x))
        linked[0].q_proj(x)
        x.mul_(2)
        torch.testing.assert_close(linked[0].k_proj(x), model[0].k_proj(x))


@pytest.mark.parametrize("router", ("task", "external"))
def test_new_tasks_between_siblings(router):
    model = nn.Sequential(Attention())
    config = MoeLoraConfig(num_experts=3, rank=2, router=router, num_tasks=4)
    replace_linears(model, config, ["q_proj", "k_proj", "v_proj"])
    linears.randomise(model)
    plain = copy.deepcopy(model)
    link_siblings(model)
    x = torch.randn(2, 5, 12)
    batches = ([1, 2], [4, 3]) if router == "task" else torch.rand(2, 2, 3)
    for tasks, name in zip(batches, ("v_proj", "k_proj"), strict=True):
        for each in (plain, model):
            set_tasks(each, tasks)
        torch.testing.assert_close(getattr(model[0], name)(x), getattr(plain[0], name)(x))


def test_copies_are_linked_to_each_other(models):
    linked = models[1]
    x = torch.randn(4, 12, dtype=torch.float64)
    linked[0].q_proj(x)
    for clone in (copy.deepcopy(linked), pickle.loads(pickle.dumps(linked))):
        assert clone[0].q_proj.link is clone[0].k_proj.link is not linked[0].q_proj.link
        assert clone[0].q_proj.link.layers[1] is clone[0].k_proj
        torch.testing.assert_close(clone(x), linked(x))


def test_compiles(models):
    model, linked = models
    x = torch.randn(4, 12, dtype=torch.float64)
    compiled = torch.compile(linked, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("names", (["q_proj", "k_proj", "v_proj"], ["k_proj", "v_proj"]))
def test_replace_linears_links(names, monkeypatch):
    torch.manual_seed(0)
    plain = nn.Sequential(Attention(), nn.Linear(24, 12), Attention()).double()
    linked = copy.deepcopy(plain)
    config = MoeLoraConfig.preset("ming", rank=2, dropout=0.0)
    assert replace_linears(linked, config, names, link=True) == replace_linears(
        plain, config, names
    )
    for model in (plain, linked):
        linears.randomise(model)
    passes = count_passes(monkeypatch)
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    assert_same(training_step(linked, x), training_step(plain, x), **FLOAT64)
    assert passes == [len(names)] * 2
    assert list(linked.state_dict()) == list(plain.state_dict())


class CrossAttention(Attention):
    def forward(self, x, memory):
        states = memory if memory is not None else x
        return self.q_proj(x), self.k_proj(states), self.project(states)

    def project(self, x):
        return self.v_proj(x)


class Flexible(CrossAttention):
    """The forward of another class, and one projection with its argument by name."""

    def forward(self, x):
        q, _, v = super().forward(x, None)
        return q, self.k_proj(input=x), v


class Normed(Attention):
    def forward(self, x):
        return self.q_proj(x), self.k_proj(x.sin()), self.v_proj(x.sin())


class Callers(Attention):
    """The source does not name the projections."""

    def forward(self, x):
        return [layer(x) for layer in self.children()]


@pytest.mark.parametrize(
    ("kind", "expected"),
    (
        (Attention, [["q_proj", "k_proj", "v_proj"]]),
        (Callers, [["q_proj", "k_proj", "v_proj"]]),
        (CrossAttention, [["q_proj"], ["k_proj"], ["v_proj"]]),
        (Flexible, [["q_proj"], ["k_proj"], ["v_proj"]]),
        (Normed, [["q_proj"], ["k_proj"], ["v_proj"]]),
        (nn.Identity, [["q_proj", "k_proj", "v_proj"]]),
    ),
)
def test_the_source_tells_which_children_read_the_same_x(kind, expected):
    assert called_alike(kind(), ["q_proj", "k_proj", "v_proj"]) == expected


def test_a_patched_forward_tells_too():
    model = Attention()
    model.forward = types.MethodType(Normed.forward, model)
    assert called_alike(model, ["q_proj", "v_proj"]) == [["q_proj"], ["v_proj"]]


def test_siblings_that_cannot_be_linked():
    with pytest.raises(ValueError, match="groups: no module has children"):
        link_siblings(nn.Sequential(Attention()))
    model = Attention()
    replace_linears(model, MoeLoraConfig.preset("ming", rank=2), ["q_proj", "k_proj"])
    replace_linears(model, MoeLoraConfig.preset("ming", rank=3), ["v_proj"])
    with pytest.raises(ValueError, match="v_proj: expected the options of q_proj"):
        link_siblings(model)
