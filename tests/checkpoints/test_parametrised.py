"""A parametrized, pruned or normed tensor trains, and is saved and loaded by its value."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.parametrize import register_parametrization

from moelora_kernels import (
    MoeLoraConfig,
    MoeLoraGroup,
    MoeLoraLinear,
    adapter_parameters,
    adapter_state_dict,
    load_adapter,
    load_adapter_state_dict,
    replace_linears,
    save_adapter,
    set_tasks,
    warmup,
)
from moelora_kernels.checkpoints import export_ming, export_moelora_peft, load_ming
from moelora_kernels.export import export_lora, main
from support.compare import assert_same
from support.ffns import make_ffn
from support.linears import randomise

MING = MoeLoraConfig.preset("ming", num_experts=3, rank=2)
TASK = MoeLoraConfig.preset("moelora", num_experts=3, rank=2, num_tasks=3, dropout=0.0)


class Same(nn.Module):
    """A parametrization that changes nothing, without right_inverse."""

    def forward(self, value):
        return value


class Doubled(nn.Module):
    def forward(self, value):
        return 2 * value

    def right_inverse(self, value):
        return value / 2


class Squared(nn.Module):
    """A parametrization without right_inverse, which cannot give negative values."""

    def forward(self, value):
        return value.square()


def old_weight_norm(module, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(module, name)


COMPUTE = {
    "same": lambda module, name: register_parametrization(module, name, Same()),
    "doubled": lambda module, name: register_parametrization(module, name, Doubled()),
    "weight_norm": parametrizations.weight_norm,
    "old_weight_norm": old_weight_norm,
    "pruned": lambda module, name: prune.l1_unstructured(module, name, 0.5),
    "pruned_twice": lambda module, name: [
        prune.random_unstructured(module, name, 0.3) for _ in range(2)
    ],
    "spectral_norm": parametrizations.spectral_norm,
    "old_spectral_norm": nn.utils.spectral_norm,
}
every_way = pytest.mark.parametrize("compute", COMPUTE.values(), ids=COMPUTE)


def make_model(config=MING, seed=0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
    replace_linears(model, config, ["0", "2"])
    return randomise(model, seed)


def owners(model):
    """The layer's tensors and those of its router that a test computes from others."""
    layer = model[0]
    yield from ((layer, "lora_A"), (layer, "lora_B"))
    for part in layer.router.modules():
        if isinstance(part, (nn.Linear, nn.Embedding)):
            yield part, "weight"


@pytest.mark.parametrize("config", (MING, TASK), ids=("ming", "tasks"))
@every_way
def test_values_are_saved_under_their_plain_names(compute, config, tmp_path):
    """The file fits a model without the parametrization, which then computes the same."""
    plain, model = make_model(config), make_model(config)
    for owner, name in owners(model):
        compute(owner, name)
    model.eval()
    if config is TASK:
        set_tasks(model, [2])
    x = torch.randn(4, 6)
    expected = model(x)
    state = adapter_state_dict(model)
    assert state.keys() == adapter_state_dict(plain).keys()
    save_adapter(model, tmp_path / "a.safetensors")
    assert_same(adapter_state_dict(model), state)
    loaded = make_model(config, seed=1).eval()
    load_adapter(loaded, tmp_path / "a.safetensors")
    if config is TASK:
        set_tasks(loaded, [2])
    torch.testing.assert_close(loaded(x), expected)
    assert_same(adapter_state_dict(loaded), state)


@pytest.mark.parametrize("config", (MING, TASK), ids=("ming", "tasks"))
@every_way
def test_the_parameters_that_a_tensor_is_computed_from_train(compute, config):
    """A step of adapter_parameters changes every tensor, and the file has the values after it."""
    model = make_model(config)
    for owner, name in owners(model):
        compute(owner, name)
    parameters = adapter_parameters(model)
    assert len({id(p) for p in parameters}) == len(parameters)
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for p in parameters} == trained
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    before = {k: v.detach().clone() for k, v in adapter_state_dict(model).items()}
    for _ in range(2):
        if config is TASK:
            set_tasks(model, [2])
        model(torch.randn(4, 6)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    # The attribute of a pruned tensor has the values of the last forward, before the step.
    after = adapter_state_dict(model)
    for key, value in after.items():
        assert not torch.equal(value, before[key]), key
    expected = model.eval()(x := torch.randn(4, 6))
    loaded = make_model(config, seed=1).eval()
    load_adapter_state_dict(loaded, after)
    if config is TASK:
        set_tasks(loaded, [2])
    torch.testing.assert_close(loaded(x), expected)


@pytest.mark.parametrize("name", [n for n in COMPUTE if "spectral" not in n])
def test_values_are_loaded_through_the_inverse(name):
    source, target = make_model(), make_model(seed=1)
    for model in (source, target):
        for owner, tensor in owners(model):
            torch.manual_seed(3)
            COMPUTE[name](owner, tensor)
    if "pruned" in name:
        # The masks are those of the source, as in a checkpoint that is resumed.
        for (owner, tensor), (other, _) in zip(owners(target), owners(source), strict=True):
            getattr(owner, f"{tensor}_mask").copy_(getattr(other, f"{tensor}_mask"))
    state = {k: v.detach().clone() for k, v in adapter_state_dict(source).items()}
    load_adapter_state_dict(target, state)
    exact = name in ("same", "doubled", "pruned", "pruned_twice")
    tolerance = {} if exact else {"rtol": 1e-5, "atol": 1e-6}
    assert_same(adapter_state_dict(target), state, **tolerance)
    torch.testing.assert_close(target[0].lora_B.detach(), state["0.lora_B"])
    x = torch.randn(4, 6)
    torch.testing.assert_close(target(x), source(x))


@pytest.mark.parametrize(
    ("compute", "reason"),
    (
        (lambda module, name: register_parametrization(module, name, Squared()), "this value"),
        (COMPUTE["pruned"], "this value"),
        (COMPUTE["old_spectral_norm"], "it has none"),
        (parametrizations.orthogonal, "inverse fails|this value"),
    ),
    ids=("squared", "pruned", "spectral_norm", "orthogonal"),
)
def test_a_value_that_the_tensor_cannot_have_is_refused_by_name(compute, reason):
    """Loaded without a check, a pruned tensor would keep a part of the file only."""
    source, model = make_model(seed=1), make_model()
    compute(model[0], "lora_B")
    register_parametrization(model[2], "lora_A", Doubled())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=rf"0\.lora_B: it is computed.*({reason})"):
        load_adapter_state_dict(model, adapter_state_dict(source))
    # Nothing is loaded then, also into the tensors that could have their values.
    assert_same(model.state_dict(), before)


