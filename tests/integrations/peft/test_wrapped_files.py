"""Files of adapters that are wrapped, parametrized or merged: portable names, computed values."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.parametrize import register_parametrization

peft = pytest.importorskip("peft")

from safetensors.torch import load_file, save_file  # noqa: E402
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (  # noqa: E402
    checkpoint_wrapper,
)

from moelora_kernels import set_tasks  # noqa: E402
from support.peft_models import (  # noqa: E402
    MING,
    TARGETS,
    TASKS,
    adapted,
    give_gates,
    inputs,
    net,
    tuner_layers,
    two_adapters,
)

FILE = "adapter_model.safetensors"
both_gates = pytest.mark.parametrize("options", (MING, TASKS), ids=("ming", "tasks"))


class Doubled(nn.Module):
    def forward(self, value):
        return 2 * value

    def right_inverse(self, value):
        return value / 2


def assert_same(actual, expected):
    """Not bitwise: tensors that stay memory-mapped have another alignment."""
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


def old_weight_norm(module, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(module, name)


COMPUTE = {
    "parametrized": lambda module, name: register_parametrization(module, name, Doubled()),
    "weight_norm": parametrizations.weight_norm,
    "old_weight_norm": old_weight_norm,
    "pruned": lambda module, name: prune.l1_unstructured(module, name, 0.5),
    "spectral_norm": parametrizations.spectral_norm,
}
WRAP = {
    "compile": lambda module: torch.compile(module, backend="eager"),
    "checkpoint": checkpoint_wrapper,
    "data_parallel": nn.DataParallel,
    "compiled_checkpoint": lambda m: torch.compile(checkpoint_wrapper(m), backend="eager"),
}


def computed_parts(model):
    """(module, tensor name) of the first layer's adapter: B and the weights of its router."""
    experts = tuner_layers(model)[0].moelora_experts["default"]
    yield experts, "lora_B"
    for part in [*experts.router.modules()]:
        if isinstance(part, (nn.Linear, nn.Embedding)):
            yield part, "weight"


def wrap_blocks(model, wrap, inner=None):
    """Wrap each block of a PeftModel, and inside it the layer "up"."""
    layers = model.base_model.model.layers
    for i, block in enumerate(layers):
        if inner is not None:
            block.up = inner(block.up)
        layers[i] = wrap(block)
    return model


def loaded(path, options=MING):
    return give_gates(peft.PeftModel.from_pretrained(net(), path), options).eval()


@both_gates
@pytest.mark.parametrize("compute", COMPUTE.values(), ids=COMPUTE)
def test_computed_tensors_are_saved_by_value(compute, options, tmp_path):
    """The file fits an adapter without the parametrization, which then computes the same."""
    model = adapted(options)
    model.save_pretrained(tmp_path / "plain")
    for module, name in computed_parts(model):
        compute(module, name)
    expected = model.eval()(inputs())
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / FILE).keys() == load_file(tmp_path / "plain" / FILE).keys()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(loaded(tmp_path, options)(inputs()), expected)
    # The values load into the same kind of model too.
    for module, name in computed_parts(model):
        for tensor in module.parameters():
            tensor.data.mul_(1.0 if name == "weight" else 0.5)
    peft.set_peft_model_state_dict(model, load_file(tmp_path / FILE))
    torch.testing.assert_close(model(inputs()), expected)


@pytest.mark.parametrize("name", ("parametrized", "weight_norm", "old_weight_norm"))
def test_a_plain_file_loads_into_computed_tensors(name, tmp_path):
    plain = adapted(MING)
    plain.save_pretrained(tmp_path)
    model = adapted(MING)
    for module, tensor in computed_parts(model):
        COMPUTE[name](module, tensor)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(0.3)
    result = model.load_adapter(tmp_path, "default")
    assert not result.missing_keys
    torch.testing.assert_close(model.eval()(inputs()), plain(inputs()))


def test_a_value_that_a_computed_tensor_cannot_have_is_refused(tmp_path):
    adapted(MING).save_pretrained(tmp_path)
    model = adapted(MING)
    prune.l1_unstructured(tuner_layers(model)[0].moelora_experts["default"], "lora_B", 0.5)
    with pytest.raises(ValueError, match=r"layers\.0\.up\..*lora_B: it is computed and cannot"):
        model.load_adapter(tmp_path, "default")


@both_gates
@pytest.mark.parametrize("inner", (None, checkpoint_wrapper), ids=("blocks", "linears_too"))
@pytest.mark.parametrize("wrap", WRAP.values(), ids=WRAP)
def test_files_do_not_depend_on_wrappers(wrap, inner, options, tmp_path):
    plain = adapted(options)
    expected = plain(inputs())
    plain.save_pretrained(tmp_path / "plain")
    wrap_blocks(adapted(options), wrap, inner).save_pretrained(tmp_path / "wrapped")
    files = [load_file(tmp_path / name / FILE) for name in ("plain", "wrapped")]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    model = wrap_blocks(adapted(options), wrap, inner)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.zero_()
    result = model.load_adapter(tmp_path / "plain", "default")
    assert not result.missing_keys
    give_gates(model, options).eval()
    assert_same(model(inputs()), expected)


