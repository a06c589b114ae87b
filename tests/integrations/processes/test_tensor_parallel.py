"""Tensor parallel bases: the weights of the base are sharded, the adapters are whole."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

for name in ("transformers", "datasets", "accelerate"):
    pytest.importorskip(name)

from moelora_kernels import adapter_state_dict, load_adapter, save_adapter  # noqa: E402
from support.compare import assert_same  # noqa: E402
from support.engines import use_fsdp  # noqa: E402
from support.models import add_preset, language_model  # noqa: E402
from support.parallel import (  # noqa: E402
    assert_close,
    backward,
    batch,
    damped,
    make_model,
    one_process,
    train,
    trained,
)
from support.processes import run_processes  # noqa: E402
from support.trainers import CLOSE, batches_of, loop, make_trainer  # noqa: E402

pytestmark = pytest.mark.exhaustive

STEPS = 2
WHOLE_Y = dict(output_layouts=Replicate())
WHOLE_X = dict(input_layouts=Replicate())


def parallelize(model, kind, column, row):
    """Shard the bases of all MLPs: gate and up by rows of the weight, down by its columns."""
    end = "" if kind == "mixlora" else ".base_layer"
    plan = {}
    for name, _ in model.named_modules():
        if name.endswith((f"gate_proj{end}", f"up_proj{end}")):
            plan[name] = ColwiseParallel(**column)
        elif name.endswith(f"down_proj{end}"):
            plan[name] = RowwiseParallel(**row)
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    return parallelize_module(model, mesh, plan)


def run(rank, kind, path):
    model = parallelize(make_model(kind), kind, WHOLE_Y, WHOLE_X)
    sharded = [p for p in model.parameters() if isinstance(p, DTensor)]
    assert len(sharded) == 6
    assert all(p.to_local().numel() * 2 == p.numel() for p in sharded)
    # Both processes get the same batch.
    result = train(model, kind, [[batch(step)] for step in range(STEPS)])
    save_adapter(model, path)
    return result


@pytest.mark.parametrize("kind", ("ming", "shared gate", "mixlora", "peft"))
def test_two_processes_train_like_one(kind, tmp_path):
    """Without a collective of its own, an adapter has the same gradients in both processes."""
    path = tmp_path / "adapter.safetensors"
    results = run_processes(run, 2, tmp_path, kind, path)
    expected = one_process(kind, 1, STEPS)
    for result in results:
        assert_close(result, expected)
    assert_same(results[0][1], results[1][1])
    loaded = make_model(kind)
    load_adapter(loaded, path)
    assert_same({name: p.detach() for name, p in trained(loaded).items()}, results[0][1])


def run_what_cannot_work(rank, kind):
    model = parallelize(make_model(kind), kind, {}, {})
    with pytest.raises(ValueError, match=r"must return all of y: Col.*=Replicate\(\)\)$"):
        backward(model, kind, [batch(0)])
    model = parallelize(make_model(kind), kind, WHOLE_Y, {})
    down = next(m for name, m in model.named_modules() if name.endswith("down_proj"))
    with pytest.raises(ValueError, match=r"needs all of x: Row.*=Replicate\(\)\)$"):
        down(torch.ones(2, 3, 12))


@pytest.mark.parametrize("kind", ("ming", "peft"))
def test_parts_of_x_or_y_say_what_to_do(kind, tmp_path):
    run_processes(run_what_cannot_work, 2, tmp_path, kind)


# The plan of `from_pretrained`: attention as the model's own plan has it.
PLAN = {
    "model.layers.*.mlp.gate_proj": "colwise_gather_output",
    "model.layers.*.mlp.up_proj": "colwise_gather_output",
    "model.layers.*.mlp.down_proj": "rowwise_split_input",
}


def add_experts(model):
    options = dict(num_experts=4, dropout=0.0, aux={"load_balance": 0.5})
    model = model.requires_grad_(False).train()
    return damped(add_preset(model, "ming", ["gate_proj", "up_proj", "down_proj"], **options))


def run_trainer(rank, folder):
    from transformers import Qwen2ForCausalLM
    from transformers.distributed import DistributedConfig

    def load(plan):
        config = DistributedConfig(tp_size=2, tp_plan=plan)
        return add_experts(Qwen2ForCausalLM.from_pretrained(folder, distributed_config=config))

    with pytest.raises(ValueError, match=r"must return all of y: Col.*=Replicate\(\)\)$"):
        load("auto")(input_ids=torch.ones(1, 4, dtype=torch.long))
    model = load(PLAN)
    bases = [p for name, p in model.named_parameters() if "mlp" in name and "base_layer" in name]
    assert [isinstance(p, DTensor) for p in bases] == [True] * 6
    # accelerate has tensor parallelism for accelerators only too.
    use_fsdp()
    trainer = make_trainer(model, folder)
    trainer.train()
    save_adapter(model, folder / "saved")
    return batches_of(trainer)


def test_trainer_of_a_model_that_transformers_shards(tmp_path):
    pytest.importorskip("transformers.distributed.tensor_parallel")
    language_model().save_pretrained(tmp_path)
    batches, others = run_processes(run_trainer, 2, tmp_path, tmp_path)
    for batch_a, batch_b in zip(batches, others, strict=True):
        assert_same(batch_a, batch_b)
    expected, loaded = add_experts(language_model()), add_experts(language_model())
    loop(expected, [[part] for part in batches])
    load_adapter(loaded, tmp_path / "saved")
    assert_same(adapter_state_dict(loaded), adapter_state_dict(expected), **CLOSE)
