"""Two processes whose batches reach other layers log the load of both."""

from __future__ import annotations

import os
import socket

import pytest
import torch
from torch import nn

for name in ("transformers", "datasets", "accelerate"):
    pytest.importorskip(name)

import transformers  # noqa: E402

from moelora_kernels import MoeLoraConfig, count_routing, routing_report, set_tasks  # noqa: E402
from moelora_kernels.trainer import attach  # noqa: E402
from support.expert_loads import EXPERTS, HandCount, adapted  # noqa: E402
from support.selection import exhaustive  # noqa: E402
from support.trainers import arguments  # noqa: E402

IN = 8
TASKS = MoeLoraConfig(
    num_experts=EXPERTS + 1, rank=2, router="task", num_tasks=3, task_embedding_dim=5
)  # fmt: skip


class Branches(nn.Module):
    """Each sample says which of four linears it takes; the batch has the kind of its first one.

    Linears 0 and 2 have E experts, so sums of both would fit each other. Linear 3 has a task gate.
    """

    def __init__(self):
        super().__init__()
        self.linears = nn.ModuleList([nn.Linear(IN, IN) for _ in range(4)])

    def forward(self, x, kind, labels=None):
        for layer in kind[0].tolist():
            if layer >= 0:
                x = self.linears[layer](x)
        return {"loss": x.square().mean() + 0 * sum(p.sum() for p in self.parameters())}


def make_model():
    torch.manual_seed(0)
    model = adapted(Branches(), ["linears.0", "linears.1", "linears.2"])
    adapted(model, ["linears.3"], TASKS)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name or "router" in name)
    set_tasks(model, [2])
    return model


# Rank 0, then rank 1, in two steps. A path of -1 reaches no layer.
PATHS = [[[0, 1], [-1, -1], [2, -1], [0, 0]], [[2, 3], [0, 2], [-1, -1], [2, 3]]]


def collate(samples):
    draw = torch.Generator().manual_seed(samples[0]["seed"])
    return {
        "x": torch.randn(len(samples), 3, IN, generator=draw),
        "kind": torch.tensor([sample["kind"] for sample in samples]),
        "labels": torch.zeros(len(samples)),
    }


# One sample for each step and rank, in the order of the sampler.
SAMPLES = [
    {"kind": kind, "seed": 10 * step + rank}
    for step, kinds in enumerate(zip(*PATHS, strict=True))
    for rank, kind in enumerate(kinds)
]


class InOrder(transformers.Trainer):
    def _get_train_sampler(self, *args, **kwargs):
        return torch.utils.data.SequentialSampler(self.train_dataset)


class Watch(transformers.TrainerCallback):
    def __init__(self, callback):
        self.callback, self.logs = callback, []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append((dict(logs), dict(self.callback.load)))


def run_process(rank: int, port: int, folder) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    model = make_model()
    args = arguments(
        folder, per_device_train_batch_size=1, learning_rate=0.0, logging_steps=2,
        ddp_backend="gloo", ddp_find_unused_parameters=False, remove_unused_columns=False,
    )  # fmt: skip
    trainer = InOrder(model, args, train_dataset=SAMPLES, data_collator=collate)
    callback = attach(trainer)
    watch = Watch(callback)
    trainer.add_callback(watch)
    # The dataset's tasks are set by hand.
    trainer.data_collator, trainer.prediction_step = collate, callback._prediction_step
    trainer.train()
    # The report of a loop by hand: rank 1 runs no forward.
    with count_routing(model):
        if rank == 0:
            model(torch.ones(2, 3, IN), torch.tensor([[0, 3]] * 2))
        report = routing_report(model)
        alone = routing_report(model, all_ranks=False)
    loads = [{n: layer.load for n, layer in r.layers.items()} for r in (report, alone)]
    torch.save((watch.logs, loads), folder / f"{rank}.pt")
    # A process that ends while the other one still talks to it may abort.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


class TokenCount(HandCount):
    """Counts the layers with token gates."""

    def gates(self, layer, tokens):
        if layer.config.router == "task":
            return torch.zeros(len(tokens), EXPERTS)
        return HandCount.gates(layer, tokens)


def expected_of(samples):
    """Return the loads of the token gates by hand, and that of the task gate."""
    model = make_model()
    count = TokenCount(model)
    for sample in samples:
        model(**collate([sample]))
    reached = any(3 in sample["kind"] for sample in samples)
    gate = model.linears[3].router(torch.tensor([2])).softmax(dim=1)[0].detach()
    return count.shares() | {"linears.3": gate if reached else torch.zeros(EXPERTS + 1)}


@exhaustive
def test_ranks_that_reach_other_layers(tmp_path):
    """The sums have one order and size on both, so no layer gets the load of another one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(run_process, (port, tmp_path), nprocs=2)
    (logs, loads), (other_logs, other_loads) = (
        torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(2)
    )
    training = [entry for entry in logs if "loss" in entry[0]]
    assert len(training) == 2
    for step, (log, load) in enumerate(training):
        expected = expected_of(SAMPLES[4 * step : 4 * step + 4])
        assert load.keys() == expected.keys()
        for name, share in expected.items():
            torch.testing.assert_close(load[name], share, atol=2e-6, rtol=0, msg=name)
        assert log["aux_loss"] > 0
        counted = [share for share in expected.values() if share.any()]
        mean = sum(share.max().item() for share in counted) / len(counted)
        assert log["expert_load_max"] == pytest.approx(mean, abs=1e-5)
    for (_, load), (_, other) in zip(logs, other_logs, strict=True):
        assert all(torch.equal(load[name], other[name]) for name in load)
    # Both ranks report the forward of rank 0; the last report covers no forward.
    model = make_model()
    count = TokenCount(model)
    model(torch.ones(2, 3, IN), torch.tensor([[0, 3]] * 2))
    for load, alone in (loads, other_loads):
        torch.testing.assert_close(load["linears.0"], count.shares()["linears.0"])
        assert load["linears.3"].sum() == pytest.approx(1)
        assert not load["linears.1"].any()
        assert not any(share.any() for share in alone.values())
