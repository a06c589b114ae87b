"""Stored outputs of linked siblings: they equal those of unlinked layers after every change."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from moelora_kernels import (
    MoeLoraGroup,
    MoeLoraLinear,
    set_samples,
    set_tasks,
    update_balance,
)
from support.siblings import NAMES, pair, random_x


def double_weight(layer):
    layer.base_layer.weight.mul_(2)


def new_lora_b(layer):
    layer.lora_B = nn.Parameter(layer.lora_B * 2)


def new_data(layer):
    layer.lora_B.data = layer.lora_B.data * 2


def new_router(layer):
    layer.router = copy.deepcopy(layer.router)
    for parameter in layer.router.parameters():
        parameter.mul_(-3)


def double_router(layer):
    for parameter in layer.router.parameters():
        parameter.mul_(-3)


def router_of_other_kind(layer):
    layer.router = nn.Sequential(copy.deepcopy(layer.router), nn.Tanh())


def hook_on_base(layer):
    layer.base_layer.register_forward_hook(lambda module, args, y: 3 * y)


def new_config(layer):
    layer.config = layer.config.replace(normalize="none", temperature=0.3, top_k=1, select="topk")


def prune_b(layer):
    prune.l1_unstructured(layer, "lora_B", amount=0.5)


def parametrize_b(layer):
    nn.utils.parametrize.register_parametrization(layer, "lora_B", nn.Tanh())


def new_base(layer):
    layer.base_layer = nn.Sequential(layer.base_layer, nn.Tanh())
    layer.base_layer.out_features = layer.out_features


CHANGES = {
    change.__name__: change
    for change in (
        double_weight,
        new_lora_b,
        new_data,
        new_router,
        double_router,
        router_of_other_kind,
        hook_on_base,
        new_config,
        prune_b,
        parametrize_b,
        new_base,
    )
}
ROUTERS = {
    "linear": dict(top_k=2),
    "mlp": dict(router="mlp", top_k=2),
    "threshold": dict(select="learned_threshold"),
}


@pytest.mark.parametrize("when", ("between calls", "before the calls"))
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_sibling(change, router, when):
    if change == "new_config" and router == "threshold":
        pytest.skip("the logits of a learned threshold do not fit another selection")
    plain, linked = pair(**ROUTERS[router])
    x = random_x(2, 5)
    if when == "between calls":
        linked.q_proj(x)
    with torch.no_grad():
        for model in (plain, linked):
            CHANGES[change](model.k_proj)
    for name in ("k_proj", "v_proj", "q_proj"):
        torch.testing.assert_close(getattr(linked, name)(x), getattr(plain, name)(x))


def test_a_changed_task_router_or_its_tasks():
    plain, linked = pair(router="task", num_tasks=4)
    x = random_x(2, 5)
    ids = torch.tensor([1, 2])
    for model in (plain, linked):
        set_tasks(model, ids)
    for change in (
        lambda model: model.k_proj.router.embedding.weight.mul_(-2),
        lambda model: ids.copy_(torch.tensor([4, 3])),
        lambda model: model.k_proj.router.hold_tasks(torch.tensor([2, 2])),
    ):
        linked.q_proj(x)
        with torch.no_grad():
            change(plain)
            change(linked)
        torch.testing.assert_close(linked.k_proj(x), plain.k_proj(x))


def test_gates_that_change_in_place():
    plain, linked = pair(router="external")
    x, gates = random_x(2, 5), torch.rand(2, 3, dtype=torch.float64)
    for arguments in ((gates,), ()):
        set_tasks(linked, gates)
        set_tasks(plain, gates)
        linked.q_proj(x, *arguments)
        gates.mul_(-2)
        torch.testing.assert_close(linked.k_proj(x, *arguments), plain.k_proj(x, gates))
    linked.q_proj(x, torch.rand(2, 3, dtype=torch.float64))
    torch.testing.assert_close(linked.k_proj(x), plain.k_proj(x))


def test_the_load_of_experts_counts_called_layers_only():
    plain, linked = pair(top_k=2, balance_rate=0.1)
    x = random_x(2, 5)
    for model in (plain, linked):
        model.q_proj(x)
        model.q_proj(x)
        model.v_proj(x)
    loads = [[getattr(m, n).router.balance.load for n in NAMES] for m in (plain, linked)]
    assert loads[1][1] is None
    assert torch.equal(loads[0][0], loads[1][0])
    assert torch.equal(loads[0][2], loads[1][2])
    for model in (plain, linked):
        model.k_proj(x)
    linked.q_proj(x)
    for model in (plain, linked):
        update_balance(model)
    torch.testing.assert_close(linked.eval().k_proj(x), plain.eval().k_proj(x))


def test_requires_grad_between_calls():
    _, linked = pair(top_k=2)
    x = random_x(2, 5)
    linked.q_proj(x)
    x.requires_grad_()
    (dx,) = torch.autograd.grad(linked.k_proj(x).sum(), x)
    assert dx.any()
    linked.requires_grad_(False)
    x = random_x(2, 5)
    linked.q_proj(x)
    linked.k_proj.lora_A.requires_grad_()
    assert linked.k_proj(x).requires_grad
    assert not linked.v_proj(x).requires_grad


@pytest.mark.parametrize("name", ("q_proj", "k_proj"))
def test_a_sibling_of_another_dtype_runs_alone(name):
    _, linked = pair(top_k=2)
    linked.k_proj.float()
    x = random_x(2, 5).to(linked.get_submodule(name).lora_A.dtype)
    assert getattr(linked, name)(x).dtype == x.dtype
    x = random_x(2, 5)
    linked.q_proj(x)
    with pytest.raises(TypeError, match="x: expected the base's dtype"):
        linked.k_proj(x)


@pytest.mark.parametrize("grouped", (False, True), ids=("linked", "group"))
def test_siblings_with_different_tasks_or_samples(grouped):
    plain, linked = pair(router="task", num_tasks=4, task_gate="per_layer")
    group = MoeLoraGroup(**{name: getattr(linked, name) for name in NAMES})
    if grouped:
        for layer in group.children():
            layer.link = None

    def check(x):
        ys = group(x) if grouped else [getattr(linked, name)(x) for name in NAMES]
        for y, name in zip(ys, NAMES, strict=True):
            torch.testing.assert_close(y, getattr(plain, name)(x))

    for model in (plain, linked):
        set_tasks(model, [1, 2])
        set_tasks(model.k_proj, [3])
    check(random_x(2, 5))
    for model in (plain, linked):
        set_tasks(model, [1, 2])
        set_samples(model, [0, 0, 1, 1])
        set_samples(model.k_proj, [1, 0, 0, 1])
    check(random_x(4))


def test_group_with_a_changed_sibling():
    plain, linked = pair(top_k=2, dropout=0.5)
    group = MoeLoraGroup(**{name: getattr(linked, name) for name in NAMES})
    for model in (plain, linked):
        model.q_proj.eval()
        model.v_proj.eval()
        model.k_proj.config = model.k_proj.config.replace(dropout=0.0)
    x = random_x(2, 5)
    for y, name in zip(group(x), NAMES, strict=True):
        torch.testing.assert_close(y, getattr(plain, name)(x))


@pytest.mark.parametrize("trains", (False, True))
def test_stored_outputs_do_not_outlive_x(trains):
    """v is never called. Its output and the graph are dropped with x."""
    _, linked = pair(top_k=2)
    inputs = []
    for _ in range(3):
        x = random_x(2, 5).requires_grad_(trains).sin()
        inputs.append(weakref.ref(x))
        with torch.set_grad_enabled(trains):
            loss = linked.q_proj(x).sum() + linked.k_proj(x).sum()
        if trains:
            loss.backward()
        del x
        gc.collect()
        assert [ref() for ref in inputs] == [None] * len(inputs)
        assert not linked.q_proj.link.stored.last.outputs


def test_a_forward_without_backward_holds_one_graph():
    _, linked = pair(top_k=2)
    inputs = []
    for _ in range(3):
        x = random_x(2, 5).requires_grad_().sin()
        inputs.append(weakref.ref(x))
        linked.q_proj(x)
        del x
        gc.collect()
    assert [ref() is None for ref in inputs] == [True, True, False]
    linked.q_proj.link.forget()
    assert inputs[2]() is None


def test_a_group_with_another_layer_on_the_same_x():
    """A replaced sibling is not part of the link."""
    plain, linked = pair(top_k=2)
    x = random_x(2, 5)
    new = MoeLoraLinear(12, 6, config=plain.k_proj.config, dtype=torch.float64)
    linked.q_proj(x)
    plain.k_proj = linked.k_proj = new
    for name in NAMES:
        torch.testing.assert_close(getattr(linked, name)(x), getattr(plain, name)(x))
    assert torch.equal(linked.k_proj(x), new(x))
