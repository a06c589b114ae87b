"""Checkpoints of MOELoRA-peft: the original's outputs, gradients, keys and bits, or an error."""

import copy
import logging
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from moelora_kernels import MoeLoraConfig, adapter_parameters, replace_linears, set_tasks
from moelora_kernels.checkpoints import export_moelora_peft, load_moelora_peft
from moelora_kernels.nn import MoeLoraLinear
from moelora_kernels.testing import assert_within_budget
from support.originals import (
    DIM,
    TASKS,
    TaskLora,
    Weighted,
    adapters,
    assert_bits,
    chatglm,
    named,
    of_gradients,
    put,
    snapshot,
)

EXPERTS, RANK, ALPHA = 4, 8, 16.0
TARGETS = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
CONFIG = MoeLoraConfig.preset(
    "moelora", num_experts=EXPERTS, rank=RANK // EXPERTS, alpha=ALPHA, num_tasks=TASKS,
    task_embedding_dim=DIM, dropout=0.0, batch_dim=1,
)  # fmt: skip
FIRST = "transformer.layers.0.attention.dense"
GATE = {"lora_task_embedding.weight", "lora_gate.GateL.weight"}


def original(variant="shared"):
    """The original over a small ChatGLM, with one live gate or one per layer."""
    model = chatglm()
    torch.manual_seed(1)
    shared = None
    if variant == "shared":
        model.lora_task_embedding = Weighted(TASKS + 1, DIM)
        model.lora_gate = named(GateL=Weighted(EXPERTS, DIM))
        shared = [model]
    return put(model, lambda base: TaskLora(base, EXPERTS, RANK, ALPHA, shared))


def set_original_tasks(model, ids):
    for module in model.modules():
        module.tasks = torch.tensor(ids)


def ours(variant="shared", config=CONFIG, dtype=torch.float32):
    """Our layers over the same linears, with adapters of their own."""
    model = chatglm().to(dtype)
    replace_linears(model, config.replace(task_gate=variant), TARGETS)
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in adapter_parameters(model):
            parameter.normal_()
    return model


@pytest.mark.parametrize(
    "ids", ([3, 16, 1], [[3, 0, 5], [16, 2, 1], [0, 0, 7]]), ids=("one", "many")
)
@pytest.mark.parametrize("variant", ("shared", "per_layer"))
def test_outputs_gradients_and_a_step_are_the_originals(variant, ids):
    """Load, compare, train a step on both, write back: float32, x [sequence, batch, I]."""
    source, model = original(variant), ours(variant)
    load_moelora_peft(model, adapters(source))
    set_original_tasks(source, ids)
    set_tasks(model, ids)
    x = torch.randn(5, 3, 8)
    target = torch.randn(5, 3, 8)
    for net in (source, model):
        nn.functional.mse_loss(net(x), target).backward()
    torch.testing.assert_close(model(x), source(x), rtol=1e-5, atol=1e-5)
    live = adapters(source, of=lambda p: p.grad)
    found = export_moelora_peft(of_gradients(model))
    assert found.keys() == live.keys()
    for key, gradient in live.items():
        assert gradient.abs().max() > 0
        torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-6, msg=key)

    for net, parameters in (
        (source, [p for p in source.parameters() if p.grad is not None]),
        (model, adapter_parameters(model)),
    ):
        torch.optim.SGD(parameters, lr=0.5).step()
        net.zero_grad()
    after = adapters(source)
    found = export_moelora_peft(model, like=adapters(source))
    assert found.keys() == after.keys()
    for key, tensor in after.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-6, msg=key)


