"""set_tasks and set_samples: the tasks or gates of samples, and the samples of the tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moelora_kernels.nn.base_linear import tensor_problem
from moelora_kernels.nn.external_gates import (
    check_pair,
    dense_rows,
    external_gates,
    external_slots,
)
from moelora_kernels.nn.layer import LoraLayer, mixture_layers, selected_layers
from moelora_kernels.nn.linear import forget_outputs
from moelora_kernels.nn.recorded_forwards import follow_forwards
from moelora_kernels.nn.routers import task_routers
from moelora_kernels.nn.samples import FLAT, Samples
from moelora_kernels.numerics import host_tensor


def set_tasks(model: nn.Module, tasks: Tensor | Sequence[int] | tuple[Tensor, Tensor]) -> None:
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
            float gates [batch, E], [1, E] or [..., E] for router="external";
            a tuple (weights, indices) of tensors [batch, K], [1, K] or [..., K] for
            router="external": the K experts of each sample or token, whole numbers, and their
            weights. An index outside [0, E) is not routed. With K < E a layer can run grouped;
            float task vectors [batch, D] for a TokenTaskRouter.

    Raises:
        TypeError: `tasks` are neither numbers nor a tensor; or `model` is not a module.
        ValueError: `tasks` are empty, or a number without a list; no layer uses them; the model
            uses both gates and task vectors; an id is out of range; a gate or a vector has another
            size; or a layer is merged with another task.

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
    follow_forwards(model)
    if isinstance(tasks, tuple) and any(isinstance(t, Tensor) and t.dim() for t in tasks):
        _set_sparse_gates(model, tasks)
        return
    expected = "a tensor or a list of numbers, with rows of one length (0 pads task ids)"
    is_meta = any(parameter.is_meta for parameter in model.parameters())
    passed, tasks = tasks, _as_tensor("tasks", tasks, expected, is_meta)
    if tasks.dim() == 0 and not tasks.is_floating_point():
        raise ValueError(
            f"tasks: expected one entry per sample, got {passed!r}; pass [{passed!r}] if all "
            "samples have this task"
        )
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.check_merged_task(tasks)
    forget_outputs(model.modules())
    if tasks.is_floating_point():
        layers = [layer for layer in selected_layers(model) if layer.config.router == "external"]
        routers_of = {
            layer: task_routers(layer.router)
            for layer in selected_layers(model)
            if layer.router is not None
        }
        routers = {router for inner in routers_of.values() for router in inner}
        if not layers and not routers:
            raise ValueError(
                "model: no layer with router='external' takes gates; task ids are whole numbers"
            )
        if layers and routers:
            raise ValueError(
                "model: it uses both gates and task vectors; call set_tasks on submodules instead"
            )
        for router in routers:
            router.check_tasks(tasks)
        for layer in layers:
            external_gates(tasks, layer.config.num_experts)
        held = None
        for router in routers:
            held = router.hold_tasks(tasks if held is None else held)
            router.layers_have_vectors = True
        for layer, inner in routers_of.items():
            if inner:
                # Layers outside of `model` keep their own.
                layer.task_vectors = held
        for layer in layers:
            layer.external_gates = tasks.to(layer.first_tensor().device)
            layer.external_experts = None
        return
    task_layers = [layer for layer in selected_layers(model) if layer.config.router == "task"]
    if not task_layers:
        raise ValueError(_no_task_ids(model, tasks))
    routers = {layer.router for layer in task_layers}
    for router in routers:
        router.check_tasks(tasks)
    for router in routers:
        router.hold_tasks(tasks)
    for layer in task_layers:
        # The router moved the ids to its device. Layers outside of `model` keep their own.
        layer.task_ids = layer.router.task_ids
        layer.router.layers_have_ids = True


def _set_sparse_gates(model: nn.Module, gates: tuple) -> None:
    """Set sparse gates (weights, indices) for the external layers of `model`."""
    check_pair(gates, "tasks")
    is_meta = any(parameter.is_meta for parameter in model.parameters())
    weights, indices = (
        _as_tensor(f"tasks[{i}]", tensor, "numbers [..., K]", is_meta)
        for i, tensor in enumerate(gates)
    )
    layers = [layer for layer in mixture_layers(model) if layer.config.router == "external"]
    selected = [layer for layer in layers if layer.is_selected]
    for num_experts in {layer.config.num_experts for layer in selected or layers}:
        external_slots((weights, indices), num_experts, "tasks")
    for layer in layers:
        if isinstance(layer, LoraLayer) and layer.merged_problem():
            layer.check_merged_task(dense_rows(weights, indices, layer.config.num_experts))
    if not selected:
        raise ValueError("model: no layer with router='external' takes gates (weights, indices)")
    forget_outputs(model.modules())
    for layer in selected:
        device = layer.first_tensor().device
        layer.external_gates, layer.external_experts = weights.to(device), indices.to(device)


def _no_task_ids(model: nn.Module, tasks: Tensor) -> str:
    """Return the text of the error for whole numbers that no layer takes."""
    layers = selected_layers(model)
    if any(layer.config.router == "external" for layer in layers):
        floats = "gates, floats [batch, num_experts], for router='external'"
    elif any(layer.router is not None and task_routers(layer.router) for layer in layers):
        floats = "task vectors, floats [batch, D], for its TokenTaskRouter"
    else:
        return "model: no layer with router='task' takes task ids"
    return f"tasks: expected {floats}, got {tasks.dtype} {[*tasks.shape]}; pass tasks.float()"


def set_samples(model: nn.Module, samples: Tensor | Sequence[int] | str | None) -> None:
    """Say which sample each token of the coming forwards belongs to, until the next call.

    It is needed if a layer gets an x from which this cannot be seen: tokens that the model has
    flattened, windows of an image, several segments in one row. `model` may be a part of a model,
    such as its encoder; other parts keep what they have.

    Args:
        model: a model, or a part of one, with mixture layers.
        samples: one of
            None: row b of x [B, L, I] is sample b. This is how every layer begins.
            "flat": as None; and a 2-D x is a flattened [B, L, I], where B is the number of task ids
            or gates that `set_tasks` got. Not for batch_dim=1, and not for sequence gates.
            whole numbers [T], or [B, L] with T = B L: the sample of each token of x, in its order.
            whole numbers [B]: the sample of each row of x [B, L, I].
            The samples are numbered from 0, in the order of the ids of `set_tasks`. A number below
            0 marks a token that belongs to no sample, such as padding: its gate is zero.

    Raises:
        TypeError: `samples` are not numbers; or `model` is not a module.
        ValueError: `model` has no mixture layer, or `samples` have another dtype or shape.

    Example:
        >>> import torch
        >>> from moelora_kernels import MoeLoraLinear, set_samples, set_tasks
        >>> layer = MoeLoraLinear(16, 32, num_experts=4, rank=2, router="task", num_tasks=3)
        >>> set_tasks(layer, [1, 3])
        >>> set_samples(layer, "flat")
        >>> layer(torch.randn(2, 5, 16).flatten(0, 1)).shape
        torch.Size([10, 32])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model)}")
    value = _checked_samples(samples)
    layers = mixture_layers(model)
    if not layers:
        raise ValueError("model: expected a model with mixture layers, got none")
    for layer in layers:
        layer.samples = value
    forget_outputs(model.modules())


