"""replace_linears, set_tasks and adapter_parameters on a whole model."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moelora_kernels import (
    MoeLoraConfig,
    MoeLoraLinear,
    adapter_parameters,
    replace_linears,
    set_tasks,
)
from support.compare import assert_same, backward_step
from support.linears import randomise
from support.models import mlp_blocks

MING = MoeLoraConfig.preset("ming", num_experts=4, rank=2)
MOELORA = MoeLoraConfig.preset("moelora", num_experts=4, num_tasks=3, task_embedding_dim=5)
EXTERNAL = MoeLoraConfig(num_experts=4, rank=2, router="external")


def test_names_match_whole_components():
    """A target is a module's name or its last part, not a substring: my_up_proj stays."""
    model = mlp_blocks()
    replaced = replace_linears(model, MING, ["up_proj", "layers.1.down_proj"])
    assert replaced == ["layers.0.up_proj", "layers.1.up_proj", "layers.1.down_proj"]
    actual = [n for n, m in model.named_modules() if isinstance(m, MoeLoraLinear)]
    assert actual == replaced
    assert type(model.get_submodule("layers.0.my_up_proj")) is nn.Linear
    assert type(model.get_submodule("layers.0.down_proj")) is nn.Linear


def test_a_regular_expression_matches_whole_names():
    model = mlp_blocks()
    assert replace_linears(model, MING, r"layers\.[01]\.(up|down)_proj") == [
        "layers.0.up_proj",
        "layers.0.down_proj",
        "layers.1.up_proj",
        "layers.1.down_proj",
    ]
    with pytest.raises(ValueError, match=r"target_modules: no module matches.*up_pro"):
        replace_linears(mlp_blocks(), MING, r".*up_pro")


@pytest.mark.parametrize(
    "targets", ("up_proj", ["gate_proj"], [], ["up_proj", "gate_proj"]), ids=str
)
def test_a_target_without_a_match_raises_and_changes_nothing(targets):
    """One wrong name among several raises as well."""
    model = mlp_blocks()
    with pytest.raises(ValueError, match="target_modules: no module matches") as error:
        replace_linears(model, MING, targets)
    if targets == ["up_proj", "gate_proj"]:
        unmatched, _, _ = str(error.value).partition(";")
        assert unmatched.endswith("['gate_proj']")
    assert not any(isinstance(m, MoeLoraLinear) for m in model.modules())
    assert all(q.requires_grad for q in model.parameters())


def test_a_target_that_is_not_a_linear_raises_and_changes_nothing():
    model = mlp_blocks()
    with pytest.raises(TypeError, match=r"target_modules: layers\.0\.norm is a .*LayerNorm"):
        replace_linears(model, MING, ["up_proj", "norm"])
    assert not any(isinstance(m, MoeLoraLinear) for m in model.modules())


@pytest.mark.parametrize(
    ("module", "target"),
    (
        (nn.MultiheadAttention(6, 2), "out_proj"),
        (nn.TransformerEncoderLayer(6, 2, 8), "linear1"),
        (nn.TransformerDecoderLayer(6, 2, 8), "out_proj"),
    ),
    ids=("attention", "encoder", "decoder"),
)
def test_a_linear_whose_weight_is_read_without_a_call_is_refused(module, target):
    """Such a module does not call its linear, so the experts would have no effect."""
    model = nn.Sequential(nn.Linear(6, 6), module)
    with pytest.raises(TypeError, match=rf"target_modules: 1.*{target} is part of a .*no effect"):
        replace_linears(model, MING, ["0", target])
    assert type(model[0]) is nn.Linear


def test_a_bad_config_or_pattern_is_named():
    with pytest.raises(TypeError, match="config: expected a MoeLoraConfig, got 'ming'"):
        replace_linears(mlp_blocks(), "ming", ["up_proj"])
    with pytest.raises(ValueError, match=r"target_modules: bad pattern '\('"):
        replace_linears(mlp_blocks(), MING, "(")


def test_bases_are_kept_and_frozen_and_other_modules_do_not_change():
    model = mlp_blocks()
    bases = {n: m for n, m in model.named_modules() if n.endswith(".up_proj")}
    x = torch.randn(2, 3, 6)
    before = model["layers"](x)
    replace_linears(model, MING, ["up_proj"])
    for name, base in bases.items():
        assert model.get_submodule(name).base_layer is base
        assert not base.weight.requires_grad
    assert model.get_submodule("layers.0.norm").weight.requires_grad
    assert model.get_submodule("layers.0.my_up_proj").weight.requires_grad
    torch.testing.assert_close(model["layers"](x), before, rtol=1e-6, atol=1e-6)


