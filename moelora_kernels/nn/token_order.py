"""Find linears that get tokens in another order than the model: the source above them tells.

A forward that passes a child `x.transpose(0, 1)` passes it [sequence, batch, features]. One that
passes it `x[torch.where(mask)]` passes tokens of several samples, in an order that x does not tell.
Code is read and not run, so the answer is a hint: `check_rows` in `nn/batch_rows.py` uses it in
the calls whose shape does not tell the samples.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Mapping, Sequence
from types import FunctionType
from typing import Any, NamedTuple

from torch import nn

from moelora_kernels.nn.weight_readers import method_definition, python_function

SWAPPED, SELECTED = "swapped", "selected"
# Functions that return positions of tokens.
SELECTIONS = {"where", "nonzero", "topk", "argsort", "sort"}
# Attributes that are not the tensor.
WITHOUT_ROWS = {"shape", "size", "device", "dtype", "dim", "ndim", "numel"}


class TokenOrder(NamedTuple):
    """The order of the tokens of a linear, as far as the source above it tells."""

    name: str  # the linear
    kind: str  # the class of the module above it whose forward changes the order
    change: str  # SWAPPED or SELECTED


def token_order(name: str, modules: Mapping[str, nn.Module]) -> TokenOrder | None:
    """Return how a module above the linear `name` changes the order of its tokens; None if none.

    modules: the modules above the linear by name, at least; the model's name is "".
    """
    parts = name.split(".")
    swaps: list[type] = []
    for depth in range(len(parts)):
        module = modules.get(".".join(parts[:depth]))
        if module is None:
            continue
        kind = type(module)
        changes = passed_changes(kind)
        ends = range(depth, len(parts) + 1)
        found = {changes.get(".".join(parts[depth:end])) for end in ends} - {None}
        if SELECTED in found:
            return TokenOrder(name, kind.__name__, SELECTED)
        if SWAPPED in found:
            swaps.append(kind)
    # Two swaps are none.
    return TokenOrder(name, swaps[-1].__name__, SWAPPED) if len(swaps) % 2 else None


@functools.cache
def passed_changes(kind: type) -> dict[str, str]:
    """Return the children that the forward of a class calls with tokens in another order.

    Returns:
        The path of the child, such as "layers" or "mlp.up_proj", -> SWAPPED or SELECTED. The path
        "" stands for all children. Code without source changes nothing.
    """
    reader = _Reader(kind, _State)
    reader.read(python_function(inspect.getattr_static(kind, "forward", None)), {})
    return reader.passed


@functools.cache
def argument_sources(kind: type) -> dict[str, frozenset[str]]:
    """Return the arguments of the forward of a class from which its children get their inputs.

    Returns:
        The path of a child -> the names of the arguments.
    """
    function = python_function(inspect.getattr_static(kind, "forward", None))
    if function is None:
        return {}
    names = [*inspect.signature(function).parameters][1:]
    reader = _Reader(kind, _Sources)
    reader.read(function, {name: frozenset({name}) for name in names})
    return reader.passed


class _Reader(ast.NodeVisitor):
    """Follows tensors through the statements of a forward, in the order of the source.

    changes: name of a variable -> SWAPPED or SELECTED.
    children: name of a variable -> the path of the child module that it stands for.
    """

    def __init__(self, kind: type, state: type[_State]) -> None:
        self.kind = kind
        self.state = state
        self.passed: dict[str, Any] = {}
        self.seen: set[tuple[FunctionType, str]] = set()

    def read(self, function: FunctionType | None, arguments: Mapping[int | str, Any]) -> None:
        """Read a method. arguments: an argument by position after self or by name -> its change."""
        key = (function, str([(k, sorted(v)) for k, v in arguments.items()]))
        if function is None or key in self.seen:
            return
        self.seen.add(key)
        definition = method_definition(function)
        if definition is None:
            return
        owner, *names = [argument.arg for argument in definition.args.args]
        by_position = dict(enumerate(names))
        changes = {by_position.get(key, str(key)): change for key, change in arguments.items()}
        self._statements(definition.body, self.state(owner, changes))

    def _statements(self, body: Sequence[ast.stmt], state: _State) -> None:
        for statement in body:
            if isinstance(statement, (ast.For, ast.AsyncFor)):
                self._calls(statement.iter, state)
                state.bind_loop(statement.target, statement.iter)
            elif isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
                continue
            for field in ("test", "value", "exc"):
                expression = getattr(statement, field, None)
                if isinstance(expression, ast.AST):
                    self._calls(expression, state)
            for item in getattr(statement, "items", ()):
                self._calls(item.context_expr, state)
            if isinstance(statement, ast.Assign):
                for target in statement.targets:
                    state.bind(target, statement.value)
            elif isinstance(statement, ast.AnnAssign) and statement.value is not None:
                state.bind(statement.target, statement.value)
            for field in ("body", "orelse", "finalbody"):
                inner = getattr(statement, field, None)
                if isinstance(inner, list):
                    self._statements(inner, state)

    def _calls(self, expression: ast.AST, state: _State) -> None:
        """Note the changes of all calls in an expression."""
        for node in ast.walk(expression):
            if not isinstance(node, ast.Call):
                continue
            values = dict(enumerate(node.args)) | {k.arg: k.value for k in node.keywords}
            changes = {key: c for key, value in values.items() if (c := state.change(value))}
            if not changes:
                continue
            path = state.path(node.func)
            # A function such as that of checkpointing can call a child that is an argument.
            paths = {path} if path is not None else {*map(state.path, values.values())} - {""}
            for child in paths - {None}:
                method = python_function(inspect.getattr_static(self.kind, child, None))
                if method is not None:
                    self.read(method, changes)
                else:
                    self.passed[child] = state.joined([*changes.values(), self.passed.get(child)])
            if _is_super(node.func):
                for base in self.kind.__mro__[1:]:
                    self.read(python_function(vars(base).get(node.func.attr)), changes)


class _State:
    """What the variables of a method are."""

    def __init__(self, owner: str, changes: dict[str, Any]) -> None:
        self.owner = owner
        self.changes = changes
        self.children: dict[str, str] = {}
        self.positions: set[str] = set()

    def bind(self, target: ast.AST, value: ast.AST) -> None:
        """Assign the value of an expression to its targets."""
        change, path = self.change(value), self.path(value)
        is_position = _called(value) in SELECTIONS
        targets = target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]
        for name in (t.id for t in targets if isinstance(t, ast.Name)):
            for table, entry in ((self.changes, change), (self.children, path)):
                table.pop(name, None)
                if entry is not None:
                    table[name] = entry
            (self.positions.add if is_position else self.positions.discard)(name)

    def bind_loop(self, target: ast.AST, iterated: ast.AST) -> None:
        """Assign the items of an expression to the target of a loop."""
        values = [iterated]
        if isinstance(iterated, ast.Call):
            values = iterated.args
        targets = target.elts if isinstance(target, ast.Tuple) else [target]
        if _called(iterated) == "enumerate":
            targets = targets[1:]
            if len(targets) == 1 and isinstance(targets[0], ast.Tuple):
                targets = targets[0].elts
            if isinstance(values[0], ast.Call) and values[0].args:
                values = values[0].args
        for name, value in zip(targets, values, strict=False):
            self.bind(name, value)

    def path(self, node: ast.AST) -> str | None:
        """Return the path of the child of self that an expression is; None for another value."""
        if isinstance(node, ast.Name):
            return "" if node.id == self.owner else self.children.get(node.id)
        if isinstance(node, ast.Subscript):
            return self.path(node.value)
        if isinstance(node, ast.Attribute):
            above = self.path(node.value)
            if above is None or node.attr in ("__call__", "forward"):
                return above
            return f"{above}.{node.attr}" if above else node.attr
        return None

    def change(self, node: ast.AST) -> str | None:
        """Return how the tokens of a tensor expression are ordered; None for the order of x."""
        if isinstance(node, ast.Attribute) and node.attr in WITHOUT_ROWS:
            return None
        if isinstance(node, ast.Name):
            return self.changes.get(node.id)
        if isinstance(node, ast.Call):
            if isinstance(node.func, ast.Attribute) and node.func.attr in WITHOUT_ROWS:
                return None
            if _called(node) in SELECTIONS:
                return None
            swapped = _swapped(node)
            if swapped is not None:
                inner = self.change(swapped)
                return {None: SWAPPED, SWAPPED: None, SELECTED: SELECTED}[inner]
        if isinstance(node, ast.Subscript):
            index = {n.id for n in ast.walk(node.slice) if isinstance(n, ast.Name)}
            return SELECTED if index & self.positions else self.change(node.value)
        if isinstance(node, (ast.Compare, ast.Lambda)):
            return None
        return self.joined([self.change(child) for child in ast.iter_child_nodes(node)])

    def joined(self, changes: Sequence[Any]) -> Any:
        """Return the change of a tensor that is computed from several tensors."""
        return SELECTED if SELECTED in changes else SWAPPED if SWAPPED in changes else None


class _Sources(_State):
    """Variables as the names of the arguments from which they are computed, instead of changes."""

    def change(self, node: ast.AST) -> frozenset[str] | None:
        if isinstance(node, ast.Attribute) and node.attr in WITHOUT_ROWS:
            return None
        if isinstance(node, ast.Name):
            return self.changes.get(node.id)
        if isinstance(node, (ast.Compare, ast.Lambda)):
            return None
        return self.joined([self.change(child) for child in ast.iter_child_nodes(node)])

    def joined(self, changes: Sequence[Any]) -> frozenset[str] | None:
        return frozenset().union(*[change for change in changes if change]) or None


def _called(node: ast.AST) -> str | None:
    """Return the last name of the function that an expression calls."""
    if not isinstance(node, ast.Call):
        return None
    return getattr(node.func, "attr", getattr(node.func, "id", None))


def _is_super(function: ast.AST) -> bool:
    return isinstance(function, ast.Attribute) and _called(function.value) == "super"


def _swapped(node: ast.Call) -> ast.AST | None:
    """Return the tensor whose first two dimensions a call swaps; None for another call.

    permute(2, 0, 1) makes [L, B, I] of [B, I, L].
    """
    numbers: list[Any] = []
    tensors = [node.func.value] if isinstance(node.func, ast.Attribute) else []
    for value in node.args:
        values = value.elts if isinstance(value, (ast.Tuple, ast.List)) else [value]
        for entry in values:
            try:
                numbers.append(ast.literal_eval(entry))
            except ValueError:
                tensors.append(entry)
    name = _called(node)
    if name in ("transpose", "swapaxes", "swapdims") and sorted(map(str, numbers)) != ["0", "1"]:
        return None
    if name == "permute" and numbers[:2] != [1, 0] and numbers != [2, 0, 1]:
        return None
    if name == "movedim" and numbers not in ([0, 1], [1, 0]):
        return None
    if name in ("transpose", "swapaxes", "swapdims", "permute", "movedim") and tensors:
        return tensors[-1]
    return None
