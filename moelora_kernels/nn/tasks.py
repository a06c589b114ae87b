"""set_tasks: set the tasks or the external gates for the next forwards of a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moelora_kernels.nn.base_linear import tensor_problem
from moelora_kernels.nn.gates import external_gates
from moelora_kernels.nn.layer import LoraLayer, selected_layers
from moelora_kernels.nn.linear import MoeLoraLinear
from moelora_kernels.nn.routers import TokenTaskRouter


def set_tasks(model: nn.Module, tasks: Tensor | Sequence[int]) -> None:
    """Set the tasks, or the gates, for all forwards of `model` until the next call.

    Row b of x [B, L, I] uses entry b; for an x of another shape call `set_samples`. `model` may be
    a part of a model that gets another number of rows: the decoder of a model that generates with
    n beams takes ids.repeat_interleave(n), a model that gets chosen and rejected answers takes
    ids.repeat(2). Layers outside of the part keep their tasks.

    Args:
        model: a model with task gates, external gates or TokenTaskRouters.
        tasks: one of
            task ids [batch], 1 to num_tasks, for router="task";
            task ids [batch, J] if a sequence has several tasks: the gate uses the mean of their
            embeddings, 0 is padding;
            float gates [batch, E], [1, E] or [T, E] for router="external";
            float task vectors [batch, D] for a TokenTaskRouter.

    Raises:
        TypeError: `tasks` are neither numbers nor a tensor; or `model` is not a module.
        ValueError: `tasks` are empty; no layer uses them; the model uses both gates and task
            vectors; an id is out of range; a gate or a vector has another size; or a layer is
            merged with another task.

    Example:
        >>> import torch
        >>> from moelora_kernels import MoeLoraLinear, set_tasks
        >>> layer = MoeLoraLinear(16, 32, num_experts=4, rank=2, router="task", num_tasks=3)
        >>> set_tasks(layer, [1, 3])
        >>> layer(torch.randn(2, 5, 16)).shape
        torch.Size([2, 5, 32])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model)}")
    tasks = _as_tensor(tasks, is_meta=any(p.is_meta for p in model.parameters()))
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.check_merged_task(tasks)
    for layer in model.modules():
        if isinstance(layer, MoeLoraLinear) and layer.link is not None:
            layer.link.forget()
    if tasks.is_floating_point():
        layers = [layer for layer in selected_layers(model) if layer.config.router == "external"]
        routers = {layer.router for layer in selected_layers(model) if layer.router is not None}
        parts = {module for router in routers for module in router.modules()}
        task_routers = [module for module in parts if isinstance(module, TokenTaskRouter)]
        if not layers and not task_routers:
            raise ValueError(
                "model: no layer with router='external' takes gates; task ids are whole numbers"
            )
        if layers and task_routers:
            raise ValueError(
                "model: it uses both gates and task vectors; call set_tasks on submodules instead"
            )
        for router in task_routers:
            router.check_tasks(tasks)
        for layer in layers:
            external_gates(tasks, layer.config.num_experts)
        for router in task_routers:
            router.hold_tasks(tasks)
        for layer in layers:
            layer.external_gates = tasks.to(layer.first_tensor().device)
        return
    task_layers = [layer for layer in selected_layers(model) if layer.config.router == "task"]
    if not task_layers:
        raise ValueError("model: no layer with router='task' takes task ids")
    routers = {layer.router for layer in task_layers}
    for router in routers:
        router.check_tasks(tasks)
    for router in routers:
        router.hold_tasks(tasks)
    for layer in task_layers:
        # The router moved the ids to its device. Layers outside of `model` keep their own.
        layer.task_ids = layer.router.task_ids
        layer.router.layers_have_ids = True


def _as_tensor(tasks: Tensor | Sequence[int], is_meta: bool) -> Tensor:
    """Return tasks as a dense tensor with at least one entry.

    is_meta: whether the model has tensors without values, so that tasks may have none either.
    """
    if not isinstance(tasks, Tensor):
        try:
            tasks = torch.as_tensor(tasks)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(
                "tasks: expected a tensor or a list of numbers, with rows of one length (0 pads "
                f"task ids), got {tasks!r}"
            ) from error
    if problem := tensor_problem(tasks):
        raise TypeError(f"tasks: expected a tensor or a list of numbers, got {problem}")
    if tasks.is_meta and not is_meta:
        raise ValueError("tasks: expected a tensor with values, got one on the meta device")
    if tasks.numel() == 0:
        raise ValueError(f"tasks: expected at least one entry, got a tensor {[*tasks.shape]}")
    if tasks.is_sparse:
        tasks = tasks.to_dense()
    small_integers = (torch.uint8, torch.int8, torch.int16)
    tasks = tasks.long() if tasks.dtype in small_integers else tasks
    if not tasks.is_inference():
        return tasks
    # Tensors of inference mode cannot be used in a forward that trains.
    with torch.inference_mode(False):
        return tasks.clone()
