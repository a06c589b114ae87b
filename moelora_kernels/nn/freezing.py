"""freeze_experts: train some experts of a layer and leave the others as they are."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from moelora_kernels.autograd.frozen import frozen_ranges
from moelora_kernels.nn.layer import MixtureLayer
from moelora_kernels.nn.sharding import copy_into, gathered, is_dtensor
from moelora_kernels.nn.wrappers import named_modules

# Optimizer -> the layers whose frozen experts its steps restore.
_KEPT: WeakKeyDictionary[torch.optim.Optimizer, WeakSet[MixtureLayer]] = WeakKeyDictionary()

WITHOUT_OPTIMIZER = (
    "use an optimizer without weight decay, and pass optimizer=None to freeze_experts"
)


def freeze_experts(
    model: nn.Module, experts: Iterable[int], optimizer: torch.optim.Optimizer | None = None
) -> None:
    """Freeze experts of all layers of `model`. All others train; `[]` freezes none.

    The rows of A and the columns of B of a frozen expert get gradients of exactly zero. Its output,
    the gradient of x, and the gradients of other experts and of the router do not change: the
    router trains for all experts.

    An optimizer can move a Parameter whose gradient is zero: by weight decay, and by the momentum
    or the averages of steps before the freeze. Pass the optimizer, and after each of its steps the
    frozen experts have the values from before the step. Without it, use a new optimizer without
    weight decay.

    The frozen experts are an option of the layers, `config.frozen_experts`, also of the config that
    a PeftModel saves. A state dict does not contain them.

    Args:
        model: a model with mixture layers, or a part of one. In a PeftModel the active adapters
            change.
        experts: the numbers of the frozen experts, from 0 to E - 1. A shared expert has the number
            num_experts. All experts can be frozen.
        optimizer: the optimizer that trains the model. It also keeps experts that later calls
            freeze.

    Raises:
        ValueError: the model has no active layer; a number is not in [0, E), or is repeated;
            experts with share="A" are frozen, but not their A; or, with an optimizer, A or B of a
            layer is computed from other tensors. No layer is changed then.
        TypeError: `experts` are not whole numbers, or `optimizer` is not an optimizer of torch.

    Example:
        >>> import torch
        >>> from moelora_kernels import MoeLoraLinear, freeze_experts
        >>> layer = MoeLoraLinear(16, 32, num_experts=3, rank=2)
        >>> freeze_experts(layer, [0, 1])
        >>> layer(torch.randn(5, 16)).sum().backward()
        >>> [bool(block.any()) for block in layer.lora_B.grad.split(2, dim=1)]
        [False, False, True]
    """
    layers = active_layers(model)
    numbers = _numbers(experts)
    configs = {}
    for name, layer in layers.items():
        try:
            configs[layer] = layer.config.replace(frozen_experts=numbers)
        except (ValueError, TypeError) as error:
            message = str(error).removeprefix("frozen_experts: ")
            raise type(error)(f"experts: {name or type(layer).__name__}: {message}") from None
    if optimizer is not None:
        _keep(optimizer, layers)
    for layer, config in configs.items():
        layer.config = config
    for config in adapter_configs(model, layers.values()):
        config.frozen_experts = [*numbers]


def keep_frozen(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Let every step of `optimizer` restore the frozen experts of the layers that have any now.

    Raises as `freeze_experts`.
    """
    layers = active_layers(model).items()
    _keep(optimizer, {name: layer for name, layer in layers if layer.config.frozen_experts})


