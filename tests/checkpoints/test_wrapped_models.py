"""Adapters of a wrapped model have the names, the files and the exports of the plain model."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from moelora_kernels import (
    MoeLoraConfig,
    MoeLoraLinear,
    adapter_state_dict,
    link_siblings,
    load_adapter,
    load_adapter_state_dict,
    merge_adapter,
    merge_and_unload,
    replace_ffns,
    replace_linears,
    save_adapter,
    set_tasks,
    unmerge_adapter,
)
from moelora_kernels.checkpoints import (
    export_ming,
    export_moelora_peft,
    load_ming,
    load_moelora_peft,
)
from moelora_kernels.checkpoints.description import describe
from moelora_kernels.export import export_lora, main
from support.compare import assert_same
from support.linears import randomise

MING = MoeLoraConfig.preset("ming", num_experts=4, rank=2)
MOELORA = MoeLoraConfig.preset("moelora", num_experts=4, num_tasks=3, task_embedding_dim=5)
TARGETS = ["q_proj", "k_proj", "v_proj", "module.up_proj", "module.gate_proj", "down_proj"]


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        return self.q_proj(x) * self.k_proj(x).sigmoid() + self.v_proj(x)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(6, 6) for _ in range(3))
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """A block whose MLP has the name `module`, which is also the name of DDP's child."""

    def __init__(self):
        super().__init__()
        self.attention, self.module = Attention(), Mlp()

    def forward(self, x):
        return x + self.module(self.attention(x))


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


def adapted(config, seed=0):
    torch.manual_seed(seed)
    model = Plain()
    names = replace_linears(model, config, TARGETS)
    assert len(names) == 12
    return randomise(model, seed)


def compiled_blocks(model):
    for i, block in enumerate(model.layers):
        model.layers[i] = torch.compile(block, backend="eager")
    return model


def checkpointed_parts(model):
    """Every block and, inside it, every attention is wrapped, as activation checkpointing does."""
    for i, block in enumerate(model.layers):
        block.attention = checkpoint_wrapper(block.attention)
        model.layers[i] = checkpoint_wrapper(block)
    return model


def wrapped_layer(model):
    block = model.layers[1]
    block.module.up_proj = torch.compile(block.module.up_proj, backend="eager")
    block.attention.k_proj = checkpoint_wrapper(block.attention.k_proj)
    return model


def compiled(model):
    return torch.compile(model, backend="eager")


WRAP = {
    "compile": compiled,
    "blocks": compiled_blocks,
    "checkpoint": checkpointed_parts,
    "layer": wrapped_layer,
    "DataParallel": nn.DataParallel,
    "average": AveragedModel,
    "nested": lambda model: compiled(nn.DataParallel(compiled(checkpointed_parts(model)))),
}
every_wrapper = pytest.mark.parametrize("wrap", WRAP.values(), ids=WRAP)


@every_wrapper
@pytest.mark.parametrize("config", (MING, MOELORA), ids=("ming", "moelora"))
def test_a_file_fits_the_wrapped_and_the_plain_model(wrap, config, tmp_path):
    """Training saves from the wrapped model; serving loads into the plain one. And the reverse."""
    plain, wrapped = adapted(config), wrap(adapted(config))
    assert list(adapter_state_dict(wrapped)) == list(adapter_state_dict(plain))
    assert describe(wrapped) == describe(plain)
    save_adapter(wrapped, tmp_path / "wrapped.safetensors")
    save_adapter(plain, tmp_path / "plain.safetensors")
    assert_same(*(load_file(tmp_path / f"{name}.safetensors") for name in ("wrapped", "plain")))
    for source, target in ((wrapped, adapted(config, 1)), (plain, wrap(adapted(config, 1)))):
        path = tmp_path / "wrapped.safetensors"
        save_adapter(source, path)
        load_adapter(target, path)
        assert_same(adapter_state_dict(target), adapter_state_dict(source))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "plain.safetensors",
        "wrapped.safetensors",
    ]


@every_wrapper
def test_a_loaded_wrapped_model_computes_what_the_plain_one_computes(wrap):
    plain, wrapped = adapted(MING), wrap(adapted(MING, 1))
    for name, parameter in plain.named_parameters():
        if "base_layer" in name:
            # Only the adapters are loaded, so the bases must be equal before.
            assert parameter.requires_grad is False
    target = wrap(adapted(MING))
    for tensor in adapter_state_dict(target).values():
        tensor.data.zero_()
    load_adapter_state_dict(target, adapter_state_dict(plain))
    x = torch.randn(3, 6)
    torch.testing.assert_close(target(x), plain(x))
    assert not torch.equal(wrapped(x), plain(x))


