"""An export that would not be the plain LoRA of the task is an error with a reason, and no file."""

import json

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
    save_adapter,
)
from moelora_kernels.export import export_lora, lora_of_model, main, read_adapter
from support.ffns import make_ffn
from support.linears import IN, Prototype
from support.models import adapt, language_model, make_model

MOELORA = MoeLoraConfig.preset("moelora", num_experts=4, num_tasks=3, task_embedding_dim=5)


@pytest.fixture
def path(tmp_path):
    """The path of an adapter file that a test writes."""
    return tmp_path / "adapter.safetensors"


@pytest.fixture
def out(tmp_path):
    """The folder of an exported LoRA. It must not exist after the test."""
    yield tmp_path / "out"
    assert not (tmp_path / "out").exists()


def error_of(capsys, *arguments):
    """Return the message with which the command exits, after checking its exit status."""
    with pytest.raises(SystemExit) as status:
        main([str(argument) for argument in arguments])
    assert status.value.code == 2
    return capsys.readouterr().err


def test_layers_with_a_gate_per_token_are_named(path, out, capsys):
    """An export without the MLP's mixtures would answer worse, without a message."""
    ming = MoeLoraConfig.preset("ming", num_experts=4, rank=2)
    lora = MoeLoraConfig.preset("lora", rank=2)
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    save_adapter(adapt(language_model(), (ming, ["up_proj"]), (lora, attention)), path)
    message = error_of(capsys, path, out)
    for i in (0, 1):
        reason = "task: its gate depends on x (router='linear'"
        assert f"model.layers.{i}.mlp.up_proj: {reason}" in message
    assert "self_attn" not in message


def test_layers_that_need_their_base_are_named(path, out, capsys):
    model = make_model(MoeLoraConfig.preset("goat", num_experts=2, rank=2, init="svd_segments"))
    save_adapter(model, path)
    assert "0.0: init='svd_segments' reduced the base" in error_of(capsys, path, out)
    with pytest.raises(ValueError, match=r"0\.0: init='svd_segments' reduced the base"):
        lora_of_model(model)

    model = nn.Module()
    model.mlp = make_ffn()
    model.first = MoeLoraLinear(IN, 8, router=Prototype(2), num_experts=2, rank=2)
    save_adapter(model, path)
    message = error_of(capsys, path, out)
    assert "mlp: the experts of a MoeLoraFFN are not linear" in message
    assert "first: its router is a custom module, which is not in the file" in message
    with pytest.raises(ValueError, match="mlp: the experts of a MoeLoraFFN are not linear"):
        lora_of_model(model)


def test_wrong_tasks_are_refused(path, out, capsys):
    save_adapter(make_model(MOELORA), path)
    assert "router='task' needs a task id, 1 to 3" in error_of(capsys, path, out)
    for task in ("0", "4", "-1"):
        message = error_of(capsys, f"--task={task}", path, out)
        assert f"expected 1 to 3, got [{task}]" in message
    assert "invalid int" in error_of(capsys, "--task", "first", path, out)
    save_adapter(make_model(MoeLoraConfig.preset("lora")), path)
    message = error_of(capsys, "--task", "1", path, out)
    assert "no layer of the model has a task gate" in message


def test_a_path_that_exists_or_is_missing_is_named(path, tmp_path, capsys):
    save_adapter(make_model(MOELORA), path)
    (tmp_path / "full").mkdir()
    assert "full: it exists" in error_of(capsys, "--task", "1", path, tmp_path / "full")
    assert not any((tmp_path / "full").iterdir())
    missing = tmp_path / "none"
    assert "No such file" in error_of(capsys, "--task", "1", missing, tmp_path / "new")


def test_a_file_that_is_not_an_adapter_is_named(path, out, capsys):
    path.write_bytes(b"\x80\x02}q\x00.")
    message = error_of(capsys, "--task", "1", path, out)
    assert "not a readable safetensors file" in message


