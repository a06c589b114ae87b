"""MOELoRA-peft alone: gates that no forward reads, aliases, one shared gate, sizes.

`test_layouts.py` tests the rules that both layouts share.
"""

import logging

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from moelora_kernels import MoeLoraConfig, adapter_parameters, replace_linears
from moelora_kernels.checkpoints import export_moelora_peft, load_moelora_peft
from support.compare import assert_same
from support.layouts.moelora_peft import CONFIG, FIRST, SHARED_GATE, TARGETS, original, ours
from support.originals import TASKS, chatglm, state_of


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_files_of_both_kinds_in_half_precision(dtype, tmp_path):
    """adapter_model.bin like the original's, its folder, and a safetensors file like PEFT's."""
    state = {k: t.to(dtype) for k, t in state_of(original()).items()}
    torch.save(state, tmp_path / "adapter_model.bin")
    for path in (tmp_path / "adapter_model.bin", str(tmp_path)):
        model = ours(dtype=dtype)
        load_moelora_peft(model, path)
        assert_same(export_moelora_peft(model, like=path), state)
    # safetensors refuses two names of one storage: every exported tensor has its own.
    save_file(export_moelora_peft(model), tmp_path / "adapter.safetensors")
    other = ours(dtype=dtype)
    load_moelora_peft(other, tmp_path / "adapter.safetensors")
    assert_same(export_moelora_peft(other), export_moelora_peft(model))


def test_only_gates_that_no_forward_reads_are_ignored(caplog):
    """A warning names the gates of layers that use the shared gate."""
    with caplog.at_level(logging.WARNING, logger="moelora_kernels"):
        load_moelora_peft(ours("per_layer"), state_of(original("per_layer")))
        assert not caplog.records
        load_moelora_peft(ours(), state_of(original()))
    (record,) = caplog.records
    text = record.getMessage()
    assert "16 keys not used" in text
    assert f"{FIRST}.lora_gate.GateL.weight" in text


def test_a_checkpoint_of_the_other_variant_is_refused():
    """Else the load would ignore a gate that a forward reads, or load one that none reads."""
    with pytest.raises(ValueError, match=r"unexpected: lora_gate\.GateL\.weight"):
        load_moelora_peft(ours("per_layer"), state_of(original("shared")))
    with pytest.raises(ValueError, match=r"missing: lora_gate\.GateL\.weight"):
        load_moelora_peft(ours("shared"), state_of(original("per_layer")))


def test_one_of_two_names_is_enough():
    """A tensor has two names. safetensors keeps one of them, and it may be either."""
    state = state_of(original())
    model = ours()
    load_moelora_peft(model, state)
    expected = export_moelora_peft(model)
    names = {key for key in state if key.endswith(".mlp.weight")}
    aliases = {key.removesuffix(".mlp.weight") + ".weight" for key in names}
    for left_out in (names, aliases):
        partial = {key: tensor for key, tensor in state.items() if key not in left_out}
        assert len(partial) == len(state) - 64
        model = ours()
        load_moelora_peft(model, partial)
        assert_same(export_moelora_peft(model), expected)
        assert_same(export_moelora_peft(model, like=partial), partial)


def test_two_names_are_compared_bit_by_bit():
    """A NaN equals itself, 0 differs from -0, and so does the same value in another dtype."""
    state = state_of(original())
    key = f"base_model.model.{FIRST}.lora_B.loraB.0"
    values = torch.zeros_like(state[f"{key}.weight"])
    values[0, 0] = torch.nan
    both = {f"{key}.weight": values, f"{key}.mlp.weight": values.clone()}
    load_moelora_peft(ours(), {**state, **both})
    for other in (values.half(), values.view(torch.int32), -values):
        with pytest.raises(ValueError, match=r"differs from its alias "):
            load_moelora_peft(ours(), {**state, **both, f"{key}.weight": other})


def test_two_shared_gates_are_refused():
    """The layout has keys for one shared gate."""
    model = ours()
    model.other = nn.Linear(6, 6)
    replace_linears(model, CONFIG.replace(num_tasks=TASKS + 1), ["other"])
    for call in (lambda: load_moelora_peft(model, {}), lambda: export_moelora_peft(model)):
        with pytest.raises(
            ValueError, match="other: the layout of MOELoRA-peft has one shared gate"
        ):
            call()


def test_a_transposed_tensor_of_like_is_written_to_safetensors(tmp_path):
    """safetensors takes contiguous tensors alone; the gates of layers are copied from `like`."""
    state = state_of(original())
    unread = f"base_model.model.{FIRST}.lora_gate.GateL.weight"
    state[unread] = state[unread].t().contiguous().t()
    exported = export_moelora_peft(ours(), like=state)
    save_file(exported, tmp_path / "adapter_model.safetensors")
    assert torch.equal(exported[unread], state[unread])


def test_trainable_parameters_at_the_original_size():
    """ChatGLM-6B: 28 layers of four linears, 8 experts of rank 2, one gate of 17 x 64 + 8 x 64."""
    with torch.device("meta"):
        model = chatglm(4096, 16384, 28)
        for block in model.transformer.layers:
            block.attention.dense = nn.Linear(4096, 4096)
    replace_linears(model, MoeLoraConfig.preset("moelora"), TARGETS)
    state = export_moelora_peft(model)
    linears = {key for key in state if key.startswith("base_model.model.transformer.")}
    assert state.keys() == SHARED_GATE | linears
    sizes = {key: tensor.numel() for key, tensor in state.items()}
    experts = sum(n for key, n in sizes.items() if key.endswith(".mlp.weight"))
    gate = sum(n for key, n in sizes.items() if key in SHARED_GATE)
    assert (experts, gate) == (29_360_128, 1_600)
    assert sum(p.numel() for p in adapter_parameters(model)) == experts + gate
