"""A merged layer: its state dict, copies, tasks, training, compile and siblings."""

import copy
import pickle

import pytest
import torch
from torch import nn

from moelora_kernels import (
    MoeLoraGroup,
    adapter_state_dict,
    link_siblings,
    load_adapter_state_dict,
    set_tasks,
)
from support.linears import IN, OUT, make_layer, task_layer


def test_a_merged_layer_is_one_linear():
    """dx is dy (W + delta W); A and B have no gradient."""
    layer = task_layer()
    layer.merge(3)
    x = torch.randn(2, 3, IN, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, 3, OUT, dtype=torch.float64)
    y = layer(x)
    assert torch.equal(y, nn.functional.linear(x, layer.weight, layer.bias))
    dx, da, db = torch.autograd.grad(y, (x, layer.lora_A, layer.lora_B), dy, allow_unused=True)
    torch.testing.assert_close(dx, dy @ layer.weight)
    assert da is None
    assert db is None
    assert "merged_task=3" in repr(layer)


def test_a_state_dict_has_the_unmerged_base():
    """The state dict has the base weight. Loading into a merged layer raises."""
    layer = task_layer()
    before = {n: t.clone() for n, t in layer.state_dict().items()}
    layer.merge(3)
    assert layer.state_dict().keys() == before.keys()
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    other = {n: torch.zeros_like(t) for n, t in before.items()}
    with pytest.raises(RuntimeError, match=r"merged with task 3; unmerge\(\) before other values"):
        layer.load_state_dict(other)
    adapter = {n: torch.zeros_like(t) for n, t in adapter_state_dict(layer).items()}
    with pytest.raises(ValueError, match=r"model: the layer is merged with task 3, unmerge first"):
        load_adapter_state_dict(layer, adapter)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("copied", (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))))
def test_copies_and_casts_of_a_merged_layer(copied):
    layer = task_layer()
    x = torch.randn(4, IN, dtype=torch.float64)
    layer.merge(3)
    other = copied(layer)
    assert torch.equal(other(x), layer(x))
    other.unmerge()
    assert layer.merged
    assert torch.equal(other.weight, layer.base_layer.weight)
    layer.to(torch.bfloat16)
    assert layer(x.bfloat16()).dtype == torch.bfloat16
    layer.unmerge()
    assert torch.equal(layer.weight, other.weight.bfloat16())


def test_other_tasks_than_the_merged_one_raise():
    """A merged layer computes its own task only, so other tasks raise."""
    layer = task_layer()
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    set_tasks(layer, [5, 3])
    layer.merge(3)
    set_tasks(layer, [3, 3])
    set_tasks(layer, torch.tensor([3]))
    for tasks in ([3, 5], [5], [5, 5]):
        with pytest.raises(ValueError, match=r"tasks: the layer is merged with task 3, got \["):
            set_tasks(layer, tasks)
    assert layer.router.task_ids.tolist() == [3]
    layer(x)
    layer.unmerge()
    set_tasks(layer, [5, 3])


def test_other_modules_with_an_attribute_merged_are_ignored():
    """PEFT's LoRA layers have an attribute `merged`, too, but no task."""
    model = nn.ModuleDict({"own": task_layer(), "plain": make_layer(router=None)})
    model["other"] = nn.Linear(IN, OUT)
    model["other"].merged = True
    model["plain"].merge()
    set_tasks(model, [5, 3])
    model["plain"].unmerge()
    load_adapter_state_dict(model, adapter_state_dict(model))


def test_gates_are_not_compared_with_a_merged_task():
    """Gates are for layers with external gates, ids for layers with task gates."""
    gated = make_layer(router="external", router_bias=False)
    model = nn.ModuleList([task_layer(), gated]).eval()
    gates = torch.rand(2, 4)
    model[0].merge(3)
    set_tasks(model, gates)
    assert torch.equal(gated.external_gates, gates)
    model[0].unmerge()
    gated.merge(gates[0])
    set_tasks(model, [3, 5])
    assert model[0].router.task_ids.tolist() == [3, 5]


def test_several_tasks_of_one_sequence_are_one_gate():
    """The gate is that of the mean of the embeddings; order and padding do not matter."""
    layer = task_layer()
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    set_tasks(layer, [[5, 3, 0], [3, 5, 0]])
    y = layer(x)
    layer.merge([3, 5])
    torch.testing.assert_close(layer(x), y, rtol=1e-12, atol=1e-12)
    set_tasks(layer, [[0, 3, 5], [5, 0, 3]])
    for tasks in ([3, 5], [[3, 0], [3, 5]], [[3, 3, 5]]):
        with pytest.raises(ValueError, match=r"tasks: the layer is merged with task \[3, 5\]"):
            set_tasks(layer, tasks)
    layer.unmerge()
    layer.merge(3)
    set_tasks(layer, [[3, 0], [0, 3]])


