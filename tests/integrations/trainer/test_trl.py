"""TRL's trainers: pairs of answers, rewards, generated batches, packing."""

from __future__ import annotations

import math

import pytest
import torch

for name in ("transformers", "datasets", "accelerate", "peft", "trl"):
    pytest.importorskip(name)

import datasets  # noqa: E402
import peft  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402

from moelora_kernels import MoeLoraConfig, set_tasks  # noqa: E402
from moelora_kernels.peft import MoeLoraPeftConfig  # noqa: E402
from moelora_kernels.trainer import attach  # noqa: E402
from support.expert_loads import EXPERTS, HandCount, adapted  # noqa: E402
from support.trainers import (  # noqa: E402
    PROJECTIONS,
    arguments,
    make_model,
    make_samples,
    make_tokenizer,
    make_trainer,
)

TASKS = MoeLoraConfig(
    num_experts=EXPERTS, rank=2, router="task", num_tasks=5, task_embedding_dim=6
)  # fmt: skip
SEQUENCES = MoeLoraConfig(num_experts=EXPERTS, rank=2, granularity="sequence", top_k=2)


def base():
    """Return a language model without adapters."""
    torch.manual_seed(0)
    return transformers.Qwen2ForCausalLM(make_model("ming").config)


def token_model():
    return adapted(base(), PROJECTIONS)


def task_model():
    return adapted(base(), PROJECTIONS, TASKS)


def sft(model, tmp_path, collator=None, **options):
    options = {"max_length": 64, **options}
    return trl.SFTTrainer(
        model=model,
        args=arguments(tmp_path, trl.SFTConfig, bf16=False, **options),
        train_dataset=datasets.Dataset.from_list(make_samples()),
        processing_class=make_tokenizer(),
        data_collator=collator,
    )


PAIRS = [
    {
        "prompt_ids": [3 + i, 4, 5], "chosen_ids": [6 + i, 7, 8, 9][: 2 + i % 3],
        "rejected_ids": [10 + i, 11], "prompt": "a", "chosen": "b", "rejected": "c",
        "task_ids": 1 + i % 5,
    }
    for i in range(6)
]  # fmt: skip


def dpo(model, tmp_path, ref_model=None, **options):
    """Return a DPOTrainer of pairs that are already tokenized."""
    trainer = trl.DPOTrainer(
        model=model,
        ref_model=ref_model,
        args=arguments(
            tmp_path,
            trl.DPOConfig,
            bf16=False,
            gradient_checkpointing=False,
            per_device_eval_batch_size=2,
            **options,
        ),
        train_dataset=datasets.Dataset.from_list(PAIRS),
        eval_dataset=datasets.Dataset.from_list(PAIRS),
        processing_class=make_tokenizer(),
    )
    # Its tokenizer has no letters, so the trainer's tokens are replaced.
    trainer.train_dataset = trainer.eval_dataset = datasets.Dataset.from_list(PAIRS)
    return trainer


class TaskLog:
    """Keeps the task ids and the first tokens of each training call of a model."""

    def __init__(self, model):
        self.calls = []
        layers = [m for m in model.modules() if hasattr(m, "record")]
        self.layer = layers[0]
        self.inputs = None
        for module in model.modules():
            if type(module).__name__ == "Qwen2ForCausalLM":
                module.register_forward_pre_hook(self.keep, with_kwargs=True)
        self.layer.register_forward_pre_hook(self.note)

    def keep(self, model, args, kwargs):
        self.inputs = kwargs["input_ids"]

    def note(self, layer, args):
        ids = layer.current_task_ids().tolist()
        self.calls.append((torch.is_grad_enabled(), ids, self.inputs[:, 0].tolist()))

    def check(self, expected_calls):
        """Assert that each row has the task of its prompt."""
        table = {pair["prompt_ids"][0]: pair["task_ids"] for pair in PAIRS}
        assert len(self.calls) == expected_calls
        for _, ids, first in self.calls:
            assert ids == [table[token] for token in first]