def test_tied_modules_stay_tied():
    """A module with two names becomes one layer with two names and one adapter."""
    model = mlp_blocks()
    model["layers"][1].up_proj = model["layers"][0].up_proj
    assert len(replace_linears(model, MING, ["up_proj"])) == 2
    first, second = (block.up_proj for block in model["layers"])
    assert isinstance(first, MoeLoraLinear)
    assert first is second
    assert len(adapter_parameters(model)) == 4


def test_a_layer_is_not_replaced_again():
    """A second call can replace other linears. Layers and their parts do not match again."""
    model = mlp_blocks()
    model["layers"][1].up_proj = model["layers"][0].up_proj
    replace_linears(model, MING, ["up_proj"])
    layer = model["layers"][0].up_proj
    for again in (["up_proj"], ["base_layer"], ["router"], r"layers\.\d\.up_proj"):
        with pytest.raises(ValueError, match="no module matches"):
            replace_linears(model, MING, again)
    assert replace_linears(model, MING, r"layers\.\d\.(up|down)_proj") == [
        "layers.0.down_proj",
        "layers.1.down_proj",
    ]
    assert model["layers"][0].up_proj is layer
    assert model["layers"][1].up_proj is layer
    assert not isinstance(layer.base_layer, MoeLoraLinear)


def test_training_mode_follows_the_module():
    model = mlp_blocks().eval()
    replace_linears(model, MING, ["up_proj"])
    assert not any(m.training for m in model.modules())