@every_wrapper
def test_replaced_and_linked_names(wrap):
    """The names do not depend on when the model is wrapped, and a user's `module` stays."""
    model = Plain()
    expected = replace_linears(Plain(), MING, TARGETS)
    assert "layers.1.module.up_proj" in expected
    model = wrap(model)
    assert replace_linears(model, MING, TARGETS) == expected
    assert list(adapter_state_dict(model)) == list(adapter_state_dict(adapted(MING)))
    model(torch.randn(3, 6)).sum().backward()


def test_linked_names_of_a_wrapped_model():
    groups = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
    expected = link_siblings(adapted(MING), groups)
    assert expected[0] == "layers.0.attention.{q_proj,k_proj,v_proj}"
    for name in ("compile", "blocks", "checkpoint", "nested"):
        assert link_siblings(WRAP[name](adapted(MING)), groups) == expected


def test_a_pattern_may_be_written_with_the_children_of_wrappers():
    """Scripts that were written for the names of earlier versions still work."""
    for target in (r".*_orig_mod\.attention\.q_proj", ["_orig_mod.attention.q_proj"]):
        names = replace_linears(compiled_blocks(Plain()), MING, target)
        assert names == ["layers.0.attention.q_proj", "layers.1.attention.q_proj"]


def test_ffn_experts_of_a_wrapped_model(tmp_path):
    config = MoeLoraConfig.preset("mixlora", num_experts=2, rank=2)

    def make(seed):
        torch.manual_seed(seed)
        model = Plain()
        assert replace_ffns(compiled(model), config, ["module"]) == [
            "layers.0.module",
            "layers.1.module",
        ]
        return randomise(model, seed)

    source, target = make(0), make(1)
    save_adapter(checkpointed_parts(compiled(source)._orig_mod), tmp_path / "a.safetensors")
    load_adapter(target, tmp_path / "a.safetensors")
    assert_same(adapter_state_dict(target), adapter_state_dict(source))
    assert "layers.0.module.gate_lora_A" in adapter_state_dict(target)


@every_wrapper
def test_an_export_has_the_names_of_the_plain_model(wrap, tmp_path):
    plain, wrapped = adapted(MOELORA), wrap(adapted(MOELORA))
    export_lora(plain, tmp_path / "plain", 2)
    export_lora(wrapped, tmp_path / "wrapped", 2)
    save_adapter(wrapped, tmp_path / "a.safetensors")
    main(["--task", "2", str(tmp_path / "a.safetensors"), str(tmp_path / "file")])
    state, config = exported(tmp_path / "plain")
    assert config["target_modules"][0] == "layers.0.attention.q_proj"
    for name in ("wrapped", "file"):
        other_state, other_config = exported(tmp_path / name)
        assert_same(other_state, state)
        assert other_config == config


