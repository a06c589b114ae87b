"""Real models: a sample of a batch gets the gate that it gets alone, or an error says why not."""

from __future__ import annotations

import pytest
import torch

from moelora_kernels import MoeLoraConfig, replace_linears, set_samples, set_tasks
from support.linears import randomise

T = pytest.importorskip("transformers")

TASK = MoeLoraConfig(num_experts=4, rank=2, router="task", num_tasks=4, task_embedding_dim=5)
SEQUENCE = MoeLoraConfig(num_experts=4, rank=2, router="linear", granularity="sequence", top_k=2)
TEXT = dict(
    vocab_size=40, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
)
PAIR = dict(
    d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
    decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, pad_token_id=0,
    bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
)  # fmt: skip
SPEECH = dict(
    conv_dim=(16, 16), conv_stride=(2, 2), conv_kernel=(3, 3), num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2, mask_time_prob=0.0,
)  # fmt: skip
VISION = dict(
    hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=8,
    patch_size=4,
)  # fmt: skip


def text(batch, length):
    return dict(input_ids=torch.randint(3, 38, (batch, length)))


def pair(batch, length):
    return text(batch, length) | dict(decoder_input_ids=torch.randint(3, 38, (batch, length)))


def noise(*sizes):
    return torch.randn(*sizes, dtype=torch.float64)


def images(size):
    return lambda batch, length: dict(pixel_values=noise(batch, 3, size, size))


# name: (model, inputs, linears that get [batch, ...], linears that get [sequence, batch, ...])
MODELS = {
    "XLNet": (
        lambda: T.XLNetLMHeadModel(
            T.XLNetConfig(vocab_size=40, d_model=16, n_layer=2, n_head=2, d_inner=32)
        ),
        text, r"lm_loss", r".*\.layer_[12]",
    ),
    "FSMT": (
        lambda: T.FSMTForConditionalGeneration(
            T.FSMTConfig(langs=["a", "b"], src_vocab_size=40, tgt_vocab_size=40,
                         max_position_embeddings=64, **PAIR)
        ),
        pair, None, r".*(fc1|fc2|k_proj|v_proj|q_proj|out_proj)",
    ),
    "Longformer": (
        lambda: T.LongformerModel(
            T.LongformerConfig(**TEXT, attention_window=4, max_position_embeddings=64,
                               pad_token_id=0),
            add_pooling_layer=False,
        ),
        text, r".*(output|intermediate)\.dense", r".*\.(query|key|value)",
    ),
    "LED": (
        lambda: T.LEDForConditionalGeneration(
            T.LEDConfig(vocab_size=40, attention_window=4, max_encoder_position_embeddings=64,
                        max_decoder_position_embeddings=64, **PAIR)
        ),
        pair, r".*(_proj|fc1|fc2)", r".*\.(query|key|value)",
    ),
    "DeBERTa": (
        lambda: T.DebertaModel(T.DebertaConfig(**TEXT, relative_attention=True,
                                               pos_att_type="c2p|p2c")),
        text, r".*dense", None,
    ),
    "Perceiver": (
        lambda: T.PerceiverForMaskedLM(
            T.PerceiverConfig(vocab_size=40, d_model=16, d_latents=16, num_latents=4, num_blocks=1,
                              num_self_attends_per_block=1, num_self_attention_heads=2,
                              num_cross_attention_heads=2, max_position_embeddings=64)
        ),
        text, r".*(query|key|value|dense\d?)", None,
    ),
    "Conformer": (
        lambda: T.Wav2Vec2ConformerModel(T.Wav2Vec2ConformerConfig(**TEXT, **SPEECH)),
        lambda batch, length: dict(input_values=noise(batch, 40 * length)),
        r".*(linear_[qkv]|linear_out|dense)", None,
    ),
    "Whisper": (
        lambda: T.WhisperForConditionalGeneration(
            T.WhisperConfig(vocab_size=40, num_mel_bins=8, max_source_positions=10,
                            max_target_positions=16, **PAIR)
        ),
        lambda batch, length: dict(
            input_features=noise(batch, 8, 20),
            decoder_input_ids=torch.randint(3, 38, (batch, length)),
        ),
        r".*(_proj|fc1|fc2)", None,
    ),
    "Segformer": (
        lambda: T.SegformerModel(
            T.SegformerConfig(num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1],
                              hidden_sizes=[8, 16], patch_sizes=[3, 3], strides=[2, 2],
                              num_attention_heads=[1, 2], mlp_ratios=[2, 2], drop_path_rate=0.0)
        ),
        images(16), r".*(_proj|fc\d)", None,
    ),
    "CLIP": (
        lambda: T.CLIPModel(
            T.CLIPConfig(text_config=dict(TEXT, projection_dim=8, eos_token_id=2),
                         vision_config=VISION, projection_dim=8)
        ),
        lambda batch, length: text(batch, length) | images(8)(batch, length),
        r".*(_proj|fc1|fc2)", None,
    ),
    "Q-Former": (
        lambda: T.Blip2QFormerModel(
            T.Blip2QFormerConfig(**TEXT, encoder_hidden_size=16, cross_attention_frequency=1)
        ),
        lambda batch, length: dict(
            query_embeds=noise(batch, length, 16), encoder_hidden_states=noise(batch, 5, 16)
        ),
        r".*\.(query|key|value|dense)", None,
    ),
}  # fmt: skip


