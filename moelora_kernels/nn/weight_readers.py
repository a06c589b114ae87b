"""Find modules that compute with the weight of a child linear instead of calling it.

The experts of a layer run when the layer is called. If a module above it computes with
`layer.weight`, the experts have no effect and no gradient. `check_target` finds such modules by
their class or in the source of their forward; `watch_reads` notes reads while a model runs.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import sys
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Mapping
from types import FunctionType
from typing import NamedTuple

import torch
from torch import nn

from moelora_kernels.nn.base_linear import conv1d_remedy, missing_size

# The first always reads the weights of its linears; the second in evaluation without gradients.
TORCH_READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)

# The code of these packages is complete: if a class of them reads a weight and never calls the
# linear, nothing else calls it either.
LIBRARIES = ("torch", "transformers")

# Attributes and methods of a weight that give no values: T5 reads `wo.weight.dtype` and calls `wo`.
WITHOUT_VALUES = ("device", "dim", "dtype", "element_size", "is_contiguous", "is_cuda", "is_meta")
WITHOUT_VALUES += ("itemsize", "ndim", "numel", "requires_grad", "shape", "size", "stride")


class WeightReader(NamedTuple):
    """A module that computes with the weight of a linear below it."""

    kind: type  # its class
    path: str  # the name of the linear in it
    calls: bool  # whether its forward can also call the linear
    is_known: bool  # whether the experts would certainly be left out, also in some forwards only


def check_target(name: str, module: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Raise TypeError if experts cannot be put over `module`, which target_modules matches.

    modules: the modules above `module` by name, at least; the model's name is "".
    """
    if missing := missing_size(module):
        raise TypeError(
            f"target_modules: {name} is a {type(module)} without {missing}; expected a linear"
            f"{conv1d_remedy(module)}"
        )
    reader = weight_reader(modules, name)
    if reader is not None and reader.is_known:
        when = "if its fused kernels run" if reader.calls else "without calling it"
        raise TypeError(
            f"target_modules: {name} is part of a {reader.kind}, which reads its weight {when}, so "
            "the experts would have no effect; leave it out of target_modules"
        )


def warn_of_readers(modules: Mapping[str, nn.Module], names: Iterable[str]) -> None:
    """Warn of the layers `names` whose weight a module above them seems to read.

    modules: the modules above the layers by name, at least; the model's name is "".
    """
    found: dict[WeightReader, list[str]] = {}
    for name in names:
        reader = weight_reader(modules, name)
        if reader is not None and not reader.is_known:
            found.setdefault(reader, []).append(name)
    for reader, layers in found.items():
        rest = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
        seldom = " in some of its forwards" if reader.calls else " and does not call it"
        warnings.warn(
            f"target_modules: {layers[0]}{rest}: the forward of {reader.kind.__qualname__} reads "
            f"{reader.path}.weight{seldom}; without a call the experts have no effect. "
            "check_trainable(model, batch) names the layers that a forward does not call",
            stacklevel=3,
        )


def weight_reader(modules: Mapping[str, nn.Module], name: str) -> WeightReader | None:
    """Return the module above the linear `name` that reads its weight; None if none is found.

    modules: the modules above the linear by name, at least; the model's name is "".
    """
    parts = name.split(".")
    for depth in reversed(range(len(parts))):
        module = modules.get(".".join(parts[:depth]))
        if module is None:
            continue
        path, kind = ".".join(parts[depth:]), type(module)
        is_parent = depth == len(parts) - 1
        if is_parent and isinstance(module, TORCH_READERS):
            return WeightReader(kind, path, calls=False, is_known=True)
        uses = child_uses(module)
        if path in uses.read:
            calls = path in uses.called or not is_parent
            in_library = kind.__module__.split(".")[0] in LIBRARIES
            is_known = (in_library and not calls) or (is_parent and _is_fused(module, path))
            return WeightReader(kind, path, calls, is_known)
    return None


def _is_fused(mixer: nn.Module, path: str) -> bool:
    """Return whether `path` is the output of a state-space layer, which PEFT does not adapt either.

    The layer has fused kernels that read `out_proj.weight`, and other code that calls `out_proj`.
    """
    return path == "out_proj" and hasattr(mixer, "A_log")


class ChildUses(NamedTuple):
    """How the forward of a class uses its children, as dotted paths such as "mlp.up_proj"."""

    read: frozenset[str]  # paths whose `.weight` is used as a value
    called: frozenset[str]  # paths that are called, or passed to code that can call them


