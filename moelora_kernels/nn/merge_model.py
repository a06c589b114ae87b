"""A whole model with the experts of one task in its weights."""

from __future__ import annotations

from torch import nn

from moelora_kernels.nn.base_linear import linear_with
from moelora_kernels.nn.group import MoeLoraGroup
from moelora_kernels.nn.layer import MixtureLayer
from moelora_kernels.nn.linear import MoeLoraLinear
from moelora_kernels.nn.merge import Task, gate_of_task, merged_weight, merged_with, why_no_merge


def merge_adapter(model: nn.Module, task: Task | None = None) -> None:
    """Merge one task into every layer of `model`, see `MoeLoraLinear.merge`; all of them or none.

    Args:
        model: a model whose gates do not depend on x: tasks, external gates, plain LoRA.
        task: as in `MoeLoraLinear.merge`; layers with router=None are the same for every task.

    Raises:
        ValueError: the model has no layer, or layers that cannot be merged, each by name with the
            reason; a task that no layer reads.
    """
    layers = _mergeable(model, task)
    done: list[MoeLoraLinear] = []
    try:
        for layer in dict.fromkeys(layers.values()):
            layer.merge(task)
            done.append(layer)
    except Exception:
        for layer in done:
            layer.unmerge()
        raise


def unmerge_adapter(model: nn.Module) -> None:
    """Unmerge every merged layer of `model`, exactly.

    Raises RuntimeError where none is merged.
    """
    merged = [m for m in model.modules() if isinstance(m, MoeLoraLinear) and m.merged]
    if not merged:
        raise RuntimeError("model: no layer is merged")
    for layer in merged:
        layer.unmerge()


def merge_and_unload(model: nn.Module, task: Task | None = None) -> nn.Module:
    """Put a plain nn.Linear with one task merged into it in the place of every layer of `model`.

    The model is changed in place and needs nothing of this package afterwards; experts and original
    weights are gone unless they are held elsewhere. Layers go one by one, so that one weight more
    than the model's is needed at a time. A base that shared its weight with another module (a tied
    embedding) has a weight of its own afterwards.

    Args and ValueError as `merge_adapter`; siblings of a MoeLoraGroup, whose forward needs them,
    are among the layers that cannot go. A sum that is not finite raises when its layer is reached:
    those before it are replaced by then.

    Returns:
        The model; where that is a layer itself, its nn.Linear.
    """
    layers = _mergeable(model, task)
    if grouped := [n for n, m in model.named_modules() if isinstance(m, MoeLoraGroup)]:
        raise ValueError(f"model: a MoeLoraGroup runs layers, not linears: {', '.join(grouped)}")
    # Names alone: a layer that is held here would keep its weight.
    places: dict[int, list[str]] = {}
    for name, layer in layers.items():
        places.setdefault(id(layer), []).append(name)
    del layers, layer
    for names in places.values():
        layer = model.get_submodule(names[0])
        linear = linear_with(layer.base_layer, merged_weight(layer, task))
        if "" in names:
            return linear
        for name in names:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, linear)
    return model


def task_layers(model: nn.Module, task: Task | None) -> tuple[dict[str, MoeLoraLinear], list[str]]:
    """Every MoeLoraLinear of `model` by each of its names, and what is in the way of one task.

    Raises ValueError where the model has no layer, or a task is given that none reads.
    """
    found = [
        (name, layer)
        for name, layer in model.named_modules(remove_duplicate=False)
        if isinstance(layer, MixtureLayer)
    ]
    if not found:
        raise ValueError("model: it has no MoeLoraLinear layer")
    if task is not None and all(layer.config.router is None for _, layer in found):
        raise ValueError("task: no layer of the model has a task gate; leave it out")
    layers, problems = {}, []
    for name, layer in found:
        if problem := layer.linear_problem():
            problems.append(f"{name}: {problem}")
            continue
        layers[name] = layer
        try:
            gate_of_task(layer, task)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    return layers, problems


def _mergeable(model: nn.Module, task: Task | None) -> dict[str, MoeLoraLinear]:
    layers, problems = task_layers(model, task)
    for name, layer in layers.items():
        if layer.merged:
            problems.append(f"{name}: {merged_with(layer)} already")
        elif reason := why_no_merge(layer.base_layer):
            problems.append(f"{name}: base_layer: {reason}")
    if problems:
        raise ValueError("model: it cannot be merged:\n  " + "\n  ".join(problems))
    return layers
