"""A step of check_trainable changes nothing: everything is compared before and after."""

from __future__ import annotations

import copy
import functools
import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from moelora_kernels import (
    MoeLoraConfig,
    MoeLoraLinear,
    adapter_parameters,
    check_trainable,
    collect_aux_loss,
    count_routing,
    link_siblings,
    replace_linears,
    routing_report,
    set_tasks,
)
from moelora_kernels.nn.trial_step import referenced_modules
from support.linears import randomise

X = torch.linspace(-1, 1, 32).view(4, 8)
MING = MoeLoraConfig.preset("ming", num_experts=2, rank=2)


def frozen(value, depth: int = 6):
    """Return a value that is equal if and only if an object and what it holds did not change."""
    if isinstance(value, Tensor):
        values = value.detach().float() if value.is_floating_point() else value
        grad = frozen(value.grad) if value.is_leaf else None
        return id(value), value.requires_grad, grad, tuple(values.flatten().tolist())
    if isinstance(value, torch.Generator):
        return tuple(value.get_state().tolist())
    if depth == 0 or value is None or isinstance(value, (int, float, str, type)):
        return repr(value)
    if isinstance(value, dict):
        return id(value), tuple((k, frozen(v, depth - 1)) for k, v in value.items())
    if isinstance(value, (list, tuple, set)):
        return type(value), tuple(frozen(v, depth - 1) for v in value)
    content = frozen(value.__dict__, depth - 1) if hasattr(value, "__dict__") else None
    return id(value), content


def everything(*objects) -> list:
    """Return all that a step could change in objects and in torch, Python and numpy."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return [
        *map(frozen, objects),
        frozen([torch.get_rng_state(), *cuda])[1][0][3],
        random.getstate(),
        tuple(np.random.get_state()[1]),  # noqa: NPY002
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_cache_enabled(),
        torch.is_autocast_enabled("cpu"),
    ]


class Busy(nn.Module):
    """A forward that writes everything that a forward can write."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm, self.drop = nn.BatchNorm1d(8), nn.Dropout(0.5)
        self.scale = nn.Parameter(torch.ones(8))
        self.register_buffer("steps", torch.zeros(2**17, dtype=torch.int64))
        self.cache = torch.zeros(8)
        self.losses, self.seen, self.settings = [1], {1}, {"a": 1}
        self.config = functools.partial(dict)
        self.config.problem_type = None
        self.draw = torch.Generator().manual_seed(3)

    def forward(self, x):
        self.steps += 1
        self.cache += 1
        self.losses.append(2)
        self.seen.add(2)
        self.settings["b"] = 2
        self.config.problem_type = "regression"
        self.new = x
        with torch.no_grad():
            self.scale.mul_(0.5)
        random.random(), np.random.rand()  # noqa: NPY002
        x = x + torch.rand(8, generator=self.draw)
        y = self.drop(self.norm(self.first(x))) * self.scale
        return self.second(y) + self.third(y)


def busy(is_linked: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = Busy()
    replace_linears(
        model, MoeLoraConfig.preset("ming", aux={"load_balance": 1.0}, dropout=0.1), ["first"]
    )
    if is_linked:
        replace_linears(model, MING, ["second", "third"])
        link_siblings(model, [("second", "third")])
    else:
        replace_linears(model, MoeLoraConfig.preset("moelora", num_tasks=3), ["second", "third"])
        set_tasks(model, [1, 2, 3, 1])
    randomise(model).eval()
    model.first.train()
    return model


@pytest.mark.parametrize("is_linked", (False, True))
@pytest.mark.parametrize("grad", (torch.no_grad, torch.enable_grad, torch.inference_mode))
def test_nothing_of_the_model_changes(grad, is_linked) -> None:
    model = busy(is_linked)
    model(X).square().sum().backward()
    optimizer = torch.optim.AdamW(adapter_parameters(model))
    called = []
    for parameter in adapter_parameters(model):
        parameter.register_post_accumulate_grad_hook(called.append)
        parameter.register_hook(called.append)
    with grad():
        before = everything(model, optimizer, X)
        report = check_trainable(model, X, lambda y: y.sum() + collect_aux_loss(model))
        assert everything(model, optimizer, X) == before
    assert report.ok, report
    assert not called
    # The record of the forward before the check is still there.
    assert collect_aux_loss(model).requires_grad


def test_nothing_changes_if_the_model_raises() -> None:
    model = busy()
    before = everything(model)
    with pytest.raises(ValueError, match="x: expected"):
        check_trainable(nn.Sequential(model.first), torch.ones(4, 9))
    with pytest.raises(ZeroDivisionError):
        check_trainable(model, X, lambda y: 1 / 0)
    # `new` was set by neither call, because it is an attribute of the model.
    assert everything(model) == before


HEAD = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))


def closure(head):
    return lambda y: head(y).square().mean()


def default(head):
    return lambda y, other=head: other(y).square().mean()


def partial(head):
    return functools.partial(lambda module, y: module(y).square().mean(), head)


def method(head):
    class Losses:
        def __init__(self):
            self.heads = [head]

        def loss(self, y):
            return self.heads[0](y).square().mean()

    return Losses().loss


def callable_object(head):
    class Loss:
        def __init__(self):
            self.inner = closure(head)

        def __call__(self, y):
            return self.inner(y)

    return Loss()


def module(head):
    return nn.Sequential(head, nn.Flatten(0), nn.Unflatten(0, (1, 16)), nn.AvgPool1d(16))


def in_globals(head):
    return lambda y: HEAD(y).square().mean()


