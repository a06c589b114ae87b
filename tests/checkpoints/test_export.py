"""An exported task is a plain LoRA that computes the same, in the files that PEFT and vLLM read."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from moelora_kernels import (
    MoeLoraConfig,
    MoeLoraLinear,
    adapter_state_dict,
    load_adapter,
    replace_ffns,
    save_adapter,
    set_tasks,
)
from moelora_kernels.export import export_lora, lora_config, lora_of_model, main, read_adapter
from support.compare import assert_same
from support.linears import IN, OUT, make_layer, randomise
from support.models import adapt, language_model, make_model

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
MOELORA = MoeLoraConfig.preset("moelora", num_experts=4, num_tasks=3, task_embedding_dim=5)
HYDRA = MOELORA.replace(share="A", dropout_mask="shared", rank=3, shared_expert="always")
IDS = torch.tensor([[5, 6, 7, 8, 9], [3, 4, 5, 3, 4], [8, 8, 1, 2, 3]])


@pytest.mark.parametrize("share", ("none", "A"))
@pytest.mark.parametrize("shared_expert", ("none", "complement"))
def test_a_layer_as_a_plain_lora(share, shared_expert):
    """y = x Wt + b + (x At) Bt with the layer's A; the rank is R, or r if experts share A."""
    layer = make_layer(
        router="task", num_tasks=3, task_embedding_dim=5, router_bias=False, top_k=None,
        share=share, shared_expert=shared_expert,
    ).eval()  # fmt: skip
    x = torch.randn(7, IN, dtype=torch.float64)
    experts = 4 + (shared_expert != "none")
    for task in (1, 2, 3):
        set_tasks(layer, [task])
        a, b = layer.export_lora(task=task)
        rank = 3 if share == "A" else 3 * experts
        assert (a.shape, b.shape) == ((rank, IN), (OUT, rank))
        assert torch.equal(a, layer.lora_A)
        assert not a.requires_grad
        assert not b.requires_grad
        plain = layer.base_layer(x) + (x @ a.t()) @ b.t()
        torch.testing.assert_close(plain, layer(x), rtol=1e-12, atol=1e-12)
    # export_lora returns a copy of A.
    a.zero_()
    assert layer.lora_A.abs().max() > 0


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_the_exported_model_has_the_same_logits_in_stock_peft(dtype, tmp_path):
    """Experts with an A each, experts that share A, and plain LoRA: the ranks of layers differ."""
    peft = pytest.importorskip("peft")
    lora = MoeLoraConfig.preset("lora", rank=5)
    replaced = (MOELORA, MLP), (HYDRA, ["q_proj", "v_proj"]), (lora, ["k_proj"])
    model = adapt(language_model().to(dtype), *replaced).eval()
    save_adapter(model, tmp_path / "adapter.safetensors")
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        base = language_model()(IDS).logits
        for task in (1, 2, 3):
            out = tmp_path / str(task)
            main(["--task", str(task), str(tmp_path / "adapter.safetensors"), str(out)])
            stock = peft.PeftModel.from_pretrained(language_model().to(dtype), out).eval()
            actual = stock(IDS).logits
            set_tasks(model, [task])
            set_tasks(exact, [task])
            expected, truth = model(IDS).logits, exact(IDS).logits
            # An adapter that changes nothing would pass the comparisons below.
            assert (truth - base).abs().max() > 0.2
            # Both models round, in another order. The error of ours sets the budget.
            budget = 4 * (expected.double() - truth).abs().max()
            assert (actual.double() - truth).abs().max() <= budget
            if dtype == torch.float32:
                torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_the_files_are_those_of_a_stock_lora(tmp_path, capsys):
    """Two files, with lora_A and lora_B of linears and nothing else, and alpha / r = 1."""
    model = adapt(language_model(), (MOELORA, MLP), (HYDRA, ATTENTION))
    save_adapter(model, tmp_path / "adapter.safetensors")
    options = ["--task", "2", "--base-model", "qwen", "--task-type", "CAUSAL_LM"]
    main([*options, str(tmp_path / "adapter.safetensors"), str(tmp_path / "out")])
    assert "LoRA of 14 linears, r = 8" in capsys.readouterr().out
    assert sorted(os.listdir(tmp_path / "out")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert config["base_model_name_or_path"] == "qwen"
    assert config["task_type"] == "CAUSAL_LM"
    assert config["r"] == config["lora_alpha"] == 8
    assert config["modules_to_save"] is None
    assert config["bias"] == "none"
    assert config["rank_pattern"] == config["alpha_pattern"]
    names = [f"model.layers.{i}.self_attn.{n}" for i in (0, 1) for n in ATTENTION]
    names += [f"model.layers.{i}.mlp.{n}" for i in (0, 1) for n in MLP]
    assert sorted(config["target_modules"]) == sorted(names)
    assert config["rank_pattern"] == {n: 8 if "mlp" in n else 3 for n in names}
    state = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert set(state) == {
        f"base_model.model.{n}.lora_{m}.weight" for n in names for m in ("A", "B")
    }
    a, b = model.model.layers[1].mlp.up_proj.export_lora(2)
    assert torch.equal(state["base_model.model.model.layers.1.mlp.up_proj.lora_A.weight"], a)
    assert torch.equal(state["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"], b)


def test_peft_reads_the_rank_of_every_layer():
    """PEFT takes the first pattern that ends a name: "proj" must come after "block.proj"."""
    peft = pytest.importorskip("peft")
    model = nn.Module()
    model.proj, model.block = nn.Linear(4, 4), nn.Module()
    model.block.proj, model.block.other = nn.Linear(4, 4), nn.Linear(4, 4)
    ranks = {"proj": 1, "block.proj": 2, "block.other": 3}
    config = lora_config({n: (torch.zeros(r, 4), torch.zeros(4, r)) for n, r in ranks.items()})
    assert config["r"] == 3
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**config))
    for name, rank in ranks.items():
        layer = wrapped.base_model.model.get_submodule(name)
        assert layer.lora_A["default"].weight.shape == (rank, 4)
        assert layer.scaling["default"] == 1
    equal_ranks = {n: (torch.zeros(3, 4), torch.zeros(4, 3)) for n in ranks}
    assert lora_config(equal_ranks)["rank_pattern"] == {}


