"""Trainers of models with several parts: a mask counts in the part that it belongs to."""

from __future__ import annotations

import math
import re

import pytest
import torch

for name in ("transformers", "datasets", "accelerate"):
    pytest.importorskip(name)

import transformers  # noqa: E402

from moelora_kernels import MoeLoraConfig, set_tasks  # noqa: E402
from moelora_kernels.trainer import attach  # noqa: E402
from support.expert_loads import HandCount, adapted  # noqa: E402
from support.trainers import arguments, make_tokenizer  # noqa: E402

SAMPLES = [{"number": i} for i in range(6)]
IGNORED = -100


def lengths(rows: int, longest: int, seed: int = 0) -> torch.Tensor:
    """Return a mask [rows, longest] of sequences padded on the right."""
    draw = torch.Generator().manual_seed(seed)
    counts = torch.randint(2, longest + 1, (rows, 1), generator=draw)
    counts[0] = longest
    return (torch.arange(longest) < counts).long()


def train(model, collator, tmp_path, mask_of, cls=transformers.Trainer, **options):
    """Train 3 steps at rate 0 and compare the load of the last log with a count by hand."""
    args_cls = {
        transformers.Trainer: transformers.TrainingArguments,
        transformers.Seq2SeqTrainer: transformers.Seq2SeqTrainingArguments,
    }[cls]
    args = arguments(
        tmp_path, args_cls, learning_rate=0.0, logging_steps=3, remove_unused_columns=False,
        **options,
    )  # fmt: skip
    trainer = cls(model, args, train_dataset=SAMPLES, eval_dataset=SAMPLES, data_collator=collator)
    count = HandCount(model, mask_of)
    callback = attach(trainer)
    trainer.train()
    count.check(callback.load)
    (log,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert math.isfinite(log["loss"])
    assert log["aux_loss"] > 0
    return trainer, count


def language_config(cls, **options):
    return cls(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
        **options,
    )  # fmt: skip


def text_batch(samples, length=6, seed=0):
    rows = len(samples)
    mask = lengths(rows, length, seed)
    draw = torch.Generator().manual_seed(samples[0]["number"])
    ids = torch.randint(3, 38, (rows, length), generator=draw) * mask
    labels = torch.where(mask.bool(), ids, IGNORED)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def t5():
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, pad_token_id=0,
        decoder_start_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def bart():
    config = transformers.BartConfig(
        vocab_size=40, d_model=16, encoder_ffn_dim=24, decoder_ffn_dim=24, encoder_layers=2,
        decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2, pad_token_id=0,
        decoder_start_token_id=2, max_position_embeddings=64, decoder_layerdrop=0.5,
        encoder_layerdrop=0.5,
    )  # fmt: skip
    return transformers.BartForConditionalGeneration(config)


def bert_to_bert():
    config = language_config(transformers.BertConfig)
    config = transformers.EncoderDecoderConfig.from_encoder_decoder_configs(config, config)
    config.decoder_start_token_id, config.pad_token_id = 2, 0
    return transformers.EncoderDecoderModel(config)


PAIRS = {
    "t5": (t5, ["q", "k", "v", "o", "wi", "lm_head"]),
    "bart": (bart, ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "lm_head"]),
    "bert to bert": (bert_to_bert, ["query", "key", "value", "dense"]),
}
# The linears of the decoders that read the encoder's output.
CROSS = re.compile(
    r"EncDecAttention\.[kv]$|encoder_attn\.[kv]_proj$|crossattention\.self\.(key|value)$"
)


@pytest.mark.parametrize("same_length", (False, True))
@pytest.mark.parametrize("name", PAIRS)
def test_encoder_and_decoder(name, same_length, tmp_path):
    """Also if the sequences of both have the same length, which a guess by size would mix up."""

    def collator(samples):
        batch = text_batch(samples)
        target = text_batch(samples, 6 if same_length else 4, seed=9)
        batch["labels"] = target["labels"]
        batch["decoder_attention_mask"] = target["attention_mask"]
        if name == "bert to bert":
            batch["decoder_input_ids"] = target["input_ids"]
        return batch

    def mask_of(layer, inputs):
        if "pooler" in layer:
            return None  # it reads the first token alone
        reads_encoder = "decoder." not in layer or CROSS.search(layer)
        is_head = "lm_head" in layer
        return inputs[
            "attention_mask" if reads_encoder and not is_head else "decoder_attention_mask"
        ]

    make, targets = PAIRS[name]
    torch.manual_seed(0)
    model = adapted(make(), targets)
    trainer, count = train(model, collator, tmp_path, mask_of, transformers.Seq2SeqTrainer)
    if name == "bart":
        assert len({count.calls.count(layer) for layer in count.sums}) > 1
    before = dict(trainer.callback_handler.callbacks[0].load)
    trainer.evaluate()
    assert trainer.callback_handler.callbacks[0].load == before


