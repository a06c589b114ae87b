"""The registered ops keep their contract with the dispatcher and the compiler."""

from __future__ import annotations

import pytest
import torch

from moelora_kernels import ops, reference
from moelora_kernels.autograd.linear import siblings_of
from moelora_kernels.types import NO_GATE, Gate, Needs, RouterTensors
from support.layers import make_case
from support.op_cases import opcheck

OPCHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)
CASES = {
    "router": {"out_features": (13, 5)},
    "router, all experts": {"top_k": 4, "renormalize": False},
    "sparse": {"gate": "sparse"},
    "dense rows": {"gate": "rows", "out_features": (13, 5)},
    "dropout": {"gate": "dense", "dropout": 0.3},
    "shared A": {"share_a": True},
}


def routers(case) -> RouterTensors:
    return RouterTensors(
        [s.router_weight for s in case.linears if s.router_weight is not None],
        [s.router_bias for s in case.linears if s.router_bias is not None],
    )


def shrink_arguments(case) -> list:
    lora_a = [s.lora_a for s in case.linears]
    return [case.x, lora_a, routers(case), case.gate or Gate(*NO_GATE), case.mixture, case.dropout]


def backward_arguments(case) -> list:
    h, _, *made = reference.shrink_gate(*shrink_arguments(case))
    gate, dlogits = case.gate, None
    if gate is None:
        gate = case.mixture.router_gate(*made)
        dlogits = torch.randn_like(gate.logits)
    return [case.dy, [s.lora_b for s in case.linears], h, gate, dlogits, case.mixture]


def dx_arguments(case, dh, dgate) -> list:
    dlogits = dgate if case.mixture.top_k else None
    lora_a = [s.lora_a for s in case.linears]
    return [dh, dlogits, lora_a, routers(case).weight, case.mixture.ranks, case.dropout]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", CASES)
def test_opcheck(name, dtype):
    case = make_case(**CASES[name]).to(dtype)
    opcheck("shrink_gate", shrink_arguments(case), test_utils=OPCHECKS)
    arguments = backward_arguments(case)
    opcheck("shrink_gate_backward", arguments, test_utils=OPCHECKS)
    dh, u, dgate = reference.shrink_gate_backward(*arguments)
    dlogits, ranks = dgate if case.mixture.top_k else None, case.mixture.ranks
    arguments = [case.x, dh, dlogits, case.dy, u, ranks, case.dropout, torch.float32, dtype]
    opcheck("weight_grad", arguments, test_utils=OPCHECKS)


@pytest.mark.parametrize("called", (False, True))
@pytest.mark.parametrize("name", CASES)
def test_opcheck_of_the_whole_layer(name, called):
    case = make_case(**CASES[name]).to(torch.float32)
    if called:
        case.linears = [
            s._replace(weight=None, bias=None, base_output=torch.randn_like(g))
            for s, g in zip(case.linears, case.dy, strict=True)
        ]
    tensors = siblings_of(case.linears)
    gate = case.gate or Gate(*NO_GATE)
    opcheck("wide", [case.x, tensors, gate, case.mixture, case.dropout], test_utils=OPCHECKS)
    dy, _, h, gate, dlogits, mixture = backward_arguments(case)
    for needs in ((True, True), (False, True), (True, False)):
        arguments = [dy, case.x, tensors, h, gate, dlogits, mixture, case.dropout, Needs(*needs)]
        opcheck("wide_backward", arguments, test_utils=OPCHECKS)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tokens", (5, 90))
def test_shrink_dx_equals_its_reference(name, tokens):
    # Fewer and more tokens than rows of A: the products are chained, or one.
    case = make_case(**CASES[name], tokens=tokens)
    dh, _, dgate = reference.shrink_gate_backward(*backward_arguments(case))
    arguments = dx_arguments(case, dh, dgate)
    torch.testing.assert_close(ops.shrink_dx(*arguments), reference.shrink_dx(*arguments))
    opcheck("shrink_dx", arguments, test_utils=OPCHECKS)


def test_opcheck_of_the_gate_and_dropout():
    logits = torch.randn(7, 5)
    forward, backward = torch.ops.moelora.topk_gate, torch.ops.moelora.topk_gate_backward
    torch.library.opcheck(forward, (logits, 2, True, 0.7), test_utils=OPCHECKS)
    weights, indices = reference.topk_gate(logits, 2, True)
    arguments = (torch.randn(7, 2), weights, indices, logits, False, 0.7)
    torch.library.opcheck(backward, arguments, test_utils=OPCHECKS)
    arguments = (torch.randn(6, 5), 0.3, torch.tensor([4]), 1)
    opcheck("dropout", [*arguments], test_utils=OPCHECKS)


@pytest.mark.parametrize("renormalize", (True, False))
@pytest.mark.parametrize("top_k", (1, 2, 5))
def test_topk_gate_gradient(top_k, renormalize):
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)

    def weights(logits):
        return ops.topk_gate(logits, top_k, renormalize, 0.8)[0]

    assert torch.autograd.gradcheck(weights, (logits,))
    if top_k == 1 and renormalize:
        assert torch.equal(weights(logits), torch.ones(6, 1).double())


def test_topk_gate_names_bad_arguments():
    logits = torch.randn(3, 4)
    for arguments, name in (
        ((logits[0], 1), "logits"),
        ((logits.int(), 1), "logits"),
        ((logits, 5), "top_k"),
        ((logits, 0), "top_k"),
        ((logits, 1, True, 0.0), "temperature"),
    ):
        with pytest.raises(ValueError, match=f"^{name}"):
            ops.topk_gate(*arguments)
