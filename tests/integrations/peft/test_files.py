"""A PEFT adapter on disk: its config, its tensors, and loading it again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")

from peft.tuners.tuners_utils import BaseTuner  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from moelora_kernels import MoeLoraConfig, set_tasks  # noqa: E402
from moelora_kernels.peft import MoeLoraPeftConfig  # noqa: E402
from moelora_kernels.presets import FFN_PRESETS, PRESETS  # noqa: E402
from support.peft_models import (  # noqa: E402
    GATES,
    LORA,
    MING,
    TARGETS,
    TASKS,
    adapted,
    give_gates,
    inputs,
    llama,
    net,
    randomise,
)

ROOT = Path(__file__).resolve().parents[3]
SAVES_BIASES = hasattr(BaseTuner, "_get_learnable_bias_state_dict")


LINEAR_PRESETS = sorted(set(PRESETS) - {*FFN_PRESETS, "pesc"})
PRESET_OPTIONS = {"moelora": {"num_tasks": 5}, "xlora": {}, "goat": {"init": "kaiming"}}

EVERY_OPTION = (
    dict(num_experts=3, rank=[1, 2, 3], alpha=7.0, scaling=[0.1, 0.2, 0.3], init="normal",
         adapter_dtype="float32", router="mlp", router_hidden=5, granularity="sequence",
         score="sigmoid", temperature=0.5, noise=0.25, select="topp", top_p=0.6, keep_min=2,
         entropy_threshold=0.4, entropy_index=1.5, normalize="none", dropout=0.2,
         dropout_mask="per_expert", aux={"entropy": 0.25, "z": 0.5}, impl="wide"),
    dict(num_experts=2, rank=4, shared_expert="complement", shared_rank=3, router="task",
         num_tasks=6, task_embedding_dim=8, scaling="alpha/sqrt(r)"),
    dict(share="A", router_bias=True, top_k=1, impl="reference", aux=("load_balance",)),
    dict(select="learned_threshold", max_threshold=0.25),
    dict(select="threshold", threshold=0.2, normalize="none"),
    dict(router=None, num_experts=1, scaling=0.5),
    dict(router="task", num_tasks=6, task_gate="per_layer", batch_dim=1),
    dict(select="sampling", top_k=2, freeze="A", grad_gate="sqrt"),
    dict(top_k=2, balance_rate=0.01),
    dict(num_experts=4, frozen_experts=[0, 2]),
)  # fmt: skip


@pytest.mark.parametrize("options", EVERY_OPTION, ids=str)
def test_options_come_back_from_a_file(options, tmp_path):
    config = MoeLoraPeftConfig(
        target_modules=["q", "k"], exclude_modules=["v"], layers_to_transform=[0, 2],
        layers_pattern=["layers"], modules_to_save=["head"], task_type="CAUSAL_LM",
        inference_mode=True, base_model_name_or_path="base", revision="main", **options,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert written["peft_type"] == "MOELORA"
    for loaded in (
        peft.PeftConfig.from_pretrained(tmp_path),
        MoeLoraPeftConfig.from_pretrained(tmp_path),
    ):
        assert type(loaded) is MoeLoraPeftConfig
        loaded.target_modules = set(loaded.target_modules)
        loaded.exclude_modules = set(loaded.exclude_modules)
        assert loaded == config
        assert loaded.moe_lora_config() == MoeLoraConfig(**options)


def test_every_option_is_covered():
    options = {name for options in EVERY_OPTION for name in options}
    refused = {"svd_rho", "rank_activation"}
    assert options | refused == set(MoeLoraConfig.__dataclass_fields__)


@pytest.mark.parametrize("preset", LINEAR_PRESETS)
def test_presets(preset, tmp_path):
    """The file has the preset's options, not its name. None is a value that replaces one."""
    options = PRESET_OPTIONS.get(preset, {})
    config = MoeLoraPeftConfig(preset=preset, target_modules="all-linear", **options)
    expected = MoeLoraConfig.preset(preset, **options)
    assert config.moe_lora_config() == expected
    config.save_pretrained(tmp_path)
    assert peft.PeftConfig.from_pretrained(tmp_path) == config
    assert config.rank == expected.rank or list(config.rank) == list(expected.rank)
    other = {**options, "alpha": 3.0, "dropout": 0.0}
    assert MoeLoraPeftConfig(preset=preset, **other).moe_lora_config() == MoeLoraConfig.preset(
        preset, **other
    )


