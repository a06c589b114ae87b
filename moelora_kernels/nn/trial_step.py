"""trial_step: a context in which a training step of a model changes nothing.

    with trial_step(model, loss_fn) as trial:
        loss = loss_fn(model(trial.copy(batch)))
        trial.backward(loss)
        gradient = trial.gradient(parameter)

In the context, the modules of the model and those that `loss_fn` uses hold copies of their tensors.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import random
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from moelora_kernels.nn.linear import forget_outputs
from moelora_kernels.nn.recorded_forwards import kept_records

# A forward does not write Parameters, codes of quantised weights, or masks above this size, so they
# are not copied: a copy of every one would double the memory of the model.
MAX_COPIED = 2**20


class TrialStep:
    """The copies that take the place of Parameters and buffers in a step."""

    def __init__(self) -> None:
        # id of a Parameter or buffer -> its copy
        self.copies: dict[int, Tensor] = {}

    def use_copies(self, modules: Collection[nn.Module]) -> None:
        """Put copies in the place of the tensors of modules."""
        # The stored outputs are put back afterwards.
        forget_outputs(modules)
        for module in modules:
            for tensors in (module._parameters, module._buffers):
                for name, tensor in tensors.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in self.copies and _needs_copy(tensor):
                        self.copies[id(tensor)] = _parameter_copy(tensor)
                    tensors[name] = self.copies.get(id(tensor), tensor)
            for name, value in vars(module).items():
                if isinstance(value, Tensor):
                    module.__dict__[name] = tensor_copy(value)
                elif isinstance(value, torch.Generator):
                    module.__dict__[name] = value.clone_state()

    def copy(self, batch: Any) -> Any:
        """Return a copy of a batch whose tensors have no graph. Modules in it are not copied."""
        return copy.deepcopy(batch, _tensor_copies(batch))

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of the copies; other tensors keep their gradients and hooks."""
        if not loss.requires_grad:
            return
        copies = {id(tensor) for tensor in self.copies.values()}
        others = [leaf for leaf in graph_leaves(loss) if id(leaf) not in copies]
        saved = [(leaf, leaf.grad, _Contents(_tensor_hooks(leaf))) for leaf in others]
        try:
            for leaf, _, hooks in saved:
                leaf.grad = None
                hooks.clear()
            loss.backward()
        finally:
            for leaf, gradient, hooks in saved:
                leaf.grad = gradient
                hooks.restore()

    def gradient(self, parameter: nn.Parameter) -> Tensor | None:
        """Return the gradient of a Parameter in the step."""
        replacement = self.copies.get(id(parameter))
        return None if replacement is None else replacement.grad


@contextlib.contextmanager
def trial_step(model: nn.Module, loss_fn: Callable[..., Any] | None = None) -> Iterator[TrialStep]:
    """Open a context with autograd in which a training step of `model` changes nothing.

    Afterwards Parameters, buffers, gradients, hooks, attributes of modules and of the objects that
    they hold, random states and the cache of autocast are as before. The model is in training mode
    inside. The modules that `loss_fn` uses keep their modes.
    """
    modules = dict.fromkeys(model.modules())
    for module in referenced_modules(loss_fn):
        modules.update(dict.fromkeys(module.modules()))
    if any(parameter.is_inference() for parameter in _parameters(modules)):
        raise ValueError(
            "model: a Parameter was created under torch.inference_mode, so it cannot be trained; "
            "build or load the model outside of torch.inference_mode"
        )
    trial = TrialStep()
    with (
        _restored_state(modules),
        kept_records(modules),
        _restored_random_states(),
        _without_autocast_cache(),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        trial.use_copies(modules)
        model.train()
        yield trial


def _parameters(modules: Iterable[nn.Module]) -> list[nn.Parameter]:
    return [p for module in modules for p in module._parameters.values() if p is not None]


def _needs_copy(tensor: Tensor) -> bool:
    """Return whether a step could change a Parameter or buffer, or its gradient."""
    if isinstance(tensor, nn.Parameter):
        return tensor.requires_grad
    return tensor.is_floating_point() or tensor.numel() <= MAX_COPIED


def _parameter_copy(tensor: Tensor) -> Tensor:
    if not isinstance(tensor, nn.Parameter):
        return tensor.detach().clone()
    values = tensor.detach()
    return (values.clone() if tensor.numel() <= MAX_COPIED else values).requires_grad_()


def tensor_copy(tensor: Tensor) -> Tensor:
    """Return a copy that needs a gradient if `tensor` does, and that has no graph."""
    values = tensor.clone().detach()
    if not tensor.requires_grad:
        return values
    values.requires_grad_()
    # A model may write into a tensor that is not a leaf.
    return values if tensor.is_leaf else values.clone()


def _tensor_copies(batch: Any) -> dict[int, Any]:
    """Return id -> copy for the tensors inside `batch`, and id -> module for its modules."""
    copies: dict[int, Any] = {}
    seen: set[int] = set()
    values = [batch]
    while values:
        value = values.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            copies[id(value)] = tensor_copy(value)
        elif isinstance(value, nn.Module):
            copies[id(value)] = value
        else:
            values += _parts(value)
            values += getattr(value, "__dict__", {}).values()
    return copies


def _parts(value: Any) -> list[Any]:
    """Return the values inside a container; nothing for other objects."""
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, (list, tuple, set, frozenset, deque)) else []