def test_bfloat16_is_within_the_budget():
    """Every layer in bfloat16 against the original in float64, measured by it in bfloat16."""
    low = original().to(torch.bfloat16)
    truth = copy.deepcopy(low).double()
    model = ours(dtype=torch.bfloat16)
    load_moelora_peft(model, adapters(low))
    ids = [3, 16, 1]
    for net in (low, truth):
        set_original_tasks(net, ids)
    set_tasks(model, ids)
    for name, layer in model.named_modules():
        if isinstance(layer, MoeLoraLinear):
            x = torch.randn(5, 3, layer.in_features, dtype=torch.bfloat16)
            assert_within_budget(
                {name: layer(x)},
                {name: truth.get_submodule(name)(x.double())},
                {name: low.get_submodule(name)(x)},
                torch.bfloat16,
            )


@pytest.mark.parametrize("prefixed", (True, False))
@pytest.mark.parametrize("infix", ("", ".default", ".clinic"))
@pytest.mark.parametrize("variant", ("shared", "per_layer"))
def test_what_is_read_is_written_back_to_the_same_keys_and_bits(variant, infix, prefixed):
    """With the original as `like`, dead copies included; and the keys of the original without."""
    state = adapters(original(variant), infix)
    plain = adapters(original(variant))
    if not prefixed:
        state = {key.removeprefix("base_model.model."): t for key, t in state.items()}
    model = ours(variant)
    load_moelora_peft(model, state)
    assert_bits(export_moelora_peft(model, like=state), state)
    if variant == "shared":
        dead = {key for key in plain if key.endswith(tuple(GATE)) and key not in GATE}
        assert len(dead) == 16
        plain = {key: tensor for key, tensor in plain.items() if key not in dead}
    assert_bits(export_moelora_peft(model), plain)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_files_of_both_kinds_in_half_precision(dtype, tmp_path):
    """adapter_model.bin as the original saves it, safetensors as PEFT does now, and the folder."""
    state = {k: t.to(dtype) for k, t in adapters(original()).items()}
    torch.save(state, tmp_path / "adapter_model.bin")
    for path in (tmp_path / "adapter_model.bin", str(tmp_path)):
        model = ours(dtype=dtype)
        load_moelora_peft(model, path)
        assert_bits(export_moelora_peft(model, like=path), state)
    # No two names may have one storage there: what is exported has a storage for each.
    save_file(export_moelora_peft(model), tmp_path / "adapter.safetensors")
    other = ours(dtype=dtype)
    load_moelora_peft(other, tmp_path / "adapter.safetensors")
    assert_bits(export_moelora_peft(other), export_moelora_peft(model))


def test_dead_copies_are_ignored_aloud_and_only_they(caplog):
    """The per-layer gates of the shared variant; a live gate per layer has nothing to ignore."""
    with caplog.at_level(logging.WARNING, logger="moelora_kernels"):
        load_moelora_peft(ours("per_layer"), adapters(original("per_layer")))
        assert not caplog.records
        load_moelora_peft(ours(), adapters(original()))
    (record,) = caplog.records
    text = record.getMessage()
    assert "16 keys not used" in text
    assert "transformer.layers.0.attention.query_key_value.lora_gate.GateL.weight" in text


def test_variants_do_not_pass_for_each_other():
    """A live gate must not be taken for dead, nor a dead one for live."""
    with pytest.raises(ValueError, match=r"unexpected: lora_gate\.GateL\.weight"):
        load_moelora_peft(ours("per_layer"), adapters(original("shared")))
    with pytest.raises(ValueError, match=r"missing: lora_gate\.GateL\.weight"):
        load_moelora_peft(ours("shared"), adapters(original("per_layer")))


def test_either_of_two_names_is_enough():
    """safetensors keeps one name of a shared tensor, and which one is up to it."""
    state = adapters(original())
    expected = export_moelora_peft(load(ours(), state))
    first = {key for key in state if key.endswith(".mlp.weight")}
    second = {key.removesuffix(".mlp.weight") + ".weight" for key in first}
    for left_out in (first, second):
        some = {key: tensor for key, tensor in state.items() if key not in left_out}
        assert len(some) == len(state) - 64
        model = load(ours(), some)
        assert_bits(export_moelora_peft(model), expected)
        assert_bits(export_moelora_peft(model, like=some), some)


