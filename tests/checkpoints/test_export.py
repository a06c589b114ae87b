"""One task as a plain LoRA: the same function, in files that stock PEFT loads."""

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
    replace_linears,
    save_adapter,
    set_tasks,
)
from moelora_kernels.export import export_lora, lora_config, lora_of_model, main, read_adapter
from support import linears
from support.ffns import make_ffn
from support.linears import IN, OUT, Prototype, randomise
from support.models import language_model

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
MLP = ["gate_proj", "up_proj", "down_proj"]
TASKS = dict(num_experts=4, num_tasks=3, task_embedding_dim=5)
MOELORA = MoeLoraConfig.preset("moelora", **TASKS)
HYDRA = MOELORA.replace(share="A", dropout_mask="shared", rank=3, shared_expert="always")
IDS = torch.tensor([[5, 6, 7, 8, 9], [3, 4, 5, 3, 4], [8, 8, 1, 2, 3]])


@pytest.fixture(scope="module")
def qwen():
    """A Qwen2 of 2 layers, 16 wide, with grouped-query attention."""
    return language_model()


def adapted(qwen, *replaced, dtype=torch.float32):
    """A copy of the model with layers of each (config, targets), nothing zero in them."""
    model = copy.deepcopy(qwen).to(dtype)
    for config, targets in replaced:
        replace_linears(model, config, targets)
    return randomise(model).eval()


def peft_model(qwen, path, dtype=torch.float32):
    peft = pytest.importorskip("peft")
    return peft.PeftModel.from_pretrained(copy.deepcopy(qwen).to(dtype), path).eval()


@pytest.mark.parametrize("share", ("none", "A"))
@pytest.mark.parametrize("shared_expert", ("none", "complement"))
def test_a_layer_as_a_plain_lora(share, shared_expert):
    """Rank R (r where experts share A), scaling 1, A as it is: y = x Wt + b + (x At) Bt."""
    layer = linears.make_layer(
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
    a.zero_()
    assert layer.lora_A.abs().max() > 0


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_the_exported_model_has_the_same_logits_in_stock_peft(qwen, dtype, tmp_path):
    """Gates of experts that share A, of experts with an A each, and plain LoRA: ranks differ."""
    lora = MoeLoraConfig.preset("lora", rank=5)
    model = adapted(
        qwen, (MOELORA, MLP), (HYDRA, ["q_proj", "v_proj"]), (lora, ["k_proj"]), dtype=dtype
    )
    save_adapter(model, tmp_path / "adapter.safetensors")
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        base = qwen.to(torch.float32)(IDS).logits
        for task in (1, 2, 3):
            out = tmp_path / str(task)
            main(["--task", str(task), str(tmp_path / "adapter.safetensors"), str(out)])
            found = peft_model(qwen, out, dtype)(IDS).logits
            set_tasks(model, [task])
            set_tasks(exact, [task])
            expected, truth = model(IDS).logits, exact(IDS).logits
            # The adapter matters, so that agreement says something.
            assert (truth - base).abs().max() > 0.2
            # One model that computes the same through other roundings: as far off as ours is.
            budget = 4 * (expected.double() - truth).abs().max()
            assert (found.double() - truth).abs().max() <= budget
            if dtype == torch.float32:
                torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_files_are_those_of_a_stock_lora(qwen, tmp_path, capsys):
    """What PEFT and vLLM read: two files, lora_A and lora_B of linears alone, alpha / r of 1."""
    model = adapted(qwen, (MOELORA, MLP), (HYDRA, ATTENTION))
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


def test_peft_gives_every_layer_the_rank_it_has():
    """PEFT takes the first pattern that ends a name: "proj" must not stand before "block.proj"."""
    peft = pytest.importorskip("peft")
    model = nn.Module()
    model.proj, model.block = nn.Linear(4, 4), nn.Module()
    model.block.proj, model.block.other = nn.Linear(4, 4), nn.Linear(4, 4)
    ranks = {"proj": 1, "block.proj": 2, "block.other": 3}
    lora = {n: (torch.zeros(r, 4), torch.zeros(4, r)) for n, r in ranks.items()}
    config = lora_config(lora)
    assert config["r"] == 3
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**config))
    for name, rank in ranks.items():
        layer = wrapped.base_model.model.get_submodule(name)
        assert layer.lora_A["default"].weight.shape == (rank, 4)
        assert layer.scaling["default"] == 1
    same = {n: (torch.zeros(3, 4), torch.zeros(4, 3)) for n in ranks}
    assert lora_config(same)["rank_pattern"] == {}


