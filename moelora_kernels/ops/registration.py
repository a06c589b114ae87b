"""Register ops: the schema, the reference for every device, the fake for the compiler.

The dispatcher takes tensors, lists and numbers, but not the structures of `types`. `register` gets
a list of arguments in which a structure stands for all its fields, and writes the schema from it.
The functions that implement the op take the structures. All ops have the same order of arguments:
activations, tensors of the linears, rank space, `Gate`, `Routing`, `Mixture` (or its ranks and
scaling), `Dropout`, switches.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from functools import cache
from itertools import islice
from typing import Any

import torch

from moelora_kernels import native
from moelora_kernels.types import (
    Dropout,
    Gate,
    Mixture,
    Needs,
    RouterTensors,
    Routing,
    SiblingTensors,
)

NAMESPACE = "moelora"

# Structure -> its fields in a schema.
FIELDS: dict[type, str] = {
    RouterTensors: "Tensor[] router_weight, Tensor[] router_bias",
    SiblingTensors: (
        "Tensor[] base_weight, Tensor[] base_bias, Tensor[] base_output, Tensor[] lora_a, "
        "Tensor[] lora_b, Tensor[] router_weight, Tensor[] router_bias"
    ),
    Gate: "Tensor? gate_weights, Tensor? experts, Tensor? rows, Tensor? logits",
    Routing: "Tensor order, Tensor offsets, Tensor tiles, Tensor chunks",
    Mixture: (
        "int[] ranks, float[] scaling, bool share_a, int top_k, bool renormalize, float temperature"
    ),
    Needs: "bool needs_x, bool needs_adapters",
    Dropout: "float dropout, bool dropout_per_expert, Tensor? seed",
}

# Op with a Triton kernel for GPUs -> the function that launches it, with flat arguments.
KERNELS: dict[str, Callable] = {}
# Op -> the arguments that were passed to `register`.
ARGUMENTS: dict[str, Sequence[str | type]] = {}

_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def register(
    name: str,
    arguments: Sequence[str | type],
    returns: str,
    reference: Callable,
    fake: Callable,
) -> torch._ops.OpOverload:
    """Define `moelora::name` and return its default overload, which takes flat arguments.

    The reference is registered for every device (CompositeExplicitAutograd). An implementation for
    one device, such as a CPU op of the native library, takes precedence, in any order of loading.
    Every implementation runs with autocast off, so that float32 products stay float32.

    Args:
        name: the name of the op.
        arguments: for each argument a schema entry ("Tensor x") or a structure of `FIELDS`.
        returns: the outputs in schema form.
        reference: the implementation for any device; takes structures.
        fake: returns tensors of the right shapes, dtypes and strides; takes structures.
    """
    qualified = f"{NAMESPACE}::{name}"
    ARGUMENTS[name] = arguments
    schema = ", ".join(FIELDS[a] if isinstance(a, type) else a for a in arguments)
    torch.library.define(
        qualified, f"({schema}) -> {returns}", tags=(torch.Tag.needs_exact_strides,)
    )
    torch.library.impl(
        qualified, "CompositeExplicitAutograd", with_structures(arguments, reference)
    )
    torch.library.register_fake(qualified, with_structures(arguments, fake))
    op = getattr(getattr(torch.ops, NAMESPACE), name).default

    def below_autocast(*args, **kwargs):
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return op(*args, **kwargs)

    for key in ("AutocastCPU", "AutocastCUDA"):
        torch.library.impl(qualified, key, below_autocast)
    return op


def with_structures(arguments: Sequence[str | type], function: Callable) -> Callable:
    """Return `function`, called with the flat arguments of the dispatcher."""

    def call(*flat):
        return function(*structured(arguments, flat))

    return call


def structured(arguments: Sequence[str | type], flat: Sequence[Any]) -> list[Any]:
    """Return the arguments of an op with structures, from the flat arguments of the dispatcher."""
    remaining = iter(flat)
    return [
        a(*islice(remaining, len(a._fields)))  # type: ignore[attr-defined]
        if isinstance(a, type)
        else next(remaining)
        for a in arguments
    ]


def flat(arguments: Sequence[Any]) -> list[Any]:
    """Return the flat arguments of the dispatcher: the fields of each structure in their order."""
    result: list[Any] = []
    for argument in arguments:
        is_structure = isinstance(argument, tuple(FIELDS))
        result += argument if is_structure else [argument]
    return result


def kernels_problem() -> str | None:
    """Return why the Triton kernels cannot run here; None if they can."""
    if torch.version.hip is not None:
        return "the kernels support NVIDIA GPUs only"
    return None if importlib.util.find_spec("triton") else "Triton is not installed"


def register_kernels(name: str, function: str = "launch", module: str | None = None) -> None:
    """Register kernels.<module or name>.<function> as the CUDA implementation of `moelora::name`.

    Triton is imported at the first call. float64 tensors use the reference: they are needed only
    to check gradients, and the kernels do not support them.
    """
    if kernels_problem():
        return
    reference = getattr(importlib.import_module("moelora_kernels.reference"), name)
    path = f"moelora_kernels.kernels.{module or name}"

    def launch(*arguments):
        if _first(arguments[0]).dtype == torch.float64:
            return reference(*arguments)
        return getattr(importlib.import_module(path), function)(*arguments)

    KERNELS[name] = with_structures(ARGUMENTS[name], launch)
    torch.library.impl(f"{NAMESPACE}::{name}", "CUDA", KERNELS[name])


def register_planned(name: str, composition: Callable) -> None:
    """Register `composition`, with plans, as the CUDA implementation of `moelora::name`.

    If the native library replays plans, it implements `moelora::name` for CUDA. The composition
    is then `moelora::name_python`, which the library calls if it has no plan.

    composition: calls ops with Triton kernels and ATen; takes structures.
    """
    composition_of_flat = function = with_structures(ARGUMENTS[name], composition)
    library = native.plan_library()
    qualified = f"{NAMESPACE}::{name}"
    if library is not None:
        schema = str(getattr(getattr(torch.ops, NAMESPACE), name).default._schema)
        qualified += "_python"
        arguments = schema[schema.index("(") : schema.index(" -> ")]
        torch.library.define(qualified, f"{arguments} -> Tensor[]")
        function = for_library(function, library)
        torch.library.impl(qualified, "CompositeExplicitAutograd", function)
    if kernels_problem():
        return

    @cache
    def planned() -> Callable:
        # The package imports Triton.
        plans = importlib.import_module("moelora_kernels.plans")
        return plans.PlannedOp(composition_of_flat, KERNELS, library)

    def call(*flat):
        return planned()(*flat)

    call = for_library(call, library) if library is not None else call
    torch.library.impl(qualified, "CUDA", call)


def for_library(function: Callable, library: Any) -> Callable:
    """Return `function` for a call by the native library.

    It returns all tensors in one list, because torch mixes up the types of several results. It
    keeps an exception, because torch keeps only that there was one.
    """

    def call(*flat):
        try:
            results = function(*flat)
        except BaseException as error:
            library.set_error(error)
            raise
        return [t for each in results for t in ([each] if isinstance(each, torch.Tensor) else each)]

    return call


def _first(argument):
    return argument[0] if isinstance(argument, (list, tuple)) else argument
