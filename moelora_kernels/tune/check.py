"""Compare the outputs of an op with the reference in float64, within the error budget.

Expectation("grouped_shrink", arguments, dtype).check(launch(*arguments))
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moelora_kernels import reference
from moelora_kernels.ops import registration
from moelora_kernels.testing import assert_within_budget

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
FFN_OPS = {
    "ffn_inner": "summed h u",
    "ffn_inner_backward": "dgate_out dup_out dh_gate dh_up dweights dgate_b dup_b ddown_a",
}
GATE_OPS = {"topk_gate": "weights experts", "topk_gate_backward": "dlogits"}
OUTPUTS = {**WIDE_OPS, **GROUPED_OPS, **FFN_OPS, **GATE_OPS}
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


class Expectation:
    """The outputs of an op for given arguments, computed by the reference.

    truth: in float64. baseline: in the dtypes of the arguments.
    """

    def __init__(
        self, op: str, arguments: list, dtype: torch.dtype, truncates: bool = False
    ) -> None:
        """dtype: of x. truncates: sums in float32 are cut, like on a GPU, although on a CPU."""
        specification = getattr(reference, op)
        self.op, self.dtype = op, dtype
        self.baseline = named(op, specification(*arguments))
        self.truth = named(op, specification(*as_float64(arguments)))
        self.cut_additions = _cut_additions(op, arguments, dtype, truncates)

    def check(self, outputs: Any) -> dict[str, Tensor]:
        """Return the outputs by name.

        Raise AssertionError, with the name of an output, unless shapes, dtypes and integers are
        equal, and other values within the error budget of `assert_within_budget`; in float64
        within 1e-13 of the largest.
        """
        actual = named(self.op, outputs)
        for name, expected in self.baseline.items():
            assert actual[name].dtype == expected.dtype, f"{name}: dtype {actual[name].dtype}"
            assert actual[name].shape == expected.shape, f"{name}: shape {actual[name].shape}"
            assert actual[name].is_contiguous(), f"{name}: not contiguous"
            if not expected.is_floating_point():
                assert torch.equal(actual[name], expected), f"{name}: other integers"
        for name, expected in self.truth.items():
            rounded_to = self.baseline[name].dtype if name in EXACT else self.dtype
            if self.dtype is torch.float64:
                largest = expected.abs().max().item() if expected.numel() else 0.0
                tolerance = 1e-13 * (1 + largest)
                torch.testing.assert_close(actual[name], expected, rtol=0, atol=tolerance)
            elif expected.is_floating_point():
                truth = {name: expected}
                assert_within_budget(actual, truth, self.baseline, rounded_to, self.cut_additions)
        return actual


def named(op: str, outputs: Any) -> dict[str, Tensor]:
    """Return the outputs of an op by name; a list of n dB becomes db0, db1, ..."""
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    result = dict(zip(OUTPUTS[op].split(), outputs, strict=True))
    if isinstance(result.get("db"), list):
        result.update({f"db{i}": db for i, db in enumerate(result.pop("db"))})
    return result


def map_tensors(function: Callable, value: Any) -> Any:
    """Return a structure of lists and tuples with `function` applied to all that is in them."""
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(function, v) for v in value))
    if isinstance(value, (list, tuple)):
        return type(value)(map_tensors(function, v) for v in value)
    return function(value)


def as_float64(value: Any) -> Any:
    """Return a structure with its floating-point tensors, and its dtypes, in float64."""

    def convert(v: Any) -> Any:
        if isinstance(v, Tensor):
            return v.double() if v.is_floating_point() else v
        return torch.float64 if isinstance(v, torch.dtype) else v

    return map_tensors(convert, value)


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