def test_a_router_that_layers_share_is_saved_once():
    model = make_model(TASK)
    register_parametrization(model[0].router.gate, "weight", Doubled())
    keys = list(adapter_state_dict(model))
    assert [key for key in keys if "gate" in key] == ["0.router.gate.weight"]


def test_a_spectral_norm_makes_no_step_when_it_is_saved(tmp_path):
    """In training every access makes a step, so two files of one model would differ."""
    model = make_model().train()
    parametrizations.spectral_norm(model[0], "lora_A")
    before = copy.deepcopy(model.state_dict())
    adapter_state_dict(model)
    save_adapter(model, tmp_path / "a.safetensors")
    assert_same(model.state_dict(), before)
    assert all(module.training for module in model.modules())


def test_whole_ffn_experts(tmp_path):
    source, target = make_ffn(), make_ffn()
    register_parametrization(source, "up_lora_B", Doubled())
    assert "up_lora_B" in adapter_state_dict(source)
    save_adapter(source, tmp_path / "a.safetensors")
    load_adapter(target, tmp_path / "a.safetensors")
    assert_same(adapter_state_dict(target), adapter_state_dict(source))
    assert len(adapter_parameters(source)) == len(adapter_parameters(target))


@every_way
def test_exports_have_the_values(compute, tmp_path):
    """Exports of a task, of the file, and of MOELoRA-peft; after a step without a forward."""
    model = make_model(TASK)
    for owner, name in owners(model):
        compute(owner, name)
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter.mul_(1.25)
    plain = make_model(TASK, seed=1)
    load_adapter_state_dict(plain, adapter_state_dict(model))
    for task in (1, 3):
        assert_same(
            dict(zip("AB", model[0].export_lora(task), strict=True)),
            dict(zip("AB", plain[0].export_lora(task), strict=True)),
            rtol=1e-5, atol=1e-6,
        )  # fmt: skip
    assert_same(export_moelora_peft(model), export_moelora_peft(plain))
    save_adapter(model, tmp_path / "a.safetensors")
    main(["--task", "1", str(tmp_path / "a.safetensors"), str(tmp_path / "file")])
    export_lora(model, tmp_path / "model", 1)


def test_original_layouts_are_loaded_before_the_parametrization():
    model = make_model()
    state = export_ming(model)
    register_parametrization(model[2], "lora_A", Same())
    with pytest.raises(ValueError, match=r"2\.lora_A: parametrized.*load the checkpoint before"):
        load_ming(model, state)
    assert_same(export_ming(model), state)


def test_a_layer_without_parameters_of_its_own():
    """Functions that ask for the device or dtype of a layer find them."""
    layer = MoeLoraLinear(6, 6, num_experts=2, rank=2, router="external")
    for name in ("lora_A", "lora_B"):
        register_parametrization(layer, name, Doubled())
    set_tasks(layer, torch.ones(1, 2))
    warmup(layer, tokens=[3])
    assert layer(torch.randn(3, 6)).shape == (3, 6)
    assert len(adapter_parameters(layer)) == 2


def test_what_is_not_a_tensor_is_refused_by_name(tmp_path):
    model = make_model()
    del model[2].lora_B
    model[2].lora_B = nn.ParameterList([nn.Parameter(torch.zeros(6, 6))])
    with pytest.raises(ValueError, match=r"2\.lora_B: expected a Parameter or tensor"):
        save_adapter(model, tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ("pruned", "old_weight_norm"))
def test_a_group_calls_layers_whose_hooks_compute_the_adapters(name):
    """A group that reads the attribute would compute with the values before the last step."""
    layers = {key: MoeLoraLinear(6, 6, num_experts=2, rank=2) for key in "ab"}
    randomise(nn.ModuleDict(layers))
    COMPUTE[name](layers["b"], "lora_B")
    group, x = MoeLoraGroup(**layers), torch.randn(3, 6)
    for _ in range(2):
        sum(y.square().sum() for y in group(x)).backward()
        with torch.no_grad():
            for parameter in adapter_parameters(group):
                parameter.mul_(1.5)
    for y, layer in zip(group(x), layers.values(), strict=True):
        torch.testing.assert_close(y, layer(x))


def test_a_computed_tensor_is_not_reset():
    """New values would be written into the computed tensor and lost."""
    layer, ffn = MoeLoraLinear(6, 6, num_experts=2, rank=2), make_ffn()
    register_parametrization(layer, "lora_B", Doubled())
    prune.l1_unstructured(ffn, "up_lora_A", 0.5)
    for module, name in ((layer, "lora_B"), (ffn, "up_lora_A")):
        with pytest.raises(RuntimeError, match=f"^{name}: .*cannot be reset"):
            module.reset_parameters()
