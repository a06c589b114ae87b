"""Hugging Face's Trainer and TRL's SFTTrainer train what a loop written by hand trains."""

from __future__ import annotations

import copy
import math
import os
import socket

import pytest
import torch
import torch.nn.functional as F
from linears import randomise

transformers = pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
pytest.importorskip("accelerate")

from transformers import Trainer, TrainerCallback, TrainingArguments  # noqa: E402

from moelora_kernels import (  # noqa: E402
    MoeLoraConfig,
    adapter_parameters,
    collect_aux_loss,
    record_routing,
    replace_ffns,
    replace_linears,
    set_tasks,
)
from moelora_kernels.nn.record import RoutingRecord  # noqa: E402
from moelora_kernels.trainer import TaskCollator, attach, expert_weights  # noqa: E402

PROJECTIONS = ["q_proj", "gate_proj"]
IGNORED = -100
EXPERTS = 4


def make_model(preset: str, tie: bool = False, **options):
    """A Qwen2 of 2 layers, 16 wide, with adapters that are not zero."""
    config = transformers.Qwen2Config(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        pad_token_id=0, bos_token_id=1, eos_token_id=None, tie_word_embeddings=tie,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.Qwen2ForCausalLM(config).requires_grad_(False)
    if preset == "moelora":
        options = {"num_tasks": 5, "task_embedding_dim": 6, "dropout": 0.0, **options}
    elif "aux" not in options:
        # Large enough to show in every step of the router.
        options = {"aux": {"load_balance": 0.5, "z": 0.1}, "dropout": 0.0, **options}
    chosen = MoeLoraConfig.preset(preset, num_experts=EXPERTS, **options)
    if preset == "mixlora":
        replace_ffns(model, chosen)
    else:
        replace_linears(model, chosen, PROJECTIONS)
    return randomise(model)


def make_samples(count: int = 10) -> list[dict]:
    """Samples of different lengths and tasks; the first tokens have no label."""
    draw = torch.Generator().manual_seed(5)
    samples = []
    for i in range(count):
        ids = torch.randint(3, 40, (4 + i % 5,), generator=draw).tolist()
        labels = [IGNORED, IGNORED, *ids[2:]]
        samples.append({"input_ids": ids, "labels": labels, "task_ids": 1 + i % 5, "text": "x"})
    return samples


class Padding:
    """Pads on the right and keeps every batch that it made."""

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


def arguments(tmp_path, cls=TrainingArguments, **args):
    """Plain AdamW at a constant rate, so that a loop can do the same."""
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
    """What a trainer with a TaskCollator, or without one, has collated, the tasks included."""
    collator = trainer.data_collator
    return (collator.collator if isinstance(collator, TaskCollator) else collator).batches


def tasks_of(batch) -> torch.Tensor:
    """The tasks of the rows, found by their tokens."""
    table = {tuple(s["input_ids"]): s["task_ids"] for s in make_samples()}
    rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
    return torch.tensor([table[tuple(ids[mask.bool()].tolist())] for ids, mask in rows])


def loop(model, steps: list[list[dict]], lr: float = 0.02) -> tuple[list[float], list[float]]:
    """The training that a user writes by hand: the loss of each step, and the auxiliary part.

    loss = sum over the tokens of all micro-batches / their number + the mean of the aux losses
    """
    optimizer = torch.optim.AdamW(adapter_parameters(model), lr=lr, weight_decay=0.0)
    losses, auxiliary = [], []
    for micro_batches in steps:
        tokens = sum((batch["labels"][:, 1:] != IGNORED).sum() for batch in micro_batches)
        total = part = 0.0
        for batch in micro_batches:
            if model.model.layers[0].self_attn.q_proj.config.router == "task":
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


# The loss is divided by the tokens before or after the sum, in float32; Adam divides gradients by
# their own size, so that a rounding of a small one can show in full.
CLOSE = dict(rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("accumulation", (1, 2))
@pytest.mark.parametrize("preset", ("ming", "moelora"))
def test_trains_what_a_loop_trains(preset, accumulation, tmp_path):
    """Auxiliary losses, tasks and padding included; with 2, the last step has one micro-batch."""
    model = make_model(preset)
    twin, frozen = copy.deepcopy(model), copy.deepcopy(model).state_dict()
    trainer = make_trainer(model, tmp_path, gradient_accumulation_steps=accumulation)
    trainer.train()
    optimized = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert {id(p) for p in optimized} == {id(p) for p in adapter_parameters(model)}
    trained = {id(p) for p in optimized}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, frozen[name]) == (id(parameter) not in trained), name

    losses, auxiliary = loop(twin, in_steps(batches_of(trainer), accumulation))
    assert len(losses) == math.ceil(5 / accumulation)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(losses, rel=1e-5)
    if preset == "ming":
        logged = [entry["aux_loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert logged == pytest.approx(auxiliary, rel=1e-5)
        assert min(auxiliary) > 0.1
    assert_same_adapters(model, twin, **CLOSE)


def test_accumulating_is_a_larger_batch(tmp_path):
    """Per token, however they fall into micro-batches: without auxiliary losses the same step."""
    found = []
    for size, accumulation in ((4, 1), (2, 2)):
        model = make_model("ming", aux=())
        sizes = dict(per_device_train_batch_size=size, gradient_accumulation_steps=accumulation)
        trainer = make_trainer(model, tmp_path, samples=make_samples(4), **sizes)
        trainer.train()
        assert len(batches_of(trainer)) == accumulation
        found.append((trainer.state.log_history[0]["loss"], model))
    (loss, model), (other_loss, other) = found
    assert loss == pytest.approx(other_loss, rel=1e-6)
    assert_same_adapters(model, other, **CLOSE)


@pytest.mark.parametrize("preset", ("ming", "moelora", "mixlora"))
def test_recomputed_activations_train_the_same(preset, tmp_path):
    """The same bits, with dropout and batches fetched ahead; the load is counted once."""
    found = []
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
        found.append((model, [entry for entry in trainer.state.log_history if "loss" in entry]))
    (model, logs), (other, other_logs) = found
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


def gates_of(layer) -> torch.Tensor:
    """The gates [rows, E] of a layer's record, slot by slot."""
    record = layer.record
    if record.indices is None:
        return record.weights[:, :EXPERTS].float()
    gates = torch.zeros(len(record.weights), EXPERTS)
    for row, (weights, indices) in enumerate(zip(record.weights, record.indices, strict=True)):
        for weight, expert in zip(weights.tolist(), indices.tolist(), strict=True):
            if expert < EXPERTS:
                gates[row, expert] += weight
    return gates


def shares_of(model, batches) -> dict[str, list[float]]:
    """The expert load by its definition, token by token."""
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "record")}
    totals = {name: [0.0] * EXPERTS for name in layers}
    for batch in batches:
        if any(layer.config.router == "task" for layer in layers.values()):
            set_tasks(model, tasks_of(batch))
        with record_routing(model), torch.no_grad():
            model(batch["input_ids"], attention_mask=batch["attention_mask"])
            for name, layer in layers.items():
                gates = gates_of(layer)
                length = batch["input_ids"].shape[1]
                for b, row in enumerate(batch["attention_mask"].tolist()):
                    for s, counts in enumerate(row):
                        gate = gates[b * length + s if len(gates) > len(row) else b]
                        for e in range(EXPERTS):
                            totals[name][e] += counts * gate[e].item()
    return {name: [t / sum(total) for t in total] for name, total in totals.items()}


class Watch(TrainerCallback):
    """A callback of the user's, such as one that reports to a service."""

    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


@pytest.mark.parametrize("preset", ("ming", "moelora", "mixlora", "mocle"))
def test_logs_the_expert_load(preset, tmp_path):
    """Of all steps since the last log, without padding; a model at rest shows it by itself."""
    options = dict(shared_expert="complement", normalize="none") if preset == "mixlora" else {}
    if preset == "mocle":
        options = dict(num_tasks=5, aux=(), noise=0.0)
    model, watch = make_model(preset, **options), Watch()
    still = dict(learning_rate=0.0, logging_steps=2)
    trainer = make_trainer(model, tmp_path, make_samples(8), False, [watch], **still)
    callback = attach(trainer)
    trainer.train()
    batches = batches_of(trainer)
    expected = shares_of(model, batches[2:])
    assert callback.load.keys() == expected.keys()
    assert len(expected) == (2 if preset == "mixlora" else 4)
    for name, shares in expected.items():
        # Sums of float32 of a few dozen tokens.
        assert callback.load[name].tolist() == pytest.approx(shares, abs=1e-6), name
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    n = len(expected)
    entropy = sum(-p * math.log(p) for s in expected.values() for p in s if p) / math.log(EXPERTS)
    assert logs[1]["expert_load_max"] == pytest.approx(sum(map(max, expected.values())) / n)
    assert logs[1]["expert_load_entropy"] == pytest.approx(entropy / n)
    assert logs[1]["experts_unused"] == sum(s.count(0.0) for s in expected.values())
    assert logs[0]["expert_load_max"] != logs[1]["expert_load_max"]
    # The other callbacks and the history see the same, and no other log gets it.
    assert [s for s in watch.seen if "loss" in s] == [
        {k: v for k, v in entry.items() if k != "step"} for entry in logs
    ]
    assert not any("expert_load_max" in s for s in watch.seen if "loss" not in s)
    if preset != "mixlora":
        assert ("aux_loss" in logs[0]) == (preset == "ming")
        return
    aux = []
    for batch in batches[2:]:
        model(batch["input_ids"], attention_mask=batch["attention_mask"])
        aux.append(collect_aux_loss(model, batch["attention_mask"].bool()).item())
    assert logs[1]["aux_loss"] == pytest.approx(sum(aux) / 2, rel=1e-5)


def record_of(weights, indices=None) -> RoutingRecord:
    record = RoutingRecord()
    record.keep(torch.tensor(weights), None if indices is None else torch.tensor(indices), None)
    return record


def test_weights_of_the_experts():
    """By hand: slots that are not routed, a shared expert in the last column, negative gates."""
    nan = float("nan")
    slots = record_of([[0.5, 0.25], [1.0, nan], [2.0, -3.0]], [[0, 2], [1, -1], [0, 3]])
    assert expert_weights(slots, 3).tolist() == [2.5, 1.0, 0.25]
    mask = torch.tensor([[1, 0, 1]])
    assert expert_weights(slots, 3, mask).tolist() == [2.5, 0.0, 0.25]
    sequences = record_of([[0.25, -0.75, 9.0], [1.0, 0.0, 9.0]])
    assert expert_weights(sequences, 2).tolist() == [1.25, 0.75]
    # As many times as a sequence has tokens.
    mask = torch.tensor([[True, True, False], [False, False, True]])
    assert expert_weights(sequences, 2, mask).tolist() == [1.5, 1.5]
    one = record_of([[0.25, 0.75]])
    assert expert_weights(one, 2, mask).tolist() == [0.75, 2.25]
    with pytest.raises(ValueError, match=r"attention_mask: \[2, 3\] does not fit 4 gate rows"):
        expert_weights(record_of([[1.0, 0.0]] * 4), 2, mask)


def test_unused_experts_are_counted(tmp_path):
    """All tokens of every layer on expert 1: three of four experts of four layers have none."""
    model = make_model("ming", top_k=1)
    with torch.no_grad():
        for module in model.modules():
            if getattr(module, "router", None) is not None:
                module.router.weight.zero_()
                module.router.bias.copy_(torch.tensor([0.0, 100.0, 0.0, 0.0]))
    trainer = make_trainer(model, tmp_path, samples=make_samples(2))
    trainer.train()
    (log,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    assert log["experts_unused"] == 12
    assert (log["expert_load_max"], log["expert_load_entropy"]) == (1.0, 0.0)


@pytest.mark.parametrize("preset", ("ming", "moelora"))
def test_evaluates_and_predicts_with_the_tasks_and_without_auxiliary_losses(preset, tmp_path):
    model = make_model(preset)
    trainer = make_trainer(model, tmp_path, per_device_eval_batch_size=3)
    samples = datasets.Dataset.from_list(make_samples(7))
    found = trainer.evaluate(samples)["eval_loss"]
    batches = batches_of(trainer)
    losses = []
    with torch.no_grad():
        for batch in batches:
            if preset == "moelora":
                set_tasks(model, tasks_of(batch))
            losses.append((len(batch["labels"]), model(**batch).loss.item()))
    assert [count for count, _ in losses] == [3, 3, 1]
    assert found == pytest.approx(sum(n * loss for n, loss in losses) / 7, rel=1e-5)
    # Without labels the trainer calls the model itself.
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


def test_collating_sets_nothing():
    """It runs ahead of the model: with tasks set here a batch would get those of a later one."""
    model = make_model("moelora")
    set_tasks(model, [4, 4])
    batch = TaskCollator(Padding())(
        [{k: v for k, v in s.items() if k != "text"} for s in make_samples(2)]
    )
    assert batch["task_ids"].tolist() == [1, 2]
    router = model.model.layers[0].self_attn.q_proj.router
    assert router.task_ids.tolist() == [4, 4]


@pytest.mark.parametrize("kept", (True, False))
def test_a_sample_without_a_task_is_named(kept, tmp_path):
    samples = [
        {k: v for k, v in s.items() if k not in ("task_ids", "text")} for s in make_samples()
    ]
    trainer = make_trainer(
        make_model("moelora"), tmp_path, samples=samples, remove_unused_columns=kept
    )
    with pytest.raises(ValueError, match=r"task_ids: .* in every sample, got one with input_ids"):
        trainer.train()


@pytest.mark.parametrize("tie", (False, True))
@pytest.mark.parametrize("preset", ("ming", "moelora"))
def test_resumes_from_a_checkpoint(preset, tie, tmp_path):
    """Layers that share a router are saved, and a run that was stopped ends at the same bits."""
    found = []
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
        found.append(model)
    for (name, p), q in zip(found[0].named_parameters(), found[1].parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("smoothing", (0.0, 0.1))
def test_whatever_the_loss_the_auxiliary_losses_are_in_it(smoothing, tmp_path):
    """Also where the trainer computes it from the logits, and returns the outputs as well."""
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
    found = trainer.compute_loss(model, dict(batch), num_items_in_batch=items)
    torch.testing.assert_close(found, expected + aux / 2)
    found, outputs = trainer.compute_loss(model, dict(batch), True, num_items_in_batch=items)
    torch.testing.assert_close(found, expected + aux / 2)
    assert outputs["logits"].shape[:2] == batch["labels"].shape
    # Without a count of the items the trainer divides what this returns.
    expected = plain.compute_loss(model, dict(batch))
    torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), expected + aux)
    model.eval()
    torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), expected)