def test_none_replaces_the_value_of_the_preset():
    config = MoeLoraPeftConfig(preset="ming", top_k=None)
    assert config.top_k is None
    assert config.select == "all"


@pytest.mark.parametrize(
    ("options", "error", "message"),
    (
        (dict(ranks=8), TypeError, "unexpected keyword argument 'ranks'"),
        (dict(rank=0), ValueError, "rank: expected a whole number"),
        (dict(preset="mixlore"), ValueError, "preset: expected one of"),
        (dict(preset="mixlora"), ValueError, "whole-FFN experts"),
        (dict(preset="goat"), ValueError, "svd_segments"),
        (dict(preset="pesc"), ValueError, "rank_activation"),
        (dict(router=nn.Linear(6, 8)), TypeError, "router: a module"),
        (dict(bias="lora_only"), ValueError, "bias: expected one of"),
        (dict(target_modules=".*up", layers_to_transform=0), ValueError, "layers_to_transform"),
        (dict(target_modules=["up"], layers_pattern="h"), ValueError, "layers_pattern"),
        (dict(task_type="MIXING"), ValueError, "Invalid task type"),
    ),
    ids=str,
)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        MoeLoraPeftConfig(**options)


def test_the_page_has_the_errors_of_refused_presets():
    page = (ROOT / "moelora_kernels" / "peft" / "README.md").read_text(encoding="utf-8")
    for preset in ("mixlora", "pesc", "goat"):
        with pytest.raises(ValueError, match=r"PEFT") as error:
            MoeLoraPeftConfig(preset=preset)
        assert f"| `{error.value}` |" in page
    assert MoeLoraPeftConfig(preset="goat", init="kaiming").scaling == "sqrt(3*alpha*I/r)"


def test_the_preset_as_a_method():
    """As in MoeLoraConfig. The field of the same name stays the name of the preset."""
    config = MoeLoraPeftConfig.preset("ming", top_k=1, target_modules=["up"])
    assert config == MoeLoraPeftConfig(preset="ming", top_k=1, target_modules=["up"])
    assert config.to_dict()["preset"] == config.preset == "ming"
    assert MoeLoraPeftConfig().preset is None


@pytest.mark.parametrize("name", ("mixlore", None, ["ming"], MoeLoraConfig()), ids=type)
def test_a_preset_that_does_not_exist_is_named(name):
    for build in (MoeLoraConfig.preset, MoeLoraPeftConfig.preset):
        with pytest.raises(ValueError, match=r"^preset: expected one of lora, .*, got "):
            build(name)
        with pytest.raises(TypeError, match="unexpected keyword argument 'ranks'"):
            build("ming", ranks=8)


def test_unknown_options_of_a_file_are_not_dropped(tmp_path):
    """PEFT would only warn, and load another gate than the trained one."""
    MoeLoraPeftConfig(**MING).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "gate_noise": 0.5}))
    with pytest.raises(ValueError, match="gate_noise"):
        MoeLoraPeftConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("low_cpu_mem_usage", (False, True))
@pytest.mark.parametrize("options", GATES.values(), ids=GATES)
def test_round_trip(options, low_cpu_mem_usage, tmp_path):
    model, x = adapted(options), inputs()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(
        net(), tmp_path, adapter_name="mine", low_cpu_mem_usage=low_cpu_mem_usage
    )
    give_gates(loaded, options).eval()
    assert not any(p.is_meta for p in loaded.parameters())
    # Not bitwise: tensors that stay memory-mapped have another alignment.
    torch.testing.assert_close(loaded(x), model(x), rtol=1e-10, atol=1e-10)
    assert not any(p.requires_grad for p in loaded.parameters())
    written = {k: v for k, v in model.named_parameters() if "moelora_" in k}
    read = {k: v for k, v in loaded.named_parameters() if "moelora_" in k}
    assert {k.replace(".mine.", ".default.") for k in read} == set(written)
    for key, tensor in read.items():
        assert torch.equal(tensor, written[key.replace(".mine.", ".default.")]), key


