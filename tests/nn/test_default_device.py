"""torch's default device changes no result."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moelora_kernels import (
    MoeLoraLinear,
    collect_aux_loss,
    count_routing,
    load_adapter,
    record_routing,
    routing_report,
    save_adapter,
    set_samples,
    set_tasks,
    warmup,
)
from moelora_kernels.testing import ROUTINGS, draw_experts
from support.ffns import make_ffn
from support.linears import IN, TASKS, make_layer, task_layer


@contextmanager
def default_device(device: str):
    torch.set_default_device(device)
    try:
        yield
    finally:
        # None removes the mode, which a device would leave in every call of torch.
        torch.set_default_device(None)


# Both ways to set the default device. With "meta" a tensor in the wrong place has no value.
CONTEXTS = {
    "context": lambda: torch.device("meta"),
    "set_default_device": lambda: default_device("meta"),
}


def same(actual: Any, expected: Any) -> None:
    if isinstance(expected, Tensor):
        assert actual.device == expected.device
        assert torch.equal(actual, expected)
    elif isinstance(expected, (list, tuple)):
        for a, b in zip(actual, expected, strict=True):
            same(a, b)
    else:
        assert actual == expected


def step(layer: nn.Module, features: int) -> list[Tensor]:
    torch.manual_seed(1)
    x = torch.randn(2, 5, features, dtype=torch.float64, device="cpu", requires_grad=True)
    y = layer(x)
    parameters = [x, *(p for p in layer.parameters() if p.requires_grad)]
    return [y.detach(), *torch.autograd.grad(y.sum(), parameters, allow_unused=True)]


def sequences() -> Tensor:
    return torch.ones(2, 5, IN, dtype=torch.float64, device="cpu")


# --- flows: a setup that runs without a default device, then what runs with it ------------------


def linear(**options) -> tuple[Callable, Callable]:
    return lambda: make_layer(**options), lambda layer: step(layer, IN)


def tasks(layer: MoeLoraLinear) -> list[Tensor]:
    set_tasks(layer, [1, TASKS])
    return step(layer, IN)


def external_gates(layer: MoeLoraLinear) -> list[Tensor]:
    set_tasks(layer, [[0.5, 0.0, 0.25, 0.25], [0.0, 1.0, 0.0, 0.0]])
    return step(layer, IN)


def merged(layer: MoeLoraLinear) -> list[Tensor]:
    layer.merge(task=3)
    set_tasks(layer, [3, 3])
    merged_output = layer(sequences())
    layer.unmerge()
    return [merged_output, layer.export_lora(task=2)]


def merged_with_a_gate(layer: MoeLoraLinear) -> Tensor:
    layer.merge(task=[0.5, 0.0, 0.25, 0.25])
    return layer(sequences())


def samples(layer: MoeLoraLinear) -> Tensor:
    set_samples(layer, [0, 1])
    return step(layer, IN)


def report(layer: MoeLoraLinear) -> list:
    with record_routing(layer):
        layer(sequences())
        loss = collect_aux_loss(layer)
    with count_routing(layer, num_tasks=2) as counter:
        counter.set_tasks([1, 2])
        layer(sequences())
        return [loss, *counter.sums.values(), str(routing_report(layer))]


def warm(layer: MoeLoraLinear) -> list[Tensor]:
    warmup(layer, tokens=(1, 4))
    return step(layer, IN)


FLOWS = {
    "wide": linear(impl="wide"),
    "grouped": linear(impl="grouped"),
    "reference": linear(impl="reference"),
    "dropout": linear(dropout=0.3, dropout_mask="per_expert"),
    "sequence": linear(granularity="sequence"),
    "warmup": (make_layer, warm),
    "ffn": (make_ffn, lambda layer: step(layer, layer.hidden_size)),
    "tasks": (task_layer, tasks),
    "external gates": (lambda: make_layer(router="external"), external_gates),
    "merge": (task_layer, merged),
    "merge with a gate": (lambda: make_layer(router="external").eval(), merged_with_a_gate),
    "samples": (lambda: make_layer(granularity="sequence"), samples),
    "report": (lambda: make_layer(aux="entropy"), report),
}


@pytest.mark.parametrize("context", CONTEXTS)
@pytest.mark.parametrize("flow", FLOWS)
def test_a_layer_on_the_cpu(flow: str, context: str) -> None:
    make, run = FLOWS[flow]
    expected, layer = run(make()), make()
    with CONTEXTS[context]():
        actual = run(layer)
    same(actual, expected)


@pytest.mark.parametrize("context", CONTEXTS)
def test_an_adapter_file(context: str, tmp_path: Path) -> None:
    layer, other, path = make_layer(), make_layer(), tmp_path / "a.safetensors"
    with torch.no_grad():
        other.lora_A.zero_()
    with CONTEXTS[context]():
        save_adapter(layer, path)
        load_adapter(other, path)
    assert torch.equal(other.lora_A, layer.lora_A)


@pytest.mark.parametrize("routing", ROUTINGS)
def test_drawn_experts(routing: str) -> None:
    def draw() -> Tensor:
        return draw_experts(routing, 20, 4, 1, torch.Generator().manual_seed(0))

    expected = draw()
    with torch.device("meta"):
        same(draw(), expected)


def test_the_tasks_of_a_batch() -> None:
    tasks = pytest.importorskip("moelora_kernels.trainer.tasks")
    collate = tasks.TaskCollator(lambda samples: {})
    with torch.device("meta"):
        batch = collate([{"task_ids": 1}, {"task_ids": 2}])
    same(batch["task_ids"], torch.tensor([1, 2]))
