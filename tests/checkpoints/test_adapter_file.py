"""save_adapter and load_adapter: every bit comes back, or an error names the problem."""

import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from moelora_kernels import (
    MoeLoraConfig,
    MoeLoraLinear,
    adapter_parameters,
    adapter_state_dict,
    load_adapter,
    load_adapter_state_dict,
    save_adapter,
)
from support.compare import assert_same
from support.models import make_model
from support.originals import snapshot

CONFIGS = {
    "ming": MoeLoraConfig.preset("ming", num_experts=4, rank=2),
    "moelora": MoeLoraConfig.preset("moelora", num_experts=4, num_tasks=3, task_embedding_dim=5),
    "hydralora": MoeLoraConfig.preset("hydralora"),
    "lora": MoeLoraConfig.preset("lora", rank=3),
    "mlp": MoeLoraConfig(num_experts=4, rank=1, router="mlp", router_hidden=3),
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_is_bitwise(name, dtype, tmp_path):
    """The adapter is that of the source; the base and the norms are still those of the target."""
    source, target = (make_model(CONFIGS[name], seed=seed, dtype=dtype) for seed in (0, 1))
    before = snapshot(target)
    save_adapter(source, tmp_path / "adapter.safetensors")
    load_adapter(target, str(tmp_path / "adapter.safetensors"))
    assert_same(adapter_state_dict(target), adapter_state_dict(source))
    for key, tensor in target.state_dict().items():
        if "base_layer" in key or ".1." in key:
            assert torch.equal(tensor, before[key]), key
    for q in adapter_parameters(target):
        assert q.requires_grad
        assert q.is_leaf


def test_the_file_has_the_adapter_and_nothing_else(tmp_path):
    """Every layer has lora_A, lora_B and its router in the file; base weights are not there."""
    model = make_model(CONFIGS["ming"])
    save_adapter(model, tmp_path / "a.safetensors")
    state = load_file(tmp_path / "a.safetensors")
    assert set(state) == {
        f"{b}.{i}.{key}"
        for b in (0, 1)
        for i in (0, 2)
        for key in ("lora_A", "lora_B", "router.weight", "router.bias")
    }
    assert state["0.0.lora_A"].shape == (8, 6)
    assert state["0.0.lora_B"].shape == (8, 8)
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        assert set(file.metadata()) == {"format", "layout"}
        assert file.metadata()["format"] == "moelora_kernels"


def test_a_shared_router_is_stored_once(tmp_path):
    """All layers use MOELoRA's gate. The file has one copy; the original saves one per layer."""
    source, target = make_model(CONFIGS["moelora"]), make_model(CONFIGS["moelora"], seed=1)
    keys = list(adapter_state_dict(source))
    assert sorted(k for k in keys if "router" in k) == [
        "0.0.router.embedding.weight",
        "0.0.router.gate.weight",
    ]
    save_adapter(source, tmp_path / "a.safetensors")
    load_adapter(target, tmp_path / "a.safetensors")
    last = target.get_submodule("1.2").router
    assert last is target.get_submodule("0.0").router
    assert torch.equal(last.gate.weight, source.get_submodule("0.0").router.gate.weight)


def test_a_single_layer_has_no_prefix(tmp_path):
    layer = MoeLoraLinear(6, 4, config=CONFIGS["ming"])
    assert list(adapter_state_dict(layer)) == ["lora_A", "lora_B", "router.weight", "router.bias"]
    other = MoeLoraLinear(6, 4, config=CONFIGS["ming"])
    save_adapter(layer, tmp_path / "a.safetensors")
    load_adapter(other, tmp_path / "a.safetensors")
    assert torch.equal(other.lora_A, layer.lora_A)


def test_every_key_that_does_not_fit_is_named():
    """The originals load with strict=False, and lose their routers without a message."""
    model = make_model(CONFIGS["ming"])
    before = snapshot(model)
    state = {k: torch.zeros_like(v) for k, v in adapter_state_dict(model).items()}
    del state["0.0.router.weight"]
    del state["1.2.lora_A"]
    state["0.0.switch.weight"] = torch.zeros(4, 6)
    state["0.2.lora_B"] = torch.zeros(6, 7)
    with pytest.raises(ValueError, match="adapter does not fit the model") as error:
        load_adapter_state_dict(model, state)
    for problem in (
        "missing: 0.0.router.weight",
        "missing: 1.2.lora_A",
        "unexpected: 0.0.switch.weight",
        "shape of 0.2.lora_B: expected [6, 8], got [6, 7]",
    ):
        assert problem in str(error.value)
    assert_same(snapshot(model), before)


def test_values_that_cannot_be_copied_leave_the_model_unchanged():
    """A load that stops at one of these tensors would leave half an adapter in the model."""
    model = make_model(CONFIGS["ming"])
    before = snapshot(model)
    good = {k: torch.zeros_like(v) for k, v in adapter_state_dict(model).items()}
    zeros = torch.zeros(6, 8)
    for bad in (
        zeros.to("meta"),
        zeros.to(torch.int8),
        zeros.to(torch.float8_e5m2),
        zeros.to_sparse(),
        zeros.to_sparse_csr(),
        torch.nested.nested_tensor([zeros]),
        zeros.tolist(),
    ):
        with pytest.raises((ValueError, TypeError), match=r"1\.2\.lora_B"):
            load_adapter_state_dict(model, {**good, "1.2.lora_B": bad})
        assert_same(snapshot(model), before)


def test_a_model_on_the_meta_device_is_refused():
    """copy_ into a meta tensor does nothing: the values would be lost without a message."""
    state = adapter_state_dict(make_model(CONFIGS["ming"]))
    model = make_model(CONFIGS["ming"]).to("meta")
    with pytest.raises(ValueError, match=r"0\.0\.lora_A.*meta"):
        load_adapter_state_dict(model, state)


@pytest.mark.parametrize(
    ("saved_dtype", "dtype"),
    ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)),
    ids=str,
)
def test_values_are_converted_to_the_models_dtype(saved_dtype, dtype, tmp_path):
    """Trained in float32, served in bfloat16, and back."""
    source, target = (
        make_model(CONFIGS["ming"], seed=seed, dtype=dtype)
        for seed, dtype in enumerate((saved_dtype, dtype))
    )
    save_adapter(source, tmp_path / "a.safetensors")
    load_adapter(target, tmp_path / "a.safetensors")
    adapter = adapter_state_dict(source)
    for key, tensor in adapter_state_dict(target).items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, adapter[key].to(dtype)), key


