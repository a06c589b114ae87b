"""How an op enters the dispatcher: schema, reference for every device, fake for the compiler.

The dispatcher knows tensors, lists and numbers, not the structures of `types`. `register` writes
the schema from a list in which a structure stands for its fields, in their order; a function that
implements the op gets the structures back. The order of all ops is: activations, tensors of the
linears, rank space, `Gate`, `Routing`, `Mixture` (or its ranks and scaling), `Dropout`, switches.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import torch

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

# Ops that Triton serves on a GPU.
KERNELS: set[str] = set()
# Op -> its arguments, as given to `register`.
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

    The reference serves every device (CompositeExplicitAutograd), so an implementation for one
    device (the native library's CPU ops) takes precedence, whichever is loaded first. Under
    autocast every implementation runs as without it: its float32 products stay float32.

    Args:
        name: of the op.
        arguments: one schema entry ("Tensor x") or structure of `FIELDS` per argument.
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
    """Return the flat arguments of an op, those of a structure put into the structure."""
    rest = iter(flat)
    return [
        a(*islice(rest, len(a._fields))) if isinstance(a, type) else next(rest)  # type: ignore[attr-defined]
        for a in arguments
    ]


def flat(arguments: Sequence[Any]) -> list[Any]:
    """Return arguments in the form the dispatcher takes: the fields of each structure in turn."""
    result: list[Any] = []
    for argument in arguments:
        is_structure = isinstance(argument, tuple(FIELDS))
        result += argument if is_structure else [argument]
    return result


def kernels_problem() -> str | None:
    """Return why Triton serves no op here; None if it does."""
    if torch.version.hip is not None:
        return "the kernels are written for and tested on NVIDIA GPUs only"
    return None if importlib.util.find_spec("triton") else "Triton is not installed"


def register_kernels(name: str, function: str = "launch", module: str | None = None) -> None:
    """Let kernels.<module or name>.<function> serve `moelora::name` on CUDA.

    Triton is imported at the first call. float64 stays with the reference: it serves to check
    gradients, and the tensor cores of the kernels do not take it.
    """
    if kernels_problem():
        return
    reference = getattr(importlib.import_module("moelora_kernels.reference"), name)
    path = f"moelora_kernels.kernels.{module or name}"

    def launch(*arguments):
        if _first(arguments[0]).dtype == torch.float64:
            return reference(*arguments)
        return getattr(importlib.import_module(path), function)(*arguments)

    torch.library.impl(f"{NAMESPACE}::{name}", "CUDA", with_structures(ARGUMENTS[name], launch))
    KERNELS.add(name)


def _first(argument):
    return argument[0] if isinstance(argument, (list, tuple)) else argument
