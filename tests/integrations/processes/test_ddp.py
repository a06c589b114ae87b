"""DistributedDataParallel: two processes train like one, and each can save the adapter."""

from __future__ import annotations

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from moelora_kernels import adapter_state_dict, load_adapter, save_adapter
from support.compare import assert_same
from support.parallel import assert_close, make_model, one_process, part_of, train
from support.processes import run_processes

pytest.importorskip("transformers")
pytestmark = pytest.mark.exhaustive

STEPS = 3


def run(rank, kind, options, checkpointing, path):
    model = make_model(kind)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    parallel = DistributedDataParallel(model, **options)
    result = train(parallel, kind, [part_of(rank, 2, step) for step in range(STEPS)])
    if rank == 1:
        save_adapter(parallel, path)
    return result, adapter_state_dict(parallel)


WAYS = {
    "plain": ({}, False),
    "static_graph": (dict(static_graph=True), False),
    "checkpointing": ({}, True),
    "static_graph-checkpointing": (dict(static_graph=True, gradient_as_bucket_view=True), True),
}
CASES = [("ming", way) for way in WAYS]
CASES += [(kind, "static_graph-checkpointing") for kind in ("shared gate", "mixlora", "peft")]


@pytest.mark.parametrize(("kind", "way"), CASES)
def test_two_processes_train_like_one(kind, way, tmp_path):
    if kind == "peft":
        pytest.importorskip("peft")
    path = tmp_path / "adapter.safetensors"
    ranks = run_processes(run, 2, tmp_path, kind, *WAYS[way], path)
    expected = one_process(kind, 2, STEPS)
    for result, _ in ranks:
        assert_close(result, expected)
    state, other = (state for _, state in ranks)
    assert all(torch.equal(state[name], other[name]) for name in state)
    loaded = make_model(kind)
    load_adapter(loaded, path)
    assert_same(adapter_state_dict(loaded), state)
