"""Linears whose weight is read instead of called are refused or named."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from moelora_kernels import MoeLoraConfig, replace_ffns, replace_linears
from moelora_kernels.nn.weight_readers import child_uses
from support.ffns import GatedMlp

transformers = pytest.importorskip("transformers")
MING = MoeLoraConfig.preset("ming", num_experts=2, rank=2)
SMALL = dict(
    vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
)
SPEECH = dict(
    conv_dim=(16,), conv_stride=(2,), conv_kernel=(3,), num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2,
)  # fmt: skip


class Reader(nn.Module):
    """Reads the weight of q and does not call q."""

    def __init__(self):
        super().__init__()
        self.q = nn.Linear(8, 8)

    def forward(self, x):
        return linear(x, self.q.weight, self.q.bias)


class Helper(Reader):
    """Reads it in a method, transposed."""

    def forward(self, x):
        return self.project(x)

    def project(self, x):
        return torch.addmm(self.q.bias, x, self.q.weight.t())


class Inherited(Reader):
    """Reads it in the forward of its base class."""

    def forward(self, x):
        return super().forward(x) + 1


class Sometimes(Reader):
    """Reads it in some forwards."""

    def forward(self, x):
        return super().forward(x) if x.shape[0] > 4 else self.q(x)


class Outer(nn.Module):
    """Reads the weight of a grandchild."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Module()
        self.inner.q = nn.Linear(8, 8)

    def forward(self, x):
        return x @ self.inner.q.weight.T


class Caller(Reader):
    """Looks at the dtype and the shape of the weight, and calls q."""

    def forward(self, x):
        if isinstance(self.q.weight, torch.Tensor) and self.q.weight is not None:
            x = x.to(self.q.weight.dtype).expand(-1, self.q.weight.shape[1])
        return self.q(x)


@pytest.mark.parametrize("kind", (Reader, Helper, Inherited, Sometimes, Outer))
def test_a_parent_whose_code_reads_a_weight_is_named(kind) -> None:
    with pytest.warns(UserWarning, match=rf"q: the forward of {kind.__name__} reads (inner\.)?q\."):
        replace_linears(kind(), MING, ["q"])


def test_one_warning_names_all_layers_of_a_class() -> None:
    model = nn.Sequential(Reader(), Reader())
    with pytest.warns(UserWarning, match=r"0\.q and 1 more") as caught:
        replace_linears(model, MING, ["q"])
    assert len(caught) == 1


def test_a_module_above_an_ffn_that_reads_its_weight_is_named() -> None:
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = GatedMlp(8, 12)

        def forward(self, x):
            return self.mlp(x) @ self.mlp.down_proj.weight

    with pytest.warns(UserWarning, match=r"mlp\.down_proj: the forward of .*Block"):
        replace_ffns(Block(), MoeLoraConfig.preset("mixlora", num_experts=2, rank=2), ["mlp"])


def model_of(name: str, **options) -> nn.Module:
    """Return a tiny model of transformers by the name of its class."""
    kind = getattr(transformers, name)
    return kind(kind.config_class(**{**SMALL, **options}))


# name -> model, targets that are refused
REFUSED = {
    "mamba": (lambda: model_of("MambaForCausalLM", state_size=4), ("out_proj", "dt_proj")),
    "falcon_mamba": (lambda: model_of("FalconMambaForCausalLM", state_size=4), ("out_proj",)),
    "mamba2": (
        lambda: model_of("Mamba2ForCausalLM", num_heads=4, head_dim=8, state_size=4, n_groups=1),
        ("out_proj",),
    ),
    "wavlm": (lambda: model_of("WavLMModel", **SPEECH), ("q_proj", "k_proj", "v_proj", "out_proj")),
    "mobilebert": (
        lambda: model_of("MobileBertForMaskedLM", embedding_size=8, true_hidden_size=16),
        ("predictions.decoder", "predictions.dense"),
    ),
    "attention": (lambda: nn.Sequential(nn.MultiheadAttention(8, 2)), ("out_proj",)),
    "encoder_layer": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16)),
        ("linear1", "linear2"),
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_linears_that_a_library_is_known_to_read_are_refused(name: str) -> None:
    build, targets = REFUSED[name]
    model = build()
    for target in targets:
        with pytest.raises(TypeError, match=f"{target} is part of a .*, which reads its weight"):
            replace_linears(model, MING, [target])


def test_the_mask_head_of_detr_is_refused() -> None:
    from transformers.models.detr.modeling_detr import DetrMHAttentionMap

    head = nn.ModuleDict({"mask_head": DetrMHAttentionMap(8, 2)})
    with pytest.raises(TypeError, match=r"k_proj is part of a .*DetrMHAttentionMap"):
        replace_linears(head, MING, ["k_proj"])


@pytest.mark.parametrize("target", ("out_proj", "dt_proj"))
def test_peft_refuses_the_same_linears(target: str) -> None:
    peft = pytest.importorskip("peft")
    from moelora_kernels.peft import MoeLoraPeftConfig

    model = model_of("MambaForCausalLM", state_size=4)
    with pytest.raises((TypeError, ValueError), match=target):
        peft.get_peft_model(model, MoeLoraPeftConfig(target_modules=[target]))


def test_peft_names_a_parent_whose_code_reads_a_weight() -> None:
    peft = pytest.importorskip("peft")
    from moelora_kernels.peft import MoeLoraPeftConfig

    with pytest.warns(UserWarning, match="q: the forward of Reader reads q.weight"):
        peft.get_peft_model(Reader(), MoeLoraPeftConfig(target_modules=["q"]))


# Models that call every linear: a warning or a refusal would be a false alarm.
CALLERS = {
    "Qwen2ForCausalLM": dict(num_key_value_heads=2),
    "LlamaForCausalLM": dict(num_key_value_heads=2),
    "MistralForCausalLM": dict(num_key_value_heads=2),
    "GemmaForCausalLM": dict(num_key_value_heads=2, head_dim=8),
    "PhiForCausalLM": {},
    "BertForMaskedLM": {},
    "ViTModel": dict(image_size=8, patch_size=4),
    "Wav2Vec2Model": SPEECH,
    "WhisperForConditionalGeneration": dict(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    ),
    "BartForConditionalGeneration": dict(
        d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
    ),
    "T5ForConditionalGeneration": dict(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLERS)
def test_models_that_call_every_linear_are_replaced_without_a_warning(name: str) -> None:
    model = model_of(name, **CALLERS[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replace_linears(model, MING, [n for n, m in model.named_modules() if type(m) is nn.Linear])


def test_only_values_of_a_weight_count_as_a_read() -> None:
    assert child_uses(Caller()).read == frozenset()
    assert child_uses(Sometimes()).read == {"q"} <= child_uses(Sometimes()).called


def test_a_forward_that_is_patched_on_the_object_is_inspected() -> None:
    model = Caller()
    model.forward = lambda x: x
    assert child_uses(model).read == frozenset()
    model.forward = Reader.forward.__get__(model)
    assert child_uses(model).read == frozenset({"q"})
