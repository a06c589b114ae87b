"""Random options: an error that names one, or layers that compute the formula on every path."""

from __future__ import annotations

import copy
import dataclasses
import json
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
    set_samples,
    set_tasks,
)
from support.formulas.any_config import mixture
from support.selection import default_cases

IN, OUT, TASK = 12, 10, 5
OPTIONS = [field.name for field in dataclasses.fields(MoeLoraConfig)]
# About a quarter of 600 draws are valid: enough for every router with every selection, in seconds.
DRAWS, PARTS = 600, 6


class TanhRouter(nn.Module):
    """A router that a user wrote."""

    def __init__(self, experts):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(experts, IN, dtype=torch.float64))

    def forward(self, x):
        return (x @ self.weight.t()).tanh()


def draw_options(rng):
    """Return a value for every option. Options that rarely go together are rarely drawn together.

    rng: a random.Random.
    """

    def sometimes(probability, values, default):
        return rng.choice(values) if rng.random() < probability else default

    experts = rng.choice([1, 2, 3, 4])
    routers = ("linear", "linear", "mlp", "task", "external", "prototype", "self", "token_task")
    options = dict(
        num_experts=experts,
        rank=sometimes(0.4, [1, 3, [rng.randint(1, 3) for _ in range(experts)]], 2),
        alpha=rng.choice([1.0, 3]),
        share=sometimes(0.2, ["A"], "none"),
        shared_expert=sometimes(0.2, ["always", "complement"], "none"),
        shared_rank=sometimes(0.1, [1, 2], None),
        init=sometimes(0.3, ["normal", "sparse", "svd_segments"], "kaiming"),
        freeze=sometimes(0.2, ["A", "AB"], "none"),
        router=rng.choice([*routers, None, TanhRouter, nn.Linear]),
        router_bias=rng.random() < 0.5,
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
    options["scaling"] = sometimes(0.5, rules, "alpha/r")
    if options["router"] in (None, "external", "task"):
        options["granularity"] = None
    if options["router"] == "self":
        options.update(rank=1, shared_expert="none", share="none", granularity=None)
    if options["router"] == "token_task":
        options.update(score="identity", noise=0.0, batch_dim=0, aux=(), grad_gate="gate")
        options["normalize"] = rng.choice(["none", "softmax"])
    if options["router"] == "task":
        options["task_gate"] = rng.choice(["shared", "per_layer"])
    select = rng.choice(
        [None, "topk", "topk", "sampling", "topp", "threshold", "learned_threshold"]
    )
    if options["router"] in (None, "external"):
        select = None
    if options["router"] == "token_task":
        select = rng.choice(["topk", "threshold", "learned_threshold", None])
    options["select"] = select
    if select in ("topk", "sampling"):
        options["top_k"] = rng.randint(1, experts)
        options["balance_rate"] = sometimes(0.3, [0.1], None)
    if options["router"] == "linear" and select == "topk":
        # With these options `shrink_gate` computes the gate, unless noise or grad_gate prevents it.
        options.update(score="softmax", shared_expert="none", granularity=None, balance_rate=None)
        options.update(
            normalize="sum", noise=rng.choice([0.0, 0.5]), grad_gate=rng.choice(["gate", "sqrt"])
        )
    if select == "topp":
        options["top_p"] = rng.choice([0.3, 0.6, 1.0])
    if select == "threshold":
        options["threshold"] = rng.choice([0.1, 0.3, 0.55])
    if select == "learned_threshold":
        options["max_threshold"] = sometimes(0.5, [0.4], None)
    if select in ("topp", "threshold"):
        options["keep_min"] = sometimes(0.5, [1, 2], None)
    if select in ("topk", "topp", "threshold") and rng.random() < 0.3:
        options.update(
            entropy_threshold=rng.choice([0.8, 0.95]), entropy_index=rng.choice([1.0, 1.1, 2.0])
        )
    return options


def randomise(layer):
    """Draw all adapters and router biases of a layer, so that experts and tasks differ."""
    with torch.no_grad():
        routers = [] if layer.router is None else layer.router.parameters()
        for q in (layer.lora_A, layer.lora_B, *routers):
            q.normal_(std=0.5)
        if layer.config.router == "prototype":
            set_prototypes(layer)
        if layer.config.balance_rate is not None:
            layer.router.balance.bias.normal_(std=0.3)


def draw_tasks(rng, config, x):
    """Return the argument of set_tasks for x: task ids, gates, task vectors, or None."""
    tokens = x.shape[:-1].numel()
    batch = x.shape[config.batch_dim] if x.dim() > 2 else tokens
    if config.router == "task":
        count = max(rng.choice([1, batch]), 1)
        ids = torch.cat([torch.randint(1, 4, (count, 1)), torch.randint(0, 4, (count, 2))], 1)
        return rng.choice([ids, ids[:, 0]])
    if config.router == "external":
        return torch.rand(max(rng.choice([1, batch, tokens]), 1), config.num_experts).double()
    if config.router == "token_task":
        count = 1 if x.dim() == 2 else max(rng.choice([1, batch]), 1)
        return torch.randn(count, TASK).double()
    return None


def assert_names_an_option(error, draw):
    """Assert that an error message begins with the name of an option."""
    assert str(error).split(":")[0] in OPTIONS, (draw, error)


def step(forward, x, parameters):
    """Return y, dx and the gradients of the parameters, after setting the random seed."""
    torch.manual_seed(99)
    leaf = x.clone().requires_grad_()
    y = forward(leaf)
    dy = torch.linspace(-1, 1, max(y.numel(), 1), dtype=y.dtype)[: y.numel()].view(y.shape)
    if not y.requires_grad:
        # Without tokens the loops of the formula read no parameter.
        return [y, *(torch.zeros_like(q) for q in (leaf, *parameters))]
    grads = torch.autograd.grad(
        y, (leaf, *parameters), dy, allow_unused=True, materialize_grads=True
    )
    return [y.detach(), *grads]


def check_formula(layers, x, tasks):
    """Assert that sibling layers compute the formula on every path that they have."""
    config = layers[0].config
    group = MoeLoraGroup(**{f"layer{i}": layer for i, layer in enumerate(layers)})
    parameters = [q for q in group.parameters() if q.requires_grad]
    keyword = "gates" if config.router == "external" else "tasks"

    def formula(leaf):
        seed = None
        if layers[0].training and config.dropout > 0:
            seed = torch.randint(0, 2**62, (1,))
        ys = [mixture(layer, leaf, seed=seed, **{keyword: tasks}) for layer in layers]
        return torch.cat(ys, dim=-1)

    expected = step(formula, x, parameters)
    sparse = config.is_sparse() and config.share == "none"
    for impl in ("wide", "reference", "auto", *(["grouped"] if sparse else [])):
        for layer in layers:
            layer.config = config.replace(impl=impl)
        actual = step(lambda leaf: torch.cat(group(leaf), dim=-1), x, parameters)
        for i, pair in enumerate(zip(actual, expected, strict=True)):
            # float64; a sum over a few dozen terms of size 1 to 10.
            torch.testing.assert_close(*pair, rtol=1e-9, atol=1e-10, msg=f"{impl} {i}")
    for layer in layers:
        layer.config = config


def check_copies(layer, x):
    """Assert that copies and loaded layers compute the same, and that a forward is recorded."""
    config = layer.config
    zeroed = copy.deepcopy(layer)
    with torch.no_grad():
        for q in zeroed.parameters():
            q.zero_()
    zeroed.load_state_dict(layer.state_dict())
    reset = copy.deepcopy(layer)
    if config.init != "svd_segments":
        reset.reset_parameters()
    load_adapter_state_dict(reset, adapter_state_dict(layer))
    torch.manual_seed(5)
    y = layer(x)
    for other in (zeroed, reset, pickle.loads(pickle.dumps(layer))):
        torch.manual_seed(5)
        assert torch.equal(other(x), y)
    with record_routing(layer):
        layer(x)
        assert layer.record.weights is not None
    if config.aux:
        layer(x)
        assert collect_aux_loss(layer).isfinite()


@pytest.mark.parametrize("part", default_cases(range(PARTS), 0))
def test_any_draw_is_refused_by_name_or_computes_its_formula(part):
    valid = 0
    for number in range(part, DRAWS, PARTS):
        rng = random.Random(number)
        torch.manual_seed(number)
        options = draw_options(rng)
        if isinstance(options["router"], type):
            router, experts = options["router"], options["num_experts"]
            sizes = (experts,) if router is TanhRouter else (IN, experts)
            options["router"] = router(*sizes).double()
        bases = [
            nn.Linear(IN, width, rng.random() < 0.7, dtype=torch.float64) for width in (OUT, 12)
        ]
        bases[1].bias = None if bases[0].bias is None else nn.Parameter(torch.randn(12).double())
        try:
            config = MoeLoraConfig(**options)
            layers = [MoeLoraLinear.from_linear(base, config) for base in bases]
        except (ValueError, TypeError) as error:
            assert_names_an_option(error, number)
            continue
        valid += 1
        if not isinstance(config.router, nn.Module):
            assert MoeLoraConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
        assert config.replace() == config
        if config.shares_gate():
            layers[1].router = layers[0].router
        shape = rng.choice([(7,), (1,), (0,), (3, 4), (1, 4), (4, 1), (3, 0), (0, 3), (4, 4)])
        x = torch.randn(*shape, IN).double()
        tasks = draw_tasks(rng, config, x)
        training = rng.random() < 0.6
        for layer in layers:
            randomise(layer)
            layer.train(training)
            if tasks is not None:
                set_tasks(layer, tasks)
            if config.granularity == "sequence" and shape == (7,):
                # A 2-D x does not tell its sequences: it is one.
                set_samples(layer, [0] * 7)
        try:
            check_formula(layers[:1], x, tasks)
            check_formula(layers, x, tasks)
            check_copies(layers[0], x)
        except AssertionError as error:
            raise AssertionError(f"draw {number}, x {[*shape]}, {options}: {error}") from error
    assert valid >= DRAWS // PARTS // 6