def test_dtype_and_options_of_every_layer():
    model = mlp_blocks().to(torch.bfloat16)
    replace_linears(model, MING.replace(adapter_dtype="float32"), ["up_proj", "down_proj"])
    assert {q.dtype for q in adapter_parameters(model)} == {torch.float32}
    assert model["layers"](torch.randn(2, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16


def moelora_model():
    model = mlp_blocks()
    replace_linears(model, MOELORA, ["up_proj", "down_proj"])
    return randomise(model)


def test_a_shared_task_gate_is_one_module():
    """All layers share one task gate, and so do the layers of a copy."""
    model = moelora_model()
    layers = [m for m in model.modules() if isinstance(m, MoeLoraLinear)]
    assert len(layers) == 4
    assert len({id(layer.router) for layer in layers}) == 1
    assert len(adapter_parameters(model)) == 2 * 4 + 2
    clone = copy.deepcopy(model)
    routers = {id(m.router) for m in clone.modules() if isinstance(m, MoeLoraLinear)}
    assert len(routers) == 1
    assert routers != {id(layers[0].router)}


def test_two_calls_share_a_gate_of_the_same_sizes():
    """Layers with other ranks share the gate if num_tasks, num_experts and the dim are equal."""
    model = mlp_blocks()
    replace_linears(model, MOELORA, ["up_proj"])
    replace_linears(model, MOELORA.replace(rank=3, dropout=0.0), ["down_proj"])
    first, second = model["layers"]
    assert len({id(b.up_proj.router) for b in (first, second)}) == 1
    assert first.down_proj.router is second.down_proj.router is first.up_proj.router
    assert first.down_proj.lora_A.shape[0] == 12


@pytest.mark.parametrize(
    "sizes", (dict(num_tasks=4), dict(num_experts=5), dict(task_embedding_dim=6)), ids=str
)
def test_two_calls_with_different_sizes_have_a_gate_each(sizes):
    """set_tasks sets both gates. If one of them refuses the ids, it sets none."""
    model = mlp_blocks()
    replace_linears(model, MOELORA.replace(**sizes), ["up_proj"])
    replace_linears(model, MOELORA, ["down_proj"])
    first, second = model["layers"]
    assert first.up_proj.router is second.up_proj.router
    assert first.down_proj.router is second.down_proj.router
    assert first.down_proj.router is not first.up_proj.router
    randomise(model).eval()
    set_tasks(model, [1, 3])
    x = torch.randn(2, 3, 6)
    before = model["layers"](x)
    for ids in ([2, 4], [4, 2], [2, 9]):
        with pytest.raises(ValueError, match="ids: expected 1 to"):
            set_tasks(model, ids)
    assert torch.equal(model["layers"](x), before)


def test_tasks_hold_until_the_next_call():
    model = moelora_model().eval()
    x = torch.randn(2, 3, 6)
    set_tasks(model, [1, 3])
    first = model["layers"](x)
    assert torch.equal(model["layers"](x), first)
    set_tasks(model, torch.tensor([3, 1], dtype=torch.int32))
    assert not torch.equal(model["layers"](x), first)
    set_tasks(model, [3])
    torch.testing.assert_close(model["layers"](x)[1], first[1], rtol=1e-5, atol=1e-6)


def test_bad_tasks_raise():
    """Id 0 is padding in the original. An id that is too large would fail on a GPU."""
    model = moelora_model()
    x = torch.randn(2, 3, 6)
    with pytest.raises(RuntimeError, match="call set_tasks"):
        model["layers"](x)
    for ids in ([0, 1], [1, 4], [-1, 1]):
        with pytest.raises(ValueError, match="ids: expected 1 to 3"):
            set_tasks(model, ids)
    with pytest.raises(ValueError, match="no layer with router='external' takes gates"):
        set_tasks(model, [0.5, 0.5])
    for ids in ([[[1, 2]]], torch.tensor([True, True])):
        with pytest.raises(ValueError, match="ids: expected whole numbers"):
            set_tasks(model, ids)
    with pytest.raises(ValueError, match="tasks: expected one entry per sample"):
        set_tasks(model, torch.tensor(1))
    set_tasks(model, [1, 2, 3])
    with pytest.raises(ValueError, match=r"set_tasks: 3 gate rows for x \[2, 3, 6\]"):
        model["layers"](x)
    with pytest.raises(ValueError, match="no layer with router='task' takes task ids"):
        set_tasks(mlp_blocks(), [1])


def test_a_refused_batch_leaves_the_tasks_that_were_set():
    model = moelora_model().eval()
    x = torch.randn(2, 3, 6)
    set_tasks(model, [1, 2])
    before = model["layers"](x)
    with pytest.raises(ValueError, match="ids"):
        set_tasks(model, [1, 9])
    assert torch.equal(model["layers"](x), before)


def test_external_gates_reach_every_layer():
    model = mlp_blocks()
    replace_linears(model, EXTERNAL, ["up_proj", "down_proj"])
    randomise(model)
    x = torch.randn(2, 3, 6)
    with pytest.raises(ValueError, match="set_tasks"):
        model["layers"](x)
    gates = torch.rand(2, 4, requires_grad=True)
    set_tasks(model, gates)
    model["layers"](x).square().sum().backward()
    assert gates.grad.abs().min() > 0
    set_tasks(model, [[0.0] * 4])
    y_without_experts = model["layers"](x)
    bare = mlp_blocks()
    torch.testing.assert_close(y_without_experts, bare["layers"](x), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"tasks: expected gates, floats .* got torch.int64 \[2\]"):
        set_tasks(model, [1, 2])


def test_external_gates_move_to_the_device_of_the_layers():
    """set_tasks moves the gates to the device of the layers."""
    model = mlp_blocks()
    replace_linears(model, EXTERNAL, ["up_proj"])
    model = model.to("meta")
    set_tasks(model, [[0.25] * 4])
    assert model["layers"][0].up_proj.external_gates.device.type == "meta"


@pytest.mark.parametrize("use_reentrant", (True, False))
@pytest.mark.parametrize("config", (MOELORA, EXTERNAL), ids=("task", "external"))
def test_tasks_survive_activation_checkpointing(config, use_reentrant):
    """The recompute in backward uses the same tasks."""
    model = mlp_blocks()
    replace_linears(model, config, ["up_proj", "down_proj"])
    randomise(model)
    set_tasks(model, [3, 1] if config is MOELORA else torch.rand(2, 4))

    def recompute(x):
        for block in model["layers"]:
            x = checkpoint(block, x, use_reentrant=use_reentrant)
        return x

    x = torch.ones(2, 3, 6)
    expected = backward_step(model, x, forward=model["layers"])
    assert_same(backward_step(model, x, forward=recompute), expected)


def test_adapter_parameters():
    """The list has every adapter parameter once, with shared gates, and none of the base."""
    model = moelora_model()
    actual = adapter_parameters(model)
    assert len({id(q) for q in actual}) == len(actual)
    for q in model.parameters():
        q.requires_grad_(False)
    for q in actual:
        q.requires_grad_(True)
    names = [n for n, q in model.named_parameters() if q.requires_grad]
    assert len(names) == len(actual) == 10
    assert all("lora_" in n or "router" in n for n in names)
    assert adapter_parameters(mlp_blocks()) == []


@pytest.mark.parametrize(
    ("model", "targets", "said"),
    (
        (nn.Sequential(nn.Linear(4, 4)), "all-linear", "linears end in 0"),
        (nn.ModuleDict({"q_proj": nn.Linear(4, 4)}), ["k_proj"], "linears end in q_proj"),
        (nn.Sequential(nn.ReLU()), ["q_proj"], "no nn.Linear without experts"),
        (nn.Linear(4, 4), ["q_proj"], r"MoeLoraLinear\.from_linear"),
    ),
)
def test_a_target_without_a_match_names_what_could_match(model, targets, said):
    with pytest.raises(ValueError, match=f"target_modules: no module matches.*{said}"):
        replace_linears(model, MoeLoraConfig(), targets)


def test_no_targets_are_named():
    with pytest.raises(TypeError, match="target_modules: expected names of modules"):
        replace_linears(nn.Sequential(nn.Linear(4, 4)), MoeLoraConfig(), None)
