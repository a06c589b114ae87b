"""PEFT's enum of methods; copies, state dict, repr and counts of a PeftModel."""

import copy
import inspect
import pickle
import runpy

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
from moelora_kernels.peft import MoeLoraPeftConfig  # noqa: E402
from support.copies import each_copier  # noqa: E402
from support.peft_models import (  # noqa: E402
    GATES,
    MING,
    TASKS,
    adapted,
    give_gates,
    inputs,
    randomise,
    two_adapters,
)


def test_the_method_is_a_member_of_the_enum():
    member = peft.PeftType.MOELORA
    assert member == "MOELORA"
    assert member is peft.PeftType("MOELORA")
    assert member is peft.PeftType["MOELORA"]
    assert member in list(peft.PeftType)
    assert {member: 1}["MOELORA"] == 1
    assert pickle.loads(pickle.dumps(member)) is member
    assert copy.deepcopy(member) is member
    assert isinstance(member, peft.PeftType)


def test_a_second_import_changes_no_member():
    """The module that adds MOELORA runs again, as after a reload."""
    members = {name: id(member) for name, member in peft.PeftType.__members__.items()}
    namespace = runpy.run_path(inspect.getsourcefile(MoeLoraPeftConfig))
    assert namespace["MOELORA"] is peft.PeftType.MOELORA
    assert {name: id(member) for name, member in peft.PeftType.__members__.items()} == members


@each_copier
@pytest.mark.parametrize("options", GATES.values(), ids=GATES)
def test_copies_compute_the_same_and_are_independent(options, copier):
    model, x = adapted(options), inputs()
    y = model(x)
    clone = copier(model)
    assert torch.equal(clone(x), y)
    randomise(clone, seed=5)
    with torch.no_grad():
        clone.base_model.model.layers[0].up.base_layer.weight.zero_()
    assert torch.equal(model(x), y)
    assert not torch.allclose(give_gates(clone, options)(x), y)


def test_state_dict_has_each_tensor_once():
    """An adapter does not repeat the base, and a shared task gate is saved once."""
    model = two_adapters(TASKS, MING)
    state = model.state_dict()
    assert len({t.data_ptr() for t in state.values()}) == len(state)
    assert len([k for k in state if "router_embedding" in k]) == 1
    assert len([k for k in state if k.endswith("base_layer.weight")]) == 4
    other = two_adapters(TASKS, MING)
    randomise(other, seed=9)
    other.load_state_dict(state, strict=True)
    assert torch.equal(other(inputs()), model(inputs()))


def test_repr_and_count_of_trainable_parameters(capsys):
    model = adapted(MING)
    text = repr(model)
    assert "MoeLoraTunerLinear" in text
    assert "(default): MoeLoraExperts(" in text
    assert "num_experts=3, rank=2, router=linear, select=topk, top_k=2" in text
    model.print_trainable_parameters()
    experts = 2 * 2 * 6 * (6 + 10)
    routers = 2 * 3 * (6 + 1 + 10 + 1)
    base = 2 * (6 * 10 + 10 + 10 * 6 + 6) + 6 * 4 + 4
    assert (
        f"trainable params: {experts + routers:,} || all params: {experts + routers + base:,}"
        in (capsys.readouterr().out)
    )


def test_layers_have_the_attributes_of_their_linear():
    layer = adapted().base_model.model.layers[0].up
    base = layer.get_base_layer()
    assert type(base) is nn.Linear
    assert (layer.in_features, layer.out_features) == (6, 10)
    assert layer.weight is base.weight
    assert layer.bias is base.bias
    assert layer.active_adapters == ["default"]