@pytest.mark.parametrize("preset", LINEAR_PRESETS)
def test_round_trip_of_presets(preset, tmp_path):
    """All tensors of the router are in the file, and come back."""
    config = MoeLoraPeftConfig(
        preset=preset, target_modules=TARGETS, **PRESET_OPTIONS.get(preset, {})
    )
    model = randomise(peft.get_peft_model(net(), config))
    for _, buffer in model.named_buffers():
        buffer.normal_()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(net(), tmp_path)
    read = loaded.state_dict()
    for key, tensor in model.state_dict().items():
        assert torch.equal(read[key], tensor), key
    tasks = {"task": [3, 1], "token_task": torch.randn(2, config.task_embedding_dim)}
    if config.router in tasks:
        set_tasks(model, tasks[config.router])
        set_tasks(loaded, tasks[config.router])
    if config.router != "external":
        torch.testing.assert_close(
            loaded.eval()(inputs()), model.eval()(inputs()), rtol=1e-10, atol=1e-10
        )


@pytest.mark.parametrize(
    ("options", "in_each_layer", "in_the_first"),
    (
        (MING, {"router.weight", "router.bias"}, set()),
        (TASKS, set(), {"router_embedding.weight", "router_gate.weight"}),
        (LORA, set(), set()),
        (GATES["threshold"], {"router_gate.weight", "router_threshold.weight",
                              "router_threshold.bias"}, set()),
    ),
    ids=("ming", "tasks", "lora", "threshold"),
)  # fmt: skip
def test_keys_of_the_file(options, in_each_layer, in_the_first, tmp_path):
    """Other programs and later versions read these keys."""
    adapted(options).save_pretrained(tmp_path)
    layers = [f"base_model.model.layers.{i}.{name}" for i in range(2) for name in ("up", "down")]
    in_each_layer = {"experts.lora_A", "experts.lora_B", *in_each_layer}
    expected = {f"{layer}.moelora_{key}" for layer in layers for key in in_each_layer}
    expected |= {f"{layers[0]}.moelora_{key}" for key in in_the_first}
    state = load_file(tmp_path / "adapter_model.safetensors")
    assert set(state) == expected
    rank = 3 if options is LORA else 6
    assert state[f"{layers[0]}.moelora_experts.lora_A"].shape == (rank, 6)
    assert state[f"{layers[0]}.moelora_experts.lora_B"].shape == (10, rank)


HMORA = dict(preset="hmora", num_experts=3, rank=2, task_embedding_dim=5, dropout=0.0)


@pytest.mark.parametrize("options", (TASKS, HMORA), ids=("tasks", "hmora"))
def test_tasks_can_be_set_before_the_tensors_are_loaded(options, tmp_path):
    """set_tasks works while the adapter is on the meta device."""
    x = inputs()
    saved = adapted(options)
    config = MoeLoraPeftConfig(target_modules=TARGETS, **options)
    early = peft.get_peft_model(net(), config, low_cpu_mem_usage=True).eval()
    for model in (saved, early):
        if options is HMORA:
            set_tasks(model, torch.tensor([[1.0, 0, 2, -1, 1], [0.5, 1, -1, 0, 0]]))
        give_gates(model, options)
    state = peft.get_peft_model_state_dict(saved)
    peft.set_peft_model_state_dict(early, state, low_cpu_mem_usage=True)
    assert torch.equal(early(x), saved(x))


def test_several_adapters_are_saved_in_one_folder_each(tmp_path):
    model, x = adapted(TASKS), inputs()
    model.add_adapter("other", MoeLoraPeftConfig(target_modules=["up"], **TASKS))
    randomise(model, seed=4)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(net(), tmp_path)
    loaded.load_adapter(tmp_path / "other", "other")
    for active in (["default"], ["other"], ["default", "other"]):
        for m in (model, loaded):
            m.base_model.set_adapter(active)
            set_tasks(m, [4, 2])
            m.eval()
        assert torch.equal(loaded(x), model(x))


def test_adapters_over_different_layers_load_one_after_another(tmp_path):
    """Each adapter is on layers that another adapter is not on."""
    x = inputs()
    model = adapted(TASKS)
    model.add_adapter("ming", MoeLoraPeftConfig(target_modules=["up"], **MING))
    model.add_adapter("top", MoeLoraPeftConfig(target_modules=["head"], **TASKS))
    randomise(model, seed=4)
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        options = dict(low_cpu_mem_usage=low_cpu_mem_usage)
        loaded = peft.PeftModel.from_pretrained(
            net(), tmp_path / "ming", adapter_name="ming", **options
        )
        loaded.load_adapter(tmp_path, "default", **options)
        loaded.load_adapter(tmp_path / "top", "top", **options)
        for active in (["default"], ["ming"], ["top"], ["ming", "default", "top"]):
            for m in (model, loaded):
                m.base_model.set_adapter(active)
                if active != ["ming"]:
                    set_tasks(m, [4, 2])
                m.eval()
            assert torch.equal(loaded(x), model(x))


