"""Merge one task into the weights of a whole model."""

from __future__ import annotations

from torch import nn

from moelora_kernels.nn.base_linear import linear_with
from moelora_kernels.nn.group import MoeLoraGroup
from moelora_kernels.nn.layer import MixtureLayer, mixture_layers
from moelora_kernels.nn.layer_tensors import layer_tensors
from moelora_kernels.nn.linear import MoeLoraLinear
from moelora_kernels.nn.merge import Task, gate_of_task, merge_problem, merged_weight, merged_with
from moelora_kernels.nn.sharding import check_dense
from moelora_kernels.nn.wrappers import named_modules, places, unwrap

PEFT_MODEL = (
    "a PeftModel is merged and exported by PEFT. To merge one task: set_tasks(peft_model, [task]), "
    "then peft_model.merge_and_unload() or peft_model.merge_adapter(). To export one task: "
    "peft_model.save_pretrained(FOLDER), then python -m moelora_kernels.export --task N FOLDER OUT"
)


def merge_adapter(model: nn.Module, task: Task | None = None) -> None:
    """Merge one task into every layer of `model`; see `MoeLoraLinear.merge`.

    Args:
        model: a model whose gates do not depend on x: task gates, external gates, plain LoRA.
        task: as in `MoeLoraLinear.merge`; layers with router=None ignore it.

    Raises:
        ValueError: the model has no layer; a layer cannot be merged (the message names each, with
            the reason); or no layer uses the task. The model is then unchanged.

    Example:
        >>> from torch import nn
        >>> from moelora_kernels import MoeLoraConfig, merge_adapter, replace_linears
        >>> model = nn.Sequential(nn.Linear(16, 16))
        >>> config = MoeLoraConfig(num_experts=4, rank=2, router="task", num_tasks=3)
        >>> names = replace_linears(model, config, ["0"])
        >>> merge_adapter(model, task=2)
        >>> model[0].merged
        True
    """
    layers = _mergeable(model, task)
    merged: list[MoeLoraLinear] = []
    try:
        for layer in dict.fromkeys(layers.values()):
            layer.merge(task)
            merged.append(layer)
    except Exception:
        for layer in merged:
            layer.unmerge()
        raise


def unmerge_adapter(model: nn.Module) -> None:
    """Unmerge every merged layer of `model`. The base weights have the same bits as before.

    Raises:
        RuntimeError: no layer is merged.

    Example:
        >>> from torch import nn
        >>> from moelora_kernels import MoeLoraConfig, merge_adapter, replace_linears
        >>> from moelora_kernels import unmerge_adapter
        >>> model = nn.Sequential(nn.Linear(16, 16))
        >>> names = replace_linears(model, MoeLoraConfig.preset("lora", rank=2), ["0"])
        >>> merge_adapter(model)
        >>> unmerge_adapter(model)
        >>> model[0].merged
        False
    """
    merged = [m for m in model.modules() if isinstance(m, MoeLoraLinear) and m.merged]
    if not merged:
        if any(layer.is_peft_adapter for layer in mixture_layers(model)):
            raise RuntimeError("model: PEFT merges a PeftModel; call peft_model.unmerge_adapter()")
        raise RuntimeError("model: no layer is merged")
    for layer in merged:
        layer.unmerge()


def merge_and_unload(model: nn.Module, task: Task | None = None) -> nn.Module:
    """Replace every layer of `model` by a plain nn.Linear with one task merged into it.

    The model is changed in place and no longer needs this package. The experts and the original
    weights are lost unless you save them before. Layers are replaced one by one, so at most one
    weight exists twice at a time. A base that shares its weight with another module (a tied
    embedding) gets a separate weight.

    Args:
        model: as in `merge_adapter`.
        task: as in `merge_adapter`.

    Returns:
        `model`; or the nn.Linear that replaces it, if `model` itself is a layer.

    Raises:
        ValueError: as in `merge_adapter`; or the model contains a MoeLoraGroup, which can only run
            layers. If a merged weight is not finite, the layers before it are already replaced.

    Example:
        >>> from torch import nn
        >>> from moelora_kernels import MoeLoraConfig, merge_and_unload, replace_linears
        >>> model = nn.Sequential(nn.Linear(16, 16))
        >>> names = replace_linears(model, MoeLoraConfig.preset("lora", rank=2), ["0"])
        >>> merge_and_unload(model)
        Sequential(
          (0): Linear(in_features=16, out_features=16, bias=True)
        )
    """
    layers = _mergeable(model, task)
    if grouped := [n for n, m in named_modules(model) if isinstance(m, MoeLoraGroup)]:
        raise ValueError(
            "model: a MoeLoraGroup cannot run plain linears; use merge_adapter, or replace these "
            f"groups first: {', '.join(grouped)}"
        )
    # Keep names, not layers: a reference to a layer would keep its weight alive.
    names_by_layer: dict[int, list[str]] = {}
    for name, layer in layers.items():
        names_by_layer.setdefault(id(layer), []).append(name)
    place_of = {name: place for name, place in places(model).items() if name in layers}
    del layers, layer
    for names in names_by_layer.values():
        if "" in names:
            layer = unwrap(model)
            return linear_with(layer.base_layer, merged_weight(layer, task))
        parent, child = place_of[names[0]]
        layer = unwrap(parent._modules[child])
        linear = linear_with(layer.base_layer, merged_weight(layer, task))
        for name in names:
            parent, child = place_of[name]
            setattr(parent, child, linear)
    return model


def task_layers(model: nn.Module, task: Task | None) -> tuple[dict[str, MoeLoraLinear], list[str]]:
    """Return every MoeLoraLinear of `model` by name, and the problems that prevent merging a task.

    A layer that has several names is listed under every name. The names are portable (see
    `nn.wrappers`).

    Raises:
        ValueError: the model has no layer or is a PeftModel; `task` is passed and no layer has a
            task gate; or a tensor is sharded.
    """
    candidates = [
        (name, layer)
        for name, layer in named_modules(model, remove_duplicate=False)
        if isinstance(layer, MixtureLayer)
    ]
    if not candidates:
        raise ValueError("model: expected a model with MoeLoraLinear layers, got none")
    if any(layer.is_peft_adapter for _, layer in candidates):
        raise ValueError(f"model: {PEFT_MODEL}")
    check_dense({key: tensor.direct for key, tensor in layer_tensors(model).items()})
    if task is not None and all(layer.config.router is None for _, layer in candidates):
        raise ValueError("task: no layer of the model has a task gate; leave it out")
    layers, problems = {}, []
    for name, layer in candidates:
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
        elif problem := merge_problem(layer.base_layer):
            problems.append(f"{name}: base_layer: {problem}")
    if problems:
        raise ValueError("model: cannot be merged:\n  " + "\n  ".join(problems))
    return layers