def test_autocast(tmp_path):
    """The model runs in bfloat16, the auxiliary losses and adapters stay in float32."""
    logs = []
    for options in ({}, {"bf16": True}):
        model = make_model("ming")
        trainer = make_trainer(model, tmp_path, samples=make_samples(2), **options)
        trainer.train()
        assert {p.dtype for p in adapter_parameters(model)} == {torch.float32}
        logs.append(trainer.state.log_history[0])
    # bfloat16 has 8 bits of mantissa; the logits of the routers see x rounded to them.
    for name in ("loss", "aux_loss"):
        assert logs[1][name] == pytest.approx(logs[0][name], rel=0.05), name
        assert logs[1][name] != logs[0][name]


def test_what_cannot_be_attached_to_is_refused(tmp_path):
    model = make_model("ming")
    trainer = make_trainer(model, tmp_path)
    with pytest.raises(ValueError, match="attached to before"):
        attach(trainer)
    trainer = make_trainer(model, tmp_path, attached=False)
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match=r"DataParallel over 2 GPUs"):
        attach(trainer)
    plain = transformers.Qwen2ForCausalLM(model.config)
    with pytest.raises(ValueError, match="no layer with experts"):
        make_trainer(plain, tmp_path)


def test_a_mask_that_is_not_one_of_tokens_is_named(tmp_path):
    model = make_model("ming", aux=())
    trainer = make_trainer(model, tmp_path)
    batch = Padding()([{k: s[k] for k in ("input_ids", "labels")} for s in make_samples(2)])
    model.train()
    with pytest.raises(ValueError, match=r"attention_mask: expected \[batch, sequence\], got \[1"):
        trainer.compute_loss(model, batch | {"attention_mask": torch.ones(1, 1, 5, 5)})
    # Without one, as where samples are packed, every token counts.
    del batch["attention_mask"]
    trainer.compute_loss(model, batch)
    callback = trainer.callback_handler.callbacks[0]
    logs = {"loss": 0.0}
    trainer.state.log_history.append({})
    callback.on_log(trainer.args, trainer.state, None, logs)
    assert all(s.sum().item() == pytest.approx(1) for s in callback.load.values())
    assert logs["expert_load_max"] > 1 / EXPERTS