def active_layers(model: nn.Module) -> dict[str, MixtureLayer]:
    """Return the layers of `model` by name, without inactive adapters of PEFT.

    Raises ValueError if there are none.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model)}")
    modules = dict(named_modules(model)).items()
    layers = {name: layer for name, layer in modules if isinstance(layer, MixtureLayer)}
    selected = {name: layer for name, layer in layers.items() if layer.is_selected}
    if not selected:
        found = "only inactive or merged adapters" if layers else "none"
        raise ValueError(f"model: expected a model with mixture layers, got {found}")
    return selected


def adapter_configs(model: nn.Module, layers: Iterable[MixtureLayer]) -> list[Any]:
    """Return the configs that PEFT saves for the adapters among `layers`, each once."""
    adapters = {layer.name for layer in layers if layer.is_peft_adapter}
    configs: dict[int, Any] = {}
    for module in model.modules() if adapters else ():
        by_adapter = getattr(module, "peft_config", None)
        for name in adapters if isinstance(by_adapter, dict) else ():
            if hasattr(by_adapter.get(name), "frozen_experts"):
                configs[id(by_adapter[name])] = by_adapter[name]
    return list(configs.values())


def _numbers(experts: Iterable[int]) -> tuple[int, ...]:
    if isinstance(experts, (str, bytes)) or not isinstance(experts, Iterable):
        raise TypeError(f"experts: expected a list of numbers of experts, got {experts!r}")
    values = experts.tolist() if isinstance(experts, Tensor) else experts
    return tuple(values)


def _keep(optimizer: torch.optim.Optimizer, layers: dict[str, MixtureLayer]) -> None:
    """Let every step of the optimizer restore the frozen experts of the layers."""
    # accelerate wraps an optimizer.
    optimizer = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer, got {type(optimizer)}")
    for name, layer in layers.items():
        if computed := [key for key in layer.tensor_names if key not in layer._parameters]:
            raise ValueError(
                f"optimizer: {name}: {', '.join(computed)}: parametrized, pruned or normed, so the "
                "optimizer trains other tensors; use one without weight decay, and pass None"
            )
    kept = _KEPT.setdefault(optimizer, WeakSet())
    new = [layer for layer in layers.values() if layer not in kept]
    kept.update(new)
    if not new:
        return
    saved: list[tuple[MixtureLayer, str, int, int, Tensor]] = []

    def save(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        saved[:] = [
            (layer, key, start, length, _rows(layer, key).narrow(0, start, length).clone())
            for layer in new
            if layer.config.frozen_experts
            for key in layer.tensor_names
            if _trains(layer, key)
            for start, length in frozen_ranges(layer.config.ranks(), layer.config.frozen_experts)
        ]
        _check_held(optimizer, [layer._parameters[key] for layer, key, *_ in saved])

    def restore(*_: Any) -> None:
        for layer, key, start, length, values in saved:
            rows = _rows(layer, key)
            rows.narrow(0, start, length).copy_(values)
            if is_dtensor(layer._parameters[key]):
                copy_into(layer._parameters[key], rows if key.endswith("A") else rows.t())
        saved.clear()

    optimizer.register_step_pre_hook(save)
    optimizer.register_step_post_hook(restore)


def _check_held(optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
    """Raise RuntimeError if the optimizer holds copies of the Parameters, as under DeepSpeed."""
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if parameters and not any(id(parameter) in held for parameter in parameters):
        raise RuntimeError(
            "optimizer: it steps on copies of A and B (DeepSpeed), so frozen experts cannot be "
            f"kept; {WITHOUT_OPTIMIZER}"
        )


def _trains(layer: MixtureLayer, name: str) -> bool:
    """Return whether an optimizer can move A or B, and its rows belong to single experts."""
    parameter = layer._parameters.get(name)
    is_shared = name == "lora_A" and layer.config.share == "A"
    return not is_shared and (parameter is None or parameter.requires_grad)


def _rows(layer: MixtureLayer, name: str) -> Tensor:
    """Return A [R, in], or B [out, R] as [R, out]: a view, or the gathered values of a DTensor."""
    parameter = layer._parameters.get(name)
    values = None if parameter is None else gathered(parameter.detach())
    if values is None or values.dim() != 2:
        raise RuntimeError(
            f"optimizer: {name} is sharded or computed, so frozen experts cannot be kept; "
            f"{WITHOUT_OPTIMIZER}"
        )
    return values if name.endswith("A") else values.t()
