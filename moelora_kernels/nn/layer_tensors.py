"""The tensors of a layer under the names that its forward reads, also if they are computed.

A tensor is *computed* if a parametrization, a pruning mask, a weight norm or a spectral norm takes
the place of the Parameter. The Parameters that train then have other names, and the values that
the forward reads are not in `module.state_dict()`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from moelora_kernels.nn.layer import MixtureLayer
from moelora_kernels.nn.sharding import check_gathered, copy_into, gathered
from moelora_kernels.nn.wrappers import named_modules, unwrap

# The suffixes of the tensors from which a forward pre-hook computes the tensor NAME.
_PARTS: dict[type, tuple[str, ...]] = {
    BasePruningMethod: ("_orig", "_mask"),
    WeightNorm: ("_g", "_v"),
    SpectralNorm: ("_orig", "_u", "_v"),
}

_ADVICE = "load it before the parametrization, mask or norm is added, or remove that first"


class LayerTensor(NamedTuple):
    """A tensor that a layer or its router reads as `module.name`."""

    module: nn.Module
    name: str
    # The Parameter or buffer itself; None if the tensor is computed.
    direct: Tensor | None

    def value(self) -> Tensor:
        """Return the Parameter or buffer itself; for a computed tensor its value."""
        return tensor_value(self.module, self.name) if self.direct is None else self.direct


def layer_tensors(model: nn.Module) -> dict[str, LayerTensor]:
    """Return A, B and the router's tensors of every layer of `model` by their portable names.

    A router that several layers share is listed once, under its first name. The names are those of
    the model without wrappers (see `nn.wrappers`) and of layers without computed tensors.

    Raises:
        ValueError: a tensor has no values in this process because FSDP1 or ZeRO-3 shards it (see
            `check_gathered`), or is not a tensor.
    """
    tensors: dict[str, LayerTensor] = {}
    listed: set[object] = set()
    for name, layer in named_modules(model):
        if not isinstance(layer, MixtureLayer):
            continue
        prefix = f"{name}." if name else ""
        entries = [(key, LayerTensor(layer, key, t)) for key, t in _layer_parameters(layer)]
        if layer.router is not None:
            entries += named_tensors(layer.router, "router.")
        for key, entry in entries:
            # A computed tensor is a new object at each access.
            place = (id(entry.module), entry.name)
            identity = place if entry.direct is None else id(entry.direct)
            if identity not in listed:
                listed.add(identity)
                tensors[prefix + key] = entry
            if entry.direct is None and entry.name not in _computed_names(entry.module):
                attribute = getattr(entry.module, entry.name, None)
                if not isinstance(attribute, Tensor):
                    raise ValueError(
                        f"{prefix}{key}: expected a Parameter or tensor, got {type(attribute)}"
                    )
    check_gathered(model, {key: (t.module, t.name) for key, t in tensors.items()})
    return tensors


def _layer_parameters(layer: MixtureLayer) -> Iterator[tuple[str, Tensor | None]]:
    """Yield the name of each adapter tensor of a layer, and the Parameter or None if computed."""
    parts = _part_names(layer)
    parameters = {name: p for name, p in layer._parameters.items() if p is not None}
    for name in dict.fromkeys([*layer.tensor_names, *_computed_names(layer), *parameters]):
        if name not in parts:
            yield name, parameters.get(name)


def named_tensors(module: nn.Module, prefix: str) -> Iterator[tuple[str, LayerTensor]]:
    """Yield the tensors of a module's state dict under the names that its forward reads."""
    module = unwrap(module)
    parts, computed = _part_names(module), _computed_names(module)
    state: dict[str, Tensor] = {}
    module._save_to_state_dict(state, "", True)
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(
                f"{prefix}{name}: expected a tensor, got {type(tensor).__name__}; an adapter holds "
                "tensors only: save, merge or export the model before its routers are quantised"
            )
        if name not in parts:
            yield prefix + name, LayerTensor(module, name, tensor)
    for name in computed:
        yield prefix + name, LayerTensor(module, name, None)
    for name, child in module._modules.items():
        if child is not None and not (name == "parametrizations" and is_parametrized(module)):
            yield from named_tensors(child, f"{prefix}{name}.")


def _hooks(module: nn.Module) -> dict[str, object]:
    """Return the pruning, weight norm and spectral norm hooks by the tensor that they compute."""
    hooks = {}
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, tuple(_PARTS)):
            hooks[hook._tensor_name if isinstance(hook, BasePruningMethod) else hook.name] = hook
    return hooks


def has_computing_hooks(module: nn.Module) -> bool:
    """Return whether hooks before each call of `module` compute a tensor of it."""
    return bool(module._forward_pre_hooks) and bool(_hooks(module))