def test_other_gates_than_the_merged_one_raise():
    layer = make_layer(router="external", router_bias=False).eval()
    gate = torch.tensor([0.5, 0.25, 0.0, 2.0])
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    layer.merge(gate)
    set_tasks(layer, gate.expand(2, 4))
    with pytest.raises(ValueError, match="tasks: the layer is merged, got"):
        set_tasks(layer, torch.stack([gate, gate + 1]))
    with pytest.raises(ValueError, match=r"gates: the layer is merged; unmerge\(\) before"):
        layer(x, gate[None])


@pytest.mark.parametrize("kind", ("gate", "task"))
def test_later_writes_of_the_caller_do_not_change_the_merged_task(kind):
    """A caller may fill the same buffer of gates for every batch."""
    if kind == "gate":
        layer = make_layer(router="external", router_bias=False).eval()
        values, other = torch.tensor([0.5, 0.25, 0.0, 2.0]), 1.0
    else:
        layer, values, other = task_layer(), [3, 0], 5
    first = values.clone() if kind == "gate" else [*values]
    layer.merge(values)
    values[0] = other
    set_tasks(layer, torch.as_tensor(first)[None])
    with pytest.raises(ValueError, match="tasks: the layer is merged"):
        set_tasks(layer, torch.as_tensor(values)[None])


def test_a_hook_on_the_base_after_the_merge_raises():
    layer = task_layer().eval()
    layer.merge(3)
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    y = layer(x)
    hook = layer.base_layer.register_forward_hook(lambda module, args, out: out * 2)
    with pytest.raises(RuntimeError, match=r"merged with task 3\. Since then the base got hooks"):
        layer(x)
    hook.remove()
    assert torch.equal(layer(x), y)


def test_a_merged_layer_does_not_train():
    """y does not depend on the adapters, so a training step would change nothing."""
    layer = task_layer()
    layer.merge(3)
    x = torch.randn(4, IN, dtype=torch.float64)
    layer.train()
    with pytest.raises(RuntimeError, match=r"merged with task 3 and does not train; unmerge\(\)"):
        layer(x)
    with torch.no_grad():
        y = layer(x)
    layer.eval()
    assert torch.equal(layer(x), y)
    layer.lora_A.requires_grad_(False)
    with pytest.raises(RuntimeError, match="does not train"):
        layer.train()(x)
    layer.requires_grad_(False)
    assert torch.equal(layer(x), y)


def test_a_merged_layer_checks_its_input():
    layer = task_layer()
    layer.merge(3)
    with pytest.raises(ValueError, match=r"x: expected \[..., 12\]"):
        layer(torch.randn(4, 5, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"x: expected the base's dtype torch.float64"):
        layer(torch.randn(4, IN))


def test_under_autocast_and_compiled():
    torch.manual_seed(0)
    layer = task_layer(torch.float32, nn.Linear(IN, OUT))
    layer.merge(3)
    x = torch.randn(4, IN)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))
        assert layer(x).dtype == torch.bfloat16
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), layer(x))
    layer.unmerge()
    set_tasks(layer, [5])
    torch.testing.assert_close(compiled(x), layer(x))


@pytest.mark.parametrize("linked", (True, False))
def test_a_sibling_can_be_merged_and_the_others_not(linked):
    """A linked sibling must not return an output from before the merge."""
    siblings = {n: task_layer(seed=i) for i, n in enumerate(("q_proj", "k_proj"))}
    siblings["k_proj"].router = siblings["q_proj"].router
    block = nn.Module()
    for name, layer in siblings.items():
        block.add_module(name, layer)
    group = MoeLoraGroup(**siblings)
    set_tasks(block, [3])
    x = torch.randn(4, IN, dtype=torch.float64)
    q, k = group(x)
    if linked:
        link_siblings(block, [("q_proj", "k_proj")])
        siblings["q_proj"](x)
    siblings["k_proj"].merge(3)
    merged = nn.functional.linear(x, siblings["k_proj"].weight, siblings["k_proj"].bias)
    for found_q, found_k in (group(x), (siblings["q_proj"](x), siblings["k_proj"](x))):
        torch.testing.assert_close(found_q, q, rtol=1e-12, atol=1e-12)
        assert torch.equal(found_k, merged)
    torch.testing.assert_close(merged, k, rtol=1e-12, atol=1e-12)
    siblings["q_proj"](x)
    siblings["k_proj"].unmerge()
    assert torch.equal(siblings["k_proj"](x), k)
