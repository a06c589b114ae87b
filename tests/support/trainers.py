"""A small model, a trainer for it, and the same training as a loop."""

from __future__ import annotations

import datasets
import pytest
import torch
import torch.nn.functional as F
import transformers
from transformers import Trainer, TrainingArguments

from moelora_kernels import (
    adapter_parameters,
    adapter_state_dict,
    collect_aux_loss,
    load_adapter,
    set_tasks,
)
from moelora_kernels.nn.layer import mixture_layers
from moelora_kernels.trainer import TaskCollator, attach
from support.compare import assert_same
from support.models import add_preset, language_model

PROJECTIONS = ["q_proj", "gate_proj"]
IGNORED = -100
EXPERTS = 4


def make_model(preset: str, tie: bool = False, **options):
    """Return a Qwen2 of 2 layers, 16 wide, with adapters that are not zero."""
    model = language_model(tie_word_embeddings=tie).requires_grad_(False).train()
    if preset == "moelora":
        options = {"num_tasks": 5, "task_embedding_dim": 6, "dropout": 0.0, **options}
    elif "aux" not in options:
        # Large enough to change every step of the router.
        options = {"aux": {"load_balance": 0.5, "z": 0.1}, "dropout": 0.0, **options}
    return add_preset(model, preset, PROJECTIONS, num_experts=EXPERTS, **options)


def make_peft_model(dropout: float = 0.0, **options):
    """Return the same model under PEFT, with token gates. B is zero."""
    from peft import get_peft_model

    from moelora_kernels.peft import MoeLoraPeftConfig

    base = language_model().requires_grad_(False).train()
    config = MoeLoraPeftConfig(
        preset="ming", target_modules=PROJECTIONS, num_experts=EXPERTS, rank=2, dropout=dropout,
        aux={"load_balance": 0.5, "z": 0.1}, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    return get_peft_model(base, config)


def make_samples(count: int = 10) -> list[dict]:
    """Return samples of different lengths and tasks. The first two tokens have no label."""
    draw = torch.Generator().manual_seed(5)
    samples = []
    for i in range(count):
        ids = torch.randint(3, 40, (4 + i % 5,), generator=draw).tolist()
        labels = [IGNORED, IGNORED, *ids[2:]]
        samples.append({"input_ids": ids, "labels": labels, "task_ids": 1 + i % 5, "text": "x"})
    return samples


class Padding:
    """A collator that pads on the right and keeps every batch."""

    def __init__(self):
        self.batches = []

    def __call__(self, samples):
        assert all(set(sample) == {"input_ids", "labels"} for sample in samples)
        length = max(len(sample["input_ids"]) for sample in samples)

        def rows(name, value):
            lists = [sample[name] for sample in samples]
            return torch.tensor([[*row, *[value] * (length - len(row))] for row in lists])

        ids = rows("input_ids", 0)
        batch = {"input_ids": ids, "attention_mask": (ids != 0).long()}
        batch["labels"] = rows("labels", IGNORED)
        self.batches.append(batch)
        return batch


class KeepingCollator:
    """Keeps every batch of another collator."""

    def __init__(self, collator):
        self.collator, self.batches = collator, []

    def __call__(self, samples):
        batch = self.collator(samples)
        self.batches.append({k: v for k, v in batch.items() if k != "task_ids"})
        return batch


def arguments(tmp_path, cls=TrainingArguments, **args):
    """Return training arguments with plain AdamW at a constant rate, like `loop` uses."""
    options = dict(
        output_dir=str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True,
        per_device_train_batch_size=2, num_train_epochs=1, learning_rate=0.02,
        lr_scheduler_type="constant", weight_decay=0.0, max_grad_norm=0.0, logging_steps=1,
        save_strategy="no",
    )  # fmt: skip
    return cls(**{**options, **args})


def make_trainer(model, tmp_path, samples=None, attached=True, callbacks=None, **args):
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, **args),
        train_dataset=datasets.Dataset.from_list(make_samples() if samples is None else samples),
        data_collator=Padding(),
        callbacks=callbacks,
    )
    if attached:
        attach(trainer)
    return trainer


def batches_of(trainer) -> list[dict]:
    """Return the batches of a trainer's Padding collator."""
    collator = trainer.data_collator
    return (collator.collator if isinstance(collator, TaskCollator) else collator).batches


def tasks_of(batch) -> torch.Tensor:
    """Return the tasks of the rows of a batch, looked up by their tokens."""
    table = {tuple(s["input_ids"]): s["task_ids"] for s in make_samples()}
    rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    return torch.tensor([table[tuple(ids[mask.bool()].tolist())] for ids, mask in rows])


def loop(model, steps: list[list[dict]], lr: float = 0.02) -> tuple[list[float], list[float]]:
    """Train a model by hand. Return the loss of each step, and its auxiliary part.

    loss = sum over the tokens of all micro-batches / their number + the mean of the aux losses
    """
    optimizer = torch.optim.AdamW(adapter_parameters(model), lr=lr, weight_decay=0.0)
    losses, auxiliary = [], []
    for micro_batches in steps:
        tokens = sum((batch["labels"][:, 1:] != IGNORED).sum() for batch in micro_batches)
        total = part = 0.0
        for batch in micro_batches:
            if any(layer.config.router == "task" for layer in mixture_layers(model)):
                set_tasks(model, tasks_of(batch))
            logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            loss = F.cross_entropy(
                logits[:, :-1].reshape(-1, 40),
                batch["labels"][:, 1:].reshape(-1),
                ignore_index=IGNORED,
                reduction="sum",
            )
            aux = collect_aux_loss(model, batch["attention_mask"].bool())
            aux = aux / len(micro_batches)
            loss = loss / tokens + aux
            loss.backward()
            total, part = total + loss.item(), part + aux.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
        auxiliary.append(part)
    return losses, auxiliary


def in_steps(batches: list[dict], accumulation: int) -> list[list[dict]]:
    return [batches[i : i + accumulation] for i in range(0, len(batches), accumulation)]


def assert_same_adapters(a, b, **tolerance):
    assert len(adapter_parameters(a)) == len(adapter_parameters(b)) > 0
    for p, q in zip(adapter_parameters(a), adapter_parameters(b), strict=True):
        torch.testing.assert_close(p, q, **tolerance)


# The loss is divided by the tokens before or after the sum, in float32. Adam divides gradients by
# their size, so the rounding of a small gradient can change a parameter visibly.
CLOSE = dict(rtol=1e-4, atol=1e-5)


def assert_trained_like_a_loop(results, make, folder, is_peft: bool = False):
    """Assert that two processes trained the model of make() as one loop does, and saved it.

    results: (batches, logged losses) of each process. folder: what they saved.
    """
    (batches, logs), (other, _) = results
    expected = make()
    losses, _ = loop(expected, [list(pair) for pair in zip(batches, other, strict=True)])
    assert logs == pytest.approx(losses, rel=1e-4)
    if is_peft:
        from peft import PeftModel

        loaded = PeftModel.from_pretrained(language_model(), folder)
    else:
        loaded = make()
        load_adapter(loaded, folder)
    assert_same(adapter_state_dict(loaded), adapter_state_dict(expected), **CLOSE)


def make_tokenizer():
    """Return a tokenizer of 40 tokens. SFTTrainer needs one, also for tokenized samples."""
    from tokenizers import Tokenizer, models

    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {chr(94 + i): i for i in range(3, 40)}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocabulary, [])),
        pad_token="<pad>",
        eos_token="<eos>",
    )
