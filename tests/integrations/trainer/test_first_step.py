"""attach names the adapters that the first training step gave no gradient."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from moelora_kernels import MoeLoraConfig, MoeLoraLinear

pytest.importorskip("accelerate")
transformers = pytest.importorskip("transformers")
from moelora_kernels.trainer import attach  # noqa: E402


class Model(nn.Module):
    """A layer that trains, one whose weight is read, one that is skipped, and one without use."""

    def __init__(self, **options):
        super().__init__()
        config = MoeLoraConfig.preset("ming", num_experts=2, rank=2, **options)
        for name in ("called", "read", "skipped", "unused"):
            self.add_module(name, MoeLoraLinear(8, 8, config=config))
        self.leave_out = True

    def forward(self, x, labels=None):
        y = self.called(x)
        if self.leave_out:
            self.unused(x)
            y = linear(y, self.read.weight)
        else:
            y = y + self.read(x) + self.skipped(x) + self.unused(x)
        return {"loss": (y - labels).square().mean(), "logits": y}


def train(model: nn.Module, folder, caplog, cls=transformers.Trainer, **options) -> list[str]:
    """Train two steps, and return the warnings of `attach`."""
    samples = [{"x": torch.randn(8), "labels": torch.zeros(8)} for _ in range(8)]
    options = {"max_steps": 2, **options}
    arguments = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=2, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, **options,
    )  # fmt: skip
    trainer = cls(model, arguments, train_dataset=samples)
    attach(trainer)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    records = [r for r in caplog.records if r.name == "moelora_kernels.trainer.first_step"]
    return [record.getMessage() for record in records]


@pytest.mark.parametrize("accumulated", (1, 2))
def test_layers_that_are_left_out_are_named_once(tmp_path, caplog, accumulated) -> None:
    model = Model()
    (message,) = train(model, tmp_path, caplog, gradient_accumulation_steps=accumulated)
    lines = message.splitlines()
    assert any("read:" in line and "Model.forward reads its weight" in line for line in lines)
    assert any("skipped:" in line and "it was not called" in line for line in lines)
    assert any("unused:" in line and "never reached the loss" in line for line in lines)
    assert not any("called.lora" in line for line in lines)


def test_a_model_that_trains_has_no_warning(tmp_path, caplog) -> None:
    model = Model()
    model.leave_out = False
    assert train(model, tmp_path, caplog) == []


def test_a_router_with_a_constant_weight_is_named(tmp_path, caplog) -> None:
    model = Model(top_k=1)
    model.leave_out = False
    (message,) = train(model, tmp_path, caplog)
    assert "called.router.weight" in message
    assert "divided by itself, is 1" in message


class FewGradients(transformers.Trainer):
    """A trainer whose loss has no gradient in its first calls, like GRPO with equal rewards."""

    zeros = 0

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs)
        self.zeros -= 1
        return loss * 0 if self.zeros >= 0 else loss


@pytest.mark.parametrize(
    ("zeros", "steps", "named_after"), ((3, 12, None), (20, 12, 10), (4, 4, 4))
)
def test_gradients_of_zero_are_named_only_if_they_stay(
    tmp_path, caplog, monkeypatch, zeros, steps, named_after
) -> None:
    monkeypatch.setattr(FewGradients, "zeros", zeros)
    model = Model()
    model.leave_out = False
    messages = train(model, tmp_path, caplog, FewGradients, max_steps=steps)
    if named_after is None:
        assert messages == []
        return
    (message,) = messages
    assert f"in the first {named_after} training steps" in message
    assert "called.lora_B" in message
    assert "the gradient is zero" in message


def test_an_unused_layer_with_an_auxiliary_loss_is_named(tmp_path, caplog) -> None:
    """The auxiliary loss trains its router, and gives A and B a gradient of zero."""
    (message,) = train(Model(aux={"load_balance": 0.1}), tmp_path, caplog)
    assert "unused.lora_B" in message
    assert "in the first training step:" in message


class StepAlone(transformers.Trainer):
    """A trainer that does not call compute_loss, like TRL's OnlineDPOTrainer."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = model(**self._prepare_inputs(inputs))["loss"]
        self.accelerator.backward(loss)
        return loss.detach()


def test_a_trainer_that_does_not_compute_the_loss_is_refused(tmp_path, caplog) -> None:
    """Its auxiliary losses would be missing."""
    with pytest.raises(RuntimeError, match="StepAlone does not call compute_loss"):
        train(Model(aux={"load_balance": 0.1}), tmp_path, caplog, StepAlone)


def test_a_trainer_that_does_not_compute_the_loss_is_warned_without_losses(tmp_path, caplog):
    with pytest.warns(UserWarning, match="check_trainable") as caught:
        assert train(Model(), tmp_path, caplog, StepAlone) == []
    texts = [str(warning.message) for warning in caught]
    assert sum("StepAlone does not call compute_loss" in text for text in texts) == 1
