"""Both layouts of original checkpoints: values, gradients, keys and bits are the original's.

A checkpoint that does not fit raises an error that names its keys, and the model does not change.
`support.layouts` has the two layouts, `support.originals` the formulas of the originals.
"""

import copy
import itertools
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from moelora_kernels import MoeLoraConfig, MoeLoraFFN, MoeLoraLinear, adapter_parameters
from moelora_kernels.testing import assert_within_budget
from support.compare import assert_same
from support.layouts import LAYOUTS
from support.originals import gradient_model, snapshot, state_of


def each(*tables):
    """Return the parameters (layout, *names) of all combinations of names in a layout's tables."""
    return [
        pytest.param(layout, *names, id="-".join((layout_name, *names)))
        for layout_name, layout in LAYOUTS.items()
        for names in itertools.product(*(getattr(layout, table) for table in tables))
    ]


@pytest.mark.parametrize(("layout", "variant", "tasks"), each("VARIANTS", "TASK_IDS"))
def test_outputs_gradients_and_a_step_are_the_originals(layout, variant, tasks):
    """Load a checkpoint, compare y and all gradients, train one step in both, compare again."""
    source, model = layout.original(variant), layout.ours(variant)
    layout.load(model, state_of(source))
    layout.set_task_ids(layout.TASK_IDS[tasks], model, source)
    x, target = torch.randn(*layout.BATCH_SHAPE, 8), torch.randn(*layout.BATCH_SHAPE, 8)
    for net in (source, model):
        nn.functional.mse_loss(net(x), target).backward()
    torch.testing.assert_close(model(x), source(x), rtol=1e-5, atol=1e-5)
    expected = layout.gradients_of(source)
    actual = layout.export(gradient_model(model))
    assert_same(actual, expected, rtol=1e-4, atol=1e-6)
    assert all(g.abs().max() > 0 for key, g in expected.items() if not layout.may_be_zero(key))

    trained = [parameter for parameter in source.parameters() if parameter.requires_grad]
    for parameters in (trained, adapter_parameters(model)):
        torch.optim.SGD(parameters, lr=0.5).step()
    expected = state_of(source)
    assert_same(layout.export(model, like=expected), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("layout", "variant"), each("VARIANTS"))
def test_bfloat16_is_within_the_budget(layout, variant):
    """The error of every layer is at most twice the error of the original in bfloat16."""
    low = layout.original(variant).to(torch.bfloat16)
    exact = copy.deepcopy(low).double()
    model = layout.ours(variant, dtype=torch.bfloat16)
    layout.load(model, state_of(low))
    layout.set_task_ids(next(iter(layout.TASK_IDS.values())), model, low, exact)
    for name, layer in model.named_modules():
        if isinstance(layer, MoeLoraLinear):
            x = torch.randn(*layout.BATCH_SHAPE, layer.in_features, dtype=torch.bfloat16)
            assert_within_budget(
                {name: layer(x)},
                {name: exact.get_submodule(name)(x.double())},
                {name: low.get_submodule(name)(x)},
                torch.bfloat16,
            )


@pytest.mark.parametrize("prefixed", (True, False), ids=("prefixed", "without_prefix"))
@pytest.mark.parametrize(("layout", "variant", "adapter"), each("VARIANTS", "ADAPTERS"))
def test_an_export_has_the_keys_and_bits_that_were_loaded(layout, variant, adapter, prefixed):
    """With `like` all keys of the checkpoint; without it the keys that the original reads."""
    source = layout.original(variant)
    state = state_of(source, layout.ADAPTERS[adapter])
    if not prefixed:
        state = {key.removeprefix("base_model.model."): t for key, t in state.items()}
    model = layout.ours(variant)
    layout.load(model, state)
    assert_same(layout.export(model, like=state), state)
    assert_same(layout.export(model), layout.exported_state(source))


@pytest.mark.parametrize("layout", each())
def test_frozen_weights_are_checked_and_not_copied(layout, caplog):
    """Originals may save weights of the base: equal ones are logged, others are refused."""
    state, name = state_of(layout.original()), layout.FROZEN
    weight = layout.base_model().get_parameter(name).detach()
    key = f"base_model.model.{name}"
    with caplog.at_level(logging.WARNING, logger="moelora_kernels"):
        layout.load(layout.ours(), {**state, key: weight})
    assert f"1 keys not used, frozen weights that equal the model's: {key}" in caplog.text
    for wrong in (weight + 1e-3, weight.half(), weight[:-1]):
        with pytest.raises(ValueError, match=rf"{name}: this frozen weight differs"):
            layout.load(layout.ours(), {**state, key: wrong})