def test_a_decoder_without_a_mask_counts_every_token(tmp_path):
    """The encoder's mask has the shape of the decoder's tokens."""

    def mask_of(layer, inputs):
        reads_encoder = "encoder." in layer or CROSS.search(layer)
        return inputs["attention_mask"] if reads_encoder else None

    torch.manual_seed(0)
    model = adapted(t5(), ["q", "k", "v", "o", "wi", "lm_head"])
    train(model, text_batch, tmp_path, mask_of, transformers.Seq2SeqTrainer)


def whisper():
    config = transformers.WhisperConfig(
        vocab_size=40, num_mel_bins=4, d_model=16, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=24,
        decoder_ffn_dim=24, max_source_positions=6, max_target_positions=16, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, encoder_layerdrop=0.5,
        decoder_layerdrop=0.5,
    )  # fmt: skip
    return transformers.WhisperForConditionalGeneration(config)


@pytest.mark.parametrize("accumulation", (1, 2))
def test_whisper_with_layerdrop(accumulation, tmp_path):
    """The encoder has half as many frames as the mask; each step leaves out other layers."""

    def collator(samples):
        target = text_batch(samples)
        draw = torch.Generator().manual_seed(samples[0]["number"])
        return {
            "input_features": torch.randn(len(samples), 4, 12, generator=draw),
            "attention_mask": lengths(len(samples), 12),
            "labels": target["labels"],
            "decoder_attention_mask": target["attention_mask"],
        }

    def mask_of(layer, inputs):
        reads_audio = ".encoder." in layer or CROSS.search(layer)
        return None if reads_audio else inputs["decoder_attention_mask"]

    torch.manual_seed(1)
    model = adapted(whisper(), ["q_proj", "k_proj", "v_proj", "fc1", "fc2"])
    options = dict(gradient_accumulation_steps=accumulation, num_train_epochs=accumulation)
    _, count = train(model, collator, tmp_path, mask_of, **options)
    assert len({count.calls.count(layer) for layer in count.sums}) > 1


def llava():
    vision = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        image_size=6, patch_size=3,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=language_config(transformers.LlamaConfig),
        image_token_id=39, vision_feature_layer=-1,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config)


@pytest.mark.parametrize("length", (5, 4, 7), ids=("as the tower", "as the projector", "another"))
def test_vision_and_language(length, tmp_path):
    """The tower has 5 tokens of each image and the projector 4: the text mask is not theirs."""

    def collator(samples):
        batch = text_batch(samples, length + 3)
        batch = {k: v[:, : length - 4] for k, v in batch.items()}
        rows = len(samples)
        image = torch.full((rows, 4), 39)
        mask = lengths(rows, length)
        mask[:, :4] = 1
        mask[1:, -1] = 0 if length > 4 else 1
        ids = torch.cat([image, batch["input_ids"]], dim=1)[:, :length]
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "labels": torch.where(mask.bool() & (ids != 39), ids, IGNORED) if length > 4 else ids,
            "pixel_values": torch.randn(rows, 3, 6, 6),
        }

    def mask_of(layer, inputs):
        is_text = "language_model" in layer or "lm_head" in layer
        return inputs["attention_mask"] if is_text else None

    torch.manual_seed(0)
    targets = ["q_proj", "v_proj", "fc1", "down_proj", "linear_1", "linear_2", "lm_head"]
    train(adapted(llava(), targets), collator, tmp_path, mask_of)


def test_seq2seq_generates_with_the_task_of_each_prompt(tmp_path):
    """Three beams for each prompt: the decoder has three times as many rows as the encoder."""
    torch.manual_seed(0)
    config = MoeLoraConfig(num_experts=4, rank=2, router="task", num_tasks=6, task_embedding_dim=5)
    model = adapted(t5(), ["q", "v", "wi"], config)
    samples = [
        {"input_ids": [3 + i, 4, 5, 6], "labels": [7 + i, 8, 9], "task_ids": 1 + i}
        for i in range(6)
    ]
    args = arguments(
        tmp_path, transformers.Seq2SeqTrainingArguments, predict_with_generate=True,
        per_device_eval_batch_size=3,
    )  # fmt: skip
    collator = transformers.DataCollatorForSeq2Seq(make_tokenizer(), model=model)
    trainer = transformers.Seq2SeqTrainer(
        model, args, train_dataset=samples, data_collator=collator
    )
    attach(trainer)
    trainer.train()
    options = dict(num_beams=3, max_length=6)
    output = trainer.predict(samples, **options)
    assert math.isfinite(output.metrics["test_loss"])
    for sample, actual in zip(samples, output.predictions, strict=True):
        set_tasks(model, [sample["task_ids"]])
        expected = model.generate(torch.tensor([sample["input_ids"]]), **options)[0].tolist()
        assert actual[: len(expected)].tolist() == expected
        assert not actual[len(expected) :].any()
