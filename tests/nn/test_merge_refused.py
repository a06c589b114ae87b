"""Layers that cannot be merged raise an error that says why, and stay unmerged."""

import pytest
import torch
from torch import nn

from moelora_kernels import (
    MoeLoraLinear,
    merge_adapter,
    set_tasks,
)
from support.linears import IN, OUT, TASK, PackedLinear, Prototype, make_layer, task_layer


def test_merging_twice_or_unmerging_nothing_raises():
    layer = task_layer()
    with pytest.raises(RuntimeError, match="the layer is not merged"):
        layer.unmerge()
    layer.merge(3)
    weight = layer.weight
    with pytest.raises(RuntimeError, match=r"merged with task 3 already; unmerge\(\) first"):
        layer.merge(4)
    assert layer.weight is weight


@pytest.mark.parametrize(
    ("task", "match"),
    (
        (None, "task: router='task' needs a task id, 1 to 16"),
        (0, r"expected 1 to 16, got \[0\]"),
        (17, r"expected 1 to 16, got \[17\]"),
        (True, "task: expected a task id, 1 to 16, got True"),
        (1.0, "task: expected a task id, 1 to 16, got 1.0"),
    ),
    ids=str,
)
def test_a_task_out_of_range_is_named(task, match):
    """0 is padding. The original has an embedding for it that never trains."""
    layer = task_layer()
    set_tasks(layer, [5])
    for call in (layer.merge, layer.export_lora):
        with pytest.raises(ValueError, match=match):
            call(task)
    assert not layer.merged
    assert layer.router.task_ids.tolist() == [5]


@pytest.mark.parametrize("router", ("task", "external"))
@pytest.mark.parametrize("task", ("ner", {3}, 2**70), ids=str)
def test_a_task_of_a_wrong_type_is_named(router, task):
    layer = task_layer() if router == "task" else make_layer(router=router, router_bias=False)
    with pytest.raises(TypeError, match="task: expected a task id, or a gate of floats, got "):
        layer.merge(task)
    assert not layer.merged


def test_adapters_without_values_are_named():
    """The adapters are still on the meta device, because no adapter file was loaded."""
    layer = task_layer()
    for name in ("lora_A", "lora_B"):
        setattr(layer, name, nn.Parameter(getattr(layer, name).to("meta")))
    with pytest.raises(ValueError, match="lora_A: it is on the meta device and has no values"):
        layer.merge(3)
    assert not layer.merged


def test_an_external_gate_of_a_wrong_shape_is_named():
    layer = make_layer(router="external", router_bias=False)
    for task, match in (
        (None, r"task: router='external' needs the gate to merge, floats \[4\]"),
        (3, r"gates: expected floats \[..., 4\]"),
        (torch.rand(5), r"gates: expected floats \[..., 4\]"),
        (torch.rand(2, 4), r"task: expected one gate \[4\], got 2 rows"),
    ):
        with pytest.raises(ValueError, match=match):
            layer.merge(task)


@pytest.mark.parametrize(
    ("options", "match"),
    (
        ({}, "router='linear', one gate per token"),
        ({"granularity": "sequence"}, "router='linear', one gate per sequence"),
        ({"router": "mlp", "router_bias": False}, "router='mlp', one gate per token"),
        ({"router": Prototype(4), "router_bias": False}, "router=a module, one gate per token"),
    ),
    ids=str,
)
def test_gates_that_depend_on_x_raise(options, match):
    layer = make_layer(**options)
    for call in (layer.merge, layer.export_lora):
        with pytest.raises(ValueError, match=f"task: its gate depends on x .{match}.*no single"):
            call(3)


def test_a_gate_with_sampled_experts_raises():
    """The experts are sampled in every forward, so there is no single weight."""
    layer = task_layer(top_k=2, select="sampling")
    with pytest.raises(ValueError, match="task: its experts are sampled in every forward"):
        layer.merge(3)


class Activated(MoeLoraLinear):
    """A layer with a ReLU after the experts, so that W + delta W is not its weight."""

    def forward(self, x, gates=None):
        return super().forward(x, gates).relu()


def test_a_layer_that_overrides_forward_raises():
    layer = Activated.from_linear(nn.Linear(IN, OUT), num_experts=4, **TASK)
    for call in (layer.merge, layer.export_lora):
        with pytest.raises(ValueError, match="layer: Activated overrides forward"):
            call(3)
    with pytest.raises(ValueError, match="0: the experts of a Activated are not linear"):
        merge_adapter(nn.Sequential(layer), 3)


def refused_bases():
    hooked = nn.Linear(IN, OUT)
    hooked.register_forward_hook(lambda module, args, y: y)
    eight_bits = nn.Linear(IN, OUT)
    eight_bits.weight = nn.Parameter(
        eight_bits.weight.detach().to(torch.float8_e4m3fn), requires_grad=False
    )
    empty = nn.Linear(IN, OUT)
    empty.weight = nn.Parameter(torch.empty(0), requires_grad=False)
    return {
        # ZeRO-3 empties a weight outside its forward.
        "empty": (empty, "a Linear with a weight of Parameter"),
        "packed": (PackedLinear(nn.Linear(IN, OUT)), "a PackedLinear with .*int8"),
        "hooked": (hooked, "hooked .*a Linear with a weight of Parameter, torch.float32"),
        "float8": (eight_bits, "a Linear with .*float8"),
        "subclass": (type("Mine", (nn.Linear,), {})(IN, OUT), "a Mine with"),
        "meta": (nn.Linear(IN, OUT, device="meta"), "on the meta device"),
    }


@pytest.mark.parametrize("name", refused_bases())
def test_a_base_without_a_plain_weight_raises(name):
    """A delta cannot be added to codes or under a hook. export_lora does not read the base."""
    base, match = refused_bases()[name]
    options = {**TASK, "adapter_dtype": "float32"}
    layer = MoeLoraLinear.from_linear(base, num_experts=4, **options)
    with pytest.raises(ValueError, match=f"base_layer: .*{match}"):
        layer.merge(3)
    assert not layer.merged
    assert [tuple(t.shape) for t in layer.export_lora(3)] == [(12, IN), (OUT, 12)]


def test_a_sum_beyond_the_dtype_raises_and_changes_nothing():
    layer = task_layer(torch.float16, nn.Linear(IN, OUT, dtype=torch.float16))
    with torch.no_grad():
        layer.lora_A.fill_(6e4)
        layer.lora_B.fill_(6e4)
    with pytest.raises(
        ValueError, match=r"task: W \+ delta W of task 3 is not finite in .*float16"
    ):
        layer.merge(3)
    assert not layer.merged
