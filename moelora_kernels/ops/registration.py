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
    InnerAdapters,
    InnerInputs,
    InnerOptions,
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
    InnerInputs: "Tensor gate_out, Tensor up_out, Tensor u_gate, Tensor u_up",
    InnerAdapters: "Tensor gate_b, Tensor up_b, Tensor down_a",
    InnerOptions: (
        "int[] ranks, float[] scaling, float dropout, bool dropout_per_expert, Tensor? seed, "
        "str activation"
    ),
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


def register_planned(name: str, composition: Callable) -> dict[str, Callable]:
    """Register `composition`, with plans, as the CUDA implementation of `moelora::name`.

    composition: calls ops with Triton kernels and ATen; takes structures.

    Returns:
        Type of a device -> a function that computes the op on it with less host time than the op,
        from flat arguments. It calls the op if it has no shorter way.
    """
    if kernels_problem():
        return {}
    function = with_structures(ARGUMENTS[name], composition)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default

    # The package of plans imports Triton.
    @cache
    def replay() -> Callable:
        return importlib.import_module("moelora_kernels.plans").native_replay(name)

    @cache
    def planned() -> Callable:
        plans = importlib.import_module("moelora_kernels.plans")
        return plans.PlannedOp(function, KERNELS, replay())

    def replayed(*flat):
        return op(*flat) if torch.compiler.is_compiling() else replay()(*flat)

    torch.library.impl(f"{NAMESPACE}::{name}", "CUDA", lambda *flat: planned()(*flat))
    return {"cuda": replayed} if native.plan_library() else {}


def _first(argument):
    return argument[0] if isinstance(argument, (list, tuple)) else argument
