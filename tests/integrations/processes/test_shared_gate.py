"""A task gate that blocks share, under fully_shard: what works, and an error that names it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from moelora_kernels import MoeLoraConfig, replace_linears, set_tasks
from support.linears import randomise
from support.processes import run_processes

pytestmark = pytest.mark.exhaustive


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return x + self.linear(x)


def blocks(peft: bool = False, task_gate: str = "shared") -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(Block(), Block(), Block())
    options = dict(num_tasks=3, task_gate=task_gate)
    if peft:
        from peft import get_peft_model

        from moelora_kernels.peft import MoeLoraPeftConfig

        config = MoeLoraPeftConfig(preset="moelora", target_modules=["linear"], **options)
        model = get_peft_model(model, config)
    else:
        model.requires_grad_(False)
        replace_linears(model, MoeLoraConfig.preset("moelora", **options), ["linear"])
    return randomise(model).eval()


def gate_of(model: nn.Module) -> nn.Module:
    return next(m.router for m in model.modules() if getattr(m, "task_ids", None) is not None)


def shard(model: nn.Module, way: str, mesh) -> None:
    if way == "gate first":
        fully_shard(gate_of(model), mesh=mesh)
    if way != "whole":
        for module in list(model.modules()):
            if isinstance(module, Block):
                fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def shard_and_run(model: nn.Module, way: str, mesh, x: torch.Tensor) -> None:
    shard(model, way, mesh)
    model(x)


def gradients(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    model(x).square().mean().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in grads.items()}


WAYS = ("blocks", "gate first", "whole", "per layer")


def run(rank: int, peft: bool) -> None:
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    x = torch.linspace(-1, 1, 4 * 5 * 8).view(4, 5, 8)
    for way in WAYS:
        if peft and way == "gate first":
            # PEFT's names need the parts of the gate in the first layer, not the gate.
            continue
        task_gate = "per_layer" if way == "per layer" else "shared"
        model, whole = blocks(peft, task_gate), blocks(peft, task_gate)
        set_tasks(whole, [1, 2, 3, 1])
        expected = gradients(whole, x)
        set_tasks(model, [[1, 2], [3, 1]][rank])
        if way == "blocks":
            # While the blocks are sharded; under PEFT, where one block holds the gate, in forward.
            with pytest.raises(RuntimeError, match=r"^task gate: the blocks share it"):
                shard_and_run(model, way, mesh, x[2 * rank : 2 * rank + 2])
            continue
        shard(model, way, mesh)
        found = gradients(model, x[2 * rank : 2 * rank + 2])
        assert found.keys() == expected.keys(), way
        for name, gradient in expected.items():
            # Sums of float32 over two ranks, in another order.
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("peft", (False, True), ids=("bare", "peft"))
def test_ways_to_shard_a_gate_that_blocks_share(peft, tmp_path):
    if peft:
        pytest.importorskip("peft")
    run_processes(run, 2, tmp_path, peft)
