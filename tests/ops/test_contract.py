"""The registered ops keep their contract with the dispatcher and the compiler."""

from __future__ import annotations

import pytest
import torch

from moelora_kernels import ops, reference
from moelora_kernels.autograd.linear import siblings_of
from moelora_kernels.types import CHUNK, TILE, Needs, Routing
from support.arguments import calls, shrink_gate_backward
from support.backends import KERNEL_DEVICE
from support.cases import GROUPED, WIDE, Case, layer_case
from support.inputs import Inputs
from support.op_checks import GROUPED_OPS, WIDE_OPS, opcheck

OPCHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)
WIDE_CASES = {
    "router": layer_case(n=2, O=(13, 5), aux=True),
    "router_all_experts": layer_case(K=4, renormalize=False, aux=True),
    "sparse": layer_case(gate="sparse"),
    "rows": layer_case(gate="rows", n=2, O=(13, 5)),
    "dropout": layer_case(gate="dense", dropout=0.3),
    "share_a": layer_case(share_a=True, aux=True),
}
GROUPED_CASES = {
    "siblings": layer_case(T=9, gate="sparse", n=2, O=(13, 5), tile=TILE, chunk=CHUNK),
    "mixed_ranks": layer_case(T=9, gate="sparse", ranks=(1, 4, 3, 2)),
    "per_pair": layer_case(T=9, gate="sparse", ranks=(1, 4, 3, 2), per_pair=True),
    "base": layer_case(T=9, gate="sparse", start="base"),
    "no_start": layer_case(T=9, gate="sparse", start=""),
    "dropout": layer_case(T=9, gate="sparse", dropout=0.3, per_expert=True),
}
# The op of a whole layer, with its gate from routers and from outside.
LAYER_CASES = {
    "router": layer_case(T=9, n=2, O=(13, 5), renormalize=False),
    "sparse": layer_case(T=9, gate="sparse", ranks=(1, 4, 3, 2)),
    "dropout": layer_case(T=9, gate="sparse", dropout=0.3, per_expert=True),
}
NEEDS = (Needs(True, True), Needs(False, True), Needs(True, False))
each_dtype = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)


@each_dtype
@pytest.mark.parametrize("case", WIDE_CASES.values(), ids=WIDE_CASES)
@pytest.mark.parametrize("op", WIDE_OPS)
def test_opcheck_of_wide_ops(op: str, case: Case, dtype: torch.dtype) -> None:
    for arguments in calls(op, Inputs(case, dtype)):
        opcheck(op, arguments, test_utils=OPCHECKS)


@each_dtype
@pytest.mark.parametrize("case", GROUPED_CASES.values(), ids=GROUPED_CASES)
@pytest.mark.parametrize("op", GROUPED_OPS)
def test_opcheck_of_grouped_ops(op: str, case: Case, dtype: torch.dtype) -> None:
    for arguments in calls(op, Inputs(case, dtype)):
        opcheck(op, arguments, test_utils=OPCHECKS)


@pytest.mark.parametrize("base", ("read", "called"))
@pytest.mark.parametrize("case", WIDE_CASES.values(), ids=WIDE_CASES)
def test_opcheck_of_wide(case: Case, base: str) -> None:
    inputs = Inputs(case, torch.float32)
    linears, mixture, dropout = inputs.linears, inputs.mixture, inputs.dropout
    if base == "called":
        linears = [
            s._replace(weight=None, bias=None, base_output=torch.randn_like(dy))
            for s, dy in zip(linears, inputs.dy, strict=True)
        ]
    tensors = siblings_of(linears)
    opcheck("wide", [inputs.x, tensors, inputs.gate, mixture, dropout], test_utils=OPCHECKS)
    dy, _, h, gate, dlogits, _ = shrink_gate_backward(inputs)
    for needs in NEEDS:
        arguments = [dy, inputs.x, tensors, h, gate, dlogits, mixture, dropout, needs]
        opcheck("wide_backward", arguments, test_utils=OPCHECKS)


@each_dtype
@pytest.mark.parametrize("case", LAYER_CASES.values(), ids=LAYER_CASES)
def test_opcheck_of_grouped(case: Case, dtype: torch.dtype) -> None:
    inputs = Inputs(case, dtype)
    tensors, mixture, dropout = siblings_of(inputs.linears), inputs.mixture, inputs.dropout
    arguments = [inputs.x, tensors, inputs.gate, mixture, dropout]
    opcheck("grouped", arguments, test_utils=OPCHECKS)
    result = ops.grouped(*arguments)
    gate, routing = inputs.gate, Routing(*result[5:])
    if inputs.has_router:
        gate = mixture.router_gate(*result[2:5])
    for needs in NEEDS:
        arguments = [
            inputs.dy, inputs.x, tensors, result.h, gate, None, routing, mixture, dropout, needs
        ]  # fmt: skip
        for frozen in ((), (0, 1)):
            opcheck("grouped_backward", [*arguments, frozen], test_utils=OPCHECKS)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("op", "case"),
    [
        pytest.param(op, cases[name], id=f"{op}-{name}")
        for names_of_ops, cases, names in (
            (WIDE_OPS, WIDE, ("plain", "siblings", "all_experts", "rows_int64", "dropout")),
            (GROUPED_OPS, GROUPED, ("plain", "siblings", "per_pair", "dropout", "mixed_ranks")),
        )
        for op in names_of_ops
        for name in names
    ],
)
def test_opcheck_of_kernels_on_a_gpu(op: str, case: Case) -> None:
    """Schema and fake hold for the kernels: no input changed, no alias, sizes and strides."""
    inputs = Inputs(case, torch.bfloat16).to(KERNEL_DEVICE)
    for arguments in calls(op, inputs):
        opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("case", WIDE_CASES.values(), ids=WIDE_CASES)
@pytest.mark.parametrize("T", (5, 90))
def test_shrink_dx_with_fewer_and_more_tokens_than_rows_of_a(T: int, case: Case) -> None:
    """The products are chained, or one."""
    for arguments in calls("shrink_dx", Inputs(case._replace(T=T), torch.float64)):
        torch.testing.assert_close(ops.shrink_dx(*arguments), reference.shrink_dx(*arguments))
        opcheck("shrink_dx", arguments, test_utils=OPCHECKS)


def test_opcheck_of_topk_gate_and_dropout() -> None:
    logits = torch.randn(7, 5)
    opcheck("topk_gate", [logits, 2, True, 0.7], test_utils=OPCHECKS)
    weights, experts = reference.topk_gate(logits, 2, True)
    arguments = [torch.randn(7, 2), weights, experts, logits, False, 0.7]
    opcheck("topk_gate_backward", arguments, test_utils=OPCHECKS)
    opcheck("dropout", [torch.randn(6, 5), 0.3, torch.tensor([4]), 1], test_utils=OPCHECKS)
