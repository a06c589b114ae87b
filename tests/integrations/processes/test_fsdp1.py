"""FSDP1 with the wrap policy of PEFT: two processes train like one."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.fsdp import FullyShardedDataParallel as Fsdp1

from moelora_kernels import adapter_state_dict, load_adapter, save_adapter
from support.compare import assert_same
from support.parallel import (
    assert_close,
    backward,
    make_model,
    part_of,
    sgd,
    train,
)
from support.processes import run_processes

pytest.importorskip("transformers")
pytest.importorskip("peft")
pytestmark = pytest.mark.exhaustive

CPU = torch.device("cpu")
STEPS = 2


def wrap(model, **options):
    """Wrap every block, and whatever else PEFT's policy chooses."""
    from peft.utils.other import fsdp_auto_wrap_policy

    return Fsdp1(model, auto_wrap_policy=fsdp_auto_wrap_policy(model), device_id=CPU, **options)


def run(rank, kind, path):
    model = wrap(make_model(kind), use_orig_params=True)
    optimizer = sgd(model)
    for step in range(STEPS):
        backward(model, kind, part_of(rank, 2, step))
        optimizer.step()
        optimizer.zero_grad()
    with Fsdp1.summon_full_params(model, writeback=False):
        save_adapter(model, path)
        return {name: tensor.clone() for name, tensor in adapter_state_dict(model).items()}


@pytest.mark.parametrize("kind", ("peft", "peft gates", "ming", "layer gates", "mixlora"))
def test_two_processes_train_like_one(kind, tmp_path):
    path = tmp_path / "adapter.safetensors"
    states = run_processes(run, 2, tmp_path, kind, path)
    expected = make_model(kind)
    train(expected, kind, [part_of(0, 1, step, 2) for step in range(STEPS)])
    for state in states:
        assert_close([state], [adapter_state_dict(expected)])
    loaded = make_model(kind)
    load_adapter(loaded, path)
    assert_same(adapter_state_dict(loaded), states[0])


def run_what_cannot_work(rank):
    with pytest.raises(ValueError, match="uniform `requires_grad` when `use_orig_params=False`"):
        wrap(make_model("peft"), use_orig_params=False)
    for kind in ("peft shared gate", "shared gate"):
        with pytest.raises(RuntimeError, match="task gate: the blocks share it, and Fully"):
            backward(wrap(make_model(kind), use_orig_params=True), kind, part_of(rank, 2, 0))


def test_what_cannot_work_says_what_to_do(tmp_path):
    """The frozen base and the adapters of a block are one unit; units cannot share a gate."""
    run_processes(run_what_cannot_work, 2, tmp_path)
