"""Hugging Face's Trainer trains like a loop written by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch

for name in ("transformers", "datasets", "accelerate"):
    pytest.importorskip(name)

import datasets  # noqa: E402
import transformers  # noqa: E402
from transformers import Trainer  # noqa: E402

from moelora_kernels import adapter_parameters, collect_aux_loss, set_tasks  # noqa: E402
from moelora_kernels.trainer import TaskCollator, attach  # noqa: E402
from support.selection import default_cases  # noqa: E402
from support.trainers import (  # noqa: E402
    CLOSE,
    EXPERTS,
    Padding,
    arguments,
    assert_same_adapters,
    batches_of,
    in_steps,
    loop,
    make_model,
    make_samples,
    make_tokenizer,
    make_trainer,
    tasks_of,
)


@pytest.mark.parametrize("accumulation", default_cases((1, 2), 2))
@pytest.mark.parametrize("preset", ("ming", "moelora"))
def test_trains_like_a_loop(preset, accumulation, tmp_path):
    """With auxiliary losses, tasks and padding. With accumulation 2 the last step has one batch."""
    model = make_model(preset)
    clone, frozen = copy.deepcopy(model), copy.deepcopy(model).state_dict()
    trainer = make_trainer(model, tmp_path, gradient_accumulation_steps=accumulation)
    trainer.train()
    optimized = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in optimized} == {id(p) for p in adapter_parameters(model)}
    trained = {id(p) for p in optimized}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, frozen[name]) == (id(parameter) not in trained), name

    losses, auxiliary = loop(clone, in_steps(batches_of(trainer), accumulation))
    assert len(losses) == math.ceil(5 / accumulation)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(losses, rel=1e-5)
    if preset == "ming":
        logged = [entry["aux_loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert logged == pytest.approx(auxiliary, rel=1e-5)
        assert min(auxiliary) > 0.1
    assert_same_adapters(model, clone, **CLOSE)


def test_accumulation_equals_a_larger_batch(tmp_path):
    """The loss is per token, so two micro-batches give the step of one batch."""
    runs = []
    for size, accumulation in ((4, 1), (2, 2)):
        model = make_model("ming", aux=())
        sizes = dict(per_device_train_batch_size=size, gradient_accumulation_steps=accumulation)
        trainer = make_trainer(model, tmp_path, samples=make_samples(4), **sizes)
        trainer.train()
        assert len(batches_of(trainer)) == accumulation
        runs.append((trainer.state.log_history[0]["loss"], model))
    (loss, model), (other_loss, other) = runs
    assert loss == pytest.approx(other_loss, rel=1e-6)
    assert_same_adapters(model, other, **CLOSE)


@pytest.mark.parametrize("preset", ("ming", "moelora", "mixlora"))
def test_recomputed_activations_train_the_same(preset, tmp_path):
    """The bits and the logs are equal with and without checkpointing, also with dropout."""
    runs = []
    for recompute in (False, True):
        model = make_model(preset, dropout=0.2)
        extra = dict(gradient_checkpointing_kwargs={"use_reentrant": False}) if recompute else {}
        trainer = make_trainer(
            model,
            tmp_path,
            gradient_accumulation_steps=2,
            gradient_checkpointing=recompute,
            **extra,
        )
        trainer.train()
        runs.append((model, [entry for entry in trainer.state.log_history if "loss" in entry]))
    (model, logs), (other, other_logs) = runs
    assert logs == other_logs
    assert_same_adapters(model, other, rtol=0, atol=0)


def test_reentrant_checkpointing_is_refused(tmp_path):
    trainer = make_trainer(
        make_model("ming"),
        tmp_path,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": True},
    )
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        trainer.train()


@pytest.mark.parametrize("preset", ("ming", "moelora"))
def test_evaluates_and_predicts_with_the_tasks_and_without_auxiliary_losses(preset, tmp_path):
    model = make_model(preset)
    trainer = make_trainer(model, tmp_path, per_device_eval_batch_size=3)
    samples = datasets.Dataset.from_list(make_samples(7))
    actual = trainer.evaluate(samples)["eval_loss"]
    batches = batches_of(trainer)
    losses = []
    with torch.no_grad():
        for batch in batches:
            if preset == "moelora":
                set_tasks(model, tasks_of(batch))
            losses.append((len(batch["labels"]), model(**batch).loss.item()))
    assert [count for count, _ in losses] == [3, 3, 1]
    assert actual == pytest.approx(sum(n * loss for n, loss in losses) / 7, rel=1e-5)
    # Without labels the trainer does not compute a loss.
    trainer.data_collator = Unlabelled(trainer.data_collator)
    logits = torch.from_numpy(trainer.predict(samples.select(range(3))).predictions)
    batch = batches[0]
    if preset == "moelora":
        set_tasks(model, tasks_of(batch))
    with torch.no_grad():
        expected = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(logits, expected)


class Unlabelled:
    def __init__(self, collator):
        self.collator = collator

    def __call__(self, samples):
        batch = self.collator(samples)
        return {k: v for k, v in batch.items() if k != "labels"}


def test_a_collator_that_adds_tasks_already_is_kept(tmp_path):
    trainer = make_trainer(make_model("moelora"), tmp_path, attached=False)
    trainer.data_collator = collator = TaskCollator(trainer.data_collator)
    attach(trainer)
    assert trainer.data_collator is collator


def test_collating_sets_nothing():
    """A collator runs before the model does, so it must not set the tasks."""
    model = make_model("moelora")
    set_tasks(model, [4, 4])
    batch = TaskCollator(Padding())(
        [{k: v for k, v in s.items() if k != "text"} for s in make_samples(2)]
    )
    assert batch["task_ids"].tolist() == [1, 2]
    router = model.model.layers[0].self_attn.q_proj.router
    assert router.task_ids.tolist() == [4, 4]


@pytest.mark.parametrize("keep_columns", (True, False))
def test_a_sample_without_a_task_is_named(keep_columns, tmp_path):
    samples = [
        {k: v for k, v in s.items() if k not in ("task_ids", "text")} for s in make_samples()
    ]
    trainer = make_trainer(
        make_model("moelora"), tmp_path, samples=samples, remove_unused_columns=keep_columns
    )
    with pytest.raises(ValueError, match=r"task_ids: .* in every sample, got one with input_ids"):
        trainer.train()


def test_the_tokenizer_of_the_collator_is_saved(tmp_path):
    """A trainer without a tokenizer saves that of its collator, through TaskCollator."""
    trainer = make_trainer(make_model("moelora"), tmp_path, attached=False)
    trainer.data_collator.tokenizer = make_tokenizer()
    attach(trainer)
    trainer.save_model()
    assert (tmp_path / "tokenizer.json").exists()


def test_the_name_of_the_task_column(tmp_path):
    models = []
    for column in ("task_ids", "job"):
        samples = [{**s, "text": ""} for s in make_samples()]
        for sample in samples:
            sample[column] = sample.pop("task_ids")
        model = make_model("moelora")
        trainer = make_trainer(model, tmp_path, samples=samples, attached=False)
        attach(trainer, task_column=column)
        trainer.train()
        models.append(model)
    assert_same_adapters(*models, rtol=0, atol=0)


def test_samples_with_several_tasks(tmp_path):
    """Rows of one length, padded with 0, go to set_tasks. Rows of other lengths raise."""
    samples = make_samples()
    for i, sample in enumerate(samples):
        sample["task_ids"] = [1 + i % 5, (2 * i) % 6]
    batch = TaskCollator(lambda rest: {})(samples[:2])
    assert batch["task_ids"].tolist() == [[1, 0], [2, 2]]
    model = make_model("moelora")
    make_trainer(model, tmp_path, samples=samples).train()
    assert model.model.layers[0].self_attn.q_proj.router.task_ids.shape == (2, 2)
    samples[1]["task_ids"] = [1, 2, 3]
    with pytest.raises(ValueError, match=r"task_ids: expected one length .* got \[\[2\], \[3\]\]"):
        TaskCollator(lambda rest: {})(samples)


@pytest.mark.parametrize(
    ("samples", "message"),
    (
        ([], "samples: expected at least one sample, got none"),
        ([(torch.ones(2), 1)], "samples: expected mappings with a value for 'task_ids', got a tup"),
        ([None], "samples: expected mappings .* got a NoneType; use a router that reads tokens"),
        (["a"], "samples: expected mappings .* got a str"),
        ([{"task_ids": None}], "task_ids: expected a task id, .* for each sample, got None"),
        ([{"task_ids": "a"}], "task_ids: expected a task id, .* for each sample, got 'a'"),
        ([{"task_ids": []}], r"task_ids: expected a task id, .* for each sample, got \[\]"),
        ([{"task_ids": [[1], [2, 3]]}], "task_ids: expected a task id, .* for each sample"),
    ),
    ids=str,
)
def test_samples_that_have_no_tasks(samples, message):
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        TaskCollator(lambda rest: {})(samples)


@pytest.mark.parametrize("tie", default_cases((False, True), False))
@pytest.mark.parametrize("preset", ("ming", "moelora"))
def test_resumes_from_a_checkpoint(preset, tie, tmp_path):
    """A resumed run ends with the bits of a full run, also if layers share a router."""
    models = []
    for resumed in (False, True):
        model = make_model(preset, tie, dropout=0.1)
        trainer = make_trainer(model, tmp_path, save_strategy="steps", save_steps=3)
        if not resumed:
            trainer.train()
        else:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.zero_()
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
        models.append(model)
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("smoothing", (0.0, 0.1))
def test_auxiliary_losses_are_added_to_every_loss(smoothing, tmp_path):
    """The auxiliary losses are added if the trainer smooths labels or returns outputs."""
    model = make_model("ming")
    trainer = make_trainer(model, tmp_path, label_smoothing_factor=smoothing)
    plain = make_trainer(model, tmp_path, attached=False, label_smoothing_factor=smoothing)
    trainer.current_gradient_accumulation_steps = 2
    batch = Padding()([{k: s[k] for k in ("input_ids", "labels")} for s in make_samples(2)])
    model.train()
    items = torch.tensor(7)
    expected = plain.compute_loss(model, dict(batch), num_items_in_batch=items)
    aux = collect_aux_loss(model, batch["attention_mask"])
    assert aux > 0.1
    actual = trainer.compute_loss(model, dict(batch), num_items_in_batch=items)
    torch.testing.assert_close(actual, expected + aux / 2)
    actual, outputs = trainer.compute_loss(model, dict(batch), True, num_items_in_batch=items)
    torch.testing.assert_close(actual, expected + aux / 2)
    assert outputs["logits"].shape[:2] == batch["labels"].shape
    # Without num_items_in_batch the trainer divides the returned loss.
    expected = plain.compute_loss(model, dict(batch))
    torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), expected + aux)
    model.eval()
    torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), expected)


def test_autocast(tmp_path):
    """The model runs in bfloat16. The auxiliary losses and adapters stay float32."""
    logs = []
    for options in ({}, {"bf16": True}):
        model = make_model("ming")
        trainer = make_trainer(model, tmp_path, samples=make_samples(2), **options)
        trainer.train()
        assert {p.dtype for p in adapter_parameters(model)} == {torch.float32}
        logs.append(trainer.state.log_history[0])
    # The routers read x in bfloat16, which has 8 bits of mantissa.
    for name in ("loss", "aux_loss"):
        assert logs[1][name] == pytest.approx(logs[0][name], rel=0.05), name
        assert logs[1][name] != logs[0][name]


def test_trainers_that_attach_refuses(tmp_path):
    model = make_model("ming")
    trainer = make_trainer(model, tmp_path)
    with pytest.raises(ValueError, match="attach was already called on it"):
        attach(trainer)
    trainer = make_trainer(model, tmp_path, attached=False)
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match=r"DataParallel over 2 GPUs"):
        attach(trainer)
    plain = transformers.Qwen2ForCausalLM(model.config)
    with pytest.raises(ValueError, match="expected a model with mixture layers"):
        make_trainer(plain, tmp_path)


@pytest.mark.parametrize(
    "mask", (torch.ones(1, 1, 5, 5), torch.ones(2, 7), None), ids=("4-D", "another length", "none")
)
def test_a_mask_that_is_no_token_mask_counts_every_token(mask, tmp_path):
    """It never stops a training: a 4-D mask, a mask with other tokens, packed samples."""
    model = make_model("ming")
    model.forward = without_mask(model.forward)
    trainer = make_trainer(model, tmp_path)
    batch = Padding()([{k: s[k] for k in ("input_ids", "labels")} for s in make_samples(2)])
    model.train()
    del batch["attention_mask"]
    loss = trainer.compute_loss(model, batch | ({} if mask is None else {"attention_mask": mask}))
    plain = model(**batch).loss
    torch.testing.assert_close(loss, plain + collect_aux_loss(model))
    callback = trainer.callback_handler.callbacks[0]
    logs = {"loss": 0.0}
    trainer.state.log_history.append({})
    callback.on_log(trainer.args, trainer.state, None, logs)
    assert all(s.sum().item() == pytest.approx(1) for s in callback.load.values())
    assert logs["expert_load_max"] > 1 / EXPERTS


def without_mask(forward):
    """Return a forward that takes a mask and attends to all tokens."""

    def call(input_ids=None, attention_mask=None, labels=None, **options):
        return forward(input_ids=input_ids, labels=labels)

    return call


def test_a_trainer_with_model_init(tmp_path):
    """With model_init, train() makes a new model."""
    trainer = Trainer(
        model_init=lambda: make_model("moelora"),
        args=arguments(tmp_path),
        train_dataset=datasets.Dataset.from_list(make_samples()),
        data_collator=Padding(),
    )
    first = trainer.model
    callback = attach(trainer)
    trainer.train()
    assert trainer.model is not first
    clone = make_model("moelora")
    loop(clone, in_steps(batches_of(trainer), 1))
    assert_same_adapters(trainer.model, clone, **CLOSE)
    assert len(callback.load) == 4


def test_a_copy_of_an_attached_model_has_no_trainer(tmp_path):
    """Its hooks set the tasks that it is called with, and change no tasks of the model."""
    model = make_model("moelora")
    trainer = make_trainer(model, tmp_path)
    trainer.train()
    clone = copy.deepcopy(model)
    ids = torch.ones(2, 3, dtype=torch.long)
    before = model.model.layers[0].self_attn.q_proj.current_task_ids().clone()
    clone(ids, task_ids=torch.tensor([4, 5]))
    assert clone.model.layers[0].self_attn.q_proj.current_task_ids().tolist() == [4, 5]
    assert torch.equal(model.model.layers[0].self_attn.q_proj.current_task_ids(), before)


def test_two_trainers_train_one_model(tmp_path):
    """Each has its task column, and logs the load of its own steps."""
    model, clone = make_model("moelora"), make_model("moelora")
    loads = []
    for column in ("task_ids", "job"):
        samples = make_samples()
        for sample in samples:
            sample[column] = sample.pop("task_ids")
        trainer = make_trainer(model, tmp_path, samples, attached=False)
        callback = attach(trainer, task_column=column)
        trainer.train()
        loads.append(callback.load)
        loop(clone, in_steps(batches_of(trainer), 1))
        assert_same_adapters(model, clone, **CLOSE)
    assert not any(torch.equal(loads[0][name], loads[1][name]) for name in loads[0])
