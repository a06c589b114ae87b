"""How an implementation of an op is compared with the reference.

An implementation is a function with the signature of the op: `ops.route`, a launcher.

    check("grouped_shrink", implementation, Inputs(GROUPED["plain"], dtype))
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moelora_kernels import reference
from moelora_kernels.ops import registration
from moelora_kernels.testing import assert_within_budget
from support.arguments import calls
from support.inputs import Inputs, as_float64

# op -> names of its outputs; the ops of a formulation in the order in which a layer calls them.
WIDE_OPS = {
    "shrink_gate": "h u weights experts logits",
    "shrink_gate_backward": "dh u dgate",
    "weight_grad": "da drouter dbias db",
    "shrink_dx": "dx",
}
GROUPED_OPS = {
    "router_logits": "logits",
    "route": "order offsets tiles chunks",
    "grouped_shrink": "h u",
    "grouped_shrink_backward": "dh u dweights",
    "grouped_expand": "y",
    "grouped_weight_grad": "da db",
    "router_grad": "drouter dbias",
}
GATE_OPS = {"topk_gate": "weights experts", "topk_gate_backward": "dlogits"}
OUTPUTS = {**WIDE_OPS, **GROUPED_OPS, **GATE_OPS}
# Computed in float32 whatever x is; every other result has passed through x.dtype.
EXACT = ("logits", "weights", "dweights", "drouter", "dlogits")


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
    specification = getattr(reference, op)
    actual = _named(op, implementation(*arguments))
    baseline = _named(op, specification(*arguments))
    truth = _named(op, specification(*as_float64(arguments)))
    for name, expected in baseline.items():
        assert actual[name].dtype == expected.dtype, name
        assert actual[name].shape == expected.shape, name
        assert actual[name].is_contiguous(), name
        if not expected.is_floating_point():
            assert torch.equal(actual[name], expected), name
    for name, expected in truth.items():
        rounded_to = baseline[name].dtype if name in EXACT else dtype
        if dtype is torch.float64:
            largest = expected.abs().max().item() if expected.numel() else 0.0
            torch.testing.assert_close(actual[name], expected, rtol=0, atol=1e-13 * (1 + largest))
        elif expected.is_floating_point():
            steps = _tensor_core_steps(arguments, truncates) if name in EXACT else 0
            assert_within_budget(actual, {name: expected}, baseline, rounded_to, steps)
    again = _named(op, implementation(*arguments))
    for name, value in actual.items():
        assert torch.equal(value, again[name]), f"{name}: two runs differ"


def opcheck(op: str, arguments: list, **options) -> None:
    """torch.library.opcheck of an op on structured arguments."""
    overload = getattr(torch.ops.moelora, op).default
    torch.library.opcheck(overload, tuple(registration.flat(arguments)), **options)


def _named(op: str, outputs) -> dict[str, Tensor]:
    """Return the outputs of an op by name; a list of n dB becomes db0, db1, ..."""
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    result = dict(zip(OUTPUTS[op].split(), outputs, strict=True))
    if isinstance(result.get("db"), list):
        result.update({f"db{i}": db for i, db in enumerate(result.pop("db"))})
    return result


def _tensor_core_steps(arguments: list, truncates: bool) -> int:
    """Return how many additions of tensor cores make one float32 sum; they cut, and do not round.

    A sum of 16-bit products takes 16 terms at a time, and no sum of an op is longer than the
    longest side of its arguments. On a CPU, in the interpreter too, float32 additions round, unless
    `truncates`.
    """
    flat = registration.flat(arguments)
    tensors = [t for a in flat for t in (a if isinstance(a, (list, tuple)) else [a])]
    tensors = [t for t in tensors if isinstance(t, Tensor) and (truncates or t.is_cuda)]
    return max((side for t in tensors for side in t.shape), default=0) // 16