def test_two_names_are_compared_bit_by_bit():
    """A NaN is equal to itself, 0 is not -0, and a name of another dtype is another tensor."""
    state = adapters(original())
    key = f"base_model.model.{FIRST}.lora_B.loraB.0"
    values = torch.zeros_like(state[f"{key}.weight"])
    values[0, 0] = torch.nan
    both = {f"{key}.weight": values, f"{key}.mlp.weight": values.clone()}
    load(ours(), {**state, **both})
    for other in (values.half(), values.view(torch.int32), -values):
        with pytest.raises(ValueError, match=r"differs from its alias "):
            load(ours(), {**state, **both, f"{key}.weight": other})


def load(model, state):
    load_moelora_peft(model, state)
    return model


def test_frozen_weights_are_checked_and_not_copied(caplog):
    """bias="all" writes biases too: those of the model pass with a notice, others are named."""
    state = adapters(original())
    model = ours()
    frozen = {f"base_model.model.{FIRST}.bias": chatglm().get_submodule(FIRST).bias.detach()}
    with caplog.at_level(logging.WARNING, logger="moelora_kernels"):
        load_moelora_peft(model, {**state, **frozen})
    assert "1 keys not used, frozen weights that equal the model's" in caplog.text
    wrong = {key: tensor + 1 for key, tensor in frozen.items()}
    with pytest.raises(ValueError, match=rf"{FIRST}\.bias: this frozen weight differs"):
        load_moelora_peft(model, {**state, **wrong})


# --- what does not fit ---------------------------------------------------------------------------

A0 = f"base_model.model.{FIRST}.lora_A.loraA.0"


def without_expert(state):
    return {k: t for k, t in state.items() if ".loraB.3." not in k}


def with_another(state):
    return {**state, A0.replace("loraA.0", "loraA.4") + ".mlp.weight": state[A0 + ".mlp.weight"]}