def test_a_trainer_that_makes_its_model(tmp_path):
    """The model of train() is another one than that of the constructor."""
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
    twin = make_model("moelora")
    loop(twin, in_steps(batches_of(trainer), 1))
    assert_same_adapters(trainer.model, twin, **CLOSE)
    assert len(callback.load) == 4


class Kept:
    """Keeps every batch of another collator."""

    def __init__(self, collator):
        self.collator, self.batches = collator, []

    def __call__(self, samples):
        batch = self.collator(samples)
        self.batches.append({k: v for k, v in batch.items() if k != "task_ids"})
        return batch


def make_tokenizer():
    """A tokenizer of 40 tokens, which SFTTrainer asks for even where all is tokens already."""
    from tokenizers import Tokenizer, models

    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2} | {chr(94 + i): i for i in range(3, 40)}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.BPE(vocabulary, [])),
        pad_token="<pad>",
        eos_token="<eos>",
    )


@pytest.mark.parametrize("accumulation", (1, 2))
@pytest.mark.parametrize("preset", ("ming", "moelora"))
def test_sft_trainer_trains_what_a_loop_trains(preset, accumulation, tmp_path):
    """TRL computes the loss from log-probabilities of its own, not from the model's loss."""
    trl = pytest.importorskip("trl")
    model = make_model(preset)
    twin = copy.deepcopy(model)
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments(
            tmp_path,
            trl.SFTConfig,
            gradient_accumulation_steps=accumulation,
            bf16=False,
            max_length=64,
            eval_strategy="epoch",
        ),
        train_dataset=datasets.Dataset.from_list(make_samples()),
        eval_dataset=datasets.Dataset.from_list(make_samples(3)),
        processing_class=make_tokenizer(),
    )
    assert type(trainer) is trl.SFTTrainer
    callback = attach(trainer)
    trainer.data_collator = Kept(trainer.data_collator)
    trainer.train()
    batches = trainer.data_collator.batches[:5]
    losses, _ = loop(twin, in_steps(batches, accumulation))
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["loss"] for entry in logs] == pytest.approx(losses, rel=1e-4)
    assert_same_adapters(model, twin, **CLOSE)
    assert all("expert_load_max" in entry for entry in logs)
    assert len(callback.load) == 4


