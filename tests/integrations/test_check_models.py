"""Models of transformers with experts over all linears: nothing is left out without a word."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch import nn

from moelora_kernels import MoeLoraConfig, check_trainable, replace_linears
from moelora_kernels.nn.gradient_reasons import own_parameters
from moelora_kernels.nn.layer import mixture_layers
from support.linears import randomise
from support.selection import exhaustive

transformers = pytest.importorskip("transformers")

LAYERS = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
TEXT = dict(LAYERS, vocab_size=40)
PAIR = dict(
    vocab_size=40, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
)  # fmt: skip
T5 = dict(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
SPEECH = dict(
    TEXT, conv_dim=(16,), conv_stride=(2,), conv_kernel=(3,), num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2, mask_time_prob=0.0,
)  # fmt: skip
MAMBA = dict(vocab_size=40, hidden_size=16, num_hidden_layers=2, state_size=4)
IMAGES = dict(LAYERS, image_size=8, patch_size=4)
IDS = torch.arange(3, 17).view(2, 7)
PIXELS = torch.linspace(-1, 1, 384).view(2, 3, 8, 8)
LM = dict(input_ids=IDS, labels=IDS)
AUDIO = dict(input_values=torch.linspace(-1, 1, 200).view(2, 100))
IMAGE_TOKENS = torch.cat([torch.full((2, 4), 39), IDS], dim=1)

# class of the model -> options of its config, batch, a pattern of the layers that have no effect.
DEFAULT = {
    "Qwen2ForCausalLM": (dict(TEXT, num_key_value_heads=2), LM, None),
    "T5ForConditionalGeneration": (dict(T5, decoder_start_token_id=0), LM, None),
    # The source of the mixer calls dt_proj in a branch that this version never takes.
    "FalconMambaForCausalLM": (MAMBA, LM, r"dt_proj"),
    # The features are taken before the last layer of the vision tower.
    "LlavaForConditionalGeneration": (
        dict(
            vision_config=dict(IMAGES, num_hidden_layers=3, model_type="clip_vision_model"),
            text_config=dict(TEXT, num_key_value_heads=2, model_type="llama"),
            image_token_id=39,
            vision_feature_layer=-2,
        ),
        dict(input_ids=IMAGE_TOKENS, labels=IMAGE_TOKENS, pixel_values=PIXELS),
        r"vision_tower\.encoder\.layers\.2",
    ),
}
OTHERS = {
    "BartForConditionalGeneration": (dict(PAIR, encoder_layerdrop=1.0), LM, r"encoder\.layers"),
    "WhisperForConditionalGeneration": (
        dict(PAIR, num_mel_bins=8, max_source_positions=10, max_target_positions=16),
        dict(input_features=torch.linspace(-1, 1, 320).view(2, 8, 20), labels=IDS),
        None,
    ),
    "HubertModel": (SPEECH, AUDIO, None),
    "WavLMModel": (dict(SPEECH, layerdrop=0.0), AUDIO, None),
    "MambaForCausalLM": (MAMBA, LM, None),
    "Mamba2ForCausalLM": (dict(MAMBA, num_heads=4, head_dim=8, n_groups=1, chunk_size=4), LM, None),
    "ViTForImageClassification": (
        IMAGES, dict(pixel_values=PIXELS, labels=torch.tensor([0, 1])), None,
    ),
    "BertForMaskedLM": (TEXT, LM, None),
    "AlbertForMaskedLM": (dict(TEXT, embedding_size=8), LM, None),
    "MixtralForCausalLM": (dict(TEXT, num_key_value_heads=2, num_local_experts=2), LM, None),
    "DebertaModel": (
        dict(TEXT, relative_attention=True, pos_att_type="c2p|p2c"), dict(input_ids=IDS),
        r"pos_q_proj",
    ),
}  # fmt: skip
CASES = [*DEFAULT, *(pytest.param(name, marks=exhaustive) for name in OTHERS)]


def replace_all(model: nn.Module) -> None:
    """Put experts over every linear that is not refused."""
    config = MoeLoraConfig.preset("ming", num_experts=2, rank=2)
    for name in [name for name, module in model.named_modules() if type(module) is nn.Linear]:
        try:
            replace_linears(model, config, re.escape(name))
        except TypeError as error:
            assert "reads its weight" in str(error)  # noqa: PT017


@pytest.mark.parametrize("name", CASES)
def test_a_parameter_has_a_gradient_or_is_named(name: str) -> None:
    options, batch, without_effect = (DEFAULT | OTHERS)[name]
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**options)).requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        replace_all(model)
    randomise(model)
    torch.manual_seed(0)
    report = check_trainable(model, batch)
    left_out = {**report.not_called, **report.unreached}
    if without_effect is None:
        assert not left_out, report
    else:
        assert any(re.search(without_effect, layer) for layer in left_out)
    # A step of the training itself, with the same random numbers.
    torch.manual_seed(0)
    model.train()
    output = model(**batch)
    loss = output.loss if "labels" in batch else output[0].float().square().mean()
    loss.backward()
    names = {layer: name for name, layer in model.named_modules()}
    for layer in mixture_layers(model):
        for key, parameter in own_parameters(layer):
            if parameter.grad is None or not parameter.grad.any():
                key = f"{names[layer]}.{key}"
                assert key in report.without_gradient or key in report.expected
