"""Options drawn at random: refused by name, or a layer that is its formula in every formulation."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle
import random

import pytest
import torch
from torch import nn

from moelora_kernels import (
    MoeLoraConfig,
    MoeLoraGroup,
    MoeLoraLinear,
    adapter_state_dict,
    collect_aux_loss,
    load_adapter_state_dict,
    record_routing,
    set_prototypes,
    set_tasks,
)
from support.formulas.any_config import mixture
from support.selection import default_cases

IN, OUT, TASK = 12, 10, 5
OPTIONS = [field.name for field in dataclasses.fields(MoeLoraConfig)]
# Of 600 draws about a quarter are configs: enough for every router under every selection, and
# a few seconds.
DRAWS, PARTS = 600, 6


class TanhRouter(nn.Module):
    """A router of one's own."""

    def __init__(self, experts):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, IN, dtype=torch.float64))

    def forward(self, x):
        return (x @ self.weight.t()).tanh()


def draw_options(r):
    """Values of all options; those that seldom go together are seldom drawn together."""

    def sometimes(probability, values, default):
        return r.choice(values) if r.random() < probability else default

    experts = r.choice([1, 2, 3, 4])
    routers = ("linear", "linear", "mlp", "task", "external", "prototype", "self", "token_task")
    o = dict(
        num_experts=experts,
        rank=sometimes(0.4, [1, 3, [r.randint(1, 3) for _ in range(experts)]], 2),
        alpha=r.choice([1.0, 3]),
        share=sometimes(0.2, ["A"], "none"),
        shared_expert=sometimes(0.2, ["always", "complement"], "none"),
        shared_rank=sometimes(0.1, [1, 2], None),
        init=sometimes(0.3, ["normal", "sparse", "svd_segments"], "kaiming"),
        freeze=sometimes(0.2, ["A", "AB"], "none"),
        router=r.choice([*routers, None, TanhRouter, nn.Linear]),
        router_bias=r.random() < 0.5,
        router_hidden=3,
        num_tasks=3,
        task_embedding_dim=TASK,
        batch_dim=sometimes(0.4, [1], 0),
        granularity=sometimes(0.3, ["token", "sequence"], None),
        score=sometimes(0.5, ["sigmoid", "identity", "abs"], "softmax"),
        temperature=sometimes(0.3, [0.7, 2.0], 1.0),
        noise=sometimes(0.2, [0.5], 0.0),
        normalize=sometimes(0.5, ["none", "softmax", "one"], "sum"),
        dropout=sometimes(0.3, [0.4], 0.0),
        dropout_mask=sometimes(0.4, ["per_expert"], "shared"),
        aux=sometimes(0.2, [{"z": 0.1}, ["load_balance"], ["entropy", "z"]], ()),
        grad_gate=sometimes(0.25, ["sqrt"], "gate"),
    )
    factors = [0.5 + e / 4 for e in range(experts)]
    rules = ["alpha/R", "alpha/sqrt(r)", "sqrt(3*alpha*I/r)", 0.7, factors, [*factors, 2.0]]
    o["scaling"] = sometimes(0.5, rules, "alpha/r")
    if o["router"] in (None, "external", "task"):
        o["granularity"] = None
    if o["router"] == "self":
        o.update(rank=1, shared_expert="none", share="none", granularity=None)
    if o["router"] == "token_task":
        o.update(score="identity", noise=0.0, batch_dim=0, aux=(), grad_gate="gate")
        o["normalize"] = r.choice(["none", "softmax"])
    if o["router"] == "task":
        o["task_gate"] = r.choice(["shared", "per_layer"])
    select = r.choice([None, "topk", "topk", "sampling", "topp", "threshold", "learned_threshold"])
    if o["router"] in (None, "external"):
        select = None
    if o["router"] == "token_task":
        select = r.choice(["topk", "threshold", "learned_threshold", None])
    o["select"] = select
    if select in ("topk", "sampling"):
        o["top_k"] = r.randint(1, experts)
        o["balance_rate"] = sometimes(0.3, [0.1], None)
    if o["router"] == "linear" and select == "topk":
        # What keeps the logits of such a gate out of the shrink, one by one.
        o.update(score="softmax", shared_expert="none", granularity=None, balance_rate=None)
        o.update(normalize="sum", noise=r.choice([0.0, 0.5]), grad_gate=r.choice(["gate", "sqrt"]))
    if select == "topp":
        o["top_p"] = r.choice([0.3, 0.6, 1.0])
    if select == "threshold":
        o["threshold"] = r.choice([0.1, 0.3, 0.55])
    if select == "learned_threshold":
        o["max_threshold"] = sometimes(0.5, [0.4], None)
    if select in ("topp", "threshold"):
        o["keep_min"] = sometimes(0.5, [1, 2], None)
    if select in ("topk", "topp", "threshold") and r.random() < 0.3:
        o.update(entropy_threshold=r.choice([0.8, 0.95]), entropy_index=r.choice([1.0, 1.1, 2.0]))
    return o