def adapted(make, config, first, last):
    """Return the model with adapters; those of `last` have batch_dim=1."""
    torch.manual_seed(0)
    model = make().double().eval().requires_grad_(False)
    if first is not None:
        replace_linears(model, config, first)
    if last is not None:
        replace_linears(model, config.replace(batch_dim=1), last)
    return randomise(model)


@torch.no_grad()
def outputs(model, batch, tasks):
    if tasks is not None:
        set_tasks(model, tasks)
    values = model(**batch).to_tuple()
    rows = next(iter(batch.values())).shape[0]
    tensors = [v for v in values if isinstance(v, torch.Tensor) and v.is_floating_point()]
    return [tensor for tensor in tensors if tensor.dim() > 1 and tensor.shape[0] == rows]


CONFIGS = {
    "task": (TASK, 3, torch.tensor([1, 3, 2])),
    "square": (TASK, 8, torch.tensor([1, 3, 2, 4, 4, 1, 2, 3])),
    "sequence": (SEQUENCE, 3, None),
}


@pytest.mark.parametrize("gate", CONFIGS)
@pytest.mark.parametrize("name", MODELS)
def test_a_sample_of_a_batch_is_computed_like_alone(name, gate):
    make, inputs, first, last = MODELS[name]
    config, rows, tasks = CONFIGS[gate]
    model = adapted(make, config, first, last)
    batch = inputs(rows, 8)
    together = outputs(model, batch, tasks)
    assert together
    for b in range(rows):
        sample = {key: value[b : b + 1] for key, value in batch.items()}
        alone = outputs(model, sample, None if tasks is None else tasks[b : b + 1])
        for all_rows, row in zip(together, alone, strict=False):
            if all_rows.shape[1:] == row.shape[1:]:
                torch.testing.assert_close(all_rows[b : b + 1], row, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("gate", CONFIGS)
@pytest.mark.parametrize("name", [name for name, (*_, last) in MODELS.items() if last])
def test_sequence_first_linears_raise_and_name_batch_dim(name, gate):
    make, inputs, _, last = MODELS[name]
    config, rows, tasks = CONFIGS[gate]
    model = adapted(make, config, last, None)
    with pytest.raises(ValueError, match=r"batch_dim=[01]"):
        outputs(model, inputs(rows, 8), tasks)


def switch():
    return T.SwitchTransformersForConditionalGeneration(
        T.SwitchTransformersConfig(
            vocab_size=40,
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_decoder_layers=2,
            num_sparse_encoder_layers=1,
            num_sparse_decoder_layers=1,
            num_heads=2,
            num_experts=2,
            decoder_start_token_id=0,
        )
    )


@pytest.mark.parametrize("samples", (None, "flat"))
def test_experts_of_a_base_model_are_named(samples):
    model = adapted(switch, TASK, r".*experts.*\.(wi|wo)", None)
    set_samples(model, samples)
    message = r"SwitchTransformersExperts selects its tokens.*leave .* out of target_modules"
    with pytest.raises(ValueError, match=message):
        outputs(model, pair(3, 8), torch.tensor([1, 3, 2]))


def test_windows_of_images_say_how_rows_repeat():
    config = T.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=2
    )
    names = r".*attention.*(query|q_proj)"
    model = adapted(lambda: T.SwinModel(config), TASK, names, None)
    with pytest.raises(ValueError, match=r"repeat_interleave\(16\)"):
        outputs(model, images(16)(3, 0), torch.tensor([1, 3, 2]))


def qwen():
    return T.Qwen2ForCausalLM(T.Qwen2Config(**TEXT, num_key_value_heads=2))


def test_packed_rows_are_refused_without_samples():
    """Position ids that start again: the rows of a collator that packs."""
    model = adapted(qwen, SEQUENCE, ["q_proj", "up_proj"], None)
    batch = text(1, 12) | dict(position_ids=torch.arange(4).repeat(3)[None])
    with pytest.raises(ValueError, match=r"several samples are packed.*set_samples"):
        outputs(model, batch, None)
    set_samples(model, torch.arange(3).repeat_interleave(4))
    outputs(model, batch, None)
    # Left padding is not packing: the mask says so.
    set_samples(model, None)
    padded = torch.tensor([[1, 1, 0, 1, 2, 3]])
    outputs(model, text(1, 6) | dict(position_ids=padded, attention_mask=padded.ne(1)), None)
    outputs(model, text(1, 6) | dict(position_ids=torch.arange(6)[None]), None)


@pytest.mark.parametrize("beams", (1, 2))
def test_generated_tokens_are_those_of_each_prompt_alone(beams):
    model = adapted(qwen, TASK, ["q_proj", "up_proj"], None)
    model.generation_config.eos_token_id = None
    ids, tasks = text(3, 5)["input_ids"], torch.tensor([1, 3, 2])
    options = dict(num_beams=beams, do_sample=False, max_new_tokens=4, pad_token_id=0)
    alone = []
    for b in range(3):
        # One task is for all rows, so the beams of one prompt need no repeated ids.
        set_tasks(model, tasks[b : b + 1])
        alone.append(model.generate(ids[b : b + 1], **options))
    set_tasks(model, tasks.repeat_interleave(beams))
    assert torch.equal(model.generate(ids, **options), torch.cat(alone))
