"""Frozen experts under DeepSpeed: they stay without weight decay, which else is an error."""

from __future__ import annotations

import os

import pytest
import torch

for name in ("transformers", "datasets", "accelerate"):
    pytest.importorskip(name)

from moelora_kernels import adapter_parameters, freeze_experts  # noqa: E402
from support.compare import assert_same  # noqa: E402
from support.engines import engine_arguments, needs_deepspeed  # noqa: E402
from support.parallel import loss_of, make_model, part_of, train, trained  # noqa: E402
from support.processes import run_processes  # noqa: E402
from support.trainers import CLOSE, make_trainer  # noqa: E402

pytestmark = [pytest.mark.exhaustive, needs_deepspeed]

FROZEN, STEPS = [0, 2], 2


def adamw(model, weight_decay):
    return torch.optim.AdamW(adapter_parameters(model), lr=0.01, weight_decay=weight_decay)


def run(rank, stage):
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    def start(model, optimizer):
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
            "gradient_clipping": 0.0,
        }
        return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]

    def step(engine, number):
        (part,) = part_of(rank, 2, number)
        engine.backward(loss_of(engine, part, False))
        engine.step()

    model = make_model("ming")
    freeze_experts(model, FROZEN)
    engine = start(model, adamw(model, 0.0))
    for number in range(STEPS):
        step(engine, number)
    with deepspeed.zero.GatheredParameters(adapter_parameters(model)):
        values = {name: p.detach().clone() for name, p in trained(model).items()}

    # An optimizer that should keep them says that it cannot, before the first step.
    model = make_model("ming")
    optimizer = adamw(model, 0.5)
    freeze_experts(model, FROZEN, optimizer)
    engine = start(model, optimizer)
    with pytest.raises(RuntimeError, match="cannot be kept; use an optimizer without weight decay"):
        step(engine, 0)
    return values


@pytest.mark.parametrize("stage", (2, 3))
def test_without_weight_decay_they_stay(stage, tmp_path):
    values, _ = run_processes(run, 2, tmp_path, stage)
    before = {name: p.detach().clone() for name, p in trained(make_model("ming")).items()}
    expected = make_model("ming")
    freeze_experts(expected, FROZEN)
    steps = [[part_of(rank, 2, number)[0] for rank in range(2)] for number in range(STEPS)]
    train(expected, "ming", steps, optimizer=adamw(expected, 0.0))
    assert_same(values, {n: p.detach() for n, p in trained(expected).items()}, **CLOSE)
    for name in values:
        if "lora_" in name:
            axis = 0 if name.endswith("A") else 1
            pairs = zip(values[name].split(2, axis), before[name].split(2, axis), strict=True)
            stay = [torch.equal(a, b) for a, b in pairs]
            assert stay == [e in FROZEN for e in range(4)], name


def run_trainer(rank, engine, folder):
    model = make_model("ming")
    freeze_experts(model, FROZEN)
    trainer = make_trainer(model, folder, weight_decay=0.1, **engine_arguments(engine))
    with pytest.raises(ValueError, match=r"would move frozen experts.*; use weight_decay=0$"):
        trainer.train()


@pytest.mark.parametrize("engine", ("zero2", "zero3"))
def test_trainer_needs_no_weight_decay(engine, tmp_path):
    run_processes(run_trainer, 2, tmp_path, engine, tmp_path)
