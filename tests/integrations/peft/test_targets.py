"""Which linears get an adapter? A target that cannot have one raises an error."""

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
from moelora_kernels import (  # noqa: E402
    MoeLoraConfig,
    set_tasks,
)
from moelora_kernels.peft import MoeLoraPeftConfig, MoeLoraTunerLinear  # noqa: E402
from support.peft_models import (  # noqa: E402
    MING,
    TARGETS,
    TASKS,
    inputs,
    llama,
    net,
    parameter_names,
    randomise,
)


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
    # The order of a set differs between processes, and ids must not.
    ids=lambda value: str(sorted(value) if isinstance(value, set) else value),
)
def test_targets(where, names):
    # PEFT counts the layers of a list inside a module.
    base = nn.ModuleDict({"body": net()})
    model = peft.get_peft_model(base, MoeLoraPeftConfig(**where, **MING))
    assert adapted_names(model.base_model.model) == {f"body.{name}" for name in names}


def test_all_linear_leaves_out_the_head_and_routers():
    model = peft.get_peft_model(llama(), MoeLoraPeftConfig(target_modules="all-linear", **MING))
    names = adapted_names(model.base_model.model)
    assert len(names) == 2 * 7
    assert not any("lm_head" in name or "moelora_" in name for name in names)
    model.add_adapter("other", MoeLoraPeftConfig(target_modules="all-linear", **MING))
    assert adapted_names(model.base_model.model) == names
    assert len(parameter_names(model, "other")) == 2 * 7 * 4


def test_default_targets_of_a_model_type():
    model = peft.get_peft_model(llama(), MoeLoraPeftConfig(**MING))
    assert {name.rpartition(".")[2] for name in adapted_names(model)} == {"q_proj", "v_proj"}
    with pytest.raises(ValueError, match="target_modules"):
        peft.get_peft_model(net(), MoeLoraPeftConfig(**MING))


def test_targets_that_cannot_be_adapted_are_named():
    with pytest.raises(ValueError, match="nowhere"):
        peft.get_peft_model(net(), MoeLoraPeftConfig(target_modules=["nowhere"], **MING))
    with pytest.raises(TypeError, match=r"embed_tokens is a .*Embedding.* without in_features"):
        peft.get_peft_model(llama(), MoeLoraPeftConfig(target_modules=["embed_tokens"], **MING))
    reader = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)})
    with pytest.raises(TypeError, match="reads its weight"):
        peft.get_peft_model(reader, MoeLoraPeftConfig(target_modules=["out_proj"], **MING))


def test_a_gate_of_samples_refuses_linears_that_count_samples_in_another_dimension():
    model = nn.ModuleDict({"block": nn.TransformerDecoderLayer(8, 2, 16)})
    config = MoeLoraPeftConfig(target_modules=["linear1"], **TASKS)
    with pytest.raises(ValueError, match=r"^batch_dim: block.linear1 is part of a Transformer"):
        peft.get_peft_model(model, config)
    plain = peft.get_peft_model(model, MoeLoraPeftConfig(target_modules=["linear1"], **MING))
    with pytest.raises(ValueError, match=r"^batch_dim: block.linear1 is part of a Transformer"):
        plain.add_adapter("tasks", config)


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"q": nn.Linear(8, 8)})

    def forward(self, x):
        return nn.functional.linear(x, self.inner.q.weight)


def test_a_module_that_reads_a_weight_is_named_inside_wrappers():
    model = nn.ModuleDict({"block": Reads()})
    model.block.inner = torch.compile(model.block.inner)
    with pytest.warns(UserWarning, match=r"block.inner.q: the forward of Reads reads inner.q.w"):
        peft.get_peft_model(model, MoeLoraPeftConfig(target_modules=["q"], **MING))


def test_a_router_whose_tensors_have_no_names_is_refused():
    """It has a tensor beside a child with tensors: PEFT would save keys that it cannot load."""
    router = nn.Sequential(nn.Linear(6, 3))
    router.offset = nn.Parameter(torch.zeros(3))
    with pytest.raises(TypeError, match=r"router: .*Sequential.* has tensors in itself and in its"):
        MoeLoraTunerLinear(nn.Linear(6, 3)).update_layer("default", MoeLoraConfig(router=router))


def test_inject_adapter_in_model():
    """Adapters without a PeftModel; also loaded from a state dict, like diffusers does."""
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
