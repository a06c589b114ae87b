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
    "grouped_dx": "dx",
    "grouped_weight_grad": "da db",
    "router_grad": "drouter dbias",
}
GATE_OPS = {"topk_gate": "weights experts", "topk_gate_backward": "dlogits"}
OUTPUTS = {**WIDE_OPS, **GROUPED_OPS, **GATE_OPS}
# Computed in float32 whatever x is; every other result has passed through x.dtype.
EXACT = ("logits", "weights", "dweights", "drouter", "dlogits")


def _sums_of_gate(dy, lora_b, h, gate, dlogits, mixture) -> tuple[int, ...]:
    """du sums over O, dgate over the ranks of an expert, and the gradient of a row over tokens."""
    shares_rows = gate.experts is None and gate.weights.shape[0] != len(h)
    tokens = len(h) if shares_rows or gate.rows is not None else 0
    return max(g.shape[1] for g in dy), lora_b[0].shape[1], tokens


# Op -> the lengths of the sums that one of its values goes through, by the arguments of the op.
# Tensor cores cut a sum, so the budget of every output grows with its length.
SUMS: dict[str, Callable[..., tuple[int, ...]]] = {
    "shrink_gate": lambda x, *_: (x.shape[1],),
    "shrink_gate_backward": _sums_of_gate,
    "weight_grad": lambda x, *_: (len(x),),
    "shrink_dx": lambda dh, dlogits, *_: (
        dh.shape[1],
        0 if dlogits is None else dlogits.shape[1],
    ),
    "router_logits": lambda x, *_: (x.shape[1],),
    "grouped_shrink": lambda x, *_: (x.shape[1],),
    "grouped_shrink_backward": lambda dy, *_: (max(g.shape[1] for g in dy),),
    "grouped_expand": lambda u, *_: (u.shape[1],),
    "grouped_dx": lambda dh, dlogits, *_: (
        dh.shape[1],
        0 if dlogits is None else dlogits.shape[1],
    ),
    "grouped_weight_grad": lambda x, dh, *_: (len(dh),),
    "router_grad": lambda dlogits, *_: (len(dlogits),),
}


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
    actual = named(op, implementation(*arguments))
    baseline = named(op, specification(*arguments))
    truth = named(op, specification(*as_float64(arguments)))
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
            cut = _cut_additions(op, arguments, dtype, truncates)
            assert_within_budget(actual, {name: expected}, baseline, rounded_to, cut)
    again = named(op, implementation(*arguments))
    for name, value in actual.items():
        assert torch.equal(value, again[name]), f"{name}: two runs differ"


def opcheck(op: str, arguments: list, **options) -> None:
    """torch.library.opcheck of an op on structured arguments."""
    overload = getattr(torch.ops.moelora, op).default
    torch.library.opcheck(overload, tuple(registration.flat(arguments)), **options)


def named(op: str, outputs) -> dict[str, Tensor]:
    """Return the outputs of an op by name; a list of n dB becomes db0, db1, ..."""
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    result = dict(zip(OUTPUTS[op].split(), outputs, strict=True))
    if isinstance(result.get("db"), list):
        result.update({f"db{i}": db for i, db in enumerate(result.pop("db"))})
    return result


def _cut_additions(op: str, arguments: list, dtype: torch.dtype, truncates: bool) -> int:
    """Return how many additions of tensor cores make one value; they cut the sum to float32.

    One addition takes 8 products of float32 operands, or 16 of 16-bit ones. An operand in float32
    has three parts, which are multiplied one after the other. On a CPU, in the interpreter too,
    additions round, unless `truncates`.
    """
    flat = registration.flat(arguments)
    tensors = [t for a in flat for t in (a if isinstance(a, (list, tuple)) else [a])]
    if not truncates and not any(isinstance(t, Tensor) and t.is_cuda for t in tensors):
        return 0
    products = 32 // dtype.itemsize
    lengths = SUMS[op](*arguments) if op in SUMS else ()
    return 3 * sum(-(-length // products) for length in lengths)