def exported(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    return load_file(folder / "adapter_model.safetensors"), config


@every_wrapper
def test_a_wrapped_model_is_merged(wrap):
    """A merge of every layer, and the plain linears that take their places."""
    plain, wrapped = (model.eval() for model in (adapted(MOELORA), wrap(adapted(MOELORA))))
    x = torch.randn(3, 6)
    set_tasks(plain, [2])
    expected = plain(x)
    if wrap is not wrapped_layer:
        merge_adapter(wrapped, 2)
        torch.testing.assert_close(wrapped(x), expected, rtol=1e-4, atol=1e-5)
        unmerge_adapter(wrapped)
    assert merge_and_unload(wrapped, 2) is wrapped
    assert not any(isinstance(module, MoeLoraLinear) for module in wrapped.modules())
    torch.testing.assert_close(wrapped(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "load", "export"),
    ((MING, load_ming, export_ming), (MOELORA, load_moelora_peft, export_moelora_peft)),
    ids=("ming", "moelora_peft"),
)
@every_wrapper
def test_original_layouts_of_a_wrapped_model(wrap, config, load, export):
    plain, wrapped = adapted(config), wrap(adapted(config))
    state = export(plain)
    assert_same(export(wrapped), state)
    assert_same(export(wrapped, like=state), state)
    target = wrap(adapted(config, 1))
    load(target, state)
    assert_same(adapter_state_dict(target), adapter_state_dict(plain))
    # Frozen weights of the model are compared by their names without wrappers.
    load(wrapped, {**state, "layers.0.module.up_proj.bias": plain.layers[0].module.up_proj.bias})
    with pytest.raises(ValueError, match="this frozen weight differs"):
        load(wrapped, {**state, "layers.0.module.up_proj.bias": torch.zeros(6)})


@pytest.mark.parametrize(
    "rename",
    (
        lambda key: f"_orig_mod.{key}",
        lambda key: f"module.{key}",
        lambda key: f"module._orig_mod.{key}",
        lambda key: key.replace("layers.0.", "layers.0._checkpoint_wrapped_module."),
        lambda key: f"_fsdp_wrapped_module.{key}",
    ),
    ids=("compile", "DDP", "both", "checkpoint", "FSDP1"),
)
def test_a_file_with_the_names_of_a_wrapped_model_is_loaded(rename, tmp_path):
    """Earlier versions wrote such files, and scripts that gather a state dict write them too."""
    source = adapted(MING)
    state = {rename(key): tensor.detach() for key, tensor in adapter_state_dict(source).items()}
    save_file(state, tmp_path / "a.safetensors")
    for target in (adapted(MING, 1), compiled(adapted(MING, 1))):
        load_adapter(target, tmp_path / "a.safetensors")
        assert_same(adapter_state_dict(target), adapter_state_dict(source))
    plain_key = "layers.0.module.up_proj.lora_A"
    twice = state | {plain_key: state[rename(plain_key)]}
    with pytest.raises(ValueError, match="unexpected: "):
        load_adapter_state_dict(adapted(MING), twice)


def test_a_file_of_an_earlier_version_is_exported(tmp_path):
    """Its description has the names of a compiled model."""
    model, path = adapted(MOELORA), tmp_path / "a.safetensors"
    save_adapter(model, path)
    with safe_open(path, "pt") as file:
        layout = json.loads(file.metadata()["layout"])
    for layer in layout["layers"]:
        layer["names"] = [f"_orig_mod.{name}" for name in layer["names"]]
        layer["router"] = f"_orig_mod.{layer['router']}"
    state = {f"_orig_mod.{key}": tensor for key, tensor in load_file(path).items()}
    save_file(state, path, metadata={"layout": json.dumps(layout)})
    main(["--task", "1", str(path), str(tmp_path / "file")])
    export_lora(model, tmp_path / "plain", 1)
    state, config = exported(tmp_path / "file")
    expected_state, expected_config = exported(tmp_path / "plain")
    assert_same(state, expected_state)
    assert config == expected_config


def test_a_failed_save_leaves_the_file_as_it_was(tmp_path):
    """A disk that is full must not cost the last checkpoint."""
    path = tmp_path / "a.safetensors"
    save_adapter(adapted(MING), path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"layers\.0\.attention\.q_proj\.lora_A.*meta"):
        save_adapter(adapted(MING).to("meta"), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("wrap", (lambda model: model, compiled), ids=("plain", "compiled"))
def test_a_peft_model_is_refused_with_the_right_call(wrap, tmp_path):
    peft = pytest.importorskip("peft")
    from moelora_kernels.peft import MoeLoraPeftConfig

    config = MoeLoraPeftConfig(preset="moelora", target_modules=["q_proj"])
    model = wrap(peft.get_peft_model(Plain(), config))
    for call in (
        lambda: export_lora(model, tmp_path / "out", 1),
        lambda: merge_adapter(model, 1),
        lambda: merge_and_unload(model, 1),
    ):
        with pytest.raises(ValueError, match=r"set_tasks.*merge_and_unload.*save_pretrained"):
            call()
    with pytest.raises(RuntimeError, match=r"peft_model\.unmerge_adapter"):
        unmerge_adapter(model)
    for export in (export_ming, export_moelora_peft):
        with pytest.raises(ValueError, match="an adapter of a PeftModel"):
            export(model)


def test_a_folder_of_peft_over_a_compiled_model_is_exported(tmp_path):
    peft = pytest.importorskip("peft")
    from moelora_kernels.peft import MoeLoraPeftConfig

    config = MoeLoraPeftConfig(preset="moelora", target_modules=["q_proj"])
    peft.get_peft_model(compiled(Plain()), config).save_pretrained(tmp_path / "folder")
    main(["--task", "1", str(tmp_path / "folder"), str(tmp_path / "out")])
    assert exported(tmp_path / "out")[1]["target_modules"] == [
        "layers.0.attention.q_proj",
        "layers.1.attention.q_proj",
    ]
