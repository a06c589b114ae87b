"""Wrappers of modules (torch.compile, DDP, FSDP1, ...), and names that do not depend on them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import Tensor, nn

# The module that defines a wrapper, its class, and the name of the child that it wraps.
WRAPPERS = (
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    ("torch.nn.parallel", "DataParallel", "module"),
    ("torch.nn.parallel", "DistributedDataParallel", "module"),
    ("torch.distributed.fsdp", "FullyShardedDataParallel", "_fsdp_wrapped_module"),
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "ActivationWrapper",
        "_checkpoint_wrapped_module",
    ),
    ("torch.optim.swa_utils", "AveragedModel", "module"),
    ("deepspeed", "DeepSpeedEngine", "module"),
)


def unwrap(model: nn.Module) -> nn.Module:
    """Return the module inside all wrappers around `model`; see `WRAPPERS`.

    FSDP2 (`fully_shard`) and `model.compile()` change a model in place, so they are not wrappers.
    """
    while (child := wrapped_child(model)) is not None:
        model = model._modules[child]
    return model


def is_pretrained(module: nn.Module) -> bool:
    """Return whether a module is a PreTrainedModel of transformers."""
    return any(cls.__name__ == "PreTrainedModel" for cls in type(module).__mro__)


def wrapped_child(module: nn.Module) -> str | None:
    """Return the name of the child that `module` wraps; None if it is not a wrapper."""
    for source, name, child in WRAPPERS:
        # If the module that defines the class is not imported, no instance exists.
        kind = getattr(sys.modules.get(source), name, None)
        if kind is not None and isinstance(module, kind):
            return child
    return None


def without_wrapped(name: str, *, keep_module: bool) -> str:
    """Return a dotted name of a file without every part that is the name of a wrapped child.

    keep_module: whether to keep "module", which may also be a child of the model itself.
    """
    wrapped = {child for _, _, child in WRAPPERS if not (keep_module and child == "module")}
    return ".".join(part for part in name.split(".") if part not in wrapped)


def places(model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Return name -> (parent, child) for every module inside `model`, by its portable name.

    `parent._modules[child]` is the module, or the wrapper around it.
    """
    modules = dict(named_modules(model, remove_duplicate=False))
    split = {name: name.rpartition(".") for name in modules if name}
    return {name: (modules[parent], child) for name, (parent, _, child) in split.items()}


def inside_checkpointing(parent: nn.Module, child: str) -> tuple[nn.Module, str]:
    """Return the (parent, child) of the module inside torch's `checkpoint_wrapper`, if any."""
    inner = "_checkpoint_wrapped_module"
    while wrapped_child(parent._modules[child]) == inner:
        parent, child = parent._modules[child], inner
    return parent, child


def portable_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the Parameters and buffers of `model.state_dict()` by their portable names."""
    state: dict[str, Tensor] = {}
    for name, module in named_modules(model, remove_duplicate=False):
        module._save_to_state_dict(state, f"{name}." if name else "", True)
    return state


def portable_name(model: nn.Module, name: str) -> str:
    """Return a dotted name of a module or tensor in `model` without the children of wrappers.

    `name` may lack the children of some wrappers: activation checkpointing and FSDP1 leave them out
    of the keys of a state dict.
    """
    parts = []
    module: nn.Module | None = model
    for part in name.split("."):
        if module is None or part != wrapped_child(module):
            parts.append(part)
            module = None if module is None else unwrap(module)
        module = None if module is None else module._modules.get(part)
    return ".".join(parts)


def portable_keys(state: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Return `state` with a name in place of each key that differs only by children of wrappers."""
    by_core: dict[str | None, list[str]] = {}
    for name in names:
        by_core.setdefault(without_wrapped(name, keep_module=False), []).append(name)
    result = dict(state)
    for key in state:
        core = without_wrapped(key, keep_module=False) if isinstance(key, str) else None
        candidates = by_core.get(core, [])
        if len(candidates) == 1 and candidates[0] not in result:
            result[candidates[0]] = result.pop(key)
    return result


def named_modules(
    model: nn.Module,
    remove_duplicate: bool = True,
    unwrap: Callable[[nn.Module], nn.Module] = unwrap,
) -> Iterator[tuple[str, nn.Module]]:
    """Yield (name, module) like `nn.Module.named_modules`, as if no module were wrapped.

    Wrappers are left out, and names do not contain their children: the module
    `_orig_mod.layers.0._checkpoint_wrapped_module.q_proj` has the name "layers.0.q_proj".

    Args:
        model: any module.
        remove_duplicate: whether a module that has several names is listed under the first only.
        unwrap: the function that removes the wrappers around a module.
    """
    return _walk("", model, set() if remove_duplicate else None, unwrap)


# Not a nested function: if it called itself, it would be in a reference cycle with `listed`, and
# replaced modules would stay in memory until the garbage collector runs.
def _walk(
    name: str,
    module: nn.Module,
    listed: set[nn.Module] | None,
    unwrap: Callable[[nn.Module], nn.Module],
) -> Iterator[tuple[str, nn.Module]]:
    module = unwrap(module)
    if listed is not None:
        if module in listed:
            return
        listed.add(module)
    yield name, module
    for child_name, child in module._modules.items():
        if child is not None:
            child_name = f"{name}.{child_name}" if name else child_name
            yield from _walk(child_name, child, listed, unwrap)