def test_the_command_needs_neither_peft_nor_the_model(tmp_path):
    """A machine that prepares adapters for a server may have torch and safetensors alone."""
    model = adapt(language_model().to(torch.bfloat16), (MOELORA, ATTENTION))
    save_adapter(model, tmp_path / "adapter.safetensors")
    program = (
        "import runpy, sys\n"
        "for name in ('peft', 'transformers', 'triton'): sys.modules[name] = None\n"
        f"sys.argv = ['export', '--task', '3', {str(tmp_path / 'adapter.safetensors')!r}, "
        f"{str(tmp_path / 'out')!r}]\n"
        "runpy.run_module('moelora_kernels.export', run_name='__main__')"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", program],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    state = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {t.dtype for t in state.values()} == {torch.bfloat16}
    layer = model.model.layers[0].self_attn.k_proj
    key = "base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight"
    assert torch.equal(state[key], layer.export_lora(3)[1])


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float64"))
def test_an_adapter_is_read_without_its_base(dtype, tmp_path):
    """read_adapter returns layers with the same options, ranks, tensors and exported LoRA."""
    model = make_model(HYDRA.replace(adapter_dtype=dtype, scaling=(1.0, 2.0, 0.1, 3.0, 0.7)))
    save_adapter(model, tmp_path / "adapter.safetensors")
    loaded = read_adapter(tmp_path / "adapter.safetensors")
    assert_same(adapter_state_dict(loaded), adapter_state_dict(model))
    names = ["0.0", "0.2", "1.0", "1.2"]
    for name in names:
        assert loaded.get_submodule(name).config == model.get_submodule(name).config
    assert len({id(loaded.get_submodule(name).router) for name in names}) == 1
    assert_same(lora_of_model(loaded, 2), lora_of_model(model, 2))


def test_routers_are_shared_as_they_were(tmp_path):
    """Two of four layers use one gate, and the other two have a gate each."""
    model = nn.Module()
    for i in range(4):
        model.add_module(f"layer{i}", MoeLoraLinear(6, 6, config=MOELORA))
    model.layer2.router = model.layer0.router
    save_adapter(randomise(model), tmp_path / "adapter.safetensors")
    loaded = read_adapter(tmp_path / "adapter.safetensors")
    assert loaded.layer2.router is loaded.layer0.router
    assert len({id(getattr(loaded, f"layer{i}").router) for i in range(4)}) == 3
    assert_same(lora_of_model(loaded, 1), lora_of_model(model, 1))


def test_a_merged_model_is_exported_and_saved_like_an_unmerged_one(tmp_path):
    model = make_model(MOELORA)
    expected = lora_of_model(model, 2)
    model[0][0].merge(1)
    save_adapter(model, tmp_path / "adapter.safetensors")
    for exported in (model, read_adapter(tmp_path / "adapter.safetensors")):
        assert_same(lora_of_model(exported, 2), expected)


def test_an_external_gate_is_exported_from_the_model(tmp_path):
    model = make_model(MoeLoraConfig(num_experts=3, rank=2, router="external"))
    gate = torch.tensor([0.5, 0.0, 2.0])
    config = export_lora(model, tmp_path / "out", gate)
    assert config["r"] == 6
    state = load_file(tmp_path / "out" / "adapter_model.safetensors")
    b = state["base_model.model.0.0.lora_B.weight"]
    torch.testing.assert_close(b[:, :2], 0.5 * 16.0 * model[0][0].lora_B[:, :2].detach())
    # An expert with gate 0 keeps its columns, so that all tasks have one rank.
    assert not b[:, 2:4].any()


def test_an_option_that_is_newer_than_the_file_has_its_default(tmp_path):
    """An earlier version saved a file without the option."""
    model, path = make_model(MOELORA), tmp_path / "adapter.safetensors"
    save_adapter(model, path)
    with safe_open(path, "pt") as file:
        layout = json.loads(file.metadata()["layout"])
    for options in layout["configs"]:
        del options["init"], options["freeze"], options["grad_gate"]
    save_file(load_file(path), path, metadata={"layout": json.dumps(layout)})
    assert_same(lora_of_model(read_adapter(path), 1), lora_of_model(model, 1))


def test_an_adapter_of_whole_ffn_experts_still_loads(tmp_path):
    """The file cannot be exported, but load_adapter does not read its description."""
    model = language_model()
    replace_ffns(model, MoeLoraConfig.preset("mixlora", num_experts=2, rank=2))
    save_adapter(randomise(model), tmp_path / "adapter.safetensors")
    other = copy.deepcopy(model)
    for tensor in adapter_state_dict(other).values():
        tensor.data.zero_()
    load_adapter(other, tmp_path / "adapter.safetensors")
    assert_same(adapter_state_dict(other), adapter_state_dict(model))