@pytest.mark.parametrize("metadata", (None, {"format": "moelora_kernels"}), ids=str)
def test_a_file_without_a_description_is_loaded_but_not_exported(metadata, path, out, capsys):
    """The first versions of save_adapter wrote no description."""
    model = make_model(MOELORA)
    state = {key: tensor.detach() for key, tensor in adapter_state_dict(model).items()}
    save_file(state, path, metadata=metadata)
    message = error_of(capsys, "--task", "1", path, out)
    assert "has no description of its layers" in message
    load_adapter(model, path)


# Name -> the text of a wrong description, from the right one.
WRONG_DESCRIPTIONS = {
    "not JSON": lambda layout: "{",
    "null": lambda layout: "null",
    "a list": lambda layout: "[]",
    "without layers": lambda layout: "{}",
    "a layer without options": lambda layout: json.dumps({**layout, "layers": [{}]}),
    "a config that is missing": lambda layout: json.dumps({**layout, "configs": []}),
    "a negative size": lambda layout: json.dumps(
        {**layout, "layers": [{**layout["layers"][0], "in_features": -1}]}
    ),
    "a size that is a string": lambda layout: json.dumps(
        {**layout, "layers": [{**layout["layers"][0], "in_features": "8"}]}
    ),
    "an option of another type": lambda layout: json.dumps(
        {**layout, "configs": [{**layout["configs"][0], "aux": 3}]}
    ),
    "an empty part in a name": lambda layout: json.dumps(
        {**layout, "layers": [{**layout["layers"][0], "names": ["a..b"]}]}
    ),
}


@pytest.mark.parametrize("change", WRONG_DESCRIPTIONS.values(), ids=WRONG_DESCRIPTIONS)
def test_a_description_that_cannot_be_read_is_named_with_its_file(change, path, out, capsys):
    save_adapter(make_model(MOELORA), path)
    with safe_open(path, "pt") as file:
        layout = json.loads(file.metadata()["layout"])
    save_file(load_file(path), path, metadata={"layout": change(layout)})
    message = error_of(capsys, "--task", "1", path, out)
    assert f"{path}: the layers that it describes cannot be built" in message


def test_tensors_that_do_not_fit_the_description_are_named(path, out, capsys):
    model = make_model(MOELORA)
    state = {key: tensor.detach() for key, tensor in adapter_state_dict(model).items()}
    save_adapter(model, path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    state["extra"] = state.pop("0.2.lora_B")
    save_file(state, path, metadata=metadata)
    message = error_of(capsys, "--task", "1", path, out)
    assert "missing: 0.2.lora_B" in message
    assert "unexpected: extra" in message


def test_values_that_are_not_finite_are_named(out):
    model = make_model(MOELORA.replace(adapter_dtype="float16", scaling=1e7))
    message = r"0\.0: lora_B of task 1 has values that are not finite"
    with pytest.raises(ValueError, match=message):
        export_lora(model, out, 1)


def test_adapters_without_values_are_named(out):
    with pytest.raises(ValueError, match="lora_A is on the meta device, without values"):
        export_lora(make_model(MOELORA).to("meta"), out, 1)


def test_a_single_layer_has_no_name_to_export(path, out):
    layer = MoeLoraLinear(4, 4, config=MOELORA)
    with pytest.raises(ValueError, match=r"got a layer; use layer.export_lora\(task\)"):
        export_lora(layer, out, 1)
    save_adapter(layer, path)
    assert torch.equal(read_adapter(path).lora_A, layer.lora_A)


def test_two_names_of_one_layer_are_refused(path, out):
    """PEFT would adapt the first name only."""
    model = nn.Module()
    model.one = model.two = MoeLoraLinear(4, 4, config=MOELORA)
    save_adapter(model, path)
    for exported in (model, read_adapter(path)):
        with pytest.raises(ValueError, match="two: the same layer as one"):
            export_lora(exported, out, 1)
