"""The ops of the grouped formulation keep their contract with the dispatcher and the compiler."""

from __future__ import annotations

import pytest
import torch

from moelora_kernels import ops
from moelora_kernels.autograd.linear import siblings_of
from moelora_kernels.types import (
    CHUNK,
    NO_DROPOUT,
    NO_GATE,
    TILE,
    Gate,
    Needs,
    RouterTensors,
    Routing,
)
from support.layers import make_case
from support.op_cases import opcheck

OPCHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)
CASES = {
    "router, siblings": dict(out_features=(13, 5), renormalize=False),
    "sparse": dict(gate="sparse", ranks=(1, 4, 3, 2)),
    "dropout": dict(gate="sparse", dropout=0.3, dropout_per_expert=True),
}


def op_calls(case):
    """Yield the name and the arguments of every grouped op that a step of `case` calls."""
    x, mixture, dropout, n = case.x, case.mixture, case.dropout, len(case.linears)
    ranks, scaling = mixture.ranks, mixture.scaling
    tensors = siblings_of(case.linears)
    bias, a, b = tensors.bias, tensors.lora_a, tensors.lora_b
    arguments = [x, tensors, case.gate or Gate(*NO_GATE), mixture, dropout]
    yield "grouped", arguments
    result = ops.grouped(*arguments)
    gate, routing = case.gate, Routing(*result[5:])
    if gate is None:
        gate = mixture.router_gate(*result[2:5])
        yield "router_logits", [x, RouterTensors(tensors.router_weight, tensors.router_bias)]
        yield "router_grad", [torch.randn_like(gate.logits), x, torch.float32]
    yield "route", [gate.experts, len(ranks), n, TILE, CHUNK]
    yield "grouped_shrink", [x, a, gate.weights, routing, ranks, scaling, dropout]
    backward = [case.dy, b, result.h, gate.weights, routing, ranks, scaling]
    yield "grouped_shrink_backward", backward
    dh, u, _ = ops.grouped_shrink_backward(*backward)
    T = len(x)
    for start in (None, bias[0], case.dy[0]):
        yield "grouped_expand", [u, b[:1], start, routing, ranks, NO_DROPOUT, T, 0, False]
    back = [m.t() for m in a]
    yield "grouped_expand", [dh, back, None, routing, ranks, dropout, T, 0, False]
    if n == 1:
        yield "grouped_expand", [u, b, bias[0], routing, ranks, NO_DROPOUT, T, 0, True]
    yield "grouped_weight_grad", [x, dh, case.dy, u, routing, ranks, dropout, torch.float32]
    for needs in ((True, True), (True, False), (False, True)):
        yield (
            "grouped_backward",
            [case.dy, x, tensors, result.h, gate, None, routing, mixture, dropout, Needs(*needs)],
        )


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", CASES)
def test_opcheck_of_every_op(name, dtype):
    case = make_case(tokens=9, **CASES[name]).to(dtype)
    for op, arguments in op_calls(case):
        opcheck(op, arguments, test_utils=OPCHECKS)