def randomise(layer):
    """Values that tell every expert, task and bias apart; the base stays."""
    with torch.no_grad():
        routers = [] if layer.router is None else layer.router.parameters()
        for q in (layer.lora_A, layer.lora_B, *routers):
            q.normal_(std=0.5)
        if layer.config.router == "prototype":
            set_prototypes(layer)
        if layer.config.balance_rate is not None:
            layer.router.balance.bias.normal_(std=0.3)


def given_from_outside(r, config, x):
    """What set_tasks takes for x: ids, gates, vectors or None."""
    tokens = x.shape[:-1].numel()
    batch = x.shape[config.batch_dim] if x.dim() > 2 else tokens
    if config.router == "task":
        count = max(r.choice([1, batch]), 1)
        several = torch.cat([torch.randint(1, 4, (count, 1)), torch.randint(0, 4, (count, 2))], 1)
        return r.choice([several, several[:, 0]])
    if config.router == "external":
        return torch.rand(max(r.choice([1, batch, tokens]), 1), config.num_experts).double()
    if config.router == "token_task":
        one = x.dim() == 2
        return torch.randn(1 if one else max(r.choice([1, batch]), 1), TASK).double()
    return None


def step(forward, x, parameters):
    """y, dx and the gradients of the parameters, from one seed for all that is drawn."""
    torch.manual_seed(99)
    leaf = x.clone().requires_grad_()
    y = forward(leaf)
    dy = torch.linspace(-1, 1, max(y.numel(), 1), dtype=y.dtype)[: y.numel()].view(y.shape)
    if not y.requires_grad:
        # Loops over no tokens touch no parameter.
        return [y, *(torch.zeros_like(q) for q in (leaf, *parameters))]
    grads = torch.autograd.grad(
        y, (leaf, *parameters), dy, allow_unused=True, materialize_grads=True
    )
    return [y.detach(), *grads]


def assert_named(error, given):
    """A message begins with the option that is wrong."""
    assert str(error).split(":")[0] in OPTIONS, (given, error)


def assert_is_formula(layers, x, given):
    """Siblings in each formulation they have, against the loops over tokens and experts."""
    config = layers[0].config
    group = MoeLoraGroup(**{f"layer{i}": layer for i, layer in enumerate(layers)})
    parameters = [q for q in group.parameters() if q.requires_grad]
    which = "gates" if config.router == "external" else "tasks"

    def formula(leaf):
        seed = None
        if layers[0].training and config.dropout > 0:
            seed = torch.randint(0, 2**62, (1,))
        return torch.cat([mixture(m, leaf, seed=seed, **{which: given}) for m in layers], dim=-1)

    truth = step(formula, x, parameters)
    sparse = config.is_sparse() and config.share == "none"
    for impl in ("wide", "reference", "auto", *(["grouped"] if sparse else [])):
        for layer in layers:
            layer.config = config.replace(impl=impl)
        found = step(lambda leaf: torch.cat(group(leaf), dim=-1), x, parameters)
        for i, (one, expected) in enumerate(zip(found, truth, strict=True)):
            # float64; a sum over a few dozen terms of size 1 to 10.
            torch.testing.assert_close(one, expected, rtol=1e-9, atol=1e-10, msg=f"{impl} {i}")
    for layer in layers:
        layer.config = config