def changed_prefix(key):
    """Return a key without the prefix of PEFT if it has it, and with it if it has not."""
    prefix = "base_model.model."
    return key.removeprefix(prefix) if key.startswith(prefix) else prefix + key


# Name -> (a change of the state at a key, the error with the key).
BROKEN_VALUES = {
    "integers": (
        lambda state, key: {**state, key: torch.zeros_like(state[key], dtype=torch.int8)},
        "dtype of {key}",
    ),
    # copy_ raises for the next two: the tensors before them would be copied by then.
    "sparse": (
        lambda state, key: {**state, key: state[key].to_sparse()},
        "{key}: expected a dense tensor, got a sparse_coo one",
    ),
    "nested": (
        lambda state, key: {**state, key: torch.nested.nested_tensor([state[key]])},
        "{key}: expected a dense tensor, got a nested one",
    ),
    # The values of the next two need a scale, or are two in a byte.
    "float8": (
        lambda state, key: {**state, key: state[key].to(torch.float8_e4m3fn)},
        "dtype of {key}: .*got torch.float8_e4m3fn",
    ),
    "float4": (
        lambda state, key: {
            **state,
            key: torch.zeros_like(state[key], dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
        },
        "dtype of {key}: .*got torch.float4_e2m1fn_x2",
    ),
    "on the meta device": (
        lambda state, key: {**state, key: state[key].to("meta")},
        "{key}: the adapter's tensor is on the meta device",
    ),
    "a number": (
        lambda state, key: {**state, "epoch": 3},
        "epoch: expected a tensor .*, got int under str",
    ),
    "a key that is a number": (
        lambda state, key: {**state, 3: torch.zeros(2)},
        "3: .* under a string, got Tensor under int",
    ),
    "the same key with another prefix": (
        lambda state, key: {**state, changed_prefix(key): state[key]},
        "stored twice: {changed_prefix} and {key}",
    ),
}


@pytest.mark.parametrize("case", BROKEN_VALUES)
@pytest.mark.parametrize("layout", each())
def test_a_value_that_is_not_a_tensor_of_floats_is_named(layout, case):
    change, message = BROKEN_VALUES[case]
    message = message.format(key=layout.KEY, changed_prefix=changed_prefix(layout.KEY))
    check_refused(layout, change(state_of(layout.original()), layout.KEY), message)


@pytest.mark.parametrize(("layout", "case"), each("BROKEN"))
def test_keys_and_shapes_that_do_not_fit_are_named(layout, case):
    change, message = layout.BROKEN[case]
    check_refused(layout, change(state_of(layout.original())), message)


@pytest.mark.parametrize("layout", each())
def test_a_key_of_this_package_is_refused(layout):
    lora_a = layout.ours().get_submodule(layout.FIRST).lora_A.detach()
    state = {**state_of(layout.original()), f"{layout.FIRST}.lora_A": lora_a}
    check_refused(layout, state, rf"unexpected: {layout.FIRST}\.lora_A")


def check_refused(layout, state, message):
    """Assert that a load raises an error and does not change the model."""
    model = layout.ours()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        layout.load(model, state)
    assert_same(snapshot(model), before)


@pytest.mark.parametrize("layout", each())
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_change_of_a_key_is_refused(layout, data):
    """Remove or replace any letter of any key: an error, and the model is unchanged."""
    state = state_of(layout.original())
    key = data.draw(st.sampled_from(sorted(state)))
    position = data.draw(st.integers(0, len(key) - 1))
    letter = data.draw(st.sampled_from(["", "x", "."]))
    wrong = key[:position] + letter + key[position + 1 :]
    if wrong != key:
        state = {wrong if k == key else k: t for k, t in state.items()}
        check_refused(layout, state, "checkpoint does not fit the model")


@pytest.mark.parametrize(("layout", "case"), each("REFUSED"))
def test_options_that_the_layout_cannot_store_are_refused(layout, case):
    model, message = layout.refused_model(case), layout.REFUSED[case][1]
    match = rf"{layout.FIRST}: the layout of {layout.NAME} needs .*{message}"
    for call in (lambda: layout.load(model, {}), lambda: layout.export(model)):
        with pytest.raises(ValueError, match=match):
            call()


@pytest.mark.parametrize("layout", each())
def test_models_without_mixtures_of_linears_are_refused(layout):
    with pytest.raises(ValueError, match="model: expected MoeLoraLinear layers, got none"):
        layout.export(layout.base_model())
    model = nn.ModuleDict({"mlp": MoeLoraFFN(8, 12, config=MoeLoraConfig.preset("mixlora"))})
    with pytest.raises(
        ValueError, match=f"mlp: the layout of {layout.NAME} cannot store whole-FFN"
    ):
        layout.export(model)
