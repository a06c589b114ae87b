"""Task gates in models whose layers see other rows than the batch of the call has."""

from __future__ import annotations

import pytest
import torch

from moelora_kernels import MoeLoraConfig, replace_linears, set_samples, set_tasks
from support.linears import randomise

transformers = pytest.importorskip("transformers")

TASKS = [1, 2, 3]
CONFIG = MoeLoraConfig(num_experts=4, rank=2, router="task", num_tasks=3, task_embedding_dim=5)
IDS = torch.tensor([[5, 6, 7, 8, 9], [4, 4, 11, 12, 13], [3, 4, 5, 3, 4]])
OPTIONS = dict(do_sample=False, max_new_tokens=4)


def adapted(model, targets):
    """Return the model in float64, where two tokens never tie by rounding, with adapters."""
    model = model.double().requires_grad_(False).eval()
    replace_linears(model, CONFIG, targets)
    return randomise(model)


def generate_one_by_one(model, **options):
    """The tokens of each prompt on its own, with its task."""
    rows = []
    for ids, task in zip(IDS, TASKS, strict=True):
        set_tasks(model, [task])
        rows.append(model.generate(ids[None], **OPTIONS, **options)[0])
    return torch.stack(rows)


def opt():
    torch.manual_seed(0)
    config = transformers.OPTConfig(
        vocab_size=40, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, word_embed_proj_dim=16, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return transformers.OPTForCausalLM(config)


def t5():
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=40, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, eos_token_id=None,
        pad_token_id=0, decoder_start_token_id=0,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def test_opt_flattens_tokens_before_its_linears():
    """fc1 and fc2 see [batch sequence, features], in prefill and in every cached step."""
    model = adapted(opt(), ["q_proj", "v_proj", "fc1", "fc2"])
    expected = generate_one_by_one(model)
    set_tasks(model, TASKS)
    flattens = [model.model.decoder.layers[0].fc1.in_features]
    assert flattens == [16]
    set_samples(model, "flat")
    assert torch.equal(model.generate(IDS, **OPTIONS), expected)


def test_the_decoder_of_t5_has_a_row_for_each_beam():
    model = adapted(t5(), ["q", "v", "wi", "wo"])
    expected = generate_one_by_one(model, num_beams=3)
    set_tasks(model, TASKS)
    with pytest.raises(ValueError, match=r"ids.repeat_interleave\(3\)"):
        model.generate(IDS, num_beams=3, **OPTIONS)
    set_tasks(model.get_decoder(), torch.tensor(TASKS).repeat_interleave(3))
    assert torch.equal(model.generate(IDS, num_beams=3, **OPTIONS), expected)
    assert not torch.equal(expected[:, 1:], expected[:, 1:2].expand(3, 4))


def test_several_images_of_a_sample():
    """The vision tower sees all images of the batch in a row, the language model the samples."""
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        image_size=8, patch_size=4,
    )  # fmt: skip
    tower = adapted(transformers.CLIPVisionModel(config), ["q_proj", "fc1"])
    images = torch.randn(3, 2, 3, 8, 8, dtype=torch.float64)
    expected = []
    for image, task in zip(images, TASKS, strict=True):
        set_tasks(tower, [task])
        expected.append(tower(image).last_hidden_state)
    set_tasks(tower, TASKS)
    with pytest.raises(ValueError, match=r"ids.repeat_interleave\(2\)"):
        tower(images.flatten(0, 1))
    set_tasks(tower, torch.tensor(TASKS).repeat_interleave(2))
    found = tower(images.flatten(0, 1)).last_hidden_state
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-11, atol=1e-12)
