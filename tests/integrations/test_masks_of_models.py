"""Multimodal models: the text mask reaches the text layers alone, whatever the sizes."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from moelora_kernels import MoeLoraConfig, record_routing, replace_linears
from moelora_kernels.nn.token_masks import follow_masks

transformers = pytest.importorskip("transformers")

TEXT = dict(
    vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
    bos_token_id=1, eos_token_id=2,
)  # fmt: skip
VISION = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
    image_size=8, patch_size=4,
)  # fmt: skip
IMAGE = 39


def gemma3():
    """It gives its language model a dictionary of 4-D masks."""
    config = transformers.Gemma3Config(
        text_config=transformers.Gemma3TextConfig(**TEXT, head_dim=8, sliding_window=4),
        vision_config=transformers.SiglipVisionConfig(**VISION),
        mm_tokens_per_image=4, image_token_index=IMAGE, image_token_id=IMAGE,
    )  # fmt: skip
    return transformers.Gemma3ForConditionalGeneration(config)


def clip():
    text = {k: v for k, v in TEXT.items() if k != "num_key_value_heads"}
    config = transformers.CLIPConfig(text_config=text, vision_config=VISION, projection_dim=16)
    return transformers.CLIPModel(config)


def blip2():
    """Its Q-Former reads the image with a mask that it makes itself."""
    config = transformers.Blip2Config(
        vision_config=VISION, num_query_tokens=4, image_token_index=IMAGE, image_token_id=IMAGE,
        qformer_config=dict(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, encoder_hidden_size=16,
        ),
        text_config=dict(
            model_type="opt", vocab_size=40, hidden_size=16, ffn_dim=24, num_hidden_layers=1,
            num_attention_heads=2, max_position_embeddings=64, word_embed_proj_dim=16,
            pad_token_id=0,
        ),
    )  # fmt: skip
    return transformers.Blip2ForConditionalGeneration(config)


MODELS = {
    "gemma3": (gemma3, 4, r"language_model|lm_head"),
    "clip": (clip, 0, r"text_model"),
    "blip2": (blip2, 4, r"language_model|lm_head"),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_text_mask_belongs_to_the_text_layers(name):
    """The sequence has 5 tokens, like the tower of CLIP and of BLIP-2, or one more."""
    make, image_tokens, text = MODELS[name]
    torch.manual_seed(0)
    model = make()
    targets = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    targets = [n for n in targets if ".head." not in n]
    replace_linears(model, MoeLoraConfig(num_experts=4, rank=2, top_k=2), targets)
    ids = torch.tensor([[3, 4, 5, 6, 7], [8, 9, 10, 11, 0]])
    ids[:, :image_tokens] = IMAGE
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
    inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(2, 3, 8, 8)}
    if name == "gemma3":
        inputs["token_type_ids"] = (ids == IMAGE).long()
    follow_masks(model)
    with record_routing(model):
        model(**inputs)
        seen = {True: 0, False: 0}
        for target in targets:
            is_text = bool(re.search(text, target)) and "projection" not in target
            for call in model.get_submodule(target).record.last:
                reaches = call.mask is not None and torch.equal(call.mask, mask)
                assert reaches == is_text, target
                seen[is_text] += 1
    assert min(seen.values()) > 3