def test_the_command_needs_neither_peft_nor_the_model(qwen, tmp_path):
    """A machine that prepares adapters for a server has torch and safetensors."""
    model = adapted(qwen, (MOELORA, ATTENTION), dtype=torch.bfloat16)
    save_adapter(model, tmp_path / "adapter.safetensors")
    program = (
        "import runpy, sys\n"
        "for name in ('peft', 'transformers', 'triton'): sys.modules[name] = None\n"
        f"sys.argv = ['export', '--task', '3', {str(tmp_path / 'adapter.safetensors')!r}, "
        f"{str(tmp_path / 'out')!r}]\n"
        "runpy.run_module('moelora_kernels.export', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-c", program],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    state = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {t.dtype for t in state.values()} == {torch.bfloat16}
    layer = model.model.layers[0].self_attn.k_proj
    key = "base_model.model.model.layers.0.self_attn.k_proj.lora_B.weight"
    assert torch.equal(state[key], layer.export_lora(3)[1])


def make_model(config=MOELORA, targets=("first", "second")):
    torch.manual_seed(0)
    model = nn.Module()
    model.first, model.second = nn.Linear(6, 8), nn.Linear(8, 6)
    replace_linears(model, config, targets)
    return randomise(model)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16", "float64"))
def test_an_adapter_is_read_without_its_base(dtype, tmp_path):
    """Every option, rank and tensor of the layers as they were, their base aside."""
    model = make_model(HYDRA.replace(adapter_dtype=dtype, scaling=(1.0, 2.0, 0.1, 3.0, 0.7)))
    save_adapter(model, tmp_path / "adapter.safetensors")
    found = read_adapter(tmp_path / "adapter.safetensors")
    expected = adapter_state_dict(model)
    for key, tensor in adapter_state_dict(found).items():
        assert tensor.dtype == expected[key].dtype, key
        assert torch.equal(tensor, expected[key]), key
    for name in ("first", "second"):
        assert found.get_submodule(name).config == model.get_submodule(name).config
    assert found.first.router is found.second.router
    for name, matrices in lora_of_model(model, 2).items():
        for own, other in zip(matrices, lora_of_model(found, 2)[name], strict=True):
            assert torch.equal(own, other)


def test_routers_are_shared_as_they_were(tmp_path):
    """A gate per layer (the original's other variant), and two gates that two layers each use."""
    model = nn.Module()
    for i in range(4):
        layer = MoeLoraLinear(6, 6, config=MOELORA)
        model.add_module(f"layer{i}", layer)
    model.layer2.router = model.layer0.router
    save_adapter(randomise(model), tmp_path / "adapter.safetensors")
    found = read_adapter(tmp_path / "adapter.safetensors")
    assert found.layer2.router is found.layer0.router
    assert len({id(getattr(found, f"layer{i}").router) for i in range(4)}) == 3
    for i in range(4):
        wanted = getattr(model, f"layer{i}").export_lora(1)[1]
        assert torch.equal(getattr(found, f"layer{i}").export_lora(1)[1], wanted)


def test_a_merged_model_is_exported_and_saved_as_an_unmerged_one(tmp_path):
    model = make_model()
    wanted = lora_of_model(model, 2)
    model.first.merge(1)
    save_adapter(model, tmp_path / "adapter.safetensors")
    for found in (model, read_adapter(tmp_path / "adapter.safetensors")):
        for name, matrices in lora_of_model(found, 2).items():
            assert all(map(torch.equal, matrices, wanted[name]))


def test_an_external_gate_is_exported_from_the_model(tmp_path):
    model = make_model(MoeLoraConfig(num_experts=3, rank=2, router="external"))
    gate = torch.tensor([0.5, 0.0, 2.0])
    config = export_lora(model, tmp_path / "out", gate)
    assert config["r"] == 6
    state = load_file(tmp_path / "out" / "adapter_model.safetensors")
    b = state["base_model.model.first.lora_B.weight"]
    torch.testing.assert_close(b[:, :2], 0.5 * 16.0 * model.first.lora_B[:, :2].detach())
    # The expert that is off keeps its place, so that all tasks have one rank.
    assert not b[:, 2:4].any()