def test_loading_copies_the_tensors():
    """Training after a load must not change the dictionary that was loaded."""
    source, target = make_model(CONFIGS["ming"]), make_model(CONFIGS["ming"], seed=1)
    state = {k: v.detach().clone() for k, v in adapter_state_dict(source).items()}
    load_adapter_state_dict(target, state)
    with torch.no_grad():
        for q in adapter_parameters(target):
            q.zero_()
    assert all(v.any() for v in state.values())


def write_truncated(path, model):
    save_adapter(model, path)
    path.write_bytes(path.read_bytes()[:-100])


def write_short_header(path, model):
    path.write_bytes(b"\x00\x01")


def write_pickle(path, model):
    path.write_bytes(pickle.dumps({"lora_A": [1.0]}))


def write_torch(path, model):
    torch.save(adapter_state_dict(model), path)


@pytest.mark.parametrize(
    "write",
    (write_truncated, write_short_header, write_pickle, write_torch),
    ids=lambda w: w.__name__,
)
def test_a_broken_or_foreign_file_is_named(write, tmp_path):
    """A full disk truncates files, and old checkpoints are pickles, whose code must not run."""
    model = make_model(CONFIGS["ming"])
    before = snapshot(model)
    path = tmp_path / "adapter.safetensors"
    write(path, model)
    with pytest.raises(ValueError, match=r"adapter\.safetensors: not a readable safetensors file"):
        load_adapter(model, path)
    assert_same(snapshot(model), before)


def test_a_file_of_other_tensors_is_refused(tmp_path):
    """The weights of a base model are a valid safetensors file, but not an adapter."""
    model = make_model(CONFIGS["ming"])
    save_file({"weight": torch.zeros(2)}, tmp_path / "base.safetensors")
    with pytest.raises(ValueError, match=r"unexpected: weight"):
        load_adapter(model, tmp_path / "base.safetensors")
    with pytest.raises(FileNotFoundError):
        load_adapter(model, tmp_path / "nothing.safetensors")


def test_a_model_without_layers_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match="model: expected a model with MoeLoraLinear or MoeLoraFFN layers"
    ):
        save_adapter(nn.Linear(2, 2), tmp_path / "a.safetensors")


def test_wrong_paths_and_swapped_arguments_are_named(tmp_path):
    layer, path = MoeLoraLinear(8, 6, num_experts=2, rank=2), tmp_path / "adapter.safetensors"
    for call in (save_adapter, load_adapter):
        with pytest.raises(TypeError, match=r"model: expected an nn\.Module, got .*str"):
            call(str(path), layer)
    with pytest.raises(FileNotFoundError, match=r"path: the folder '.*missing' does not"):
        save_adapter(layer, tmp_path / "missing" / "adapter.safetensors")
    with pytest.raises(IsADirectoryError, match="path: expected the file that save_adapter wrote"):
        load_adapter(layer, tmp_path)
    save_adapter(layer, path)
    load_adapter(layer, str(path))
