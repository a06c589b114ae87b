"""model.generate with mixture layers: batches, caches, beams and samples."""

from __future__ import annotations

import pytest
import torch

from moelora_kernels import link_siblings, set_tasks
from support.models import add_preset, language_model

transformers = pytest.importorskip("transformers")

FAMILIES = ("Qwen2", "Llama")
EXPERTS = 4
# Padded on the left, which generation needs.
IDS = torch.tensor([[5, 6, 7, 8, 9], [0, 0, 11, 12, 13], [0, 4, 5, 3, 4]])
ATTENTION = (IDS != 0).long()
TASKS = [1, 2, 3]
NEW = 5


def generating_model(family: str, preset: str, dtype=torch.float64):
    """Return a model of two layers, 16 wide. In float64 two tokens never tie by rounding.

    The config has dropout, which evaluation must ignore.
    """
    model = language_model(family).to(dtype).requires_grad_(False)
    options = dict(num_tasks=3, task_embedding_dim=5) if preset == "moelora" else {}
    targets = ["q_proj", "k_proj", "v_proj", "down_proj"]
    add_preset(model, preset, targets, num_experts=EXPERTS, dropout=0.3, **options)
    if preset != "mixlora":
        link_siblings(model)
    return model.eval()


def generate(model, preset, rows, repeats=1, **options):
    """Return the new tokens of the prompts `rows`, generated with their tasks."""
    if preset == "moelora":
        set_tasks(model, torch.tensor([TASKS[row] for row in rows]).repeat_interleave(repeats))
    options = {"max_new_tokens": NEW, "do_sample": False, **options}
    tokens = model.generate(IDS[rows], attention_mask=ATTENTION[rows], **options)
    return tokens[:, IDS.shape[1] :]


def greedy_decoding(model, preset, row):
    """Return the greedy decoding of one prompt, without padding and cache."""
    ids = IDS[row][ATTENTION[row].bool()][None]
    if preset == "moelora":
        set_tasks(model, [TASKS[row]])
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(NEW):
            best = model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, best], dim=1)
    return ids[0, start:]


PRESETS = ("ming", "moelora", "mixlora")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_generates_the_tokens_of_its_prompts(family, preset):
    """With and without a cache, a batch generates the tokens of each prompt alone."""
    model = generating_model(family, preset)
    batch = generate(model, preset, [0, 1, 2])
    assert batch.shape == (3, NEW)
    assert torch.equal(generate(model, preset, [0, 1, 2], use_cache=False), batch)
    for row in range(3):
        assert torch.equal(greedy_decoding(model, preset, row), batch[row]), row
        assert torch.equal(generate(model, preset, [row])[0], batch[row]), row


@pytest.mark.parametrize("family", FAMILIES)
def test_each_task_generates_other_tokens(family):
    """Each task generates other tokens, so the tests here can tell a wrong task."""
    model = generating_model(family, "moelora")
    generated = set()
    for task in TASKS:
        set_tasks(model, [task])
        tokens = model.generate(IDS[:1], attention_mask=ATTENTION[:1], max_new_tokens=NEW)
        generated.add(tuple(tokens[0].tolist()))
    assert len(generated) == len(TASKS)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_beams_of_a_batch_equal_those_of_its_prompts(family, preset):
    """The model's batch is prompts times beams, so the tasks are repeated."""
    model = generating_model(family, preset)
    options = dict(num_beams=3, num_return_sequences=2)
    batch = generate(model, preset, [0, 1, 2], repeats=3, **options)
    assert batch.shape == (6, NEW)
    greedy = generate(model, preset, [0, 1, 2])
    assert not torch.equal(batch[::2], greedy), "beams found nothing else: a weak test"
    for row in range(3):
        # A single task applies to all beams.
        assert torch.equal(generate(model, preset, [row], **options), batch[2 * row :][:2]), row


@pytest.mark.parametrize(
    "options", (dict(num_beams=2), dict(do_sample=True, num_return_sequences=2))
)
def test_tasks_that_are_not_repeated_are_refused(options):
    """Three tasks for a batch of six raise an error that says what to do."""
    model = generating_model("Qwen2", "moelora")
    with pytest.raises(ValueError, match=r"3 gate rows for x \[6, 5, 16\].*repeat_interleave"):
        generate(model, "moelora", [0, 1, 2], **options)


@pytest.mark.parametrize("preset", PRESETS)
def test_samples_of_a_prompt(preset):
    """Each sample of a prompt has the scores of the prompt alone, with its task."""
    model = generating_model("Llama", preset)
    options = dict(
        do_sample=True, num_return_sequences=2, top_k=0, output_scores=True,
        return_dict_in_generate=True, max_new_tokens=1,
    )  # fmt: skip
    if preset == "moelora":
        set_tasks(model, torch.tensor(TASKS).repeat_interleave(2))
    scores = model.generate(IDS, attention_mask=ATTENTION, **options).scores[0]
    assert scores.shape == (6, 40)
    for row in range(3):
        if preset == "moelora":
            set_tasks(model, [TASKS[row]])
        ids = IDS[row][ATTENTION[row].bool()][None]
        with torch.no_grad():
            alone = model(ids).logits[0, -1].to(scores.dtype)
        for sample in scores[2 * row : 2 * row + 2]:
            torch.testing.assert_close(sample, alone, rtol=1e-4, atol=1e-4)


def test_a_training_step_does_not_change_generation():
    """A training step with dropout does not change generation in evaluation."""
    model = generating_model("Qwen2", "ming")
    before = generate(model, "ming", [0, 1, 2])
    model.train()
    model(IDS, attention_mask=ATTENTION, labels=IDS).loss.backward()
    assert torch.equal(generate(model.eval(), "ming", [0, 1, 2]), before)


def test_bfloat16():
    """A bfloat16 model with bfloat16 adapters generates a batch."""
    for preset in PRESETS:
        model = generating_model("Qwen2", preset, torch.bfloat16)
        assert generate(model, preset, [0, 1, 2]).shape == (3, NEW)