BROKEN = {
    "renamed": (
        lambda s: {k.replace("GateL", "Gate"): t for k, t in s.items()},
        r"unexpected: lora_gate\.Gate\.weight",
    ),
    "misses a gate": (
        lambda s: {k: t for k, t in s.items() if k != "lora_task_embedding.weight"},
        r"missing: lora_task_embedding\.weight",
    ),
    "misses an expert": (without_expert, rf"missing: {FIRST}\.lora_B\.loraB\.3\.mlp\.weight"),
    "one expert more": (with_another, r"unexpected: .*loraA\.4\.mlp\.weight"),
    "wrong shape": (
        lambda s: {**s, A0 + ".mlp.weight": torch.zeros(3, 24)},
        rf"shape of {A0}\.mlp\.weight: expected \[2, 24\], got \[3, 24\]",
    ),
    "names that differ": (
        lambda s: {**s, A0 + ".weight": s[A0 + ".weight"] + 1e-3},
        rf"{A0}\.weight: differs from its alias {A0}\.mlp\.weight",
    ),
    "integers": (
        lambda s: {**s, "lora_gate.GateL.weight": torch.zeros(4, 8, dtype=torch.int8)},
        r"dtype of lora_gate\.GateL\.weight",
    ),
    # copy_ knows none of these: the tensors before them would have been copied by then.
    "sparse": (
        lambda s: {**s, A0 + ".mlp.weight": s[A0 + ".mlp.weight"].to_sparse()},
        rf"{A0}\.mlp\.weight: expected a dense tensor, got a sparse_coo one",
    ),
    "nested": (
        lambda s: {**s, "lora_gate.GateL.weight": torch.nested.nested_tensor([torch.zeros(4, 8)])},
        r"lora_gate\.GateL\.weight: expected a dense tensor, got a nested one",
    ),
    "a sparse copy that no forward reads": (
        lambda s: {**s, f"{FIRST}.lora_gate.GateL.weight": torch.zeros(4, 8).to_sparse()},
        r"lora_gate\.GateL\.weight: expected a dense tensor, got a sparse_coo one",
    ),
    "codes without their scale": (
        lambda s: {**s, "lora_gate.GateL.weight": torch.zeros(4, 8).to(torch.float8_e4m3fn)},
        r"dtype of lora_gate\.GateL\.weight: .*got torch\.float8_e4m3fn",
    ),
    "two values in a byte": (
        lambda s: {
            **s,
            "lora_gate.GateL.weight": torch.zeros(4, 8, dtype=torch.uint8).view(
                torch.float4_e2m1fn_x2
            ),
        },
        r"dtype of lora_gate\.GateL\.weight: .*got torch\.float4_e2m1fn_x2",
    ),
    "our own key beside the layout's": (
        lambda s: {**s, f"{FIRST}.lora_A": MODEL.get_submodule(FIRST).lora_A.detach()},
        rf"unexpected: {FIRST}\.lora_A",
    ),
    "no tensor": (lambda s: {**s, "epoch": 3}, r"epoch: expected a tensor .*, got int under str"),
    "no name": (lambda s: {**s, 3: torch.zeros(2)}, r"3: .* under a string, got Tensor under int"),
    "on meta": (
        lambda s: {k: t.to("meta") if k == "lora_gate.GateL.weight" else t for k, t in s.items()},
        r"lora_gate\.GateL\.weight: the adapter's tensor is on the meta device",
    ),
    "double": (
        lambda s: {**s, "base_model.model.lora_gate.GateL.weight": s["lora_gate.GateL.weight"]},
        r"stored twice: base_model\.model\.lora_gate\.GateL\.weight and lora_gate\.GateL\.weight",
    ),
    "two adapters": (
        lambda s: {
            k.replace("lora_A.", "lora_A.a.").replace("lora_B.", "lora_B.b."): t
            for k, t in s.items()
        },
        r"several adapters, expected one",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_does_not_fit_is_named_and_changes_nothing(case):
    change, message = BROKEN[case]
    model = ours()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        load_moelora_peft(model, change(adapters(original())))
    assert_bits(snapshot(model), before)


STATE = adapters(original())
MODEL = ours()
BEFORE = snapshot(MODEL)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_key_renamed_is_named(data):
    """Whatever letter of whatever key is lost or changed: an error, and the model unchanged."""
    key = data.draw(st.sampled_from(sorted(STATE)))
    place = data.draw(st.integers(0, len(key) - 1))
    letter = data.draw(st.sampled_from(["", "x", "."]))
    wrong = key[:place] + letter + key[place + 1 :]
    if wrong == key:
        return
    state = {wrong if k == key else k: t for k, t in STATE.items()}
    with pytest.raises(ValueError, match="checkpoint does not fit the model"):
        load_moelora_peft(MODEL, state)
    assert_bits(snapshot(MODEL), BEFORE)


def write_truncated_safetensors(path):
    save_file(export_moelora_peft(ours()), path)
    path.write_bytes(path.read_bytes()[:-50])


def write_truncated_bin(path):
    torch.save(adapters(original()), path)
    path.write_bytes(path.read_bytes()[:-50])


class Code:
    """What unpickling would run."""

    ran = False

    def __reduce__(self):
        return exec, ("import test_checkpoints_moelora_peft as t; t.Code.ran = True",)


def write_code(path):
    torch.save({**adapters(original()), "x": Code()}, path)


def write_plain_pickle(path):
    path.write_bytes(pickle.dumps({"x": Code()}, protocol=2))


def write_nothing(path):
    path.write_bytes(b"")


def write_list(path):
    torch.save([torch.zeros(2)], path)


@pytest.mark.parametrize(
    ("write", "name", "message"),
    (
        (write_truncated_safetensors, "a.safetensors", "not a readable safetensors file"),
        (write_truncated_bin, "a.bin", "not a readable file of tensors"),
        (write_code, "a.bin", "pickled code is never run"),
        (write_plain_pickle, "a.bin", "pickled code is never run"),
        (write_nothing, "a.bin", "not a readable file of tensors"),
        (write_list, "a.bin", "expected a dictionary of tensors, got list"),
        (write_code, "a.safetensors", "not a readable safetensors file"),
    ),
)
def test_a_broken_file_is_named_and_changes_nothing(write, name, message, tmp_path):
    model = ours()
    before = snapshot(model)
    write(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name}.*{message}"):
        load_moelora_peft(model, tmp_path / name)
    assert not Code.ran
    assert_bits(snapshot(model), before)


def test_a_missing_file_or_an_empty_folder_is_named(tmp_path):
    with pytest.raises(TypeError, match="state_dict: expected tensors by key, a path"):
        load_moelora_peft(ours(), 3)
    with pytest.raises(FileNotFoundError):
        load_moelora_peft(ours(), tmp_path / "adapter_model.bin")
    with pytest.raises(
        ValueError, match=r"expected .* one of: adapter_model\.safetensors, adapter_model\.bin"
    ):
        load_moelora_peft(ours(), tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    (
        ({"rank": (1, 2, 2, 3)}, "share='none' and equal ranks"),
        ({"share": "A"}, "share='none' and equal ranks"),
        ({"router": "linear", "batch_dim": 0}, "router='task'"),
        ({"shared_expert": "always"}, "shared_expert='none'"),
    ),
    ids=str,
)
def test_layers_that_the_layout_has_no_place_for_are_refused(options, message):
    options = {"task_gate": "shared", **options}
    model = ours(config=CONFIG.replace(dropout_mask="shared", **options))
    for call in (lambda: load_moelora_peft(model, {}), lambda: export_moelora_peft(model)):
        with pytest.raises(
            ValueError, match=rf"query_key_value: the layout of MOELoRA-peft needs .*{message}"
        ):
            call()


def test_two_shared_gates_are_refused():
    """The top level of the layout has a place for one."""
    model = ours()
    model.other = nn.Linear(6, 6)
    replace_linears(model, CONFIG.replace(num_tasks=TASKS + 1), ["other"])
    for call in (lambda: load_moelora_peft(model, {}), lambda: export_moelora_peft(model)):
        with pytest.raises(
            ValueError, match="other: the layout of MOELoRA-peft has one shared gate"
        ):
            call()


def test_a_transposed_tensor_is_written_as_safetensors_takes_it(tmp_path):
    """`like` lends the copies that the model does not hold, in whatever memory format."""
    state = adapters(original())
    dead = f"base_model.model.{FIRST}.lora_gate.GateL.weight"
    state[dead] = state[dead].t().contiguous().t()
    written = export_moelora_peft(ours(), like=state)
    save_file(written, tmp_path / "adapter_model.safetensors")
    assert torch.equal(written[dead], state[dead])


def test_trainable_parameters_at_the_original_size():
    """ChatGLM-6B: 28 layers of four linears, 8 experts of rank 2, one gate of 17 x 64 + 8 x 64."""
    with torch.device("meta"):
        model = chatglm(4096, 16384, 28)
        for block in model.transformer.layers:
            block.attention.dense = nn.Linear(4096, 4096)
    replace_linears(model, MoeLoraConfig.preset("moelora"), TARGETS)
    state = export_moelora_peft(model)
    assert state.keys() == {k for k in state if k in GATE or k.startswith("base_model.model.tr")}
    once = {k: t.numel() for k, t in state.items() if k in GATE or k.endswith(".mlp.weight")}
    assert sum(n for k, n in once.items() if k not in GATE) == 29_360_128
    assert sum(n for k, n in once.items() if k in GATE) == 1_600
    assert sum(p.numel() for p in adapter_parameters(model)) == 29_360_128 + 1_600
