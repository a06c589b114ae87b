"""add_experts: more experts beside those that exist, for every router and kind of layer."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from moelora_kernels import (
    MoeLoraAdapter,
    MoeLoraConfig,
    MoeLoraFFN,
    MoeLoraGroup,
    MoeLoraLinear,
    add_experts,
    collect_aux_loss,
    freeze_experts,
    link_siblings,
    load_adapter,
    record_routing,
    replace_linears,
    routing_report,
    save_adapter,
    set_tasks,
    update_balance,
)
from moelora_kernels.presets import PRESETS
from support.ffns import HIDDEN, make_ffn
from support.linears import IN, OUT, make_layer, randomise
from support.siblings import NAMES, Attention, random_x

LAYERS = {
    "ming": dict(),
    "grouped": dict(impl="grouped"),
    "reference": dict(impl="reference"),
    "shared": dict(shared_expert="always", rank=2, shared_rank=4),
    "shared A": dict(share="A"),
    "alpha/R": dict(scaling="alpha/R"),
    "goat scale": dict(scaling="sqrt(3*alpha*I/r)"),
    "numbers": dict(scaling=(0.5,) * 4),
    "mlp": dict(router="mlp"),
    "threshold": dict(select="learned_threshold", top_k=None),
    "balance": dict(balance_rate=0.1),
    "prototype": dict(router="prototype"),
    "self": dict(router="self", rank=1),
    "token_task": dict(router="token_task", score="identity", normalize="softmax"),
    "task": dict(router="task", num_tasks=3, top_k=None),
    "external": dict(router="external"),
    "none": dict(router=None),
    "sequence": dict(granularity="sequence"),
    "dropout": dict(dropout=0.3, dropout_mask="per_expert"),
    "sparse": dict(init="sparse", freeze="A"),
    "aux": dict(aux="load_balance"),
    "ranks": dict(rank=(1, 3, 2, 4)),
}


def give_tasks(layer):
    """Set what the router needs for a batch of two."""
    config = layer.config
    if config.router == "task":
        set_tasks(layer, [3, 1])
    elif config.router == "token_task":
        set_tasks(layer, torch.randn(2, config.task_embedding_dim, dtype=torch.float64))
    elif config.router == "external":
        gates = torch.zeros(2, config.num_experts, dtype=torch.float64)
        gates[:, :4] = torch.tensor([[0.5, 0.0, 1.5, 0.2], [0.1, 0.7, 0.0, 0.4]])
        set_tasks(layer, gates)
    return layer


def blocks(matrix, ranks, name):
    return matrix.split(list(ranks), dim=int("lora_B" in name))


@pytest.mark.parametrize("name", LAYERS)
def test_old_experts_keep_their_values_and_the_layer_trains(name):
    layer = give_tasks(make_layer(**LAYERS[name]))
    old = copy.deepcopy(layer)
    rank = 2 if name == "ranks" else None
    add_experts(layer, 3, rank=rank)
    config, ranks, E = layer.config, layer.config.ranks(), 4
    assert config.num_experts == 7
    assert layer.lora_B.shape == (OUT, sum(ranks))
    shared = len(ranks) - 7
    kept = [*range(E), *range(7, 7 + shared)]
    assert [config.scales(IN)[e] for e in kept] == [*old.config.scales(IN)]
    for key in ("lora_A", "lora_B"):
        actual, previous = getattr(layer, key), getattr(old, key)
        assert actual.requires_grad == previous.requires_grad
        if key == "lora_A" and config.share == "A":
            assert torch.equal(actual, previous)
            continue
        actual = blocks(actual, ranks, key)
        for e, block in zip(kept, blocks(previous, old.config.ranks(), key), strict=True):
            assert torch.equal(actual[e], block)
        for e in range(E, 7):
            assert bool(actual[e].any()) == (key == "lora_A")
    for key, tensor in old.state_dict().items():
        current = layer.state_dict()[key]
        rows = slice(tensor.shape[0]) if tensor.dim() else ...
        assert current.dtype == tensor.dtype
        if "lora_" not in key:
            assert torch.equal(current[rows], tensor), key
    give_tasks(layer)
    x = torch.randn(2, 6, IN, dtype=torch.float64)
    layer(x).square().sum().backward()
    for key, parameter in layer.named_parameters():
        if parameter.requires_grad and "router" not in key:
            assert parameter.grad is not None
    if config.balance_rate:
        update_balance(layer)
        assert layer.router.balance.bias.shape == (7,)
    if config.aux:
        assert collect_aux_loss(layer).requires_grad


def test_a_layer_with_more_experts_equals_a_new_one_with_the_same_values():
    """Nothing of the old number of experts is left in the layer: options, record, tasks."""
    layer = make_layer()
    x = torch.randn(3, 5, IN, dtype=torch.float64)
    with record_routing(layer):
        layer(x)
    add_experts(layer, 2)
    randomise(layer)
    other = make_layer(num_experts=6)
    other.load_state_dict(layer.state_dict())
    with record_routing(layer):
        assert torch.equal(layer(x), other(x))
        assert layer.record.weights.shape == (15, 2)
        assert routing_report(layer).layers[""].load.shape == (6,)
    assert layer.router.out_features == 6
    assert layer.config == other.config
    assert repr(layer) == repr(other)


@pytest.mark.parametrize("name", ("external", "none", "shared A"))
@pytest.mark.parametrize("impl", ("auto", "wide", "reference"))
def test_gates_that_you_pass_and_no_router_change_nothing(name, impl):
    options = dict(LAYERS[name], impl=impl)
    if name == "shared A":
        options.update(router="external")
    layer = give_tasks(make_layer(**options))
    x = torch.randn(2, 6, IN, dtype=torch.float64)
    before = layer(x)
    add_experts(layer, 2)
    torch.testing.assert_close(give_tasks(layer)(x), before, rtol=1e-14, atol=1e-14)


def test_sparse_gates_stay_and_dense_ones_must_be_set_again():
    layer = make_layer(router="external", impl="grouped")
    x = torch.randn(2, 6, IN, dtype=torch.float64)
    set_tasks(layer, (torch.ones(2, 1, dtype=torch.float64), torch.tensor([[1], [3]])))
    before = layer(x)
    add_experts(layer, 1)
    assert torch.equal(layer(x), before)
    dense = give_tasks(make_layer(router="external"))
    add_experts(dense, 1)
    with pytest.raises(ValueError, match="set_tasks"):
        dense(x)


def test_a_softmax_gives_new_experts_the_share_of_logit_zero():
    """The gates of the old experts shrink by the same factor, which the page names."""
    layer = make_layer(top_k=None, router_bias=False, normalize="sum")
    x = torch.randn(50, IN, dtype=torch.float64)
    with record_routing(layer):
        layer(x)
        before, logits = layer.record.weights, layer.record.logits
        add_experts(layer, 2)
        layer(x)
        after = layer.record.weights
    total = logits.exp().sum(dim=1, keepdim=True)
    torch.testing.assert_close(after[:, :4], before * total / (total + 2), rtol=0.05, atol=0.01)


def test_top_k_selects_a_new_expert_only_below_logit_zero():
    layer = make_layer(router_bias=False)
    x = torch.randn(200, IN, dtype=torch.float64)
    with record_routing(layer):
        layer(x)
        old, logits = layer.record.indices, layer.record.logits
        add_experts(layer, 1)
        layer(x)
        new = layer.record.indices
    second = logits.topk(2).values[:, 1]
    assert torch.equal(new[second > 0.05].sort().values, old[second > 0.05].sort().values)
    assert (new[second < -0.05] == 4).any(dim=1).all()
    assert (second < -0.05).any()


@pytest.mark.parametrize("options", (dict(rank=2), dict(preset="llava-mole", rank=2)), ids=str)
def test_whole_ffn_experts(options):
    layer = make_ffn(**options)
    names = [*layer.state_dict()]
    E = layer.config.num_experts
    old = {key: p.detach().clone() for key, p in layer.named_parameters()}
    add_experts(layer, 2)
    assert [*layer.state_dict()] == names
    assert len(layer.mixture.ranks) == E + 2
    for key in layer.tensor_names:
        dim = int("lora_B" in key)
        kept, new = getattr(layer, key).split([2 * E, 4], dim=dim)
        assert torch.equal(kept, old[key])
        assert bool(new.any()) != bool(dim)
    x = torch.randn(2, 7, HIDDEN, dtype=torch.float64)
    layer(x).square().sum().backward()
    assert layer.router.weight.grad.shape[0] == E + 2


def test_adapters_with_an_activation():
    base = nn.Linear(IN, IN).requires_grad_(False)
    layer = randomise(MoeLoraAdapter(base, IN, MoeLoraConfig.preset("pesc", num_experts=3, rank=2)))
    add_experts(layer, 1)
    assert layer.lora_A.shape == (8, IN)
    layer(torch.randn(4, IN)).sum().backward()
    assert layer.lora_A.grad.shape == (8, IN)


@pytest.mark.parametrize("linked", (False, True))
def test_siblings_stay_together(linked):
    model = Attention().double()
    replace_linears(model, MoeLoraConfig(num_experts=3, rank=2, top_k=2), list(NAMES))
    randomise(model)
    layers = [getattr(model, name) for name in NAMES]
    if linked:
        link_siblings(model)
    group = MoeLoraGroup(**dict(zip(NAMES, layers, strict=True)))
    x = random_x(2, 5)
    [layer(x) for layer in layers]
    add_experts(model, 2)
    randomise(model)
    together = group(x)
    assert (layers[0].link is not None) == linked
    for layer, y in zip(layers, together, strict=True):
        alone = MoeLoraLinear.from_linear(layer.base_layer, layer.config)
        alone.load_state_dict(layer.state_dict())
        torch.testing.assert_close(layer(x), alone(x))
        torch.testing.assert_close(y, alone(x))
    if linked:
        assert layers[0].link.layers == tuple(layers)
        assert layers[1](x)._base is not None or layers[1](x).grad_fn is not None


def test_layers_share_one_larger_task_gate():
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    config = MoeLoraConfig(num_experts=2, rank=2, router="task", num_tasks=3)
    replace_linears(model, config, ["0", "1"])
    set_tasks(model, [1, 2])
    add_experts(model, 2)
    assert model[0].router is model[1].router
    assert model[0].router.gate.weight.shape[0] == 4
    assert model(torch.randn(2, 3, 6)).shape == (2, 3, 6)


def test_a_file_of_a_larger_layer_loads_into_a_new_one(tmp_path):
    layer = make_layer()
    add_experts(layer, 2)
    randomise(layer)
    save_adapter(layer, tmp_path / "a.safetensors")
    other = MoeLoraLinear.from_linear(layer.base_layer, layer.config)
    load_adapter(other, tmp_path / "a.safetensors")
    x = torch.randn(4, IN, dtype=torch.float64)
    assert torch.equal(other(x), layer(x))


def test_compiled_layers_follow():
    torch._dynamo.reset()
    layer = make_layer()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(9, IN, dtype=torch.float64)
    compiled(x)
    add_experts(layer, 2)
    randomise(layer)
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-11, atol=1e-11)


def test_new_experts_train_after_inference_mode():
    layer = MoeLoraLinear(12, 6, num_experts=2, rank=2)
    with torch.inference_mode():
        add_experts(layer, 1)
    layer(torch.randn(3, 12)).sum().backward()
    assert layer.lora_B.grad.shape == (6, 6)
    assert layer.router.weight.grad is not None


def test_several_calls_and_ranks():
    layer = make_layer(scaling="alpha/R", shared_expert="always")
    scales = layer.config.scales()
    add_experts(layer, 1)
    add_experts(layer, 2, rank=5)
    assert layer.config.ranks() == (3, 3, 3, 3, 3, 5, 5, 3)
    assert {*layer.config.scales()} == {*scales}
    with pytest.raises(ValueError, match=r"rank: .*pass the rank"):
        add_experts(layer, 1)
    layer(torch.randn(3, IN, dtype=torch.float64))


def test_frozen_experts_stay_frozen_and_a_shared_one_keeps_its_place():
    layer = make_layer(shared_expert="always")
    freeze_experts(layer, [1, 4])
    add_experts(layer, 2)
    assert layer.config.frozen_experts == (1, 6)


def values(layer, experts):
    rows = [e * 3 + j for e in experts for j in range(3)]
    return layer.lora_A[rows].clone(), layer.lora_B[:, rows].clone()


@pytest.mark.parametrize("impl", ("wide", "grouped", "reference"))
@pytest.mark.parametrize("make", (torch.optim.SGD, torch.optim.AdamW), ids=("sgd", "adamw"))
def test_a_second_task_leaves_the_first_as_it_was(impl, make):
    """Continual learning with gates that you pass: the loss of task 1 keeps its bits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, 20), nn.Tanh(), nn.Linear(20, 4)).double()
    config = MoeLoraConfig(num_experts=2, rank=3, router="external", impl=impl)
    replace_linears(model.requires_grad_(False), config, ["0", "2"])
    x, targets = torch.randn(2, 40, IN, dtype=torch.float64), torch.randn(2, 40, 4).double()

    def loss(task, experts):
        gates = torch.full((1, len(experts)), 0.5, dtype=torch.float64), torch.tensor([experts])
        set_tasks(model, gates)
        return (model(x[task]) - targets[task]).square().mean()

    def train(task, experts, optimizer):
        for _ in range(5):
            optimizer.zero_grad()
            loss(task, experts).backward()
            optimizer.step()

    def optimizer():
        return make([p for p in model.parameters() if p.requires_grad], lr=0.05, weight_decay=0.1)

    train(0, [0, 1] if impl != "grouped" else [1], optimizer())
    first = [0, 1] if impl != "grouped" else [1]
    add_experts(model, 2)
    adam = optimizer()
    freeze_experts(model, [0, 1], adam)
    before = loss(0, first)
    start = loss(1, [2, 3])
    kept = [values(model[i], [0, 1]) for i in (0, 2)]
    train(1, [2, 3], adam)
    assert loss(1, [2, 3]) < start
    assert torch.equal(loss(0, first), before)
    for i, pair in zip((0, 2), kept, strict=True):
        assert all(map(torch.equal, values(model[i], [0, 1]), pair))
        assert values(model[i], [2, 3])[1].any()


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_grows_or_says_why(preset):
    config = MoeLoraConfig.preset(preset)
    if preset in ("moelora", "mocle"):
        config = config.replace(num_tasks=3)
    config = config.replace(adapter_dtype="float64")
    torch.manual_seed(0)
    if config.rank_activation:
        layer = MoeLoraAdapter(nn.Linear(64, 64).double(), 64, config)
    elif preset in ("mixlora", "llava-mole"):
        layer = MoeLoraFFN(64, 64, config=config, dtype=torch.float64)
    else:
        layer = MoeLoraLinear.from_linear(nn.Linear(64, 64).double(), config)
    if config.freeze == "AB" or config.init == "svd_segments":
        with pytest.raises(ValueError, match=r"freeze|init"):
            add_experts(layer, 2)
        return
    add_experts(layer, 2)
    assert layer.config.num_experts == config.num_experts + 2
    give_tasks(randomise(layer))(torch.randn(2, 3, 64, dtype=torch.float64)).sum().backward()
