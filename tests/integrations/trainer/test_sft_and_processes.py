"""TRL's SFTTrainer, and two processes, train like one loop written by hand."""

from __future__ import annotations

import copy
import os
import socket

import pytest
import torch

for name in ("transformers", "datasets", "accelerate"):
    pytest.importorskip(name)

import datasets  # noqa: E402

from moelora_kernels import set_tasks  # noqa: E402
from moelora_kernels.trainer import attach  # noqa: E402
from support.selection import default_cases, exhaustive  # noqa: E402
from support.trainers import (  # noqa: E402
    CLOSE,
    KeepingCollator,
    arguments,
    assert_same_adapters,
    batches_of,
    in_steps,
    loop,
    make_model,
    make_samples,
    make_tokenizer,
    make_trainer,
)


@pytest.mark.parametrize("accumulation", default_cases((1, 2), 2))
@pytest.mark.parametrize("preset", ("ming", "moelora"))
def test_sft_trainer_trains_like_a_loop(preset, accumulation, tmp_path):
    """TRL computes its loss from log-probabilities, not from the model's loss."""
    trl = pytest.importorskip("trl")
    model = make_model(preset)
    clone = copy.deepcopy(model)
    trainer = trl.SFTTrainer(
        model=model,
        args=arguments(
            tmp_path,
            trl.SFTConfig,
            gradient_accumulation_steps=accumulation,
            bf16=False,
            max_length=64,
            eval_strategy="epoch",
        ),
        train_dataset=datasets.Dataset.from_list(make_samples()),
        eval_dataset=datasets.Dataset.from_list(make_samples(3)),
        processing_class=make_tokenizer(),
    )
    assert type(trainer) is trl.SFTTrainer
    callback = attach(trainer)
    trainer.data_collator = KeepingCollator(trainer.data_collator)
    trainer.train()
    batches = trainer.data_collator.batches[:5]
    losses, _ = loop(clone, in_steps(batches, accumulation))
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["loss"] for entry in logs] == pytest.approx(losses, rel=1e-4)
    assert_same_adapters(model, clone, **CLOSE)
    assert all("expert_load_max" in entry for entry in logs)
    assert len(callback.load) == 4


def run_process(rank: int, port: int, folder) -> None:
    """Run one of two processes: two trainers, then forwards of DistributedDataParallel."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    results = {}
    for preset, options in PARALLEL.items():
        model = make_model(preset, **options)
        trainer = make_trainer(model, folder, ddp_backend="gloo", ddp_find_unused_parameters=False)
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        callback = trainer.callback_handler.callbacks[0]
        results[preset] = model.state_dict(), batches_of(trainer), logs, callback.load
    model = make_model("moelora").eval()
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    ids = torch.arange(3, 15).view(2, 6)
    outputs = []
    for called in (parallel, parallel, model):
        set_tasks(model, [1 + rank, 3 + rank])
        outputs.append(called(ids).logits.detach())
    results["by hand"] = outputs
    torch.save(results, folder / f"{rank}.pt")
    # A process that ends while the other one still talks to it may abort.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


# Top-1 of four experts with few tokens leaves an expert without tokens.
PARALLEL = {"ming": dict(top_k=1, normalize="none", score="softmax"), "moelora": {}}


@exhaustive
def test_two_processes_train_like_one_loop(tmp_path):
    """Each process has the tasks and auxiliary losses of its batch, and uses every parameter.

    DistributedDataParallel sends the buffers of the first process to the others, so the tasks must
    not be a buffer.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(run_process, (port, tmp_path), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)]
    for preset, options in PARALLEL.items():
        (state, batches, logs, load), (other, other_batches, _, other_load) = (
            rank[preset] for rank in ranks
        )
        assert all(torch.equal(state[name], other[name]) for name in state)
        clone = make_model(preset, **options)
        steps = [list(pair) for pair in zip(batches, other_batches, strict=True)]
        losses, auxiliary = loop(clone, steps)
        assert len(losses) == 3
        trained = make_model(preset, **options)
        trained.load_state_dict(state)
        assert_same_adapters(trained, clone, **CLOSE)
        assert [entry["loss"] for entry in logs] == pytest.approx(losses, rel=1e-4)
        if preset == "ming":
            assert [entry["aux_loss"] for entry in logs] == pytest.approx(auxiliary, rel=1e-4)
        # Both processes log the load of both.
        assert load.keys() == other_load.keys()
        assert all(torch.equal(load[name], other_load[name]) for name in load)
    assert ranks[0]["ming"][2][0]["experts_unused"] > 0
    for outputs in (rank["by hand"] for rank in ranks):
        assert all(torch.equal(output, outputs[-1]) for output in outputs)