def test_a_file_without_an_expert_is_reported(tmp_path):
    """PEFT warns, and its warning names the missing key."""
    from safetensors.torch import save_file

    adapted(TASKS).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    state = load_file(path)
    state.pop(next(k for k in state if k.endswith("router_gate.weight")))
    save_file(state, path)
    with pytest.warns(UserWarning, match=r"missing adapter keys.*router_gate"):
        peft.PeftModel.from_pretrained(net(), tmp_path)


@pytest.mark.parametrize("options", (MING, TASKS, dict(router="mlp", rank=2)), ids=str)
def test_a_file_without_a_tensor_does_not_load_with_low_cpu_mem_usage(options, tmp_path):
    """With low_cpu_mem_usage the missing tensor would stay on meta, so loading raises."""
    from safetensors.torch import save_file

    adapted(options).save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    state = load_file(path)
    for key in [key for key in state if ".layers.0.up." in key]:
        save_file({k: v for k, v in state.items() if k != key}, path)
        part = key.rpartition(".up.")[2]
        with pytest.raises(RuntimeError, match=rf"adapter 'default': .* no values for {part}"):
            peft.PeftModel.from_pretrained(net(), tmp_path, low_cpu_mem_usage=True)


def test_the_router_of_an_adapter_moves_with_it():
    model = adapted(MING)
    layer = model.base_model.model.layers[0].up
    # PEFT calls this private method of its layers after it has loaded a file. On a machine with one
    # device no public call moves an adapter, so the test calls it; meta is the other device.
    layer._move_adapter_to_device_of_base_layer("default", torch.device("meta"))
    parameters = [p for name, p in layer.named_parameters() if "moelora_" in name]
    assert len(parameters) == 4
    assert all(p.is_meta for p in parameters)


def test_a_file_of_another_rank_does_not_load(tmp_path):
    adapted(MING).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "rank": 4}))
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(net(), tmp_path)


def test_loading_without_the_import_names_the_method(tmp_path):
    adapted(MING).save_pretrained(tmp_path)
    assert type(peft.PeftConfig.from_pretrained(tmp_path)) is MoeLoraPeftConfig
    program = "import sys, peft; peft.PeftConfig.from_pretrained(sys.argv[1])"
    without = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True
    )
    assert without.returncode != 0
    assert "KeyError: 'MOELORA'" in without.stderr


def test_modules_to_save(tmp_path):
    """The whole head trains, and is saved and loaded with the adapter."""
    model, x = adapted(MING, modules_to_save=["head"]), inputs()
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert "base_model.model.head.modules_to_save.default.weight" in trained
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["default"].weight.normal_()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(net(), tmp_path).eval()
    assert torch.equal(loaded(x), model(x))
    with loaded.disable_adapter():
        assert torch.equal(loaded(x), net()(x))


@pytest.mark.parametrize("bias", ("all", "moelora_only"))
def test_trained_biases(bias, tmp_path):
    if not SAVES_BIASES:
        with pytest.raises(ValueError, match=r"from 0\.21 on"):
            MoeLoraPeftConfig(bias=bias, **MING)
        return
    model, x = adapted(MING, bias=bias), inputs()
    trained = {n for n, p in model.named_parameters() if p.requires_grad and "moelora_" not in n}
    biases = {f"base_model.model.layers.{i}.{n}.base_layer.bias" for i in (0, 1) for n in TARGETS}
    assert trained == biases | ({"base_model.model.head.bias"} if bias == "all" else set())
    model(x).sum().backward()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in trained:
                assert parameter.grad.any(), name
                parameter.normal_()
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(net(), tmp_path).eval()
    assert torch.equal(loaded(x), model(x))


def test_tied_embeddings_and_a_language_model(tmp_path):
    """A language model with tied embeddings, loaded by PEFT and by transformers."""
    ids = torch.arange(8).view(2, 4)
    model = adapted(dict(TASKS, target_modules=["q_proj"]), llama(tie_word_embeddings=True))
    set_tasks(model, [1, 2])
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(llama(tie_word_embeddings=True), tmp_path).eval()
    set_tasks(loaded, [1, 2])
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    plain = llama(tie_word_embeddings=True)
    plain.load_adapter(str(tmp_path))
    set_tasks(plain, [1, 2])
    assert torch.equal(plain.eval()(ids).logits, model(ids).logits)