@pytest.mark.parametrize(
    "kind", (closure, default, partial, method, callable_object, module, in_globals)
)
def test_nothing_of_the_loss_changes(kind) -> None:
    """A loss with its own modules: gradients, hooks, and statistics of a BatchNorm."""
    model = nn.Sequential(MoeLoraLinear(8, 8, config=MING))
    head = HEAD if kind is in_globals else nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4))
    called = []
    for parameter in head.parameters():
        parameter.register_post_accumulate_grad_hook(called.append)
        parameter.grad = torch.ones_like(parameter)
    before = everything(model, head)
    check_trainable(model, X, kind(head))
    assert everything(model, head) == before
    assert not called


def test_tensors_of_the_loss_keep_gradient_and_hooks() -> None:
    """A Parameter that no module holds, and one of the model in a list."""
    model = nn.Sequential(MoeLoraLinear(8, 8, config=MING))
    weight = nn.Parameter(torch.ones(8))
    weight.grad = torch.ones(8)
    tensors, called = [weight, model[0].lora_A], []
    for tensor in tensors:
        tensor.register_hook(called.append)
        tensor.register_post_accumulate_grad_hook(called.append)
    before = everything(model, tensors)
    check_trainable(model, X, lambda y: (y * tensors[0]).sum() + tensors[1].square().sum())
    assert everything(model, tensors) == before
    assert not called
    (2 * weight).sum().backward()
    assert len(called) == 2
    assert (weight.grad == 3).all()


class Cache:
    """A cache of keys, as generation has it."""

    def __init__(self):
        self.layers = [{"keys": torch.zeros(4, 8)}]


class Cached(nn.Module):
    def __init__(self):
        super().__init__()
        self.q = MoeLoraLinear(8, 8, config=MING)

    def forward(self, x, cache, more):
        x *= 2
        more["x"][0].add_(1)
        cache.layers[0]["keys"] += 1
        cache.layers.append(x)
        return self.q(x)


def test_nothing_of_the_batch_changes() -> None:
    """Also not the graph behind it: the training step that follows needs it."""
    model, embedding = Cached(), nn.Embedding(5, 8)
    x = embedding(torch.arange(4)).tanh()
    batch = {"x": x, "cache": Cache(), "more": {"x": [torch.zeros(2)]}}
    before = everything(model, embedding, batch)
    assert check_trainable(model, batch).ok
    assert everything(model, embedding, batch) == before
    x.sum().backward()
    assert embedding.weight.grad is not None
    leaf = torch.ones(4, 8, requires_grad=True)
    assert check_trainable(nn.Sequential(model.q), leaf).ok
    assert leaf.grad is None


def test_gates_with_a_graph_keep_it() -> None:
    layer, gates = MoeLoraLinear(8, 8, num_experts=2, rank=2, router="external"), nn.Linear(8, 2)
    given = gates(torch.ones(1, 8)).sigmoid()
    set_tasks(layer, given)
    assert check_trainable(nn.Sequential(layer), X).ok
    assert layer.external_gates is given
    assert gates.weight.grad is None
    given.sum().backward()


def test_tensors_of_inference_mode() -> None:
    model = nn.Sequential(MoeLoraLinear(8, 8, config=MING))
    with torch.inference_mode():
        assert check_trainable(model, X).ok
        made = nn.Sequential(nn.Linear(8, 8))
    replace_linears(made, MING, ["0"])
    with pytest.raises(ValueError, match=r"model: a Parameter was created under torch.inference"):
        check_trainable(made, X)


def test_it_is_not_counted() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    replace_linears(model, MING, ["0"])
    with count_routing(model) as counter:
        model(X)
        before = everything(model, counter)
        check_trainable(model, X)
        assert everything(model, counter) == before
        report = routing_report(model)
        model(X)
        assert torch.equal(routing_report(model).layers["0"].load, report.layers["0"].load)


def test_loads_of_a_balance_do_not_change() -> None:
    layer = MoeLoraLinear(8, 8, num_experts=4, rank=2, top_k=2, balance_rate=0.1)
    model = nn.Sequential(layer)
    model(X)
    before = everything(model)
    check_trainable(model, X)
    assert everything(model) == before


def test_autocast_keeps_its_cache() -> None:
    model, head = nn.Sequential(MoeLoraLinear(8, 8, config=MING)), nn.Linear(8, 1)
    with torch.autocast("cpu", torch.bfloat16):
        before = everything(model, head)
        assert check_trainable(model, X, lambda y: head(y).float().mean()).ok
        assert everything(model, head) == before
        head(model(X)).float().mean().backward()
    assert head.weight.grad is not None


def test_recurrent_modules_and_tied_weights() -> None:
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.rnn = nn.Embedding(12, 8), nn.LSTM(8, 8)
            self.head = nn.Linear(8, 12, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids):
            return self.head(self.rnn(self.embed(ids))[0])

    model = Model()
    replace_linears(model, MING, ["head"])
    model.embed.weight.requires_grad_()
    before = everything(model)
    assert check_trainable(model, torch.arange(6)).ok
    assert everything(model) == before
    assert model.embed.weight is model.head.base_layer.weight


def test_transformers_writes_its_config() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    model = transformers.BertForSequenceClassification(config)
    replace_linears(model, MING, ["query"])
    before = copy.deepcopy(model.config.to_dict())
    batch = {"input_ids": torch.ones(2, 5, dtype=torch.int64), "labels": torch.tensor([0, 1])}
    assert check_trainable(model, batch).ok
    assert model.config.to_dict() == before


def test_modules_of_a_function() -> None:
    head = nn.Linear(8, 8)
    assert referenced_modules(None) == []
    assert referenced_modules(nn.functional.mse_loss) == []
    for kind in (closure, default, partial, method, callable_object):
        assert referenced_modules(kind(head)) == [head]
