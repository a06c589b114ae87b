"""How an implementation of an op is compared with the reference.

An implementation is a function with the signature of the op: `ops.route`, a launcher.

    check("grouped_shrink", implementation, Inputs(GROUPED["plain"], dtype))
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from moelora_kernels.ops import registration
from moelora_kernels.tune.check import (
    FFN_OPS,
    GATE_OPS,
    GROUPED_OPS,
    OUTPUTS,
    WIDE_OPS,
    Expectation,
    named,
)
from support.arguments import calls
from support.inputs import Inputs

__all__ = [
    "FFN_OPS",
    "GATE_OPS",
    "GROUPED_OPS",
    "OUTPUTS",
    "WIDE_OPS",
    "check",
    "compare",
    "named",
    "opcheck",
]


def check(op: str, implementation: Callable, inputs: Inputs) -> None:
    """Compare every call of an op that a training step of this layer makes."""
    for arguments in calls(op, inputs):
        compare(op, implementation, arguments, inputs.dtype)


def compare(
    op: str,
    implementation: Callable,
    arguments: list,
    dtype: torch.dtype,
    truncates: bool = False,
) -> None:
    """Assert that an implementation returns the values of the reference, and the same bits twice.

    dtype: of x. Shapes, dtypes and integers must be equal; other values must be within the error
    budget of `assert_within_budget`, in float64 within 1e-13 of the largest. truncates: sums in
    float32 are cut, as on a GPU.
    """
    actual = Expectation(op, arguments, dtype, truncates).check(implementation(*arguments))
    again = named(op, implementation(*arguments))
    for name, value in actual.items():
        assert torch.equal(value, again[name]), f"{name}: two runs differ"


def opcheck(op: str, arguments: list, **options) -> None:
    """torch.library.opcheck of an op on structured arguments."""
    overload = getattr(torch.ops.moelora, op).default
    torch.library.opcheck(overload, tuple(registration.flat(arguments)), **options)