def child_uses(module: nn.Module) -> ChildUses:
    """Return how `module.forward`, and the methods that it reaches, use the children.

    Code without source (built from strings, written in C) uses nothing.
    """
    if "forward" in module.__dict__:
        # Not cached: a patched forward can hold the model.
        return _uses(type(module), python_function(module.__dict__["forward"]))
    return _cached_uses(type(module), python_function(type(module).forward))


def _uses(kind: type, forward: FunctionType | None) -> ChildUses:
    read: set[str] = set()
    called: set[str] = set()
    functions = [forward]
    seen: set[FunctionType | None] = {None}
    while functions:
        function = functions.pop()
        if function in seen:
            continue
        seen.add(function)
        for path, is_value in _paths_of_self(function):
            child, _, last = path.rpartition(".")
            if child == "super()":
                functions += [python_function(vars(base).get(last)) for base in kind.__mro__]
            elif not child and (
                method := python_function(inspect.getattr_static(kind, last, None))
            ):
                functions.append(method)
            elif not is_value:
                continue
            elif child and last == "weight":
                read.add(child)
            elif child and last == "forward":
                called.add(child)
            else:
                called.add(path)
    return ChildUses(frozenset(read), frozenset(called))


_cached_uses = functools.lru_cache(maxsize=None)(_uses)


def python_function(method: object) -> FunctionType | None:
    """Return the Python function behind a method, a property or a decorated function."""
    method = getattr(method, "fget", None) or method
    method = inspect.unwrap(method) if callable(method) else method
    method = getattr(method, "__func__", method)
    return method if isinstance(method, FunctionType) else None


def method_definition(function: FunctionType) -> ast.FunctionDef | None:
    """Return the parsed source of a method; None without source or without arguments."""
    try:
        definition = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    is_method = isinstance(definition, ast.FunctionDef) and definition.args.args
    return definition if is_method else None


def _paths_of_self(function: FunctionType) -> Iterator[tuple[str, bool]]:
    """Yield the dotted paths after the first argument of a function, such as "q_proj.weight".

    Paths after `super()` begin with "super()". The second item tells whether the path is used as a
    value: `self.q.weight.t()` is one, `self.q.weight.dtype` and `isinstance(self.q.weight, Tensor)`
    are not.
    """
    definition = method_definition(function)
    if definition is None:
        return
    owner = definition.args.args[0].arg
    parents = {child: node for node in ast.walk(definition) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(definition):
        if not (isinstance(node, ast.Name) and node.id in (owner, "super")):
            continue
        path = ["super()"] if node.id == "super" else []
        end: ast.AST = parents[node] if path else node
        while isinstance(parent := parents.get(end), ast.Attribute) and "weight" not in path:
            end = parent
            path.append(parent.attr)
        if isinstance(end, ast.Attribute) and isinstance(end.ctx, ast.Load):
            yield ".".join(path), not _is_description(end, parents)


def _is_description(expression: ast.AST, parents: Mapping[ast.AST, ast.AST]) -> bool:
    """Return whether the expression is used without its values."""
    parent = parents.get(expression)
    if isinstance(parent, ast.Attribute):
        return parent.attr in WITHOUT_VALUES
    if isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name):
        return parent.func.id in ("isinstance", "hasattr", "id", "type")
    if isinstance(parent, ast.Compare):
        return all(isinstance(operator, (ast.Is, ast.IsNot)) for operator in parent.ops)
    return False


class WeightReads:
    """The reads of `layer.weight` inside `watch_reads`: the code that read it, by layer."""

    def __init__(self) -> None:
        self.readers: dict[nn.Module, str] = {}


_reads: WeightReads | None = None


def note_read(layer: nn.Module) -> None:
    """Note that code outside of the package reads `layer.weight`, if reads are watched."""
    # The compiler evaluates the first condition, so that a compiled graph has no guard on `_reads`.
    if torch.compiler.is_compiling() or _reads is None:
        return
    # Frame 0 is this function and frame 1 the property `weight`.
    code = sys._getframe(2).f_code
    name = getattr(code, "co_qualname", code.co_name)
    _reads.readers[layer] = name.rpartition("<locals>.")[2]


@contextlib.contextmanager
def watch_reads() -> Iterator[WeightReads]:
    """Return the reads of `layer.weight` while the context is open."""
    global _reads
    previous, _reads = _reads, WeightReads()
    try:
        yield _reads
    finally:
        _reads = previous
