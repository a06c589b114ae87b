"""A training that is killed between two steps resumes, and ends with the same bits."""

from __future__ import annotations

import importlib.util
import os
import signal

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from moelora_kernels.nn.sharding import gathered
from support.compare import assert_same
from support.parallel import backward, load_state, make_model, part_of, state_of, trained
from support.processes import ProcessError, run_processes

pytest.importorskip("transformers")
pytestmark = pytest.mark.exhaustive

STEPS, KILLED_AFTER = 4, 2
# Dropout draws its seeds from torch's generator, whose state is part of a checkpoint.
DROPOUT = 0.2


def whole_state(model, optimizer):
    """Return what a step depends on: adapters, Adam's averages, the generator of this process."""
    draw = {f"draw{torch.distributed.get_rank()}": torch.get_rng_state()}
    return {**state_of(model, optimizer), **draw}


def resume(model, optimizer, folder):
    """Load the newest checkpoint, and return its step; 0 if there is none."""
    steps = [int(path.parent.name) for path in folder.glob("*/.metadata")]
    if not steps:
        return 0
    state = whole_state(model, optimizer)
    dcp.load(state, checkpoint_id=folder / str(max(steps)))
    load_state(model, optimizer, state)
    torch.set_rng_state(state[f"draw{torch.distributed.get_rank()}"])
    return max(steps)


def run(rank, kind, engine, folder, killed_after):
    torch.manual_seed(rank)
    model = make_model(kind, dropout=DROPOUT)
    if engine == "fsdp2":
        gate = getattr(model.model.layers[0].self_attn.q_proj, "router", None)
        units = [gate] if kind == "shared gate" else []
        for module in [*units, *model.model.layers, model]:
            fully_shard(module)
    else:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for step in range(resume(model, optimizer, folder), STEPS):
        if step == killed_after and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        backward(model, kind, part_of(rank, 2, step))
        optimizer.step()
        optimizer.zero_grad()
        dcp.save(whole_state(model, optimizer), checkpoint_id=folder / str(step + 1))
    averages = optimizer.state_dict()["state"].values()
    result = {name: gathered(p.detach()).clone() for name, p in trained(model).items()}
    for i, entry in enumerate(averages):
        result |= {f"{key} of {i}": gathered(tensor).clone() for key, tensor in entry.items()}
    return result


@pytest.mark.parametrize(("kind", "engine"), (("ming", "ddp"), ("shared gate", "fsdp2")))
def test_a_loop(kind, engine, tmp_path):
    arguments = (run, 2, tmp_path / "processes", kind, engine)
    expected = run_processes(*arguments, tmp_path / "whole", None)
    with pytest.raises(ProcessError, match=f"1: -{signal.SIGKILL.value}"):
        run_processes(*arguments, tmp_path / "killed", KILLED_AFTER)
    found = run_processes(*arguments, tmp_path / "killed", None)
    for rank in range(2):
        assert_same(found[rank], expected[rank])


def run_trainer(rank, engine, folder, killed_after):
    from transformers import TrainerCallback

    from support.engines import engine_arguments, engines_of
    from support.trainers import make_peft_model, make_trainer

    class Kill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == killed_after and rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)

    options = dict(save_strategy="steps", save_steps=1, **engine_arguments(engine))
    model = make_peft_model(DROPOUT)
    trainer = make_trainer(model, folder, callbacks=[Kill()], **options)
    trainer.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")))
    assert engines_of(trainer.model_wrapped) == {engine}
    return {name: gathered(p.detach()).clone() for name, p in trained(model).items()}


@pytest.mark.parametrize("engine", ("ddp", "fsdp2", "zero2", "zero3"))
def test_trainer(engine, tmp_path):
    for name in ("datasets", "accelerate", "peft", *["deepspeed"] * engine.startswith("zero")):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"needs {name}")
    arguments = (run_trainer, 2, tmp_path / "processes", engine)
    expected = run_processes(*arguments, tmp_path / "whole", None)
    with pytest.raises(ProcessError, match=f"1: -{signal.SIGKILL.value}"):
        run_processes(*arguments, tmp_path / "killed", KILLED_AFTER)
    assert (tmp_path / "killed" / f"checkpoint-{KILLED_AFTER}").is_dir()
    found = run_processes(*arguments, tmp_path / "killed", None)
    for rank in range(2):
        assert_same(found[rank], expected[rank])
