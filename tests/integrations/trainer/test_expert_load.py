"""The expert load in a trainer's logs equals its definition and reaches all callbacks."""

from __future__ import annotations

import math

import pytest
import torch

for name in ("transformers", "datasets", "accelerate"):
    pytest.importorskip(name)

from transformers import TrainerCallback  # noqa: E402

from moelora_kernels import collect_aux_loss, record_routing, set_tasks  # noqa: E402
from moelora_kernels.trainer import attach  # noqa: E402
from support.trainers import EXPERTS, batches_of, make_model, make_samples, make_trainer, tasks_of  # noqa: E402


def gates_of(layer) -> torch.Tensor:
    """Return the gates [rows, E] of a layer's record, slot by slot."""
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
    """Return the expert load of each layer by its definition, token by token."""
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
    """A user's callback, for example one that reports to a service."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


@pytest.mark.parametrize("preset", ("ming", "moelora", "mixlora", "mocle"))
def test_logs_the_expert_load(preset, tmp_path):
    """The load counts all steps since the last log, without padding.

    The learning rate is zero, so the final model has the load of all steps.
    """
    options = dict(shared_expert="complement", normalize="none") if preset == "mixlora" else {}
    if preset == "mocle":
        options = dict(num_tasks=5, aux=(), noise=0.0)
    model, watch = make_model(preset, **options), Watch()
    no_training = dict(learning_rate=0.0, logging_steps=2)
    trainer = make_trainer(model, tmp_path, make_samples(8), False, [watch], **no_training)
    callback = attach(trainer)
    trainer.train()
    batches = batches_of(trainer)
    expected = shares_of(model, batches[2:])
    assert callback.load.keys() == expected.keys()
    assert len(expected) == (2 if preset == "mixlora" else 4)
    for name, shares in expected.items():
        # float32 sums over a few dozen tokens.
        assert callback.load[name].tolist() == pytest.approx(shares, abs=1e-6), name
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 2
    n = len(expected)
    entropy = sum(-p * math.log(p) for s in expected.values() for p in s if p) / math.log(EXPERTS)
    assert logs[1]["expert_load_max"] == pytest.approx(sum(map(max, expected.values())) / n)
    assert logs[1]["expert_load_entropy"] == pytest.approx(entropy / n)
    assert logs[1]["experts_unused"] == sum(s.count(0.0) for s in expected.values())
    assert logs[0]["expert_load_max"] != logs[1]["expert_load_max"]
    # The other callbacks and the history get the same entries. Other logs have no load.
    assert [s for s in watch.logs if "loss" in s] == [
        {k: v for k, v in entry.items() if k != "step"} for entry in logs
    ]
    assert not any("expert_load_max" in s for s in watch.logs if "loss" not in s)
    if preset != "mixlora":
        assert ("aux_loss" in logs[0]) == (preset == "ming")
        return
    aux = []
    for batch in batches[2:]:
        model(batch["input_ids"], attention_mask=batch["attention_mask"])
        aux.append(collect_aux_loss(model, batch["attention_mask"].bool()).item())
    assert logs[1]["aux_loss"] == pytest.approx(sum(aux) / 2, rel=1e-5)


def test_unused_experts_are_counted(tmp_path):
    """All tokens use expert 1, so three experts in each of four layers are unused."""
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
