"""Merge one layer. If every token has the same gate, the mixture equals one plain LoRA.

    delta W = sum_e scale_e gate_e B_e A_e = B' A'        [O, I]
    A' = A                 B' = B, its columns times scale_e gate_e        rank R
    share="A": A' = A      B' = sum_e scale_e gate_e B_e                   rank r

This module computes the gate of a task, A' and B', and the merged weight. A merged layer does not
change its base. It holds W + delta W in a buffer that is not part of the state dict. `unmerge`
drops the buffer. So the base keeps its bits (subtracting delta W would not restore them), a tied
weight stays tied, and a checkpoint of a merged model does not contain delta W in its base weights.
A merged layer needs the memory of a second weight; `merge_and_unload` keeps only the merged weight.

Source: arXiv 2310.18339 (MOELoRA), which recovers one weight per task.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moelora_kernels.nn.base_linear import check_called, dense_weight
from moelora_kernels.nn.external_gates import external_gates
from moelora_kernels.nn.gates import gate_from
from moelora_kernels.nn.layer_tensors import evaluation, tensor_value
from moelora_kernels.numerics import host_tensor
from moelora_kernels.types import ExternalGates

# A task id; several ids of one sample; or for router="external" the gate itself.
Task = int | Sequence[int] | Tensor
REDUCED_BASE = (
    "init='svd_segments' reduced the base, so no LoRA of its experts fits the original weight"
)


def task_gate_problem(layer: nn.Module) -> str | None:
    """Return why the gate of a task differs between tokens or forwards; None if it does not."""
    config = layer.config
    if config.select == "sampling":
        return "its experts are sampled in every forward (select='sampling')"
    if config.router in (None, "task", "external"):
        return None
    router = "a module" if isinstance(config.router, nn.Module) else repr(config.router)
    return (
        f"its gate depends on x (router={router}, one gate per {config.granularity}), so no "
        "single weight or LoRA equals it"
    )


@torch.no_grad()
def gate_of_task(layer: nn.Module, task: Task | None = None) -> Tensor:
    """Return the gate [E] that every token of a task has in evaluation.

    Args:
        layer: a module with the config and router of a MoeLoraLinear.
        task: with router="task" an id from 1 to num_tasks, or the list of ids of one sample; with
            router="external" the gate, floats [E] or [1, E]; ignored with router=None, whose gates
            are 1.

    Returns:
        [E] in float32 (float64 for a float64 router); the shared expert, if any, comes last.

    Raises:
        ValueError: the gate depends on x; the task is missing, out of range or of another kind.
        TypeError: the task is neither an id nor a gate.
    """
    config = layer.config
    if problem := task_gate_problem(layer):
        raise ValueError(f"task: {problem}")
    logits = external = None
    if config.router == "external":
        external = _external_gate(task, config.num_experts)
    elif config.router is not None:
        logits = _logits_of_task(layer.router, task)
    return gate_from(config, logits, external).weights[0]


def _tensor(task: Task) -> Tensor:
    try:
        return host_tensor(task)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"task: expected a task id, or a gate of floats, got {task!r}") from error


def _external_gate(task: Task | None, experts: int) -> Tensor:
    if task is None:
        raise ValueError(f"task: router='external' needs the gate to merge, floats [{experts}]")
    gate = external_gates(torch.atleast_2d(_tensor(task)), experts)
    if gate.shape[0] != 1:
        raise ValueError(f"task: expected one gate [{experts}], got {gate.shape[0]} rows")
    return gate.double() if gate.dtype == torch.float64 else gate.float()


def _logits_of_task(router: nn.Module, task: Task | None) -> Tensor:
    """Return the logits [1, E] of a task; the tasks that `set_tasks` set do not change."""
    if task is None:
        raise ValueError(f"task: router='task' needs a task id, 1 to {router.num_tasks}")
    ids = _tensor(task)
    if ids.is_floating_point() or ids.dtype == torch.bool or ids.dim() > 1:
        raise ValueError(f"task: expected a task id, 1 to {router.num_tasks}, got {task!r}")
    ids = ids[None]
    router.check_tasks(ids)
    with evaluation(router):
        return router(ids)


@torch.no_grad()
def lora_of_task(layer: nn.Module, task: Task | None = None) -> tuple[Tensor, Tensor]:
    """Return A' [R, I] and B' [O, R] of a task in float64; [r, I] and [O, r] with share="A".

    An expert whose gate is zero is zero in both, even if its A or B holds NaN.

    Args:
        layer: a module with the config, router, lora_A and lora_B of a MoeLoraLinear.
        task: as in `gate_of_task`, which also raises.
    """
    config = layer.config
    a, b = (
        tensor_value(layer, name).detach().to(torch.float64, copy=True)
        for name in ("lora_A", "lora_B")
    )
    gate = gate_of_task(layer, task).to(b)
    factors = gate * gate.new_tensor(config.scales(a.shape[1]))
    ranks = torch.tensor(config.ranks(), device=b.device)
    columns = factors.repeat_interleave(ranks, output_size=b.shape[1])
    # A select, not a product: a NaN in an expert with gate zero does not spread.
    scaled = torch.where(columns != 0, b * columns, 0)
    if config.share == "A":
        return a, scaled.unflatten(1, (len(ranks), -1)).sum(dim=1)
    return torch.where(columns[:, None] != 0, a, 0), scaled


def delta_weight(layer: nn.Module, task: Task | None = None) -> Tensor:
    """Return sum_e scale_e gate_e B_e A_e of a task, [O, I] in float64 on the adapter's device.

    The arguments and errors are as in `lora_of_task`.
    """
    a, b = lora_of_task(layer, task)
    return b @ a


@torch.no_grad()
def merged_weight(layer: nn.Module, task: Task | None = None) -> Tensor:
    """Return W + delta W in the dtype of W, [O, I], summed in float64 and rounded once.

    Raises:
        ValueError: the base is not a plain nn.Linear with a dense float weight; the base or the
            adapter is on the meta device; the sum is not finite; or `gate_of_task` raises.
    """
    if problem := merge_problem(layer.base_layer):
        raise ValueError(f"base_layer: {problem}")
    if layer.first_tensor().is_meta:
        raise ValueError("lora_A: it is on the meta device and has no values")
    weight = dense_weight(layer.base_layer)
    merged = delta_weight(layer, task).to(weight.device).add_(weight).to(weight.dtype)
    if not merged.isfinite().all():
        raise ValueError(
            f"task: W + delta W of task {task!r} is not finite in {weight.dtype}: the weight or "
            "the adapter has values that are not finite, or the sum is too large for the dtype"
        )
    return merged


def merge_problem(base: nn.Module) -> str | None:
    """Return why delta W cannot be added to the weight of `base`; None if it can."""
    weight = dense_weight(base)
    is_float = weight is not None and weight.is_floating_point() and weight.itemsize > 1
    if not is_float or weight.shape != (base.out_features, base.in_features):
        base_weight = getattr(base, "weight", None)
        kind = "no weight"
        if isinstance(base_weight, Tensor):
            kind = f"a weight of {type(base_weight).__name__}, {base_weight.dtype}"
        elif base_weight is not None:
            # A linear of torch.ao.quantization has a method in place of the parameter.
            kind = "a weight that is not a tensor"
        return (
            "merging needs a plain nn.Linear with a dense float weight (a quantised, hooked or "
            f"sharded base cannot be merged), got a {type(base).__name__} with {kind}"
        )
    return "its weight is on the meta device and has no values" if weight.is_meta else None


def copy_task(task: Task | None) -> Task | None:
    """Return a copy of `task`, so that later changes by the caller have no effect."""
    return task.detach().clone() if isinstance(task, Tensor) else copy.deepcopy(task)


def merged_with(layer: nn.Module) -> str:
    """Return the start of an error message that names the merged task."""
    task = f" with task {layer.merged_task!r}" if layer.config.router == "task" else ""
    return f"the layer is merged{task}"


def forward_merged(layer: nn.Module, x: Tensor, gates: ExternalGates | None) -> Tensor:
    """Return y = x (W + delta W)t + b of a merged layer.

    Raises:
        ValueError: gates are passed, but the layer computes with the merged gate.
        RuntimeError: the forward trains, or the base has hooks that a merged weight would skip.
    """
    if gates is not None:
        raise ValueError(f"gates: {merged_with(layer)}; unmerge() before you pass other gates")
    trains = layer.training and torch.is_grad_enabled()
    if trains and any(q.requires_grad for q in layer.parameters()):
        raise RuntimeError(f"{merged_with(layer)} and does not train; unmerge() or eval() first")
    if dense_weight(layer.base_layer) is None:
        raise RuntimeError(
            f"{merged_with(layer)}. Since then the base got hooks or another forward, and a "
            "merged layer does not call the base; unmerge() first"
        )
    check_called(layer.base_layer, x)
    return nn.functional.linear(x, layer.merged_weight, layer.bias)


def check_merged_task(layer: nn.Module, tasks: Tensor) -> None:
    """Raise ValueError if `tasks` contains a task that a merged layer is not merged with.

    tasks: as in `set_tasks`. The host reads them, so it waits for the device.
    """
    takes_gates = layer.config.router == "external"
    if layer.config.router is None or tasks.is_floating_point() != takes_gates:
        return
    if not _samples(tasks) <= _samples(host_tensor(layer.merged_task)[None]):
        raise ValueError(f"tasks: {merged_with(layer)}, got {tasks.tolist()}; unmerge first")


def _samples(tasks: Tensor) -> set[tuple]:
    """Return the distinct rows of ids [B] or [B, J] without padding, or of gates [..., E]."""
    if tasks.is_floating_point():
        return {tuple(row) for row in tasks.reshape(-1, tasks.shape[-1]).tolist()}
    rows = torch.atleast_1d(tasks)
    return {tuple(sorted(filter(None, row))) for row in rows.reshape(len(rows), -1).tolist()}
