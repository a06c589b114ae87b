"""A mixture with one gate for every token is a plain LoRA: its gate, its factors, its delta of W.

    delta W = sum_e scale_e gate_e B_e A_e = B' A'        [O, I]
    A' = A                 B' = B, its columns times scale_e gate_e        rank R
    share="A": A' = A      B' = sum_e scale_e gate_e B_e                   rank r

Source: arXiv 2310.18339 (MOELoRA), which recovers one weight per task.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moelora_kernels.nn.routers import add_shared_expert, external_gates, gate_of_logits

# A task id, several ids that one sample has together, or the gate itself for router="external".
Task = int | Sequence[int] | Tensor


def why_no_task_gate(layer: nn.Module) -> str:
    """Why the gate of a layer is not one row for every token; empty where it is."""
    config = layer.config
    if config.router in (None, "task", "external"):
        return ""
    router = "a module" if isinstance(config.router, nn.Module) else repr(config.router)
    return (
        f"its gate depends on x (router={router}, one gate per {config.granularity}), so that no "
        "single weight or LoRA equals it"
    )


@torch.no_grad()
def gate_of_task(layer: nn.Module, task: Task | None = None) -> Tensor:
    """The gate that every token of a task has in evaluation, by the code that forward uses.

    Args:
        layer: what has the config and router of a MoeLoraLinear.
        task: with router="task" an id from 1 to num_tasks, or what else `set_tasks` takes for one
            sample; with router="external" the gate, floats [E] or [1, E]; with router=None, where
            every task has gates of 1, nothing is read.

    Returns:
        [E] in float32 (float64 of a float64 router), the shared expert last where there is one.

    Raises:
        ValueError: the gate depends on x; the task is missing, out of range or of another kind.
    """
    config = layer.config
    if reason := why_no_task_gate(layer):
        raise ValueError(f"task: {reason}")
    if config.router is None:
        gate = torch.ones(1, config.num_experts)
    elif config.router == "external":
        gate = _given_gate(task, config.num_experts)
    else:
        logits = _logits_of_task(layer.router, task)
        gate, _ = gate_of_logits(logits, config, training=False)
    gate, _ = add_shared_expert(gate, None, config)
    return gate[0]


def _given_gate(task: Task | None, experts: int) -> Tensor:
    if task is None:
        raise ValueError(f"task: router='external' needs the gate to merge, floats [{experts}]")
    gate = torch.as_tensor(task)
    gate = external_gates(gate[None] if gate.dim() == 1 else gate, experts)
    if gate.shape[0] != 1:
        raise ValueError(f"task: expected one gate [{experts}], got {gate.shape[0]} rows")
    return gate.double() if gate.dtype == torch.float64 else gate.float()


def _logits_of_task(router: nn.Module, task: Task | None) -> Tensor:
    """Logits [1, E] of a task; the tasks that are set stay set."""
    if task is None:
        raise ValueError(f"task: router='task' needs a task id, 1 to {router.num_tasks}")
    ids = torch.as_tensor(task)
    if ids.is_floating_point() or ids.dtype == torch.bool or ids.dim() > 1:
        raise ValueError(f"task: expected a task id, 1 to {router.num_tasks}, got {task!r}")
    ids = ids[None]
    router.check_tasks(ids)
    held = router.task_ids
    try:
        router.hold_tasks(ids)
        return router()
    finally:
        router.task_ids = held


@torch.no_grad()
def lora_of_task(layer: nn.Module, task: Task | None = None) -> tuple[Tensor, Tensor]:
    """A' [R, I] and B' [O, R] of a task in float64 ([r, I] and [O, r] where experts share A).

    An expert whose gate is zero is zero in both, whatever its A and B hold.

    Args:
        layer: what has the config, router, lora_A [R, I] and lora_B [O, R] of a MoeLoraLinear.
        task: see `gate_of_task`.

    Raises ValueError as `gate_of_task` does.
    """
    config, a, b = layer.config, layer.lora_A.double(), layer.lora_B.double()
    ranks = torch.tensor(config.ranks())
    gate = gate_of_task(layer, task).to(b)
    factors = gate * gate.new_tensor(config.scales(a.shape[1]))
    columns = factors.repeat_interleave(ranks.to(b.device))
    # A select, not a product: a NaN in an expert that is off stays there.
    scaled = torch.where(columns != 0, b * columns, 0)
    if config.share == "A":
        return a, scaled.unflatten(1, (len(ranks), -1)).sum(dim=1)
    return torch.where(columns[:, None] != 0, a, 0), scaled


def delta_weight(layer: nn.Module, task: Task | None = None) -> Tensor:
    """sum_e scale_e gate_e B_e A_e of a task, [O, I] in float64 on the adapter's device.

    Arguments and errors as `lora_of_task`.
    """
    a, b = lora_of_task(layer, task)
    return b @ a
