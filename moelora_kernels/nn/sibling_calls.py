"""Which children of a module read the same x? The source of its forward tells.

The attention of a Llama passes one variable to q_proj, k_proj and v_proj. A cross-attention passes
another one to q_proj than to k_proj and v_proj. Code is read and not run. If it does not tell, the
layers still compute the right outputs; only the time can be longer.
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Collection, Iterator, Mapping
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
        for owner, child, call in _calls(function):
            if owner == "super":
                functions += [python_function(vars(base).get(child)) for base in kind.__mro__]
            elif method := python_function(inspect.getattr_static(kind, child, None)):
                functions.append(method)
            else:
                found.setdefault(child, set()).add(f"{function.__qualname__}:{_variable(call)}")
    return {child: frozenset(variables) for child, variables in found.items()}


_cached_arguments = functools.lru_cache(maxsize=None)(_arguments)


def _calls(function: FunctionType) -> Iterator[tuple[str, str, ast.Call]]:
    """Yield ("self" or "super", attribute, call) for each call `self.attribute(...)`."""
    definition = method_definition(function)
    if definition is None:
        return
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
