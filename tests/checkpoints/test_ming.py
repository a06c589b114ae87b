"""MING-MOE alone: batches, two files, attention with plain LoRA, generation, sizes.

`test_layouts.py` tests the rules that both layouts share.
"""

import copy

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from moelora_kernels import MoeLoraConfig, adapter_parameters, replace_linears
from moelora_kernels.checkpoints import export_ming, load_ming
from support.compare import assert_same
from support.layouts.ming import ALPHA, CONFIG, EXPERTS, LORA, RANK, original, ours
from support.models import language_model
from support.originals import MoLora, PlainLora, replace, state_of


@pytest.mark.parametrize("shape", ((1, 1), (3, 1), (1, 5), (3, 5)), ids=str)
@pytest.mark.parametrize("variant", ("public", "shared", "rslora"))
def test_batches_in_prefill_and_decode(variant, shape):
    """Public MING fails at decode with a batch, its dev branch at prefill without one."""
    source, model = original(variant), ours(variant).eval()
    load_ming(model, state_of(source))
    x = torch.randn(*shape, 8)
    with torch.no_grad():
        y = model(x)
        one_by_one = torch.stack([
            torch.cat([source(token[None, None])[0] for token in sample]) for sample in x
        ])  # fmt: skip
    torch.testing.assert_close(y, one_by_one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ("bin", "safetensors"))
def test_attention_and_mixtures_are_in_two_files(kind, tmp_path):
    """Stock PEFT writes adapter_model, and MING writes non_lora_trainables."""
    source = original("public_attention")
    state = {k: t.to(torch.float16) for k, t in state_of(source).items()}
    attention = {k: t for k, t in state.items() if "self_attn" in k}
    mixtures = {k: t for k, t in state.items() if "self_attn" not in k}
    if kind == "bin":
        torch.save(attention, tmp_path / "adapter_model.bin")
    else:
        save_file(attention, tmp_path / "adapter_model.safetensors")
    torch.save(mixtures, tmp_path / "non_lora_trainables.bin")
    files = [tmp_path / f"adapter_model.{kind}", tmp_path / "non_lora_trainables.bin"]
    for checkpoint in (tmp_path, files):
        model = ours("public_attention", dtype=torch.float16)
        load_ming(model, checkpoint)
        assert_same(export_ming(model, like=checkpoint), state)
    with pytest.raises(ValueError, match=r"q_proj\.lora_A\.weight, .*: in more than one part"):
        load_ming(model, [attention, tmp_path])


def test_a_qwen2_generates_the_tokens_of_the_original():
    """A real model's names; a batch of three in prefill and, with a KV cache, in decode."""
    model = language_model(hidden_size=32, intermediate_size=48).requires_grad_(False)
    source = copy.deepcopy(model)
    replace(source, lambda base: MoLora(base, EXPERTS, RANK, ALPHA), ".mlp.")
    replace(source, lambda base: PlainLora(base, RANK, ALPHA), "_attn.")
    replace_linears(model, CONFIG, ["gate_proj", "up_proj", "down_proj"])
    replace_linears(model, LORA, ["q_proj", "k_proj", "v_proj", "o_proj"])
    state = state_of(source)
    load_ming(model, state)
    assert_same(export_ming(model), state)
    ids = torch.randint(0, 40, (3, 6))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, source(ids).logits, rtol=1e-5, atol=1e-5)
    actual, expected = (
        net.generate(ids, max_new_tokens=4, do_sample=False) for net in (model, source)
    )
    assert torch.equal(actual, expected)


def test_lora_of_a_linear_that_was_not_replaced_is_named():
    """A model without attention's LoRA would answer worse, without a message."""
    state = state_of(original("public_attention"))
    with pytest.raises(
        ValueError, match=r"unexpected: .*q_proj\.lora_A\.weight \(a plain LoRA: replace"
    ):
        load_ming(ours(), state)
    with pytest.raises(
        ValueError, match=r"missing: .*layers\.1\.self_attn\.o_proj\.lora_B\.weight"
    ):
        load_ming(ours("public_attention"), state_of(original()))


def test_trainable_parameters_at_the_original_size():
    """MLPs of Qwen1.5-7B: 32 layers of three linears, 8 experts of rank 16 and a router each."""
    with torch.device("meta"):
        mlps = [
            nn.ModuleDict({
                "gate_proj": nn.Linear(4096, 11008, bias=False),
                "up_proj": nn.Linear(4096, 11008, bias=False),
                "down_proj": nn.Linear(11008, 4096, bias=False),
            })
            for _ in range(32)
        ]  # fmt: skip
    model = nn.ModuleList(mlps)
    replace_linears(model, MoeLoraConfig.preset("ming"), ["gate_proj", "up_proj", "down_proj"])
    sizes = {key: tensor.numel() for key, tensor in export_ming(model).items()}
    experts = sum(n for key, n in sizes.items() if ".experts." in key)
    routers = sum(n for key, n in sizes.items() if ".switch." in key)
    # 32 * 3 * 8 * 16 * (4096 + 11008) and 32 * 8 * (2 * 4096 + 11008 + 3): 185.6 M and 4.9 M.
    assert (experts, routers) == (185_597_952, 4_915_968)
    assert sum(p.numel() for p in adapter_parameters(model)) == experts + routers
