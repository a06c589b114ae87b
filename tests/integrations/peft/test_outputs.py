"""Outputs and gradients with one or more active adapters; functions of this package on them."""

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
from moelora_kernels import (  # noqa: E402
    MoeLoraLinear,
    adapter_parameters,
    collect_aux_loss,
    record_routing,
    set_tasks,
    warmup,
)
from moelora_kernels.peft import MoeLoraPeftConfig  # noqa: E402
from support.peft_models import (  # noqa: E402
    EXTERNAL,
    GATES,
    LORA,
    MING,
    TARGETS,
    TASKS,
    adapted,
    delta_of_token,
    give_gates,
    inputs,
    net,
    parameter_names,
    two_adapters,
)


@pytest.mark.parametrize("options", GATES.values(), ids=GATES)
def test_a_new_adapter_is_the_base(options):
    x, base = inputs(), net()
    model = peft.get_peft_model(net(), MoeLoraPeftConfig(target_modules=TARGETS, **options))
    give_gates(model, options).eval()
    # B is zero, so the adapter adds exactly zero. The base's product is computed by another call.
    torch.testing.assert_close(model(x), base(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("active", (["default"], ["other"], ["default", "other"]), ids=str)
def test_active_adapters_add_up(active):
    """y equals the formulas of a task gate and of a plain LoRA, token by token."""
    model = two_adapters(TASKS, LORA)
    model.base_model.set_adapter(active)
    layer = model.base_model.model.layers[0].up
    mixture, lora = layer.moelora_experts["default"], layer.moelora_experts["other"]
    x = inputs()
    if "default" in active:
        set_tasks(model, [3, 1])
    y = layer(x)
    embedding, gate = mixture.router.embedding.weight, mixture.router.gate.weight
    for sample, task in enumerate((3, 1)):
        gates = torch.softmax(gate @ embedding[task], dim=0)
        for position in range(3):
            token = x[sample, position]
            expected = layer.base_layer.weight @ token + layer.base_layer.bias
            if "default" in active:
                # alpha 32 over R = 3 experts of rank 2
                expected = expected + delta_of_token(
                    token, mixture.lora_A, mixture.lora_B, gates, 32 / 6, 2
                )
            if "other" in active:
                expected = expected + delta_of_token(
                    token, lora.lora_A, lora.lora_B, [1.0], 32 / 3, 3
                )
            # The gate is float32 in every dtype of the layer.
            torch.testing.assert_close(y[sample, position], expected, rtol=1e-6, atol=1e-6)


def test_gradients_of_several_active_adapters():
    model = two_adapters(MING, LORA)
    model.base_model.set_adapter(["default", "other"])
    layer = model.base_model.model.layers[0].up
    x = inputs().requires_grad_()
    tensors = [x, *[p for p in layer.parameters() if p.requires_grad]]
    assert len(tensors) == 1 + 4 + 2

    def parts():
        base = layer.base_layer(x)
        for experts in layer.moelora_experts.values():
            alone = MoeLoraLinear.from_linear(layer.base_layer, experts.config)
            alone.lora_A, alone.lora_B = experts.lora_A, experts.lora_B
            alone.router = experts.router
            base = base + (alone(x) - layer.base_layer(x))
        return base

    actual = torch.autograd.grad(layer(x).square().sum(), tensors)
    expected = torch.autograd.grad(parts().square().sum(), tensors)
    for g, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(g, e, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", GATES.values(), ids=GATES)
def test_disable_adapter_gives_the_base(options):
    x, base = inputs(), net()
    model = adapted(options)
    y = model(x)
    assert not torch.allclose(y, base(x))
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    with model.disable_adapter():
        assert torch.equal(model(x), base(x))
    assert torch.equal(model(x), y)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == trained
    with pytest.raises(KeyError, match="inside"), model.disable_adapter():
        raise KeyError("inside")
    assert torch.equal(model(x), y)


def test_the_base_is_called_only_under_several_adapters():
    """One adapter over a dense base reads its weight. With a second adapter the base is called."""
    model = two_adapters(MING, LORA)
    layer = model.base_model.model.layers[0].up
    calls = []
    layer.base_layer.register_forward_hook(lambda *_: calls.append(1))
    layer(inputs())
    assert calls == [1]
    layer.base_layer._forward_hooks.clear()
    original = nn.Linear.forward
    try:
        nn.Linear.forward = lambda *_: calls.append(2)
        layer(inputs())
    finally:
        nn.Linear.forward = original
    assert calls == [1]


def test_samples_of_a_batch_cannot_choose_adapters():
    model = two_adapters()
    with pytest.raises(ValueError, match="adapter_names"):
        model(inputs(), adapter_names=["default", "other"])


def test_set_tasks_sets_the_active_adapters():
    model = two_adapters(TASKS, dict(TASKS, num_tasks=9))
    with pytest.raises(ValueError, match="1 to 4"):
        set_tasks(model, [9, 1])
    model.set_adapter("other")
    set_tasks(model, [9, 1])
    with model.disable_adapter():
        set_tasks(model, [8, 1])
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match="1 to 4"):
        set_tasks(model, [9, 1])
    model.add_adapter("gated", MoeLoraPeftConfig(target_modules=TARGETS, **EXTERNAL))
    with pytest.raises(ValueError, match="external"):
        set_tasks(model, torch.ones(1, 3))


def test_adapter_parameters_are_those_of_the_active_adapters():
    model = two_adapters(TASKS, LORA)
    names = {id(p): n for n, p in model.named_parameters()}
    assert [names[id(p)] for p in adapter_parameters(model)] == parameter_names(model, "default")
    model.base_model.set_adapter(["default", "other"])
    assert len(adapter_parameters(model)) == 4 * 2 + 2 + 4 * 2


def test_routing_and_auxiliary_losses_of_the_active_adapters():
    balanced = dict(MING, aux={"load_balance": 0.5, "z": 0.1})
    model, x = two_adapters(balanced, balanced), inputs()
    with pytest.raises(RuntimeError, match="run a forward"):
        collect_aux_loss(model)
    model(x)
    loss = collect_aux_loss(model)
    loss.backward()
    moved = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    routers = {n for n in parameter_names(model, "default") if "moelora_router" in n}
    # The input of a router depends on the adapters of the layers below.
    assert routers <= moved <= set(parameter_names(model, "default"))
    with model.disable_adapter():
        model(x)
        assert collect_aux_loss(model) == 0
    with record_routing(model):
        model(x)
        experts = model.base_model.model.layers[0].up.moelora_experts
        assert experts["default"].record.indices.shape == (6, 2)
        assert experts["other"].record.indices is None


@pytest.mark.parametrize("options", (MING, TASKS, EXTERNAL), ids=("ming", "tasks", "external"))
def test_warmup_runs_the_active_adapters(options):
    model = two_adapters(options, dict(TASKS, num_experts=5))
    y = model(inputs())
    # The inactive adapter has no tasks, and needs none.
    warmup(model, (1, 3), batch=2)
    assert torch.equal(model(inputs()), y)
    model.base_model.set_adapter(["default", "other"])
    set_tasks(model, [3, 1])
    warmup(model, (1,), batch=2)


def test_a_compiled_model_gives_the_same():
    model, x = two_adapters(MING, LORA), inputs()
    model.base_model.set_adapter(["default", "other"])
    layer = model.base_model.model.layers[0].up
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-9, atol=1e-9)
