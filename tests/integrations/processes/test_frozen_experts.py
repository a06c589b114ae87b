"""Frozen experts under fully_shard: zero gradients, and an optimizer that keeps their values."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

from moelora_kernels import MoeLoraConfig, freeze_experts, replace_linears
from moelora_kernels.nn.layer import mixture_layers
from support.linears import randomise
from support.processes import run_processes

pytestmark = pytest.mark.exhaustive


def build() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 6)).requires_grad_(False)
    replace_linears(model, MoeLoraConfig(num_experts=3, rank=2, top_k=2), ["0", "2"])
    return randomise(model)


def train(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the adapters after two steps of AdamW, one before and one after the freeze."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.5)
    for experts in ([], [0, 2]):
        freeze_experts(model, experts, optimizer)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    names = {n: p for n, p in model.named_parameters() if p.requires_grad}
    return {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in names.items()}


def run(rank: int) -> None:
    mesh = torch.distributed.init_device_mesh("cpu", (2,))
    x = torch.linspace(-1, 1, 4 * 5 * 8).view(4, 5, 8)
    expected = train(build(), x)
    model = build()
    for layer in mixture_layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    found = train(model, x[2 * rank : 2 * rank + 2])
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        # Sums of float32 over two ranks, in another order.
        torch.testing.assert_close(found[name], values, rtol=1e-4, atol=1e-5)


def test_two_processes_keep_frozen_experts(tmp_path):
    run_processes(run, 2, tmp_path)
