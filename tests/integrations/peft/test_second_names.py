"""PEFT's names in the config (r, lora_alpha, lora_dropout), and init_weights."""

import dataclasses
import inspect
import json
import math

import pytest
import torch

peft = pytest.importorskip("peft")
from moelora_kernels.peft import MoeLoraPeftConfig  # noqa: E402
from support.peft_models import (  # noqa: E402
    GATES,
    LORA,
    MING,
    TARGETS,
    give_gates,
    inputs,
    net,
    new_adapter,
    tuner_layers,
)

# The second name, the first one, a value and another value.
NAMES = (("r", "rank", 4, 5), ("lora_alpha", "alpha", 8.0, 9), ("lora_dropout", "dropout", 0.1, 0))


@pytest.mark.parametrize("preset", (None, "ming"), ids=str)
@pytest.mark.parametrize(("second", "first", "value", "other"), NAMES)
def test_both_names_mean_the_same(preset, second, first, value, other):
    config = MoeLoraPeftConfig(preset=preset, **{second: value})
    assert config == MoeLoraPeftConfig(preset=preset, **{first: value})
    assert getattr(config, first) == getattr(config, second) == value
    assert config == MoeLoraPeftConfig(preset=preset, **{first: value, second: value})
    setattr(config, second, other)
    assert getattr(config.moe_lora_config(), first) == other


@pytest.mark.parametrize(("second", "first", "value", "other"), NAMES)
def test_two_values_are_refused(second, first, value, other):
    message = rf"^{second}: another name of {first}, .*{second}={value} and {first}={other}$"
    for build in (MoeLoraPeftConfig, lambda **options: MoeLoraPeftConfig.preset("ming", **options)):
        with pytest.raises(ValueError, match=message):
            build(**{second: value, first: other})


def test_one_rank_for_each_expert_by_the_second_name():
    config = MoeLoraPeftConfig(num_experts=2, r=[1, 2])
    assert config == MoeLoraPeftConfig(num_experts=2, rank=(1, 2), r=[1, 2])
    assert list(config.r) == [1, 2]


def test_none_is_no_value():
    assert MoeLoraPeftConfig(**MING, r=None) == MoeLoraPeftConfig(**MING)


def test_the_file_has_each_option_once(tmp_path):
    """So an earlier version of this package reads it, and a file of an earlier version loads."""
    names = dict(r=4, lora_alpha=8.0, lora_dropout=0.1)
    config = MoeLoraPeftConfig(preset="ming", target_modules=["up"], **names)
    config.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    written = json.loads(path.read_text())
    assert not {*names, "init_weights"} & set(written)
    assert peft.PeftConfig.from_pretrained(tmp_path) == config
    # A file from elsewhere may have PEFT's names, alone or with the same values.
    path.write_text(json.dumps(written | names))
    assert peft.PeftConfig.from_pretrained(tmp_path) == config
    path.write_text(json.dumps({k: v for k, v in written.items() if k != "rank"} | names))
    assert MoeLoraPeftConfig.from_pretrained(tmp_path) == config
    path.write_text(json.dumps(written | {"r": 5}))
    with pytest.raises(ValueError, match="r: another name of rank"):
        peft.PeftConfig.from_pretrained(tmp_path)


def test_the_names_in_tools():
    """They are parameters, but no fields: a copy with a changed option has no second value."""
    parameters = inspect.signature(MoeLoraPeftConfig).parameters
    assert [parameters[second].default for second, *_ in NAMES] == [None] * 3
    fields = {field.name for field in dataclasses.fields(MoeLoraPeftConfig)}
    assert not fields & {second for second, *_ in NAMES}
    config = MoeLoraPeftConfig(**MING)
    assert dataclasses.replace(config, rank=7).r == 7
    assert MoeLoraPeftConfig(**config.to_dict()) == config


@pytest.mark.parametrize("value", ("gaussian", None, 0), ids=str)
def test_init_weights_is_true_or_false(value):
    with pytest.raises(ValueError, match=r"^init_weights: expected True .* or False"):
        MoeLoraPeftConfig(init_weights=value)


def test_init_weights_comes_back_from_a_file(tmp_path):
    config = MoeLoraPeftConfig(**MING, init_weights=False)
    config.save_pretrained(tmp_path)
    loaded = peft.PeftConfig.from_pretrained(tmp_path)
    assert loaded == config
    assert loaded.init_weights is False


@pytest.mark.parametrize("options", GATES.values(), ids=GATES)
def test_with_drawn_weights_a_new_adapter_changes_the_output(options):
    model = give_gates(new_adapter(options, init_weights=False), options).eval()
    assert not torch.allclose(model(inputs()), net()(inputs()), rtol=1e-3, atol=1e-3)
    drawn = [experts for m in tuner_layers(model) for experts in m.moelora_experts.values()]
    assert len({experts.lora_B.sum().item() for experts in drawn}) == 4
    for experts in drawn:
        bound = 1 / math.sqrt(experts.lora_B.shape[1])
        assert bound / 2 < experts.lora_B.abs().max() <= bound
        assert experts.lora_B.requires_grad


def test_each_adapter_has_its_own_init_weights():
    model = new_adapter(dict(LORA, init_weights=False))
    model.add_adapter("zero", MoeLoraPeftConfig(target_modules=TARGETS, **MING))
    drawn = model(inputs())
    model.set_adapter("zero")
    torch.testing.assert_close(model(inputs()), net()(inputs()), rtol=1e-12, atol=1e-12)
    model.set_adapter("default")
    assert torch.equal(model(inputs()), drawn)


def test_the_values_of_a_file_replace_drawn_ones(tmp_path):
    options = dict(MING, init_weights=False)
    model = new_adapter(options)
    model.save_pretrained(tmp_path)
    for low_cpu_mem_usage in (False, True):
        loaded = peft.PeftModel.from_pretrained(
            net(), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage
        )
        assert torch.allclose(loaded(inputs()), model(inputs()), rtol=1e-10, atol=1e-10)
    assert not torch.allclose(new_adapter(options)(inputs()), model(inputs()))


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("autocast_adapter_dtype", (True, False), ids=("float32", "as_base"))
def test_drawn_weights_over_a_base_of_16_bits(dtype, autocast_adapter_dtype):
    model = new_adapter(
        MING, net(dtype), init_weights=False, autocast_adapter_dtype=autocast_adapter_dtype
    )
    (tensor,) = {m.moelora_experts["default"].lora_B.dtype for m in tuner_layers(model)}
    assert tensor == (torch.float32 if autocast_adapter_dtype else dtype)
    x = inputs(dtype=dtype)
    assert torch.isfinite(model(x)).all()
    assert not torch.allclose(model(x), net(dtype)(x), rtol=0.05, atol=0.05)
