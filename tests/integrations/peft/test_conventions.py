"""PEFT's conventions, one by one: registration, adapters that come and go, targets."""

import copy
import io
import pickle

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
from moelora_kernels.peft import MoeLoraPeftConfig, MoeLoraTunerLinear  # noqa: E402
from support.peft_models import (  # noqa: E402
    EXTERNAL,
    GATES,
    LORA,
    MING,
    TASKS,
    delta_of_token,
    give_gates,
    inputs,
    llama,
    net,
    randomise,
)

TARGETS = ["up", "down"]
UP = "base_model.model.layers.0.up"


def adapted(options=MING, base=None, **more):
    """A PeftModel in evaluation whose adapter is not zero."""
    config = MoeLoraPeftConfig(**{"target_modules": TARGETS, **options, **more})
    model = peft.get_peft_model(net() if base is None else base, config)
    return give_gates(randomise(model), options).eval()


def two_adapters(first=MING, second=LORA):
    """Adapters "default" and "other"; the first is active."""
    model = adapted(first)
    model.add_adapter("other", MoeLoraPeftConfig(target_modules=TARGETS, **second))
    randomise(model, seed=1)
    return give_gates(model, first).eval()


def tuner_layers(model):
    return [m for m in model.modules() if isinstance(m, MoeLoraTunerLinear)]


def own_names(model, name):
    return [n for n, _ in model.named_parameters() if f".{name}." in n]


# --- the method ---------------------------------------------------------------------------------


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


def test_a_member_that_exists_is_left_alone():
    from moelora_kernels.peft.config import _add_peft_type

    before = list(peft.PeftType)
    assert _add_peft_type("LORA") is peft.PeftType.LORA
    assert _add_peft_type("MOELORA") is peft.PeftType.MOELORA
    assert list(peft.PeftType) == before


# --- what an adapter computes -------------------------------------------------------------------