def _checked_samples(samples: Tensor | Sequence[int] | str | None) -> Samples | str | None:
    if samples is None:
        return None
    if isinstance(samples, str):
        if samples != FLAT:
            raise ValueError(f"samples: expected numbers, 'flat' or None, got {samples!r}")
        return FLAT
    ids = _as_tensor("samples", samples, "whole numbers [tokens], [batch, sequence] or [batch]")
    if ids.dim() not in (1, 2) or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            "samples: expected whole numbers [tokens], [batch, sequence] or [batch], the sample "
            f"of each token or row from 0, got {ids.dtype} {[*ids.shape]}"
        )
    # Tensors of inference mode cannot be used in a forward that trains.
    with torch.inference_mode(False):
        return Samples(ids.to(torch.int32, copy=True), max(int(ids.max()) + 1, 0))


def _as_tensor(
    name: str, values: Tensor | Sequence[int], expected: str, is_meta: bool = False
) -> Tensor:
    """Return values as a dense tensor with at least one entry, whole numbers as int32 or int64.

    Args:
        name: the argument that an error names.
        values: a tensor or nested lists of numbers.
        expected: what an error says that the argument can be.
        is_meta: whether the tensor may be on the meta device, because the model is.
    """
    if not isinstance(values, Tensor):
        try:
            values = host_tensor(values)
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"{name}: expected {expected}, got {values!r}") from error
    if problem := tensor_problem(values):
        raise TypeError(f"{name}: expected {expected}, got {problem}")
    if values.is_meta and not is_meta:
        raise ValueError(f"{name}: expected a tensor with values, got one on the meta device")
    if values.numel() == 0:
        raise ValueError(f"{name}: expected at least one entry, got a tensor {[*values.shape]}")
    if values.is_sparse:
        values = values.to_dense()
    small_integers = (torch.uint8, torch.int8, torch.int16)
    values = values.long() if values.dtype in small_integers else values
    if not values.is_inference():
        return values
    # Tensors of inference mode cannot be used in a forward that trains.
    with torch.inference_mode(False):
        return values.clone()