@pytest.mark.parametrize("wrap", WRAP.values(), ids=WRAP)
def test_peft_over_a_wrapped_model(wrap, tmp_path):
    adapted(MING).save_pretrained(tmp_path / "plain")
    adapted(MING, wrap(net())).save_pretrained(tmp_path / "wrapped")
    files = [load_file(tmp_path / name / FILE) for name in ("plain", "wrapped")]
    assert files[0].keys() == files[1].keys()
    model = peft.PeftModel.from_pretrained(wrap(net()), tmp_path / "plain").eval()
    torch.testing.assert_close(model(inputs()), adapted(MING)(inputs()))


def test_one_of_several_wrapped_adapters(tmp_path):
    model = wrap_blocks(two_adapters(), checkpoint_wrapper)
    model.save_pretrained(tmp_path)
    plain = two_adapters()
    fresh = peft.PeftModel.from_pretrained(net(), tmp_path)
    fresh.load_adapter(tmp_path / "other", "other")
    for name in ("default", "other"):
        fresh.set_adapter(name)
        plain.set_adapter(name)
        assert_same(fresh.eval()(inputs()), plain.eval()(inputs()))


@pytest.mark.parametrize("bias", ("all", "moelora_only"))
def test_trained_biases_of_wrapped_blocks(bias, tmp_path):
    model = adapted(MING, bias=bias)
    for name, parameter in model.named_parameters():
        if name.endswith("base_layer.bias"):
            parameter.data.add_(1.0)
    expected = model(inputs())
    model.save_pretrained(tmp_path / "plain")
    wrap_blocks(model, checkpoint_wrapper).save_pretrained(tmp_path / "wrapped")
    files = [load_file(tmp_path / name / FILE) for name in ("plain", "wrapped")]
    assert files[0].keys() == files[1].keys()
    assert_same(loaded(tmp_path / "wrapped")(inputs()), expected)
    wrapped = wrap_blocks(adapted(MING, bias=bias), checkpoint_wrapper)
    wrapped.load_adapter(tmp_path / "plain", "default")
    assert_same(wrapped.eval()(inputs()), expected)


def test_files_of_earlier_versions_load(tmp_path):
    """They have the names of torch.compile's wrapper."""
    adapted(MING).save_pretrained(tmp_path)
    state = load_file(tmp_path / FILE)
    old = {key.replace(".layers.0.", ".layers.0._orig_mod."): t for key, t in state.items()}
    save_file(old, tmp_path / FILE)
    assert_same(loaded(tmp_path)(inputs()), adapted(MING)(inputs()))


def test_tensors_that_the_adapter_does_not_have_are_refused(tmp_path):
    adapted(MING).save_pretrained(tmp_path)
    state = load_file(tmp_path / FILE)
    key = "base_model.model.layers.0.up.moelora_experts.parametrizations.lora_B.original"
    save_file({**state, key: torch.ones(1)}, tmp_path / FILE)
    with pytest.raises(ValueError, match=r"'default': .*does not have: .*lora_B\.original"):
        loaded(tmp_path)


def test_a_missing_tensor_is_named(tmp_path):
    """`PeftModel.load_adapter` itself does not name it."""
    model = adapted(MING)
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / FILE)
    key = "base_model.model.layers.0.up.moelora_experts.lora_B"
    state.pop(key)
    save_file(state, tmp_path / FILE)
    with pytest.warns(UserWarning, match=rf"no values for {key};"):
        model.load_adapter(tmp_path, "default")


def test_a_merged_adapter_does_not_load(tmp_path):
    """The merged weight would keep the old values."""
    model = adapted(TASKS)
    model.save_pretrained(tmp_path)
    set_tasks(model, [2])
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"'default' is merged; call .*unmerge_adapter\(\)"):
        model.load_adapter(tmp_path, "default")
    model.unmerge_adapter()
    model.load_adapter(tmp_path, "default")


@both_gates
def test_state_dicts_of_adapters_that_are_injected_without_a_peft_model(options):
    """Transformers' add_adapter does this; the keys then have no prefix."""
    from moelora_kernels.peft import MoeLoraPeftConfig

    config = MoeLoraPeftConfig(target_modules=TARGETS, **options)
    model = wrap_blocks_of(peft.inject_adapter_in_model(config, net()))
    state = peft.get_peft_model_state_dict(adapted(options))
    bare = {key.removeprefix("base_model.model."): tensor for key, tensor in state.items()}
    for source in (state, bare):
        for key, parameter in model.named_parameters():
            if "moelora_" in key:
                parameter.data.zero_()
        peft.set_peft_model_state_dict(model, source)
        give_gates(model, options).eval()
        torch.testing.assert_close(model(inputs()), adapted(options)(inputs()))
    assert peft.get_peft_model_state_dict(model).keys() == bare.keys()


def wrap_blocks_of(model):
    model.layers[0] = checkpoint_wrapper(model.layers[0])
    return model
