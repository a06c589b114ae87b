"""Run the ops on CPU tensors as on a GPU: layer ops with plans, and the launchers of the kernels.

    with kernels_on_cpu() as planned, fake_driver("sm_90") as driver:
        layer(x)

Tests then choose what a launch does: nothing (`fake_driver`), or Triton's interpreter
(`fake_driver(..., interpret=True)`).
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from unittest import mock

import torch

from moelora_kernels import native
from moelora_kernels.ops import registration
from moelora_kernels.plans import PlannedOp, native_replay

LAYER_OPS = ("wide", "wide_backward", "grouped", "grouped_backward")


def _module(op: str) -> ModuleType:
    return importlib.import_module(f"moelora_kernels.ops.{op.removesuffix('_backward')}")


def composition(op: str) -> Callable:
    """Return the function that computes a layer op with other ops, with flat arguments."""
    module = _module(op)
    function = module._backward if op.endswith("_backward") else module._forward
    return registration.with_structures(registration.ARGUMENTS[op], function)


@contextmanager
def kernels_on_cpu(plans: bool = True, launch: int = 0) -> Iterator[dict[str, PlannedOp]]:
    """Yield the layer ops by name. plans: whether they have plans.

    launch: the address of a function like cuLaunchKernel; the native library then replays plans.
    """
    functions = {op: composition(op) for op in LAYER_OPS}
    planned = {
        op: PlannedOp(function, registration.KERNELS, native_replay(op) if launch else None)
        for op, function in functions.items()
    }
    implementations = torch.library.Library(registration.NAMESPACE, "IMPL")
    with ExitStack() as stack:
        stack.callback(implementations._destroy)
        if launch:
            stack.enter_context(_native_replays(launch))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for op, function in {
                **registration.KERNELS,
                **(planned if plans else functions),
            }.items():
                implementations.impl(op, function, "CPU", allow_override=True)
        yield planned


@contextmanager
def _native_replays(launch: int) -> Iterator[None]:
    """Call the layer ops on CPU tensors like on tensors of a GPU."""
    library = native.plan_library()
    assert library is not None
    with ExitStack() as stack:
        for op in LAYER_OPS:
            by_device = "_backward_by_device" if op.endswith("_backward") else "_by_device"
            functions = getattr(_module(op), by_device)
            stack.enter_context(mock.patch.dict(functions, cpu=functions["cuda"]))
        library.set_cpu_launch(launch)
        try:
            yield
        finally:
            library.set_cpu_launch(0)
            library.clear_plans()
