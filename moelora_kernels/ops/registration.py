"""How an op enters the dispatcher: schema, reference for every device, fake for the compiler."""

from __future__ import annotations

from collections.abc import Callable

import torch

NAMESPACE = "moelora"

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
