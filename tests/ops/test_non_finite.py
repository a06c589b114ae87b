"""NaN and infinities in one tensor of an op: they reach the elements that the reference names.

Kernels multiply by matrices of zeros and ones, and 0 * NaN is NaN: without care, a value of one
expert reaches the other experts of its token, and one of a token every gate row.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from moelora_kernels import reference
from support.arguments import calls
from support.backends import NATIVE, PTX, TRITON, Backend, each_backend
from support.cases import Case, grouped_case
from support.inputs import Inputs
from support.op_checks import GROUPED_OPS, WIDE_OPS, named

VALUES = (torch.inf, -torch.inf, torch.nan)
pytestmark = pytest.mark.filterwarnings("ignore:invalid value")
# With both NaN and infinity, the largest logit is not defined.
SETS = {"shrink_gate": [(value,) for value in VALUES]}
SMALL = dict(T=21, I=40, O=24, ranks=(4, 8, 4))
WIDE = {
    "router": Case(**SMALL, router_bias=True, aux=True),
    "softmax_before_topk": Case(**SMALL, renormalize=False),
    "dense": Case(**SMALL, gate="dense", n=2),
    "rows": Case(**SMALL, gate="rows"),
    "one_row": Case(**SMALL, gate="one_row"),
    "sparse": Case(**SMALL, gate="sparse"),
    "share_a": Case(**{**SMALL, "ranks": (4, 4, 4)}, share_a=True, gate="dense"),
    # Columns of rank space and experts past one launch and one block of columns.
    "two_launches": Case(**{**SMALL, "ranks": (70, 70)}, gate="rows"),
    "dropout": Case(**SMALL, gate="dense", dropout=0.4, per_expert=True),
}
GROUPED = {
    "mixed_ranks": grouped_case(**SMALL),
    "dropout": grouped_case(**SMALL, dropout=0.4, per_expert=True),
    "siblings": grouped_case(**{**SMALL, "ranks": (4, 4, 4)}, n=2),
}
CASES = {
    **{f"{op}-{name}": (op, case) for op in WIDE_OPS for name, case in WIDE.items()},
    **{
        f"{op}-{name}": (op, case)
        for op in GROUPED_OPS
        for name, case in GROUPED.items()
        if op != "route"
    },
}

# Case -> the architecture that executes it. Products of tensor cores, and the selects of float32's
# three parts, have rules of their own.
ON_PTX = {"router": "sm_90", "rows": "sm_80", "one_row": "sm_90", "mixed_ranks": "sm_90"}


def replace_tensors(value, function: Callable[[Tensor], Tensor]):
    """Return arguments whose tensors, in lists and tuples too, are function(tensor)."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(replace_tensors(each, function) for each in value))
    if isinstance(value, (list, tuple)):
        return type(value)(replace_tensors(each, function) for each in value)
    return value


def poison(tensor: Tensor, values: tuple[float, ...]) -> Tensor:
    """Return a copy with these values, in different rows and columns if there are several."""
    tensor = tensor.clone()
    for number, value in enumerate(values):
        tensor[tuple(side * (number + 1) // 4 for side in tensor.shape)] = value
    return tensor


def poisoned(arguments: list, values: tuple[float, ...]) -> Iterator[tuple[int, list]]:
    """Yield the arguments once for each floating-point tensor, which then has `values`."""
    tensors = []
    replace_tensors(arguments, lambda tensor: tensors.append(tensor) or tensor)
    for number, target in enumerate(tensors):
        if target.is_floating_point() and target.numel():

            def replace(tensor, target=target):
                return poison(tensor, values) if tensor is target else tensor

            yield number, replace_tensors(arguments, replace)


def kinds(tensor: Tensor) -> Tensor:
    """Return 0 for a finite element, 1 for infinity, -1 for minus infinity, 2 for NaN."""
    return torch.where(tensor.isnan(), 2, tensor.isposinf().int() - tensor.isneginf().int())


@pytest.mark.parametrize(
    ("op", "case", "backend"),
    [
        pytest.param(*value, backend, id=f"{name}-{backend.name}", marks=backend.marks_of_edges)
        for backend in (NATIVE, TRITON, *PTX)
        for name, value in CASES.items()
        if not backend.ptx or ON_PTX.get(name.split("-")[1]) == backend.ptx
    ],
)
def test_pattern_of_the_reference(op: str, case: Case, backend: Backend) -> None:
    for arguments in calls(op, Inputs(case, torch.float32)):
        variants = (poisoned(arguments, values) for values in SETS.get(op, [VALUES]))
        for number, args in itertools.chain(*variants):
            expected = named(op, getattr(reference, op)(*args))
            args = replace_tensors(args, lambda tensor: tensor.to(backend.device))
            for implementation in backend.implementations(op):
                result = named(op, implementation(*args))
                for name, value in expected.items():
                    if value.is_floating_point():
                        same = torch.equal(kinds(result[name].cpu()), kinds(value))
                        assert same, f"{name}, tensor {number} of the arguments is poisoned"


@each_backend(NATIVE, TRITON, *PTX)
def test_a_value_stays_with_its_expert_and_its_gate_row(backend: Backend) -> None:
    """The examples that the formulas give by hand: <du, h> of one expert, rows of one token."""
    inputs = Inputs(Case(T=6, ranks=(4, 4), gate="rows"), torch.float32)
    inputs.gate_weights = torch.rand(3, 2) + 0.5
    inputs.rows = torch.tensor([0, 0, 1, 1, 2, 2], dtype=torch.int32)
    (arguments,) = calls("shrink_gate_backward", inputs)
    arguments[2] = arguments[2].clone()
    # h of expert 1 at token 3, whose gate row is 1.
    arguments[2][3, 5] = torch.nan
    for args in (arguments, replace_tensors(arguments, lambda t: t.to(backend.device))):
        on_backend = args is not arguments
        function = backend.implementation("shrink_gate_backward")
        function = function if on_backend else reference.shrink_gate_backward
        dh, u, dgate = function(*args)
        assert torch.isfinite(dh).all()
        assert u.isnan().nonzero().tolist() == [[3, 5]]
        assert dgate.isnan().nonzero().tolist() == [[1, 1]]
