"""Adapters are added, selected, replaced and deleted: what runs, and what trains?"""

import pytest
import torch

peft = pytest.importorskip("peft")
from moelora_kernels import (  # noqa: E402
    MoeLoraLinear,
    set_tasks,
)
from moelora_kernels.peft import MoeLoraPeftConfig, MoeLoraTunerLinear  # noqa: E402
from support.peft_models import (  # noqa: E402
    MING,
    TARGETS,
    TASKS,
    adapted,
    inputs,
    net,
    parameter_names,
    tuner_layers,
    two_adapters,
)


def test_the_base_of_an_adapter():
    """It is the adapter that runs before; for an adapter that does not run, the linear."""
    model = two_adapters()
    layer = model.base_model.model.layers[0].up
    first, other = (layer.moelora_experts[name] for name in ("default", "other"))
    assert first.base_layer is layer.base_layer
    assert other.base_layer is layer.base_layer
    model.base_model.set_adapter(["other", "default"])
    assert first.base_layer is other
    assert other.base_layer is layer.base_layer


def test_set_adapter_switches_what_runs_and_what_trains():
    model, x = two_adapters(), inputs()
    first = model(x)
    model.set_adapter("other")
    second = model(x)
    assert not torch.allclose(first, second)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == set(parameter_names(model, "other"))
    assert len(trained) == 4 * 2
    model.set_adapter("default")
    assert torch.equal(model(x), first)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(
        parameter_names(model, "default")
    )


def test_adapters_are_in_the_mode_of_their_base():
    """A new adapter has the mode of its base, so in evaluation it has no dropout and no noise."""
    config = MoeLoraPeftConfig(target_modules=TARGETS, **{**MING, "dropout": 0.5, "noise": 1.0})
    model = peft.inject_adapter_in_model(config, net().eval())
    assert not any(m.training for m in model.modules())
    peft.inject_adapter_in_model(config, model.train(), adapter_name="other")
    assert all(m.training for m in model.modules())


def test_adding_an_adapter_changes_neither_output_nor_training():
    model, x = adapted(), inputs()
    y = model(x)
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    model.add_adapter("other", MoeLoraPeftConfig(target_modules=["up"], **TASKS))
    assert torch.equal(model(x), y)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == trained
    model.set_adapter("other")
    set_tasks(model, [1, 2])
    torch.testing.assert_close(model(x), net()(x), rtol=1e-12, atol=1e-12)
    # A layer without the adapter "other" computes its base.
    assert torch.equal(
        model.base_model.model.layers[0].down(torch.ones(1, 10).double()),
        net().layers[0].down(torch.ones(1, 10).double()),
    )


def test_delete_adapter():
    model, x = two_adapters(), inputs()
    y = model(x)
    model.delete_adapter("other")
    assert torch.equal(model(x), y)
    assert not parameter_names(model, "other")
    assert list(model.peft_config) == ["default"]
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("other")


def test_delete_the_active_adapter():
    model, x = two_adapters(), inputs()
    model.set_adapter("other")
    y = model(x)
    model.set_adapter("default")
    with pytest.warns(UserWarning, match="default was active"):
        model.delete_adapter("default")
    assert model.active_adapters == ["other"]
    assert torch.equal(model(x), y)
    model.delete_adapter("other")
    # A PeftModel without an adapter cannot run; its inner model can.
    assert torch.equal(model.base_model.model(x), net()(x))


def test_each_adapter_has_its_own_task_gate():
    """Also if both have the same sizes, so that training one does not change the other."""
    model = two_adapters(TASKS, TASKS)
    routers = {
        name: {layer.moelora_experts[name].router for layer in tuner_layers(model)}
        for name in ("default", "other")
    }
    assert [len(gates) for gates in routers.values()] == [1, 1]
    assert not routers["default"] & routers["other"]


def test_a_deleted_task_gate_is_not_used_again():
    """A new adapter with the same name gets a new gate."""
    model = two_adapters(MING, TASKS)

    def gates():
        layers = [m for m in model.modules() if isinstance(m, MoeLoraTunerLinear)]
        return {m.moelora_experts["other"].router for m in layers if "other" in m.moelora_experts}

    (gate,) = gates()
    model.delete_adapter("other")
    assert not [m for m in model.modules() if m is gate.embedding]
    model.add_adapter("other", MoeLoraPeftConfig(target_modules=TARGETS, **TASKS))
    (again,) = gates()
    assert again is not gate


def test_set_requires_grad():
    model = two_adapters()
    parameters = {n: p for n, p in model.named_parameters() if n in parameter_names(model, "other")}
    model.base_model.set_requires_grad("other")
    assert all(p.requires_grad for p in parameters.values())
    model.base_model.set_requires_grad(["other", "default"], requires_grad=False)
    assert not any(p.requires_grad for p in model.parameters())


def test_inference_mode_freezes_the_adapter():
    config = MoeLoraPeftConfig(target_modules=TARGETS, inference_mode=True, **TASKS)
    model = peft.get_peft_model(net(), config)
    assert not any(p.requires_grad for p in model.parameters())


def test_unload_returns_the_base():
    x = inputs()
    plain = two_adapters().unload()
    assert torch.equal(plain(x), net()(x))
    assert not any(isinstance(m, (MoeLoraTunerLinear, MoeLoraLinear)) for m in plain.modules())
    assert set(plain.state_dict()) == set(net().state_dict())


@pytest.mark.parametrize(
    "second", ({**TASKS, "num_tasks": 9}, {**TASKS, "num_experts": 5}, dict(MING, router="mlp"))
)
def test_a_second_adapter_of_the_same_name_replaces_the_first(second):
    """After a second get_peft_model the first adapter has no tensors left in the model."""
    x = inputs()
    first = adapted(TASKS).base_model.model
    again, new = (
        peft.get_peft_model(base, MoeLoraPeftConfig(target_modules=TARGETS, **second))
        for base in (first, net())
    )
    keys = peft.get_peft_model_state_dict(new)
    assert {k: v.shape for k, v in peft.get_peft_model_state_dict(again).items()} == {
        k: v.shape for k, v in keys.items()
    }
    peft.set_peft_model_state_dict(again, keys)
    for m in (again, new):
        m.eval()
        if second["preset"] == "moelora":
            set_tasks(m, [4, second["num_tasks"]])
    assert torch.equal(again(x), new(x))
