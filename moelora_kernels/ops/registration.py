"""How an op enters the dispatcher: schema, reference for every device, fake for the compiler."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

import torch

NAMESPACE = "moelora"

# Ops that Triton serves on a GPU.
KERNELS: set[str] = set()

_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU) | torch._C.DispatchKeySet(
    torch._C.DispatchKey.AutocastCUDA
)


def register(name: str, schema: str, reference: Callable, fake: Callable) -> torch._ops.OpOverload:
    """Define `moelora::name` and return its default overload.

    The reference serves every device (CompositeExplicitAutograd), so an implementation for one
    device (the native library's CPU ops) takes precedence whichever of the two is loaded first.
    Under autocast every implementation runs as without it: its float32 products stay float32.
    """
    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, schema, tags=(torch.Tag.needs_exact_strides,))
    torch.library.impl(qualified, "CompositeExplicitAutograd", reference)
    torch.library.register_fake(qualified, fake)
    op = getattr(getattr(torch.ops, NAMESPACE), name).default

    def below_autocast(*args):
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return op(*args)

    for key in ("AutocastCPU", "AutocastCUDA"):
        torch.library.impl(qualified, key, below_autocast)
    return op


def why_no_kernels() -> str:
    """Why Triton serves nothing here; empty where it does."""
    if torch.version.hip is not None:
        return "the kernels are written for and tested on NVIDIA GPUs only"
    return "" if importlib.util.find_spec("triton") else "Triton is not installed"


def register_kernels(name: str, function: str = "launch", module: str | None = None) -> None:
    """Let kernels.<module or name>.<function> serve `moelora::name` on CUDA.

    Triton is imported at the first call. float64 stays with the reference: it is there to check
    gradients, and tensor cores have no use for it.
    """
    if why_no_kernels():
        return
    reference = getattr(importlib.import_module("moelora_kernels.reference"), name)
    path = f"moelora_kernels.kernels.{module or name}"

    def launch(*args):
        if _first(args[0]).dtype == torch.float64:
            return reference(*args)
        return getattr(importlib.import_module(path), function)(*args)

    torch.library.impl(f"{NAMESPACE}::{name}", "CUDA", launch)
    KERNELS.add(name)


def _first(argument):
    return argument[0] if isinstance(argument, (list, tuple)) else argument
