"""Set the tasks of a batch for all layers of a model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moelora_kernels.nn.layer import MixtureLayer, mixture_layers
from moelora_kernels.nn.linear import MoeLoraLinear
from moelora_kernels.nn.merge import check_merged_task
from moelora_kernels.nn.routers import TokenTaskRouter


def set_tasks(model: nn.Module, tasks: Tensor | Sequence[int]) -> None:
    """The tasks, or the gates, of the coming forwards of `model`; they hold until the next call.

    Args:
        model: a model with task gates, external gates or task vectors.
        tasks: task ids [batch] from 1 to num_tasks, or [batch, L] where a sequence has several: the
            mean of their embeddings, 0 for padding. Or as a float tensor gates [batch, E] (also
            [1, E] for all, or one row per token) for router="external", or task vectors [batch, D]
            for "token_task".

    Raises:
        ValueError: the model has no layer that takes them, or takes both gates and task vectors;
            ids are out of range, vectors of another size, or a layer is merged with another task.
    """
    tasks = torch.as_tensor(tasks)
    for layer in model.modules():
        if isinstance(layer, MoeLoraLinear) and layer.merged:
            check_merged_task(layer, tasks)
    for layer in model.modules():
        if isinstance(layer, MoeLoraLinear) and layer.link is not None:
            layer.link.forget()
    if tasks.is_floating_point():
        layers = [layer for layer in _selected(model) if layer.config.router == "external"]
        routers = {layer.router for layer in _selected(model) if layer.router is not None}
        within = {m for router in routers for m in router.modules()}
        mixed = [m for m in within if isinstance(m, TokenTaskRouter)]
        if not layers and not mixed:
            raise ValueError(
                "model: no layer with router='external' takes gates; task ids are whole numbers"
            )
        if layers and mixed:
            raise ValueError(
                "model: it takes gates and task vectors; set_tasks of its parts tells them apart"
            )
        for router in mixed:
            router.check_tasks(tasks)
        for router in mixed:
            router.hold_tasks(tasks)
        for layer in layers:
            layer.external_gates = tasks.to(next(layer.parameters(recurse=False)).device)
        return
    routers = {layer.router for layer in _selected(model) if layer.config.router == "task"}
    if not routers:
        raise ValueError("model: no layer with router='task' takes task ids")
    for router in routers:
        router.check_tasks(tasks)
    for router in routers:
        router.hold_tasks(tasks)


def _selected(model: nn.Module) -> list[MixtureLayer]:
    return [layer for layer in mixture_layers(model) if layer.is_selected]
