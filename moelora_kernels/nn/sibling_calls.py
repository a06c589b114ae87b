"""Which children of a module read the same x? The source of its forward tells.

The attention of a Llama passes one variable to q_proj, k_proj and v_proj. A cross-attention passes
another one to q_proj than to k_proj and v_proj. Code is read and not run. If it does not tell, the
layers still compute the right outputs; only the time can be longer.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Collection, Iterator, Mapping, Sequence
from types import FunctionType

from torch import nn

from moelora_kernels.nn.weight_readers import method_definition, python_function

# The names of children that read the same x in most models.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def sibling_names(modules: Mapping[str, nn.Module], names: Collection[str]) -> list[list[str]]:
    """Return the groups of two or more of `names` that read the same x.

    Args:
        modules: the parents of the linears by name, at least; the model's name is "".
        names: the names of linears.
    """
    children: dict[str, list[str]] = {}
    for name in names:
        parent, _, child = name.rpartition(".")
        children.setdefault(parent, []).append(child)
    return [
        [f"{parent}.{child}".lstrip(".") for child in together]
        for parent, present in children.items()
        for group in SIBLINGS
        for together in called_alike(modules[parent], [n for n in group if n in present])
        if len(together) > 1
    ]


def called_alike(module: nn.Module, names: Collection[str]) -> list[list[str]]:
    """Split the children `names` of a module into those that it calls with the same arguments.

    Children that the source of the module does not call are together.
    """
    if "forward" in module.__dict__:
        # Not cached: a patched forward can hold the model.
        arguments = _arguments(type(module), python_function(module.__dict__["forward"]))
    else:
        arguments = _cached_arguments(type(module), python_function(type(module).forward))
    groups: dict[frozenset[str], list[str]] = {}
    for name in names:
        groups.setdefault(arguments.get(name, frozenset()), []).append(name)
    return list(groups.values())


def are_called_in_a_row(module: nn.Module, names: Collection[str]) -> bool:
    """Return whether `module.forward` calls these children on one x that does not change between.

    A forward that makes the first call then makes them all. True only if the source shows it: each
    child has one call; the calls are in statements of one list, outside of branches in them; and no
    statement from the first call to the last one returns, assigns to x or passes x elsewhere.
    """
    forward = python_function(module.__dict__.get("forward") or type(module).forward)
    definition = None if forward is None else method_definition(forward)
    if definition is None:
        return False
    calls = [
        (child, call)
        for owner, child, call in _calls(definition)
        if owner == "self" and child in names
    ]
    variables = {_variable(call) for _, call in calls}
    if sorted(child for child, _ in calls) != sorted(names) or len(variables) > 1:
        return False
    statements = _statements(definition, [call for _, call in calls])
    nodes = [node for statement in statements for node in ast.walk(statement)]
    is_left = any(isinstance(node, _LEAVE) for s in statements[:-1] for node in ast.walk(s))
    return bool(statements) and not is_left and not _is_used(*variables, nodes, names)


# Expressions that may leave out or repeat a part of them.
_BRANCHES = (
    ast.IfExp, ast.BoolOp, ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp,
)  # fmt: skip
# The attributes and methods of a tensor that do not give its values.
_SHAPES = ("shape", "size", "ndim", "dim", "dtype", "device")
# Statements after which the next one may not run.
_LEAVE = (ast.Return, ast.Raise, ast.Break, ast.Continue)


def _statements(definition: ast.FunctionDef, calls: Sequence[ast.Call]) -> list[ast.stmt]:
    """Return the statements from the first call to the last; [] if they are not of one list."""
    parents = {child: node for node in ast.walk(definition) for child in ast.iter_child_nodes(node)}
    found: list[ast.AST] = []
    for call in calls:
        node: ast.AST = call
        while not isinstance(node, ast.stmt):
            if isinstance(node, _BRANCHES):
                return []
            node = parents[node]
        found.append(node)
    for _, body in ast.iter_fields(parents[found[0]]):
        if isinstance(body, list) and all(statement in body for statement in found):
            positions = [body.index(statement) for statement in found]
            return body[min(positions) : max(positions) + 1]
    return []


def _is_used(variable: str, nodes: Sequence[ast.AST], names: Collection[str]) -> bool:
    """Return whether code may change the variable, its tensor, or the tensors of the children.

    It assigns to the variable; changes any tensor in place, which may be a view; or passes the
    variable or a part of it to another call than those of the children `names`. The shape of the
    variable is no part of it.
    """
    for node in nodes:
        if isinstance(node, ast.AugAssign):
            return True
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
            is_in_place = name.endswith("_") and not name.endswith("__")
            if is_in_place or any(keyword.arg == "out" for keyword in node.keywords):
                return True
            passed = [*node.args, *[keyword.value for keyword in node.keywords]]
            if name not in names and any(_contains(value, variable, names) for value in passed):
                return True
        is_target = isinstance(getattr(node, "ctx", None), (ast.Store, ast.Del))
        if is_target and (isinstance(node, ast.Subscript) or ast.unparse(node) == variable):
            return True
    return False


def _contains(node: ast.AST, variable: str, names: Collection[str]) -> bool:
    """Return whether an expression reads the variable, and not only its shape or in a child."""
    called = node.func if isinstance(node, ast.Call) else None
    if isinstance(called, ast.Attribute) and called.attr in names:
        return False
    if isinstance(node, ast.Attribute) and node.attr in _SHAPES:
        return False
    is_variable = isinstance(node, ast.expr) and ast.unparse(node) == variable
    return is_variable or any(_contains(c, variable, names) for c in ast.iter_child_nodes(node))


def _arguments(kind: type, forward: FunctionType | None) -> dict[str, frozenset[str]]:
    """Return child -> the variables that `forward`, and the methods it reaches, call it with."""
    found: dict[str, set[str]] = {}
    functions = [forward]
    seen: set[FunctionType | None] = {None}
    while functions:
        function = functions.pop()
        if function in seen:
            continue
        seen.add(function)
        definition = method_definition(function)
        for owner, child, call in () if definition is None else _calls(definition):
            if owner == "super":
                functions += [python_function(vars(base).get(child)) for base in kind.__mro__]
            elif method := python_function(inspect.getattr_static(kind, child, None)):
                functions.append(method)
            else:
                found.setdefault(child, set()).add(f"{function.__qualname__}:{_variable(call)}")
    return {child: frozenset(variables) for child, variables in found.items()}


_cached_arguments = functools.lru_cache(maxsize=None)(_arguments)


def _calls(definition: ast.FunctionDef) -> Iterator[tuple[str, str, ast.Call]]:
    """Yield ("self" or "super", attribute, call) for each call `self.attribute(...)`."""
    name_of_self = definition.args.args[0].arg
    for call in ast.walk(definition):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
            continue
        match call.func.value:
            case ast.Name(id=name) if name == name_of_self:
                yield "self", call.func.attr, call
            case ast.Call(func=ast.Name(id="super")):
                yield "super", call.func.attr, call


def _variable(call: ast.Call) -> str:
    """Return the variable that a call gets as its x; a text of its own for any other expression."""
    named = {keyword.arg: keyword.value for keyword in call.keywords}
    x = call.args[0] if call.args else named.get("input")
    variable = x
    while isinstance(variable, ast.Attribute):
        variable = variable.value
    if x is not None and isinstance(variable, ast.Name):
        return ast.unparse(x)
    # Two equal expressions make two tensors.
    return f"{call.lineno}:{call.col_offset}"