def _computed_names(module: nn.Module) -> list[str]:
    parametrized = module.parametrizations if is_parametrized(module) else ()
    return [*parametrized, *_hooks(module)]


def _part_names(module: nn.Module) -> set[str]:
    """Return the names of the tensors of `module` from which its hooks compute others."""
    return {
        name + suffix
        for name, hook in _hooks(module).items()
        for kind, suffixes in _PARTS.items()
        if isinstance(hook, kind)
        for suffix in suffixes
    }


@contextlib.contextmanager
def evaluation(module: nn.Module) -> Iterator[None]:
    """Set `module` and its children to evaluation inside the context."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


@torch.no_grad()
def tensor_value(module: nn.Module, name: str) -> Tensor:
    """Return the tensor `module.name`, computed anew if a parametrization or hook computes it.

    A computed tensor is the one of evaluation: a spectral norm makes no step, a mask is not drawn.
    """
    hook = _hooks(module).get(name)
    if is_parametrized(module, name):
        with evaluation(module.parametrizations[name]):
            return getattr(module, name).detach()
    if isinstance(hook, BasePruningMethod):
        return hook.apply_mask(module).detach()
    if isinstance(hook, WeightNorm):
        return hook.compute_weight(module).detach()
    if isinstance(hook, SpectralNorm):
        return hook.compute_weight(module, do_power_iteration=False).detach()
    return getattr(module, name)


@torch.no_grad()
def set_computed(values: Mapping[str, tuple[LayerTensor, Tensor]]) -> list[str]:
    """Change the Parameters from which tensors are computed, so that each gets a new value.

    A parametrization without a right_inverse is taken for the identity, as torch takes it when it
    is registered.

    Args:
        values: name -> a computed tensor and its new value.

    Returns:
        [] if every tensor has its value up to rounding; else why not, by name. Nothing is changed
        then.
    """
    problems: list[str] = []
    undo: list[Callable[[], object]] = []
    for name, (tensor, new) in values.items():
        current = tensor.value()
        new = gathered(new).to(current.device, current.dtype)
        undo.append(_undo(tensor.module, tensor.name))
        try:
            targets = _inverse(tensor.module, tensor.name, new)
        except Exception as error:
            # A right_inverse is code of the user and can raise any type of error.
            problems.append(f"{name}: it is computed, and its inverse fails ({error}); {_ADVICE}")
            continue
        for target, part in targets:
            copy_into(target, part)
        eps = torch.finfo(new.dtype).eps if new.is_floating_point() else 0.0
        tolerance = eps**0.75 * new.nan_to_num().abs().max().item()
        result = gathered(tensor.value())
        if not torch.allclose(result, new, rtol=0.0, atol=tolerance, equal_nan=True):
            problems.append(f"{name}: it is computed and cannot have this value; {_ADVICE}")
    if problems:
        for restore in reversed(undo):
            restore()
        return problems
    for tensor, _ in values.values():
        if hook := _hooks(tensor.module).get(tensor.name):
            # Before the next forward, the attribute would have the old value.
            hook(tensor.module, ())
    return []


def _undo(module: nn.Module, name: str) -> Callable[[], object]:
    """Return a function that restores the present tensors from which `module.name` is computed."""
    if is_parametrized(module, name):
        # A right_inverse may also change buffers of the parametrization.
        steps = module.parametrizations[name]
        state = {key: tensor.clone() for key, tensor in steps.state_dict().items()}
        return lambda: steps.load_state_dict(state)
    parts = [getattr(module, part) for part in _part_names(module) if part.startswith(name)]
    saved = [(part, part.clone()) for part in parts]
    return lambda: [part.copy_(values) for part, values in saved]


def _inverse(module: nn.Module, name: str, value: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Return (tensor, new values) for the tensors that `module.name` is computed from.

    Raises ValueError if there is no inverse.
    """
    if is_parametrized(module, name):
        steps = module.parametrizations[name]
        for step in reversed(steps):
            if hasattr(step, "right_inverse"):
                value = step.right_inverse(value)
        originals = [value] if steps.is_tensor else [*value]
        names = ["original"] if steps.is_tensor else [f"original{i}" for i in range(steps.ntensors)]
        targets = [getattr(steps, original) for original in names]
    else:
        hook = _hooks(module).get(name)
        if isinstance(hook, BasePruningMethod):
            targets, originals = [getattr(module, f"{name}_orig")], [value]
        elif isinstance(hook, WeightNorm):
            targets = [getattr(module, f"{name}_g"), getattr(module, f"{name}_v")]
            originals = [torch.norm_except_dim(value, 2, hook.dim), value]
        else:
            raise ValueError("it has none")
    if [t.shape for t in targets] != [t.shape for t in originals]:
        raise ValueError("it has other shapes")
    return list(zip(targets, originals, strict=True))