def graph_leaves(loss: Tensor) -> list[Tensor]:
    """Return the tensors for which `loss.backward()` would store a gradient.

    Without those inside reentrant activation checkpointing.
    """
    leaves, seen, nodes = [], set(), [loss.grad_fn]
    if loss.grad_fn is None:
        return [loss]
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
        if isinstance(leaf := getattr(node, "variable", None), Tensor):
            leaves.append(leaf)
    return leaves


def _tensor_hooks(tensor: Tensor) -> list[dict]:
    hooks = (tensor._backward_hooks, tensor._post_accumulate_grad_hooks)
    return [hook for hook in hooks if hook is not None]


def referenced_modules(function: object) -> list[nn.Module]:
    """Return the modules that a function uses: in its closure, its arguments, its object, globals.

    The functions that it uses are searched too, except those of torch.
    """
    modules: list[nn.Module] = []
    # The values are kept, because an id is unique only while its object lives.
    seen: dict[int, object] = {}
    values = [function]
    while values:
        value = values.pop()
        if id(value) in seen:
            continue
        seen[id(value)] = value
        if isinstance(value, nn.Module):
            modules.append(value)
        elif isinstance(value, functools.partial):
            values += [value.func, *value.args, *value.keywords.values()]
        elif isinstance(value, MethodType):
            values.append(value.__func__)
            if isinstance(value.__self__, nn.Module):
                values.append(value.__self__)
            else:
                values += getattr(value.__self__, "__dict__", {}).values()
        elif isinstance(value, FunctionType):
            if (value.__module__ or "").split(".")[0] != "torch":
                values += _names_of(value)
        elif callable(value) and isinstance(call := type(value).__call__, FunctionType):
            values.append(MethodType(call, value))
        else:
            values += _parts(value)
    return modules


def _names_of(function: FunctionType) -> list[Any]:
    """Return the values of the outer names that a function reads, and its default arguments."""
    values = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    for cell in function.__closure__ or ():
        # A cell is empty until its variable has a value.
        with contextlib.suppress(ValueError):
            values.append(cell.cell_contents)
    codes: list[CodeType] = [function.__code__]
    while codes:
        code = codes.pop()
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        values += [function.__globals__.get(name) for name in code.co_names]
    return [value for value in values if not isinstance(value, ModuleType)]


class _Contents:
    """The contents of dicts, lists, sets and deques, to restore them."""

    KINDS = (dict, OrderedDict, defaultdict, list, set, deque)

    def __init__(self, values: Iterable[Any]) -> None:
        containers = [value for value in values if type(value) in self.KINDS]
        self.saved = [(item, self._copied(item)) for item in containers]

    @staticmethod
    def _copied(container: Any) -> dict | list:
        return dict(container) if isinstance(container, dict) else list(container)

    def clear(self) -> None:
        """Remove all contents."""
        for container, _ in self.saved:
            container.clear()

    def restore(self) -> None:
        """Put the contents back into the containers that have changed."""
        for container, previous in self.saved:
            if _is_same(self._copied(container), previous):
                continue
            container.clear()
            if isinstance(container, (dict, set)):
                container.update(previous)
            else:
                container.extend(previous)


def _is_same(a: dict | list, b: dict | list) -> bool:
    """Return whether two containers hold the same objects in the same order."""
    if isinstance(a, dict):
        return _is_same([*a, *a.values()], [*b, *b.values()])
    return len(a) == len(b) and all(x is y for x, y in zip(a, b, strict=True))


@contextlib.contextmanager
def _restored_state(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Restore gradients, hooks, and attributes of modules and of the objects that they hold."""
    objects: dict[int, Any] = {id(module): module for module in modules}
    for module in modules:
        for value in vars(module).values():
            # Records, hooks of records, configs: transformers writes config.problem_type.
            if _has_state(value):
                objects[id(value)] = value
    attributes = [item.__dict__ for item in objects.values()]
    values = [value for names in attributes for value in names.values()]
    contents = _Contents([*attributes, *values])
    gradients = [(parameter, parameter.grad) for parameter in _parameters(modules)]
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        yield
    finally:
        contents.restore()
        for parameter, gradient in gradients:
            parameter.grad = gradient


def _has_state(value: object) -> bool:
    """Return whether a value is an object with attributes; a module, function or type is not."""
    others = (nn.Module, Tensor, type, FunctionType, MethodType, ModuleType)
    return hasattr(value, "__dict__") and not isinstance(value, others)


@contextlib.contextmanager
def _restored_random_states() -> Iterator[None]:
    numpy = sys.modules.get("numpy")
    python, legacy = random.getstate(), None if numpy is None else numpy.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(legacy)


@contextlib.contextmanager
def _without_autocast_cache() -> Iterator[None]:
    """Switch the cache of autocast off: it would keep casts of the copies."""
    was_on = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(was_on)