@pytest.mark.parametrize("options", GATES.values(), ids=GATES)
def test_a_new_adapter_is_the_base(options):
    x, base = inputs(), net()
    model = peft.get_peft_model(net(), MoeLoraPeftConfig(target_modules=TARGETS, **options))
    give_gates(model, options).eval()
    # B is zero, so that the adapter adds an exact zero; the base's product is another call.
    torch.testing.assert_close(model(x), base(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("active", (["default"], ["other"], ["default", "other"]), ids=str)
def test_active_adapters_add_up(active):
    """Against the formulas of a task gate and of a plain LoRA, token by token."""
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
            # The gate is made in float32 whatever the layer's dtype is.
            torch.testing.assert_close(y[sample, position], expected, rtol=1e-6, atol=1e-6)


def test_gradients_of_several_active_adapters_are_those_of_the_sum():
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

    found = torch.autograd.grad(layer(x).square().sum(), tensors)
    expected = torch.autograd.grad(parts().square().sum(), tensors)
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", GATES.values(), ids=GATES)
def test_disable_adapter_is_exactly_the_base_and_is_undone(options):
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


def test_a_read_base_stays_read_under_one_adapter():
    """One adapter over a dense base takes its weight into the fused product; a second calls it."""
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


# --- adapters come and go -----------------------------------------------------------------------


def test_the_base_of_an_adapter():
    """The one that runs before it; of an adapter that does not run, the linear."""
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
    assert trained == set(own_names(model, "other"))
    assert len(trained) == 4 * 2
    model.set_adapter("default")
    assert torch.equal(model(x), first)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(
        own_names(model, "default")
    )


def test_adapters_are_in_the_mode_of_their_base():
    """A model in evaluation that is given an adapter must not start to drop and to draw."""
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
    # Layers that "other" is not in run as their base.
    assert torch.equal(
        model.base_model.model.layers[0].down(torch.ones(1, 10).double()),
        net().layers[0].down(torch.ones(1, 10).double()),
    )


def test_delete_adapter():
    model, x = two_adapters(), inputs()
    y = model(x)
    model.delete_adapter("other")
    assert torch.equal(model(x), y)
    assert not own_names(model, "other")
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
    # A PeftModel without an adapter does not run, with any method; what it wraps does.
    assert torch.equal(model.base_model.model(x), net()(x))


def test_each_adapter_has_a_task_gate_of_its_own():
    """Also where the sizes of both are the same: training one leaves the other as it was."""
    model = two_adapters(TASKS, TASKS)
    of = {
        name: {layer.moelora_experts[name].router for layer in tuner_layers(model)}
        for name in ("default", "other")
    }
    assert [len(gates) for gates in of.values()] == [1, 1]
    assert not of["default"] & of["other"]


def test_a_deleted_task_gate_is_not_taken_again():
    """An adapter of the same name starts with a gate of its own."""
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
    own = {n: p for n, p in model.named_parameters() if n in own_names(model, "other")}
    model.base_model.set_requires_grad("other")
    assert all(p.requires_grad for p in own.values())
    model.base_model.set_requires_grad(["other", "default"], requires_grad=False)
    assert not any(p.requires_grad for p in model.parameters())


def test_inference_mode_freezes_the_adapter():
    config = MoeLoraPeftConfig(target_modules=TARGETS, inference_mode=True, **TASKS)
    model = peft.get_peft_model(net(), config)
    assert not any(p.requires_grad for p in model.parameters())


def test_unload_gives_the_base_back():
    x = inputs()
    plain = two_adapters().unload()
    assert torch.equal(plain(x), net()(x))
    assert not any(isinstance(m, (MoeLoraTunerLinear, MoeLoraLinear)) for m in plain.modules())
    assert set(plain.state_dict()) == set(net().state_dict())


# --- where adapters go --------------------------------------------------------------------------


def adapted_names(model):
    return {n for n, m in model.named_modules() if isinstance(m, MoeLoraTunerLinear)}


@pytest.mark.parametrize(
    ("where", "names"),
    (
        (dict(target_modules=["up"]), {"layers.0.up", "layers.1.up"}),
        (dict(target_modules=r".*\.0\.(up|down)"), {"layers.0.up", "layers.0.down"}),
        (
            dict(target_modules=TARGETS, exclude_modules=["0.down"], layers_to_transform=[0]),
            {"layers.0.up"},
        ),
        (
            dict(target_modules=["up"], layers_to_transform=1, layers_pattern="layers"),
            {"layers.1.up"},
        ),
        (
            dict(target_modules=["up", "head"], exclude_modules=r".*layers\.1.*"),
            {"layers.0.up", "head"},
        ),
    ),
    # A set has another order in another process.
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),
)
def test_targets(where, names):
    # PEFT counts layers of a list that lies in a module.
    base = nn.ModuleDict({"body": net()})
    model = peft.get_peft_model(base, MoeLoraPeftConfig(**where, **MING))
    assert adapted_names(model.base_model.model) == {f"body.{name}" for name in names}


def test_all_linear_is_all_but_the_head_and_our_own_routers():
    model = peft.get_peft_model(llama(), MoeLoraPeftConfig(target_modules="all-linear", **MING))
    names = adapted_names(model.base_model.model)
    assert len(names) == 2 * 7
    assert not any("lm_head" in name or "moelora_" in name for name in names)
    model.add_adapter("other", MoeLoraPeftConfig(target_modules="all-linear", **MING))
    assert adapted_names(model.base_model.model) == names
    assert len(own_names(model, "other")) == 2 * 7 * 4


def test_default_targets_of_a_model_type():
    model = peft.get_peft_model(llama(), MoeLoraPeftConfig(**MING))
    assert {name.rpartition(".")[2] for name in adapted_names(model)} == {"q_proj", "v_proj"}
    with pytest.raises(ValueError, match="target_modules"):
        peft.get_peft_model(net(), MoeLoraPeftConfig(**MING))


def test_targets_that_cannot_be_adapted():
    with pytest.raises(ValueError, match="nowhere"):
        peft.get_peft_model(net(), MoeLoraPeftConfig(target_modules=["nowhere"], **MING))
    with pytest.raises(TypeError, match=r"embed_tokens is a .*Embedding.* without in_features"):
        peft.get_peft_model(llama(), MoeLoraPeftConfig(target_modules=["embed_tokens"], **MING))
    reader = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    with pytest.raises(TypeError, match="reads its weight"):
        peft.get_peft_model(reader, MoeLoraPeftConfig(target_modules=["out_proj"], **MING))


def test_a_router_without_names_for_its_tensors():
    """One that has tensors beside parts with tensors: PEFT would save keys that it cannot load."""
    router = nn.Sequential(nn.Linear(6, 3))
    router.offset = nn.Parameter(torch.zeros(3))
    with pytest.raises(TypeError, match=r"router: .*Sequential.* has tensors in itself and in its"):
        MoeLoraTunerLinear(nn.Linear(6, 3))._hold_router("default", router)


def test_inject_adapter_in_model():
    """Without a PeftModel around it; also from a state dict alone, as diffusers does it."""
    x = inputs()
    config = MoeLoraPeftConfig(target_modules=TARGETS, **TASKS)
    model = randomise(peft.inject_adapter_in_model(config, net()))
    set_tasks(model, [2, 4])
    state = peft.get_peft_model_state_dict(model)
    assert len(state) == 4 * 2 + 2
    for low_cpu_mem_usage in (False, True):
        other = peft.inject_adapter_in_model(
            MoeLoraPeftConfig(target_modules=TARGETS, **TASKS),
            net(),
            adapter_name="mine",
            low_cpu_mem_usage=low_cpu_mem_usage,
        )
        result = peft.set_peft_model_state_dict(
            other, state, adapter_name="mine", low_cpu_mem_usage=low_cpu_mem_usage
        )
        assert not result.unexpected_keys
        assert not [k for k in result.missing_keys if "moelora_" in k]
        set_tasks(other, [2, 4])
        assert torch.equal(other(x), model(x))


@pytest.mark.parametrize(
    "second", ({**TASKS, "num_tasks": 9}, {**TASKS, "num_experts": 5}, dict(MING, router="mlp"))
)
def test_a_second_adapter_of_the_same_name_takes_the_place_of_the_first(second):
    """PEFT warns of a second get_peft_model; nothing of the first adapter is left in it."""
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
    for one in (again, new):
        one.eval()
        if second["preset"] == "moelora":
            set_tasks(one, [4, second["num_tasks"]])
    assert torch.equal(again(x), new(x))


# --- a PeftModel as an object -------------------------------------------------------------------


@pytest.mark.parametrize("copier", ("deepcopy", "pickle", "torch.save"))
@pytest.mark.parametrize("options", GATES.values(), ids=GATES)
def test_copies_compute_the_same_and_are_apart(options, copier):
    model, x = adapted(options), inputs()
    y = model(x)
    if copier == "deepcopy":
        twin = copy.deepcopy(model)
    elif copier == "pickle":
        twin = pickle.loads(pickle.dumps(model))
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert torch.equal(twin(x), y)
    randomise(twin, seed=5)
    with torch.no_grad():
        twin.base_model.model.layers[0].up.base_layer.weight.zero_()
    assert torch.equal(model(x), y)
    assert not torch.allclose(give_gates(twin, options)(x), y)


def test_state_dict_has_each_tensor_once():
    """No base through an adapter, no task gate in every layer."""
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


def test_layers_look_like_the_linear_they_adapt():
    layer = adapted().base_model.model.layers[0].up
    base = layer.get_base_layer()
    assert type(base) is nn.Linear
    assert (layer.in_features, layer.out_features) == (6, 10)
    assert layer.weight is base.weight
    assert layer.bias is base.bias
    assert layer.active_adapters == ["default"]


# --- the functions of this package --------------------------------------------------------------


def test_set_tasks_means_the_active_adapters():
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
    assert [names[id(p)] for p in adapter_parameters(model)] == own_names(model, "default")
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
    routers = {n for n in own_names(model, "default") if "moelora_router" in n}
    # The router of a layer reads what the layers below it put out.
    assert routers <= moved <= set(own_names(model, "default"))
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
    # The adapter that is not active has no tasks, and needs none.
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
