"""Run the layer ops with plans, on the replay in Python or on that of the native library."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from moelora_kernels.autograd.linear import siblings_of
from moelora_kernels.plans import PlannedOp
from moelora_kernels.plans.steps import Plan
from support.backends import needs_library
from support.cases import layer_case
from support.fake_driver import FakeDriver, fake_driver
from support.inputs import Inputs
from support.kernels_on_cpu import kernels_on_cpu

BACKENDS = ("python", pytest.param("native", marks=needs_library))


@contextmanager
def planned_ops(
    backend: str, interpret: bool = True
) -> Iterator[tuple[dict[str, PlannedOp], FakeDriver]]:
    """Yield the layer ops by name, and the driver on which they launch."""
    with fake_driver("sm_90", interpret) as driver:
        with kernels_on_cpu(launch=driver.address if backend == "native" else 0) as planned:
            yield planned, driver
        assert not driver.errors


def wide_arguments(T: int = 9) -> list[Any]:
    """Return the flat arguments of the op `wide`, as the dispatcher passes them."""
    inputs = Inputs(layer_case(T=T, I=32, O=24), torch.float16, 1)
    mixture = [[*value] if isinstance(value, tuple) else value for value in inputs.mixture]
    return [inputs.x, *siblings_of(inputs.linears), *inputs.gate, *mixture, *inputs.dropout]


def plans_of(planned: dict[str, PlannedOp]) -> list[Plan]:
    """Return the plans of the layer ops."""
    return [p for op in planned.values() for p in op.plans.values() if isinstance(p, Plan)]


def run(op: PlannedOp, arguments: Sequence[Any]) -> Any:
    """Return the results of a call like that of a layer."""
    return (op.native or op)(*arguments)


def counted(function: Callable, name: str, calls: Counter) -> Callable:
    """Return `function`, which also counts its calls under `name`."""

    def call(*arguments):
        calls[name] += 1
        return function(*arguments)

    return call


def shifted(tensor: Tensor) -> Tensor:
    """Return a copy that begins at an odd element of its storage."""
    flat = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)[1:]
    return flat.copy_(tensor.flatten()).view(tensor.shape)
