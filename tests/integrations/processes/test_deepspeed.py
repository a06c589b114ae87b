"""DeepSpeed's ZeRO-2 and ZeRO-3 in two processes on a CPU, if DeepSpeed is installed."""

from __future__ import annotations

import os

import pytest

from moelora_kernels import adapter_parameters, load_adapter, save_adapter
from support.compare import assert_same
from support.engines import needs_deepspeed
from support.parallel import (
    assert_close,
    loss_of,
    make_model,
    one_process,
    part_of,
    sgd,
    trained,
    uses_tasks,
)
from support.processes import run_processes

pytest.importorskip("transformers")
pytestmark = [pytest.mark.exhaustive, needs_deepspeed]

STEPS = 2


def run(rank, kind, stage, path):
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed

    model = make_model(kind)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        # 1.0 by default.
        "gradient_clipping": 0.0,
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=sgd(model), config=config)
    for step in range(STEPS):
        (part,) = part_of(rank, 2, step)
        engine.backward(loss_of(engine, part, uses_tasks(kind)))
        engine.step()
    if stage == 2:
        save_adapter(engine, path)
        return {name: p.detach().clone() for name, p in trained(model).items()}
    with deepspeed.zero.GatheredParameters(adapter_parameters(model), modifier_rank=0):
        save_adapter(engine, path)
        return {name: p.detach().clone() for name, p in trained(model).items()}


@pytest.mark.parametrize("stage", (2, 3))
@pytest.mark.parametrize("kind", ("ming", "shared gate", "mixlora", "peft"))
def test_two_processes_train_like_one(kind, stage, tmp_path):
    path = tmp_path / "adapter.safetensors"
    results = run_processes(run, 2, tmp_path, kind, stage, path)
    _, expected = one_process(kind, 2, STEPS)
    for result in results:
        assert_close([result], [expected])
    loaded = make_model(kind)
    load_adapter(loaded, path)
    assert_same({name: p.detach() for name, p in trained(loaded).items()}, results[0])
