"""Two processes of which one drops all layers, and two that shard the model with FSDP2."""

from __future__ import annotations

import os
import socket

import pytest
import torch
from torch import nn

for name in ("transformers", "datasets", "accelerate"):
    pytest.importorskip(name)

import transformers  # noqa: E402

from moelora_kernels import (  # noqa: E402
    MoeLoraConfig,
    collect_aux_loss,
    count_routing,
    replace_linears,
    routing_report,
)
from moelora_kernels.trainer import attach  # noqa: E402
from support.linears import randomise  # noqa: E402
from support.selection import exhaustive  # noqa: E402
from support.trainers import arguments  # noqa: E402

CONFIG = MoeLoraConfig.preset(
    "ming", num_experts=3, rank=2, top_k=2, dropout=0.0, aux={"load_balance": 0.1}
)


class Layers(nn.Module):
    """Three blocks. A process that drops them calls none of them, like LayerDrop at probability 1.

    drops: for each training step, whether the process drops the blocks.
    """

    def __init__(self, drops: list[bool]):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.head = nn.Linear(8, 8)
        self.drops, self.step = drops, 0

    def forward(self, x, labels=None):
        is_dropped = self.training and self.drops[self.step % len(self.drops)]
        self.step += self.training
        for block in () if is_dropped else self.blocks:
            x = x + block(x)
        y = self.head(x)
        return {"loss": (y - labels).square().mean(), "logits": y}


def adapted(drops: list[bool], names: list[str]) -> nn.Module:
    model = Layers(drops).requires_grad_(False)
    replace_linears(model, CONFIG, names)
    return randomise(model)


BLOCKS = ["blocks.0", "blocks.1", "blocks.2"]
# Rank 0 drops the blocks in the first step and in the last one, rank 1 never.
DROPS = ([True, False, True], [False])
# The loss of the first forward must have a graph if all layers are in the blocks.
LATER_DROPS = ([False, True, True], [False])


def inputs(index: int) -> torch.Tensor:
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(index))


def two_processes(run, folder) -> list:
    """Run `run(rank, folder)` in two processes, and return their results."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(start, (run, port, folder), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


def start(rank: int, run, port: int, folder) -> None:
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.set_num_threads(1)
    torch.save(run(rank, folder), folder / f"{rank}.pt")
    # A process that ends while the other one still talks to it may abort.
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def train(rank: int, folder, drops: list[bool], names: list[str]):
    model = adapted(drops, names)
    args = arguments(
        folder, per_device_train_batch_size=2, max_steps=3, logging_steps=3, learning_rate=0.0,
        ddp_backend="gloo", ddp_find_unused_parameters=True,
    )  # fmt: skip
    samples = [{"x": inputs(i)[0], "labels": torch.zeros(5, 8)} for i in range(12)]
    trainer = transformers.Trainer(model, args, train_dataset=samples)
    callback = attach(trainer)
    trainer.train()
    (log,) = (entry for entry in trainer.state.log_history if "loss" in entry)
    return log, callback.load, callback.report


def train_blocks(rank: int, folder):
    return train(rank, folder, DROPS[rank], [*BLOCKS, "head"])


def train_without_layers(rank: int, folder):
    return train(rank, folder, LATER_DROPS[rank], BLOCKS)


@exhaustive
def test_a_rank_that_drops_all_blocks_does_not_hang(tmp_path) -> None:
    (log, load, report), (other, other_load, _) = two_processes(train_blocks, tmp_path)
    assert log["aux_loss"] > 0
    assert log["expert_load_max"] == other["expert_load_max"]
    assert set(load) == {*BLOCKS, "head"}
    assert all(torch.equal(load[name], other_load[name]) for name in load)
    assert all(layer.is_counted for layer in report.layers.values())


@exhaustive
def test_a_rank_that_reaches_no_layer_does_not_hang(tmp_path) -> None:
    """DDP sums gradients only on a process whose output has a graph."""
    (log, load, _), (other, other_load, _) = two_processes(train_without_layers, tmp_path)
    assert log["expert_load_max"] == other["expert_load_max"]
    assert set(load) == set(BLOCKS)
    assert all(torch.equal(load[name], other_load[name]) for name in load)


def loop_of_ddp(rank: int, folder):
    """A loop by hand: DDP, the auxiliary loss, and the report of all processes."""
    torch.distributed.init_process_group("gloo")
    model = adapted(DROPS[rank], [*BLOCKS, "head"])
    parallel = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    losses = []
    with count_routing(parallel):
        for step in range(3):
            loss = parallel(inputs(2 * step + rank), torch.zeros(2, 5, 8))["loss"]
            loss = loss + collect_aux_loss(parallel)
            loss.backward()
            losses.append(loss.item())
        report = routing_report(parallel)
    return losses, {name: layer.load for name, layer in report.layers.items()}


@exhaustive
def test_a_loop_whose_rank_drops_all_blocks(tmp_path) -> None:
    (losses, load), (other_losses, other_load) = two_processes(loop_of_ddp, tmp_path)
    alone: list[list[float]] = [[], []]
    models = [adapted(drops, [*BLOCKS, "head"]) for drops in DROPS]
    sums: dict[str, torch.Tensor] = {}
    for rank, model in enumerate(models):
        for step in range(3):
            with count_routing(model):
                loss = model(inputs(2 * step + rank), torch.zeros(2, 5, 8))["loss"]
                alone[rank].append((loss + collect_aux_loss(model)).item())
                for name, layer in routing_report(model).layers.items():
                    # Every counted call has ten tokens, so the shares have equal weight.
                    sums[name] = sums.get(name, 0) + layer.load
    assert losses == pytest.approx(alone[0])
    assert other_losses == pytest.approx(alone[1])
    for name, total in sums.items():
        torch.testing.assert_close(load[name], total / total.sum())
        assert torch.equal(load[name], other_load[name])


def sharded(rank: int, folder):
    """FSDP2: the auxiliary loss of the rank, the report of all, and gradients."""
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    torch.distributed.init_process_group("gloo")
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    model = adapted([False], [*BLOCKS, "head"])
    for block in [*model.blocks, model.head]:
        fsdp.fully_shard(block, mesh=mesh)
    fsdp.fully_shard(model, mesh=mesh)
    with count_routing(model):
        loss = model(inputs(rank), torch.zeros(2, 5, 8))["loss"]
        aux = collect_aux_loss(model)
        (loss + aux).backward()
        report = routing_report(model)
    gradients = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
    return aux.item(), {name: layer.load for name, layer in report.layers.items()}, gradients


@exhaustive
def test_a_sharded_model_reports_like_one_process(tmp_path) -> None:
    results = two_processes(sharded, tmp_path)
    model = adapted([False], [*BLOCKS, "head"])
    with count_routing(model):
        for rank, (aux, _, _) in enumerate(results):
            loss = model(inputs(rank), torch.zeros(2, 5, 8))["loss"]
            expected = collect_aux_loss(model)
            assert aux == pytest.approx(expected.item(), rel=1e-5)
            # FSDP averages the gradients over the ranks.
            ((loss + expected) / 2).backward()
        report = routing_report(model)
    for _, load, gradients in results:
        for name, layer in report.layers.items():
            torch.testing.assert_close(load[name], layer.load)
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)
