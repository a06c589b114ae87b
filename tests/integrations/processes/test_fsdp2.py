"""FSDP2: `fully_shard` for each block, over 1, 2 and 4 processes."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from moelora_kernels import adapter_state_dict, load_adapter, save_adapter
from support.compare import assert_same
from support.parallel import (
    assert_close,
    load_state,
    loss_of,
    make_model,
    one_process,
    part_of,
    parts,
    sgd,
    state_of,
    train,
    trained,
    uses_tasks,
)
from support.processes import run_processes

pytest.importorskip("transformers")
pytestmark = pytest.mark.exhaustive

STEPS = 2
CPU = torch.device("cpu")
HALF = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def shard(model, kind, count, **options):
    """Shard every block, then the rest. A task gate of all blocks is sharded first."""
    options["mesh"] = torch.distributed.init_device_mesh("cpu", (count,))
    layers = model.get_decoder().layers if kind.startswith("peft") else model.model.layers
    if kind == "shared gate":
        fully_shard(layers[0].self_attn.q_proj.router, **options)
    for block in layers:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def run(rank, kind, micro, path):
    model = shard(make_model(kind), kind, 2)

    def before(index, count):
        model.set_requires_gradient_sync(index == count - 1)

    steps = [part_of(rank, 2, step, micro) for step in range(STEPS)]
    result = train(model, kind, steps, before)
    save_adapter(model, path)
    return result


CASES = [("ming", 1), ("ming", 2), ("shared gate", 2), ("layer gates", 1)]
CASES += [("mixlora", 2), ("peft", 2), ("peft gates", 1)]


@pytest.mark.parametrize(("kind", "micro"), CASES)
def test_two_processes_train_like_one(kind, micro, tmp_path):
    """micro: parts whose gradients are added before the processes talk."""
    path = tmp_path / "adapter.safetensors"
    results = run_processes(run, 2, tmp_path, kind, micro, path)
    expected = one_process(kind, 2, STEPS, micro)
    for result in results:
        assert_close(result, expected)
    loaded = make_model(kind)
    load_adapter(loaded, path)
    # The file has the values of the Parameters to the bit.
    assert_same({name: p.detach() for name, p in trained(loaded).items()}, results[0][1])


def run_half(rank, kind):
    model = shard(make_model(kind), kind, 2, mp_policy=HALF)
    return train(model, kind, [part_of(rank, 2, 0)])


def half_by_hand(kind):
    """Compute in a copy of bfloat16, add the gradients in float32, update float32 Parameters."""
    model = make_model(kind)
    optimizer = sgd(model)
    for p in trained(model).values():
        p.grad = torch.zeros_like(p)
    for part in parts(0, 2):
        half = copy.deepcopy(model).bfloat16()
        loss_of(half, part, uses_tasks(kind)).backward()
        for name, p in trained(half).items():
            trained(model)[name].grad.add_(p.grad.float() / 2)
    gradients = {name: p.grad.clone() for name, p in trained(model).items()}
    optimizer.step()
    return [gradients, {name: p.detach() for name, p in trained(model).items()}]


@pytest.mark.parametrize("kind", ("ming", "shared gate", "mixlora"))
def test_mixed_precision(kind, tmp_path):
    expected = half_by_hand(kind)
    for result in run_processes(run_half, 2, tmp_path, kind):
        assert_close(result, expected)


def adamw(model):
    """Return AdamW. Its epsilon keeps the rounding of a small gradient small in its step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=0.01, eps=1e-3)


def quarters(rank, count, step):
    """Return the parts of a process if a step has four, as the auxiliary losses see them."""
    return part_of(rank, count, step, 4 // count)


def save_sharded(rank, kind, count, folder):
    model = shard(make_model(kind), kind, count)
    optimizer = adamw(model)
    train(model, kind, [quarters(rank, count, step) for step in range(2)], optimizer=optimizer)
    dcp.save(state_of(model, optimizer), checkpoint_id=folder)
    return values_and_next_step(model, kind, rank, count, optimizer)


def load_sharded(rank, kind, count, folder):
    model = make_model(kind)
    for parameter in trained(model).values():
        torch.nn.init.zeros_(parameter)
    model = shard(model, kind, count)
    optimizer = adamw(model)
    state = state_of(model, optimizer)
    dcp.load(state, checkpoint_id=folder)
    load_state(model, optimizer, state)
    return values_and_next_step(model, kind, rank, count, optimizer)


def values_and_next_step(model, kind, rank, count, optimizer):
    values = {name: tensor.clone() for name, tensor in adapter_state_dict(model).items()}
    return values, train(model, kind, [quarters(rank, count, 2)], optimizer=optimizer)


MOVES = [("ming", 1, 2), ("ming", 2, 4), ("ming", 4, 1)]
MOVES += [("shared gate", 2, 1), ("shared gate", 4, 2), ("peft", 1, 4)]


@pytest.mark.parametrize(("kind", "count", "other"), MOVES)
def test_a_checkpoint_moves_to_another_number_of_processes(kind, count, other, tmp_path):
    """The values come back to the bit, and the next step is that of the other number."""
    path = tmp_path / "checkpoint"
    ((saved, next_step), *_) = run_processes(save_sharded, count, tmp_path, kind, count, path)
    for state, step in run_processes(load_sharded, other, tmp_path, kind, other, path):
        assert_same(state, saved)
        assert_close(step, next_step)
