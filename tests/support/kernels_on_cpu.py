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
from contextlib import contextmanager

import torch

from moelora_kernels import native
from moelora_kernels.ops import registration
from moelora_kernels.plans import PlannedOp

LAYER_OPS = ("wide", "wide_backward", "grouped", "grouped_backward")


def composition(op: str) -> Callable:
    """Return the function that computes a layer op with other ops, with flat arguments."""
    module = importlib.import_module(f"moelora_kernels.ops.{op.removesuffix('_backward')}")
    function = module._backward if op.endswith("_backward") else module._forward
    return registration.with_structures(registration.ARGUMENTS[op], function)


@contextmanager
def kernels_on_cpu(plans: bool = True, launch: int = 0) -> Iterator[dict[str, PlannedOp]]:
    """Yield the layer ops by name. plans: whether they have plans.

    launch: the address of a function like cuLaunchKernel; the native library then replays plans.
    """
    library = native.plan_library() if launch else None
    functions = {op: composition(op) for op in LAYER_OPS}
    planned = {
        op: PlannedOp(function, registration.KERNELS, library) for op, function in functions.items()
    }
    # Without plans of the library its ops for the CPU are replaced too.
    suffix = "_python" if launch else ""
    layers = {
        f"{op}{suffix}": function for op, function in (planned if plans else functions).items()
    }
    implementations = torch.library.Library(registration.NAMESPACE, "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for op, function in {**registration.KERNELS, **layers}.items():
                implementations.impl(op, function, "CPU", allow_override=True)
            if library is not None:
                library.clear_plans()
                library.set_cpu_launch(launch)
                library.register_plans_for_cpu(True)
        yield planned
    finally:
        if library is not None:
            library.register_plans_for_cpu(False)
            library.clear_plans()
        implementations._destroy()
