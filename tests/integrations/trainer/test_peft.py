"""Trainer and SFTTrainer train, save and resume a PeftModel."""

from __future__ import annotations

import pytest
import torch

for name in ("transformers", "datasets", "accelerate", "peft", "trl"):
    pytest.importorskip(name)

import datasets  # noqa: E402
import peft  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402

from moelora_kernels.peft import MoeLoraPeftConfig  # noqa: E402
from moelora_kernels.trainer import attach  # noqa: E402
from support.selection import default_cases  # noqa: E402
from support.trainers import (  # noqa: E402
    EXPERTS,
    PROJECTIONS,
    Padding,
    arguments,
    make_model,
    make_samples,
    make_tokenizer,
)


@pytest.mark.parametrize("cls", ("Trainer", "SFTTrainer"))
@pytest.mark.parametrize("preset", default_cases(("ming", "moelora"), "moelora"))
def test_a_peft_model_trains_saves_and_resumes(preset, cls, tmp_path):
    """A checkpoint has only the adapter, and a resumed run ends with the bits of a full run."""
    options = {"num_tasks": 5} if preset == "moelora" else {"aux": {"z": 0.1}}
    samples = datasets.Dataset.from_list(make_samples())
    trained = []
    for resumed in (None, str(tmp_path / "checkpoint-3")):
        base = make_model("ming").config
        torch.manual_seed(0)
        model = peft.get_peft_model(
            transformers.Qwen2ForCausalLM(base),
            MoeLoraPeftConfig(
                preset=preset, num_experts=EXPERTS, target_modules=PROJECTIONS, **options
            ),
        )
        saving = dict(save_strategy="steps", save_steps=3)
        if cls == "Trainer":
            trainer = transformers.Trainer(
                model, arguments(tmp_path, **saving), data_collator=Padding(), train_dataset=samples
            )
        else:
            trainer = trl.SFTTrainer(
                model,
                arguments(tmp_path, trl.SFTConfig, bf16=False, **saving),
                train_dataset=samples,
                processing_class=make_tokenizer(),
            )
        callback = attach(trainer)
        trainer.train(resume_from_checkpoint=resumed)
        assert len(callback.load) == 4
        trained.append([p.detach().clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(p, q) for p, q in zip(*trained, strict=True))
    assert (tmp_path / "checkpoint-3" / "adapter_model.safetensors").exists()
    assert not (tmp_path / "checkpoint-3" / "model.safetensors").exists()


def test_an_inactive_adapter_needs_no_tasks(tmp_path):
    """An inactive task adapter needs no tasks, with and without a task column."""
    samples = make_samples()
    bare = [{k: v for k, v in s.items() if k != "task_ids"} for s in samples]
    trained = []
    for rows in (samples, bare):
        torch.manual_seed(0)
        model = peft.get_peft_model(
            transformers.Qwen2ForCausalLM(make_model("ming").config),
            MoeLoraPeftConfig(preset="moelora", num_tasks=5, target_modules=PROJECTIONS),
        )
        tokens = MoeLoraPeftConfig(preset="ming", num_experts=EXPERTS, target_modules=PROJECTIONS)
        model.add_adapter("tokens", tokens)
        model.set_adapter("tokens")
        trainer = transformers.Trainer(
            model,
            arguments(tmp_path),
            data_collator=Padding(),
            train_dataset=datasets.Dataset.from_list(rows),
        )
        callback = attach(trainer)
        trainer.train()
        assert len(callback.load) == 4
        assert all(".tokens" in name for name in callback.load)
        trained.append([p.detach().clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(p, q) for p, q in zip(*trained, strict=True))