def assert_survives(layer, x, given):
    """Copies, pickles and state dicts are the same layer; a forward can be recorded."""
    config = layer.config
    zeroed = copy.deepcopy(layer)
    with torch.no_grad():
        for q in zeroed.parameters():
            q.zero_()
    zeroed.load_state_dict(layer.state_dict())
    anew = copy.deepcopy(layer)
    anew.reset_parameters() if config.init != "svd_segments" else None
    load_adapter_state_dict(anew, adapter_state_dict(layer))
    torch.manual_seed(5)
    y = layer(x)
    for other in (zeroed, anew, pickle.loads(pickle.dumps(layer))):
        torch.manual_seed(5)
        assert torch.equal(other(x), y)
    with record_routing(layer):
        layer(x)
        assert layer.record.weights is not None
    if config.aux:
        layer(x)
        assert collect_aux_loss(layer).isfinite()


@pytest.mark.parametrize("part", default_cases(range(PARTS), 0))
def test_any_draw_is_refused_by_name_or_is_its_formula(part):
    made = 0
    for number in range(part, DRAWS, PARTS):
        r = random.Random(number)
        torch.manual_seed(number)
        options = draw_options(r)
        if isinstance(options["router"], type):
            kind = options["router"]
            sizes = (
                (options["num_experts"],) if kind is TanhRouter else (IN, options["num_experts"])
            )
            options["router"] = kind(*sizes).double()
        bases = [nn.Linear(IN, width, r.random() < 0.7, dtype=torch.float64) for width in (OUT, 12)]
        bases[1].bias = None if bases[0].bias is None else nn.Parameter(torch.randn(12).double())
        try:
            config = MoeLoraConfig(**options)
            layers = [MoeLoraLinear.from_linear(base, config) for base in bases]
        except (ValueError, TypeError) as error:
            assert_named(error, number)
            continue
        made += 1
        if not isinstance(config.router, nn.Module):
            assert MoeLoraConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        assert config.replace() == config
        if config.shares_gate():
            layers[1].router = layers[0].router
        shape = r.choice([(7,), (1,), (0,), (3, 4), (1, 4), (4, 1), (3, 0), (0, 3), (4, 4)])
        x = torch.randn(*shape, IN).double()
        given = given_from_outside(r, config, x)
        training = r.random() < 0.6
        for layer in layers:
            randomise(layer)
            layer.train(training)
            if given is not None:
                set_tasks(layer, given)
        try:
            assert_is_formula(layers[:1], x, given)
            assert_is_formula(layers, x, given)
            assert_survives(layers[0], x, given)
        except AssertionError as error:
            raise AssertionError(f"draw {number}, x {[*shape]}, {options}: {error}") from error
    assert made >= DRAWS // PARTS // 6


WRONG = [
    True, 1.0, 1.5, 0, -1, math.nan, math.inf, "x", [], [1.5], (), {}, {"z": "x"}, [["z", 0.1]],
    torch.tensor([1, 2]), object(), b"a", nn.Linear, {1, 2}, [None], 1j,
]  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_a_value_of_any_kind_is_taken_or_named(name):
    """What is taken is equal after JSON, and has a hash: adapters and groups compare configs."""
    under = [{}, dict(top_k=2), dict(select="topp", top_p=0.5), dict(router="task", num_tasks=3)]
    for options in under:
        for value in WRONG:
            try:
                config = MoeLoraConfig(**{"num_experts": 4, **options, name: value})
            except (ValueError, TypeError) as error:
                assert_named(error, value)
                continue
            back = MoeLoraConfig.from_dict(json.loads(json.dumps(config.to_dict())))
            assert (back, hash(back)) == (config, hash(config)), value