def refused(call, capsys):
    """What the command says before it exits with the status of a wrong argument."""
    with pytest.raises(SystemExit) as status:
        main(call)
    assert status.value.code == 2
    return capsys.readouterr().err


def test_layers_that_are_no_plain_lora_are_named(qwen, tmp_path, capsys):
    """A mixture per token on the MLP, plain LoRA on attention: half of it would be lost."""
    ming = MoeLoraConfig.preset("ming", num_experts=4, rank=2)
    model = adapted(qwen, (ming, ["up_proj"]), (MoeLoraConfig.preset("lora", rank=2), ATTENTION))
    path = tmp_path / "adapter.safetensors"
    save_adapter(model, path)
    said = refused([str(path), str(tmp_path / "out")], capsys)
    for i in (0, 1):
        assert f"model.layers.{i}.mlp.up_proj: task: its gate depends on x (router='linear'" in said
    assert "self_attn" not in said
    assert not (tmp_path / "out").exists()


def test_layers_that_need_their_base_are_named(tmp_path, capsys):
    path = tmp_path / "adapter.safetensors"
    model = make_model(MoeLoraConfig.preset("goat", num_experts=2, rank=2, init="svd_segments"))
    save_adapter(model, path)
    assert "first: init='svd_segments' reduced the base" in refused([str(path), "out"], capsys)
    with pytest.raises(ValueError, match="first: init='svd_segments' reduced the base"):
        lora_of_model(model)

    model = nn.Module()
    model.mlp = make_ffn()
    model.first = MoeLoraLinear(IN, 8, router=Prototype(2), num_experts=2, rank=2)
    save_adapter(model, path)
    said = refused([str(path), "out"], capsys)
    assert "mlp: the experts of a MoeLoraFFN are not linear" in said
    assert "first: its router is a custom module, which is not in the file" in said
    with pytest.raises(ValueError, match="mlp: the experts of a MoeLoraFFN are not linear"):
        lora_of_model(model)


def test_wrong_tasks_and_paths(tmp_path, capsys):
    path, out = tmp_path / "adapter.safetensors", tmp_path / "out"
    save_adapter(make_model(), path)
    assert "router='task' needs a task id, 1 to 3" in refused([str(path), str(out)], capsys)
    for task in ("0", "4", "-1"):
        call = [f"--task={task}", str(path), str(out)]
        assert f"expected 1 to 3, got [{task}]" in refused(call, capsys)
    assert "invalid int" in refused(["--task", "first", str(path), str(out)], capsys)
    assert not out.exists()
    out.mkdir()
    assert "out: it exists" in refused(["--task", "1", str(path), str(out)], capsys)
    assert "No such file" in refused(["--task", "1", str(tmp_path / "none"), "new"], capsys)
    save_adapter(make_model(MoeLoraConfig.preset("lora")), path)
    assert "no layer of the model has a task gate" in refused(
        ["--task", "1", str(path), "x"], capsys
    )


def test_files_that_are_no_adapter_of_ours(tmp_path, capsys):
    path = tmp_path / "adapter.safetensors"
    path.write_bytes(b"\x80\x02}q\x00.")
    assert "not a readable safetensors file" in refused(["--task", "1", str(path), "x"], capsys)
    model = make_model()
    state = {k: v.detach() for k, v in adapter_state_dict(model).items()}
    for metadata in (None, {"format": "moelora_kernels"}):
        # What save_adapter wrote before it knew of layouts.
        save_file(state, path, metadata=metadata)
        said = refused(["--task", "1", str(path), "x"], capsys)
        assert "has no description of its layers" in said
        load_adapter(model, path)


def test_an_option_that_is_newer_than_the_file_has_its_default(tmp_path):
    """What an earlier version saved did not know of it."""
    model, path = make_model(), tmp_path / "adapter.safetensors"
    save_adapter(model, path)
    with safe_open(path, "pt") as file:
        layout = json.loads(file.metadata()["layout"])
    for options in layout["configs"]:
        del options["init"], options["freeze"], options["grad_gate"]
    save_file(load_file(path), path, metadata={"layout": json.dumps(layout)})
    for name, pair in lora_of_model(read_adapter(path), 1).items():
        for own, other in zip(pair, lora_of_model(model, 1)[name], strict=True):
            assert torch.equal(own, other), name


