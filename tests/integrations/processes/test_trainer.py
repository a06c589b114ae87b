"""Hugging Face's Trainer and TRL's SFTTrainer in two processes: DDP, FSDP1, FSDP2."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

for name in ("transformers", "datasets", "accelerate", "peft"):
    pytest.importorskip(name)

import datasets  # noqa: E402
from peft import PeftModel  # noqa: E402

from moelora_kernels import adapter_state_dict, save_adapter  # noqa: E402
from moelora_kernels.trainer import attach  # noqa: E402
from support import trainer_program  # noqa: E402
from support.compare import assert_same  # noqa: E402
from support.engines import engine_arguments, engines_of  # noqa: E402
from support.models import language_model  # noqa: E402
from support.processes import run_processes, run_program  # noqa: E402
from support.trainers import (  # noqa: E402
    CLOSE,
    KeepingCollator,
    arguments,
    assert_trained_like_a_loop,
    batches_of,
    loop,
    make_model,
    make_peft_model,
    make_samples,
    make_tokenizer,
    make_trainer,
)

pytestmark = pytest.mark.exhaustive

MING = dict(top_k=1, normalize="none", score="softmax")
TASKS = dict(task_gate="per_layer")


def model_of(kind):
    if kind == "peft":
        return make_peft_model(**MING)
    return make_model(kind, **(MING if kind == "ming" else TASKS))


@pytest.mark.parametrize("launcher", ("accelerate", "torchrun"))
def test_launched_from_a_shell(launcher, tmp_path):
    """--multi_gpu starts torchrun, and use_cpu of the arguments leads to gloo."""
    command = {
        "accelerate": [
            "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1",
            "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0",
        ],
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node=2"],
    }[launcher]  # fmt: skip
    script = Path(trainer_program.__file__)
    run_program([sys.executable, "-m", *command, str(script), str(tmp_path)])
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]

    def make():
        return make_model("ming", **trainer_program.OPTIONS)

    assert_trained_like_a_loop(results, make, tmp_path / "adapter")


def run(rank, kind, engine, folder):
    options = engine_arguments(engine)
    trainer = make_trainer(model_of(kind), folder, **options)
    trainer.train()
    assert engines_of(trainer.model_wrapped) == {engine}
    if kind == "peft":
        trainer.save_model(str(folder / "saved"))
    else:
        save_adapter(trainer.model, folder / "saved")
    logs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return batches_of(trainer), logs


CASES = [("peft", "ddp"), ("peft", "fsdp1"), ("peft", "fsdp2"), ("ming", "fsdp2")]
CASES += [("moelora", "fsdp2")]


@pytest.mark.parametrize(("kind", "engine"), CASES)
def test_trainer(kind, engine, tmp_path):
    """The model that one process loads from the folder was trained as by one loop."""
    results = run_processes(run, 2, tmp_path, kind, engine, tmp_path)
    assert_trained_like_a_loop(
        results, lambda: model_of(kind), tmp_path / "saved", is_peft=kind == "peft"
    )


def run_sft(rank, engine, folder):
    import trl

    options = engine_arguments(engine)
    trainer = trl.SFTTrainer(
        model=make_peft_model(**MING),
        args=arguments(folder, trl.SFTConfig, bf16=False, max_length=64, **options),
        train_dataset=datasets.Dataset.from_list(make_samples()),
        processing_class=make_tokenizer(),
    )
    attach(trainer)
    trainer.data_collator = KeepingCollator(trainer.data_collator)
    trainer.train()
    assert engines_of(trainer.model_wrapped) == {engine}
    trainer.save_model(str(folder / "saved"))
    return trainer.data_collator.batches


@pytest.mark.parametrize("engine", ("ddp", "fsdp2"))
def test_sft_trainer(engine, tmp_path):
    pytest.importorskip("trl")
    batches, other = run_processes(run_sft, 2, tmp_path, engine, tmp_path)
    expected = make_peft_model(**MING)
    # The collator may be one batch ahead of the last step.
    loop(expected, [list(pair) for pair in zip(batches[:3], other[:3], strict=True)])
    loaded = PeftModel.from_pretrained(language_model(), tmp_path / "saved")
    assert_same(adapter_state_dict(loaded), adapter_state_dict(expected), **CLOSE)
