"""Models of transformers with experts over all linears: nothing is left out without a word."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch import nn

from moelora_kernels import MoeLoraConfig, check_trainable, replace_linears
from moelora_kernels.nn.gradient_reasons import own_parameters
from moelora_kernels.nn.layer import MixtureLayer, mixture_layers
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
    # It divides its queries in place, and its global projections need a global_attention_mask.
    "LongformerForMaskedLM": (
        dict(TEXT, attention_window=4, max_position_embeddings=64, pad_token_id=0), LM, "_global",
    ),
    # Its plain code reads dt_proj.weight.
    "JambaForCausalLM": (
        dict(
            TEXT, num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1,
            num_experts=2, num_experts_per_tok=1, mamba_d_state=4, mamba_dt_rank=4,
            use_mamba_kernels=False,
        ),
        LM, r"mamba\.dt_proj",
    ),
    "FalconH1ForCausalLM": (
        dict(
            TEXT, num_key_value_heads=2, head_dim=8, mamba_d_ssm=32, mamba_n_heads=4,
            mamba_d_head=8, mamba_n_groups=1, mamba_d_state=4, mamba_chunk_size=4,
        ),
        LM, None,
    ),
    "BloomForCausalLM": (
        dict(
            vocab_size=40, hidden_size=16, n_layer=2, n_head=2, pretraining_tp=2,
            slow_but_exact=True,
        ),
        LM, r"dense",
    ),
    # Reversible layers are like reentrant checkpointing: their input must need a gradient.
    "ReformerModelWithLMHead": (
        dict(
            vocab_size=40, hidden_size=16, num_attention_heads=2, attention_head_size=8,
            feed_forward_size=32, attn_layers=["local"], local_attn_chunk_length=4,
            axial_pos_embds=False, is_decoder=True, max_position_embeddings=64, num_hashes=1,
        ),
        dict(input_ids=IDS[:, :4], labels=IDS[:, :4]), r"encoder\.layers",
    ),
    "DeepseekV3ForCausalLM": (
        dict(
            TEXT, num_key_value_heads=2, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=4,
            qk_rope_head_dim=4, v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, n_group=2,
            topk_group=1, moe_intermediate_size=16, n_shared_experts=1, first_k_dense_replace=1,
        ),
        LM, None,
    ),
    "Wav2Vec2ConformerForCTC": (
        dict(
            SPEECH, layerdrop=0.0, conv_depthwise_kernel_size=3, position_embeddings_type="relative"
        ),
        dict(AUDIO, labels=torch.ones(2, 3, dtype=torch.int64)), None,
    ),
    "Qwen2VLForConditionalGeneration": (
        dict(
            vision_config=dict(
                depth=1, embed_dim=16, hidden_size=16, num_heads=2, mlp_ratio=2, patch_size=4,
                spatial_merge_size=1, temporal_patch_size=1, in_channels=3,
            ),
            text_config=dict(
                TEXT, num_key_value_heads=2,
                rope_parameters=dict(
                    rope_type="default", mrope_section=[1, 1, 2], rope_theta=1e4
                ),
            ),
            image_token_id=39, vision_start_token_id=38, vision_end_token_id=37, video_token_id=36,
        ),
        dict(
            input_ids=IMAGE_TOKENS, labels=IMAGE_TOKENS,
            pixel_values=torch.linspace(-1, 1, 384).view(8, 48),
            image_grid_thw=torch.tensor([[1, 2, 2]] * 2),
            mm_token_type_ids=(IMAGE_TOKENS == 39).int(),
        ),
        None,
    ),
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
    # It divides its position queries in place.
    "DebertaModel": (
        dict(TEXT, relative_attention=True, pos_att_type="c2p|p2c"), dict(input_ids=IDS),
        None,
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


def output_of(model: nn.Module, batch: dict) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return model.train()(**batch)[0]


def assert_every_unnamed_b_changes_the_output(model: nn.Module, batch: dict, named: dict) -> None:
    """Change the B of one layer after the other. A layer without effect must be named."""
    y = output_of(model, batch)
    for name, layer in model.named_modules():
        if isinstance(layer, MixtureLayer):
            b = layer.lora_B.detach().clone()
            with torch.no_grad():
                layer.lora_B.mul_(-3).add_(0.5)
            is_changed = not torch.equal(output_of(model, batch), y)
            layer.lora_B.data.copy_(b)
            assert is_changed or name in named or f"{name}.lora_B" in named, name


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
    assert_every_unnamed_b_changes_the_output(model, batch, {**left_out, **report.without_gradient})
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