def run_process(rank: int, port: int, folder) -> None:
    """One of two processes: two trainers, and a forward under DistributedDataParallel by hand."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    found = {}
    for preset, options in PARALLEL.items():
        model = make_model(preset, **options)
        trainer = make_trainer(model, folder, ddp_backend="gloo", ddp_find_unused_parameters=False)
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        callback = trainer.callback_handler.callbacks[0]
        found[preset] = model.state_dict(), batches_of(trainer), logs, callback.load
    model = make_model("moelora").eval()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    ids = torch.arange(3, 15).view(2, 6)
    outputs = []
    for called in (parallel, parallel, model):
        set_tasks(model, [1 + rank, 3 + rank])
        outputs.append(called(ids).logits.detach())
    found["by hand"] = outputs
    torch.save(found, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


# Top-1 of four experts and few tokens: some expert of some layer gets none.
PARALLEL = {"ming": dict(top_k=1, normalize="none", score="softmax"), "moelora": {}}


def test_two_processes_train_what_one_loop_trains(tmp_path):
    """Each with the tasks and auxiliary losses of its own batch; no parameter is left unused.

    With tasks in a buffer of the router, those of the first process would be sent to the other.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(run_process, (port, tmp_path), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    for preset, options in PARALLEL.items():
        (state, batches, logs, load), (other, other_batches, _, other_load) = (
            rank[preset] for rank in ranks
        )
        assert all(torch.equal(state[name], other[name]) for name in state)
        twin = make_model(preset, **options)
        steps = [list(pair) for pair in zip(batches, other_batches, strict=True)]
        losses, auxiliary = loop(twin, steps)
        assert len(losses) == 3
        trained = make_model(preset, **options)
        trained.load_state_dict(state)
        assert_same_adapters(trained, twin, **CLOSE)
        assert [entry["loss"] for entry in logs] == pytest.approx(losses, rel=1e-4)
        if preset == "ming":
            assert [entry["aux_loss"] for entry in logs] == pytest.approx(auxiliary, rel=1e-4)
        # The load is that of both.
        assert load.keys() == other_load.keys()
        assert all(torch.equal(load[name], other_load[name]) for name in load)
    assert ranks[0]["ming"][2][0]["experts_unused"] > 0
    for outputs in (rank["by hand"] for rank in ranks):
        assert all(torch.equal(output, outputs[-1]) for output in outputs)
