"""The registered ops keep their contract with the dispatcher and the compiler."""

from __future__ import annotations

import pytest
import torch

from moelora_kernels import ops, reference
from support.layers import make_case

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


def shrink_arguments(case):
    return (
        case.x,
        [s.lora_a for s in case.siblings],
        case.gate.get("gates"),
        case.gate.get("indices"),
        case.gate.get("rows"),
        [s.router_weight for s in case.siblings if s.router_weight is not None],
        [s.router_bias for s in case.siblings if s.router_bias is not None],
        *case.plan,
        case.gate.get("seed"),
    )


def backward_arguments(case):
    h, _, weights, chosen, logits = reference.shrink_gate(*shrink_arguments(case))
    plan, routed = case.plan, case.plan.top_k > 0
    gates = weights if routed else case.gate["gates"]
    indices = chosen if routed and plan.top_k < len(plan.ranks) else case.gate.get("indices")
    return (
        case.dy, [s.lora_b for s in case.siblings], h, gates, indices, case.gate.get("rows"),
        logits if routed else None, torch.randn_like(logits) if routed else None,
        plan.ranks, plan.scaling, plan.share_a, plan.top_k, plan.renormalize, plan.temperature,
    )  # fmt: skip


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", CASES)
def test_opcheck(name, dtype):
    case = make_case(**CASES[name]).to(dtype)
    torch.library.opcheck(ops.shrink_gate, shrink_arguments(case), test_utils=OPCHECKS)
    arguments = backward_arguments(case)
    torch.library.opcheck(ops.shrink_gate_backward, arguments, test_utils=OPCHECKS)
    dh, u, dgate = reference.shrink_gate_backward(*arguments)
    torch.library.opcheck(
        ops.weight_grad,
        (
            case.x, dh, dgate if case.plan.top_k else None, case.dy, u, torch.float32, dtype,
            case.plan.ranks, case.plan.dropout, case.plan.dropout_per_expert, case.gate.get("seed"),
        ),
        test_utils=OPCHECKS,
    )  # fmt: skip


@pytest.mark.parametrize("called", (False, True))
@pytest.mark.parametrize("name", CASES)
def test_opcheck_of_the_whole_layer(name, called):
    case = make_case(**CASES[name]).to(torch.float32)
    x, lora_a, gates, indices, rows, routers, biases, *plan, seed = shrink_arguments(case)
    weight, bias, lora_b = ([s[i] for s in case.siblings] for i in (0, 1, 4))
    base = [torch.randn_like(g) for g in case.dy] if called else []
    weight, bias = ([], []) if called else (weight, bias)
    torch.library.opcheck(
        ops.wide,
        (
            x, weight, bias, base, lora_a, lora_b, routers, biases, gates, indices, rows, seed,
            *plan,
        ),
        test_utils=OPCHECKS,
    )  # fmt: skip
    dy, lora_b, h, gates, indices, rows, logits, dlogits, *_ = backward_arguments(case)
    for needs in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(
            ops.wide_backward,
            (
                dy, x, weight, lora_a, lora_b, routers, h, gates, indices, rows, logits, dlogits,
                seed, *plan, *needs,
            ),
            test_utils=OPCHECKS,
        )  # fmt: skip


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("tokens", (5, 90))
def test_shrink_dx_equals_its_reference(name, tokens):
    # Fewer and more tokens than rows of A: the products are chained, or one.
    case = make_case(**CASES[name], tokens=tokens)
    dh, _, dgate = reference.shrink_gate_backward(*backward_arguments(case))
    arguments = (
        dh, dgate if case.plan.top_k else None, [s.lora_a for s in case.siblings],
        [s.router_weight for s in case.siblings if s.router_weight is not None],
        case.plan.ranks, case.plan.dropout, case.plan.dropout_per_expert, case.gate.get("seed"),
    )  # fmt: skip
    torch.testing.assert_close(ops.shrink_dx(*arguments), reference.shrink_dx(*arguments))
    torch.library.opcheck(ops.shrink_dx, arguments, test_utils=OPCHECKS)


def test_opcheck_of_the_gate_and_dropout():
    logits = torch.randn(7, 5)
    forward, backward = torch.ops.moelora.topk_gate, torch.ops.moelora.topk_gate_backward
    torch.library.opcheck(forward, (logits, 2, True, 0.7), test_utils=OPCHECKS)
    weights, indices = reference.topk_gate(logits, 2, True)
    arguments = (torch.randn(7, 2), weights, indices, logits, False, 0.7)
    torch.library.opcheck(backward, arguments, test_utils=OPCHECKS)
    arguments = (torch.randn(6, 5), 0.3, torch.tensor([4]), 1)
    torch.library.opcheck(ops.dropout, arguments, test_utils=OPCHECKS)


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