LAYOUTS = {
    "no JSON": lambda layout: "{",
    "null": lambda layout: "null",
    "a list": lambda layout: "[]",
    "no layers": lambda layout: "{}",
    "no names": lambda layout: json.dumps({**layout, "layers": [{}]}),
    "a config that is not there": lambda layout: json.dumps({**layout, "configs": []}),
    "a negative size": lambda layout: json.dumps(
        {**layout, "layers": [{**layout["layers"][0], "in_features": -1}]}
    ),
    "a size that is no number": lambda layout: json.dumps(
        {**layout, "layers": [{**layout["layers"][0], "in_features": "8"}]}
    ),
    "an option of another kind": lambda layout: json.dumps(
        {**layout, "configs": [{**layout["configs"][0], "aux": 3}]}
    ),
    "an empty name": lambda layout: json.dumps(
        {**layout, "layers": [{**layout["layers"][0], "names": ["a..b"]}]}
    ),
}


@pytest.mark.parametrize("change", LAYOUTS.values(), ids=LAYOUTS)
def test_a_layout_that_cannot_be_read_is_named_with_its_file(change, tmp_path, capsys):
    path, out = tmp_path / "adapter.safetensors", tmp_path / "out"
    save_adapter(make_model(), path)
    with safe_open(path, "pt") as file:
        layout = json.loads(file.metadata()["layout"])
    save_file(load_file(path), path, metadata={"layout": change(layout)})
    said = refused(["--task", "1", str(path), str(out)], capsys)
    assert f"{path}: the layers that it describes cannot be built" in said
    assert not out.exists()


def test_tensors_that_are_not_those_of_the_layout(tmp_path, capsys):
    model, path = make_model(), tmp_path / "adapter.safetensors"
    state = {k: v.detach() for k, v in adapter_state_dict(model).items()}
    save_adapter(model, path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    state["extra"] = state.pop("second.lora_B")
    save_file(state, path, metadata=metadata)
    said = refused(["--task", "1", str(path), "x"], capsys)
    assert "missing: second.lora_B" in said
    assert "unexpected: extra" in said


def test_values_that_are_not_finite_are_named(tmp_path):
    model = make_model(MOELORA.replace(adapter_dtype="float16", scaling=1e7))
    with pytest.raises(ValueError, match="first: lora_B of task 1 has values that are not finite"):
        export_lora(model, tmp_path / "out", 1)
    assert not (tmp_path / "out").exists()


def test_adapters_without_values_are_named(tmp_path):
    with pytest.raises(ValueError, match="lora_A is on the meta device, without values"):
        export_lora(make_model().to("meta"), tmp_path / "out", 1)
    assert not (tmp_path / "out").exists()


def test_names_that_peft_does_not_have(tmp_path):
    """A layer of its own has no name; of two names for one layer PEFT adapts the first alone."""
    layer = MoeLoraLinear(4, 4, config=MOELORA)
    with pytest.raises(ValueError, match=r"got a layer; use layer.export_lora\(task\)"):
        export_lora(layer, tmp_path / "out", 1)
    save_adapter(layer, tmp_path / "adapter.safetensors")
    assert torch.equal(read_adapter(tmp_path / "adapter.safetensors").lora_A, layer.lora_A)
    model = nn.Module()
    model.one = model.two = layer
    save_adapter(model, tmp_path / "adapter.safetensors")
    for found in (model, read_adapter(tmp_path / "adapter.safetensors")):
        with pytest.raises(ValueError, match="two: the same layer as one"):
            export_lora(found, tmp_path / "out", 1)


def test_an_adapter_of_whole_ffn_experts_still_loads(qwen, tmp_path):
    """The layout is for the export; saving and loading serve every layer as before."""
    model = copy.deepcopy(qwen)
    replace_ffns(model, MoeLoraConfig.preset("mixlora", num_experts=2, rank=2))
    save_adapter(randomise(model), tmp_path / "adapter.safetensors")
    other = copy.deepcopy(model)
    for tensor in adapter_state_dict(other).values():
        tensor.data.zero_()
    load_adapter(other, tmp_path / "adapter.safetensors")
    for key, tensor in adapter_state_dict(other).items():
        assert torch.equal(tensor, adapter_state_dict(model)[key]), key