@pytest.mark.parametrize("accumulation", (1, 3))
@pytest.mark.parametrize("recompute", (False, True))
def test_dpo_counts_every_pair(recompute, accumulation, tmp_path):
    """The load is that of the trained model, with a reference model beside it."""
    model = token_model()
    options = dict(gradient_accumulation_steps=accumulation, logging_steps=3 // accumulation)
    trainer = dpo(model, tmp_path, base(), learning_rate=0.0, **options)
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    count = HandCount(model, lambda name, inputs: inputs["attention_mask"])
    callback = attach(trainer)
    trainer.train()
    (log,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert log["aux_loss"] > 0
    count.check(callback.load)


@pytest.mark.parametrize("kind", ("model", "peft"))
def test_dpo_sets_the_task_of_each_pair_for_both_answers(kind, tmp_path):
    """The rows are [chosen; rejected]. The reference forward changes no tasks."""
    if kind == "peft":
        config = MoeLoraPeftConfig(
            preset="moelora", num_tasks=5, num_experts=EXPERTS, target_modules=PROJECTIONS
        )
        model, reference = peft.get_peft_model(base(), config), None
    else:
        model, reference = task_model(), base()
    trainer = dpo(model, tmp_path, reference, eval_strategy="epoch")
    callback = attach(trainer)
    log = TaskLog(trainer.model)
    trainer.train()
    # Three steps, and three batches of the evaluation.
    assert [is_training for is_training, _, _ in log.calls] == [True] * 3 + [False] * 3
    log.check(6)
    assert all(len(ids) == 4 for _, ids, _ in log.calls)
    assert math.isfinite(trainer.state.log_history[-1]["train_loss"])
    assert all(layer.task_load is not None for layer in callback.report.layers.values())


def test_a_function_sets_the_tasks(tmp_path):
    """For models with other rows than the samples; the default names it."""
    calls = []

    def set_pairs(model, tasks, inputs):
        calls.append((tasks.tolist(), sorted(inputs)))
        set_tasks(model, torch.cat([tasks, tasks]))

    trainer = dpo(task_model(), tmp_path, base(), max_steps=1)
    attach(trainer, set_tasks=set_pairs)
    log = TaskLog(trainer.model)
    trainer.train()
    log.check(1)
    assert len(calls) == 1
    assert "input_ids" in calls[0][1]
    assert "task_ids" not in calls[0][1]
    trainer = dpo(task_model(), tmp_path, base(), max_steps=1)
    attach(trainer)
    callback = trainer.callback_handler.callbacks[0]
    callback._tasks.is_paired = False
    with pytest.raises(ValueError, match=r"tasks of 2 samples.* 4 rows; pass set_tasks="):
        trainer.train()


def reward(model, tmp_path):
    return trl.RewardTrainer(
        model=model,
        args=arguments(tmp_path, trl.RewardConfig, bf16=False),
        train_dataset=datasets.Dataset.from_list(REWARDS),
        processing_class=make_tokenizer(),
    )


REWARDS = [
    {"chosen_ids": pair["prompt_ids"] + pair["chosen_ids"], "task_ids": pair["task_ids"],
     "rejected_ids": pair["prompt_ids"] + pair["rejected_ids"]}
    for pair in PAIRS
]  # fmt: skip


@pytest.mark.parametrize("gate", ("token", "task"))
def test_rewards(gate, tmp_path):
    torch.manual_seed(0)
    model = transformers.Qwen2ForSequenceClassification(
        transformers.Qwen2Config(**{**make_model("ming").config.to_dict(), "num_labels": 1})
    )
    model = adapted(model, PROJECTIONS, *([TASKS] if gate == "task" else []))
    trainer = reward(model, tmp_path)
    callback = attach(trainer)
    trainer.train()
    assert math.isfinite(trainer.state.log_history[-1]["train_loss"])
    assert len(callback.load) == 4
    if gate == "task":
        assert len(model.model.layers[0].self_attn.q_proj.current_task_ids()) == 4


@pytest.mark.parametrize("config", (TASKS, SEQUENCES), ids=("task", "sequence"))
@pytest.mark.parametrize("packed", ("packing", "padding_free", "collator"))
def test_packed_samples_are_refused_for_gates_of_samples(packed, config, tmp_path):
    options, name = {}, f"{packed}=True"
    if packed == "padding_free":
        options = {"padding_free": True, "max_length": None}
    collator = None
    if packed == "collator":
        collator = transformers.DataCollatorWithFlattening()
        name = "DataCollatorWithFlattening"
    trainer = sft(adapted(base(), PROJECTIONS, config), tmp_path, collator, **options)
    if packed == "packing":
        # The packing of a dataset needs flash attention.
        trainer.args.packing = True
    with pytest.raises(ValueError, match=rf"{name} puts several samples into one row"):
        attach(trainer)
    attach(sft(token_model(), tmp_path, collator, **options))


def grpo(model, tmp_path):
    return trl.GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [float(len(c)) for c in completions],
        args=arguments(
            tmp_path, trl.GRPOConfig, bf16=False, num_generations=2, max_completion_length=4,
            max_steps=2, learning_rate=0.0, logging_steps=2,
        ),
        train_dataset=datasets.Dataset.from_list([{"prompt": "ab", "task_ids": 1}] * 4),
        processing_class=make_tokenizer(),
    )  # fmt: skip


def test_grpo_with_token_gates(tmp_path):
    """Its collator returns a list, and it builds the inputs of the model itself."""
    model = token_model()
    trainer = grpo(model, tmp_path)
    count = HandCount(model, lambda name, inputs: inputs["attention_mask"])
    callback = attach(trainer)
    trainer.train()
    (log,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert math.isfinite(log["loss"])
    assert log["aux_loss"] > 0
    count.check(callback.load)


def test_grpo_with_task_gates_says_what_to_do(tmp_path):
    trainer = grpo(task_model(), tmp_path)
    with pytest.raises(ValueError, match=r"GRPOTrainer makes its own batches.*router='linear'"):
        attach(trainer)


@pytest.mark.parametrize("build", (sft, dpo, grpo))
def test_experts_on_a_head_that_the_loss_reads_are_refused(build, tmp_path):
    """The losses multiply by lm_head.weight. PEFT's adapters on it are refused by TRL itself."""
    options = {"ref_model": base()} if build is dpo else {}
    trainer = build(adapted(base(), [*PROJECTIONS, "lm_head"]), tmp_path, **options)
    with pytest.raises(ValueError, match=r"multiplies by lm_head\.weight.*leave lm_head out"):
        attach(trainer)


def test_experts_on_a_head_that_the_loss_calls_train(tmp_path):
    model = adapted(base(), [*PROJECTIONS, "lm_head"])
    before = model.lm_head.lora_B.detach().clone()
    make_trainer(model, tmp_path, max_steps=1).train()
    assert not torch.equal(model.lm_head.lora_B, before)
