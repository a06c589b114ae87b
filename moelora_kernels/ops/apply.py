"""Call a torch.autograd.Function, with the least work that the caller's mode allows."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor


def apply(function: type[torch.autograd.Function], *inputs: Any) -> Any:
    """Return the outputs of `function`, with its gradient if grad mode is on.

    `Function.apply` binds the inputs of a Function with `setup_context` to a signature on every
    call. For small layers that takes longer than their products, and only functorch needs it. So
    eager mode runs a Function without `setup_context` that calls both methods of `function`.

    Args:
        function: it has `setup_context`, so its `forward` does not take a context. Its `backward`
            is `once_differentiable`.
        inputs: the inputs of `forward`.

    Raises:
        RuntimeError: torch.jit.trace traces the call in grad mode.
    """
    if torch._C._are_functorch_transforms_active():
        return function.apply(*inputs)
    if not torch.is_grad_enabled():
        return function.forward(*inputs)
    if torch.compiler.is_compiling():
        # If no input needs a gradient, Dynamo passes a context to the forward of a Function. A
        # Function with `setup_context` does not take one.
        trains = any([isinstance(t, Tensor) and t.requires_grad for t in inputs])
        return function.apply(*inputs) if trains else function.forward(*inputs)
    if torch._C._is_tracing():
        raise RuntimeError(
            "torch.jit.trace: trace the layer inside torch.no_grad(), or use torch.export.export"
        )
    return _eager_apply(function)(*inputs)


@cache
def _eager_apply(function: type[torch.autograd.Function]) -> Callable:
    """Return the `apply` of a Function with the same results whose `forward` takes the context."""

    def forward(ctx, *inputs):
        output = function.forward(*inputs)
        function.setup_context(ctx, inputs, output)
        return output

    def backward(ctx, *grads):
        # With create_graph=True grad mode is on. Otherwise `once_differentiable` has nothing to do.
        step = function.backward if torch.is_grad_enabled() else once
        return step(ctx, *grads)

    once = function.backward.__wrapped__  # type: ignore[attr-defined]
    methods = {
        "__module__": function.__module__,
        "__qualname__": function.__qualname__,
        "__doc__": function.__doc__,
        "forward": staticmethod(forward),
        "backward": staticmethod(backward),
    }
    eager: Any = type(function.__name__, (torch.autograd.Function,), methods)
    # In older versions of torch, `Function.apply` is a Python method that looks for functorch
    # transforms before it calls the `apply` of its base class, which is in C++.
    return super(torch.autograd.Function, eager).apply
