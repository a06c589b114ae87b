"""freeze_experts and add_experts on a PeftModel: gradients, configs, files, several adapters."""

import json

import pytest
import torch

peft = pytest.importorskip("peft")

from moelora_kernels import add_experts, check_trainable, freeze_experts, set_tasks  # noqa: E402
from moelora_kernels.peft import MoeLoraPeftConfig  # noqa: E402
from support.peft_models import (  # noqa: E402
    EXTERNAL,
    GATES,
    MING,
    TASKS,
    adapted,
    give_gates,
    inputs,
    llama,
    net,
    new_adapter,
    randomise,
    tuner_layers,
    two_adapters,
)


def experts_of(model, name="default"):
    return [layer.moelora_experts[name] for layer in tuner_layers(model)]


def blocks(experts, name, matrix=None):
    matrix = getattr(experts, name) if matrix is None else matrix
    return matrix.split(list(experts.config.ranks()), dim=int(name == "lora_B"))


GROWING = {name: options for name, options in GATES.items() if name not in ("lora", "shared")}


@pytest.mark.parametrize("options", GROWING.values(), ids=GROWING)
def test_frozen_experts_have_no_gradient_and_do_not_move(options):
    model = adapted(options).train()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1
    )
    freeze_experts(model, [0, 2], optimizer)
    before = [
        (e, name, [b.clone() for b in blocks(e, name)])
        for e in experts_of(model)
        for name in ("lora_A", "lora_B")
    ]
    for _ in range(3):
        optimizer.zero_grad()
        model(inputs()).square().sum().backward()
        for e in experts_of(model):
            for name in ("lora_A", "lora_B"):
                zero = [not g.any() for g in blocks(e, name, getattr(e, name).grad)]
                assert zero == [True, False, True]
        optimizer.step()
    for e, name, old in before:
        same = [torch.equal(a, b) for a, b in zip(blocks(e, name), old, strict=True)]
        assert same == [True, False, True]
    assert check_trainable(model, inputs()).ok


def test_a_saved_adapter_keeps_its_frozen_experts(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path / "plain")
    assert "frozen_experts" not in json.loads(
        (tmp_path / "plain" / "adapter_config.json").read_text()
    )
    freeze_experts(model, [1])
    assert model.peft_config["default"].frozen_experts == [1]
    model.save_pretrained(tmp_path / "a")
    loaded = peft.PeftModel.from_pretrained(net(), tmp_path / "a", is_trainable=True)
    assert all(e.config.frozen_experts == (1,) for e in experts_of(loaded))
    freeze_experts(loaded, [])
    assert loaded.peft_config["default"].frozen_experts == []
    loaded.save_pretrained(tmp_path / "b")
    again = peft.PeftModel.from_pretrained(net(), tmp_path / "b")
    assert all(e.config.frozen_experts == () for e in experts_of(again))


def test_a_config_can_freeze():
    model = new_adapter(MING, frozen_experts=[0])
    assert all(e.config.frozen_experts == (0,) for e in experts_of(model))


@pytest.mark.parametrize("options", GROWING.values(), ids=GROWING)
def test_a_larger_adapter_is_saved_and_loaded(options, tmp_path):
    model = adapted(options)
    names = [*model.state_dict()]
    add_experts(model, 2)
    assert [*model.state_dict()] == names
    assert model.peft_config["default"].num_experts == 5
    randomise(model)
    if options is EXTERNAL:
        gates = torch.tensor([[0.2, 0.0, 1.5, 0.1, 0.7]], dtype=torch.float64)
        set_tasks(model, gates)
    expected = model(inputs())
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(net(), tmp_path).eval()
    if options is EXTERNAL:
        set_tasks(loaded, gates)
    else:
        give_gates(loaded, options)
    assert torch.equal(loaded(inputs()), expected)
    assert loaded.peft_config["default"].moe_lora_config() == experts_of(model)[0].config


def test_training_after_growth_moves_only_the_new_experts():
    model = adapted(TASKS).train()
    add_experts(model, 1)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    freeze_experts(model, [0, 1, 2], optimizer)
    old = [(e, n, [b.clone() for b in blocks(e, n)]) for e in experts_of(model) for n in
           ("lora_A", "lora_B")]  # fmt: skip
    for _ in range(3):
        optimizer.zero_grad()
        model(inputs()).square().sum().backward()
        optimizer.step()
    for e, name, before in old:
        same = [torch.equal(a, b) for a, b in zip(blocks(e, name), before, strict=True)]
        assert same == [True, True, True, False]
    routers = {id(e.router) for e in experts_of(model)}
    assert len(routers) == 1


def test_only_active_adapters_change():
    model = two_adapters(MING, EXTERNAL)
    model.set_adapter("other")
    freeze_experts(model, [1])
    add_experts(model, 1)
    for name, count, frozen in (("default", 3, ()), ("other", 4, (1,))):
        assert model.peft_config[name].num_experts == count
        for e in experts_of(model, name):
            assert (e.config.num_experts, e.config.frozen_experts) == (count, frozen)
    model.set_adapter("default")
    model(inputs())


def test_parts_and_merged_adapters_are_refused():
    model = adapted(TASKS)
    part = model.base_model.model.layers[0]
    with pytest.raises(ValueError, match="whole PeftModel"):
        add_experts(part, 1)
    set_tasks(model, [1])
    model.merge_adapter()
    for call in (lambda: add_experts(model, 1), lambda: freeze_experts(model, [0])):
        with pytest.raises(ValueError, match="inactive or merged"):
            call()
    assert all(e.config.num_experts == 3 for e in experts_of(model))


def test_gradient_checkpointing_of_a_language_model():
    """A Llama in which blocks are checkpointed has the gradients of one that is not."""
    ids = torch.tensor([[5, 6, 7, 8]])
    grads = []
    for checkpointing in (False, True):
        config = MoeLoraPeftConfig(target_modules=["q_proj", "down_proj"], **MING)
        model = randomise(peft.get_peft_model(llama(), config)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        freeze_experts(model, [1])
        model(ids, labels=ids).loss.backward()
        grads.append([p.grad for n, p in model.named_parameters() if p.requires_grad])
        for e in experts_of(model):
            assert not blocks(e, "lora_B", e.lora_B.grad)[1].any()
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
