"""Hugging Face's Trainer with DeepSpeed's ZeRO-2 and ZeRO-3 in two processes on a CPU."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

for name in ("transformers", "datasets", "accelerate", "peft"):
    pytest.importorskip(name)

from transformers import Qwen2ForCausalLM  # noqa: E402

from moelora_kernels import (  # noqa: E402
    adapter_parameters,
    adapter_state_dict,
    load_adapter,
    save_adapter,
)
from support import trainer_program  # noqa: E402
from support.compare import assert_same  # noqa: E402
from support.engines import engine_arguments, engines_of, needs_deepspeed  # noqa: E402
from support.models import add_preset, language_model  # noqa: E402
from support.processes import run_processes, run_program  # noqa: E402
from support.trainers import (  # noqa: E402
    CLOSE,
    PROJECTIONS,
    arguments,
    assert_trained_like_a_loop,
    batches_of,
    loop,
    make_model,
    make_peft_model,
    make_trainer,
)

pytestmark = [pytest.mark.exhaustive, needs_deepspeed]

MING = dict(top_k=1, normalize="none", score="softmax")


def model_of(kind):
    if kind == "peft":
        return make_peft_model(**MING)
    return make_model(kind, **(MING if kind == "ming" else {}))


def run(rank, kind, engine, folder):
    trainer = make_trainer(model_of(kind), folder, **engine_arguments(engine))
    trainer.train()
    assert engines_of(trainer.model_wrapped) == {engine}
    if kind == "peft":
        trainer.save_model(str(folder / "saved"))
    else:
        import deepspeed

        with deepspeed.zero.GatheredParameters(adapter_parameters(trainer.model)):
            save_adapter(trainer.model_wrapped, folder / "saved")
    logs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return batches_of(trainer), logs


@pytest.mark.parametrize("engine", ("zero2", "zero3"))
@pytest.mark.parametrize("kind", ("peft", "ming", "moelora"))
def test_trainer(kind, engine, tmp_path):
    """The model that one process loads from the folder was trained as by one loop."""
    results = run_processes(run, 2, tmp_path, kind, engine, tmp_path)
    assert_trained_like_a_loop(
        results, lambda: model_of(kind), tmp_path / "saved", is_peft=kind == "peft"
    )


def run_sharded(rank, folder):
    """The arguments come first, so `from_pretrained` shards every weight when it reads it."""
    options = engine_arguments("zero3")
    kept = arguments(folder, **options)
    import deepspeed

    def load():
        model = Qwen2ForCausalLM.from_pretrained(folder).requires_grad_(False).train()
        assert kept.deepspeed
        assert model.model.layers[0].mlp.gate_proj.weight.numel() == 0
        return model

    model = load()
    with pytest.raises(ValueError, match=r"ZeRO-3 shards .* inside `with deepspeed.zero.Gathered"):
        add_preset(model, "goat", PROJECTIONS, num_experts=2)
    with deepspeed.zero.GatheredParameters([*model.parameters()]):
        add_preset(model, "goat", PROJECTIONS, num_experts=2)
    trainer = make_trainer(add_preset(load(), "ming", PROJECTIONS, **SHARDED), folder, **options)
    trainer.train()
    with deepspeed.zero.GatheredParameters(adapter_parameters(trainer.model)):
        save_adapter(trainer.model, folder / "saved")
    return batches_of(trainer)


SHARDED = dict(num_experts=4, dropout=0.0, aux={"load_balance": 0.5, "z": 0.1})


def test_a_model_that_zero3_loads(tmp_path):
    language_model().save_pretrained(tmp_path)
    results = run_processes(run_sharded, 2, tmp_path, tmp_path)
    models = [language_model().requires_grad_(False).train() for _ in range(2)]
    expected, loaded = (add_preset(model, "ming", PROJECTIONS, **SHARDED) for model in models)
    loop(expected, [list(pair) for pair in zip(*results, strict=True)])
    load_adapter(loaded, tmp_path / "saved")
    assert_same(adapter_state_dict(loaded), adapter_state_dict(expected), **CLOSE)


@pytest.mark.parametrize("stage", (2, 3))
def test_accelerate_launch(stage, tmp_path):
    """The options of `accelerate launch` choose DeepSpeed, and TrainingArguments has no config."""
    command = [
        "accelerate.commands.launch", "--use_deepspeed", f"--zero_stage={stage}",
        "--num_processes=2", "--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no",
        "--main_process_port=0",
    ]  # fmt: skip
    script = Path(trainer_program.__file__)
    run_program([sys.executable, "-m", *command, str(script), str(tmp_path)])
    results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]

    def make():
        return make_model("ming", **trainer_program.OPTIONS)

    assert_trained_like_a_loop(results, make, tmp_path / "adapter")
