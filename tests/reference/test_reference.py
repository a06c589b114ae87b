"""The specification against independently written loops: nothing here shares code with it."""

from __future__ import annotations

import pytest
import torch

from moelora_kernels import reference
from moelora_kernels.types import Gate
from support.cases import layer_case
from support.inputs import Inputs


def loop(inputs: Inputs, sibling: int = 0) -> torch.Tensor:
    """Return y of one sibling, one token and one expert at a time."""
    s, mixture, n = inputs.linears[sibling], inputs.mixture, inputs.case.n
    gates, experts, rows = inputs.gate_weights, inputs.experts, inputs.rows
    E = len(mixture.ranks)
    ys = []
    for t, x in enumerate(inputs.x):
        y = s.weight @ x + (0 if s.bias is None else s.bias)
        weights = dict.fromkeys(range(E), 0.0)
        if s.router_weight is not None:
            logits = s.router_weight @ x + (0 if s.router_bias is None else s.router_bias)
            p = torch.exp(logits / mixture.temperature)
            p = p / p.sum()
            best = sorted(range(E), key=lambda e: (-p[e].item(), e))[: mixture.router_top_k]
            total = sum(p[e] for e in best) if mixture.renormalize else 1.0
            weights |= {e: p[e] / total for e in best}
        elif experts is not None:
            K = gates.shape[1] // n
            for slot in range(sibling * K, (sibling + 1) * K):
                e = int(experts[t, slot])
                if 0 <= e < E:
                    weights[e] = weights[e] + gates[t, slot]
        else:
            row = min(t, len(gates) - 1) if rows is None else int(rows[t])
            if 0 <= row < len(gates):
                weights = {e: gates[row, sibling * E + e] for e in range(E)}
        start = 0
        for e, rank in enumerate(mixture.ranks):
            a = s.lora_a if mixture.share_a else s.lora_a[start : start + rank]
            b = s.lora_b[:, start : start + rank]
            y = y + weights[e] * mixture.scaling[e] * (b @ (a @ x))
            start += rank
        ys.append(y)
    return torch.stack(ys)


CASES = {
    "router": layer_case(),
    "router_siblings": layer_case(n=2, O=(5, 7)),
    "router_softmax": layer_case(renormalize=False, temperature=0.7),
    "router_all_experts": layer_case(K=4),
    "router_mixed_ranks": layer_case(ranks=(1, 3, 2, 16)),
    "sparse": layer_case(gate="sparse"),
    "sparse_repeated_and_not_routed": layer_case(gate="sparse", routing="some"),
    "sparse_siblings": layer_case(gate="sparse", n=2, O=(5, 7)),
    "dense": layer_case(gate="dense"),
    "rows": layer_case(gate="rows", n=2, O=(5, 7)),
    "one_row": layer_case(gate="one_row"),
    "share_a": layer_case(gate="dense", share_a=True),
    "share_a_router": layer_case(share_a=True, n=2, O=(5, 7)),
    "one_expert": layer_case(ranks=(3,), gate="dense"),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_the_token_loop(name):
    case = CASES[name]._replace(T=6, I=5)
    inputs = Inputs(case if case.n > 1 else case._replace(O=4), torch.float64)
    parameters = {}
    for i in range(case.n):
        parameters |= {f"dA{i}": inputs.lora_a[i], f"dB{i}": inputs.lora_b[i]}
        if inputs.has_router:
            parameters[f"drouter{i}"] = inputs.router_weight[i]
            parameters[f"dbias{i}"] = inputs.router_bias[i]
    leaves = {"dx": inputs.x, **parameters}
    if not inputs.has_router:
        leaves["dgates"] = inputs.gate_weights
    for leaf in leaves.values():
        leaf.requires_grad_()
    ys = [loop(inputs, i) for i in range(case.n)]
    gradients = torch.autograd.grad(ys, [*leaves.values()], inputs.dy)
    with torch.no_grad():
        result = inputs.reference_step()
    for i, y in enumerate(ys):
        torch.testing.assert_close(result[f"y{i}"], y.detach(), rtol=1e-12, atol=1e-12)
    for key, expected in zip(leaves, gradients, strict=True):
        torch.testing.assert_close(result[key], expected, rtol=1e-11, atol=1e-11, msg=key)


def test_backward_formulas_equal_autograd_through_the_forward():
    # The token loop has no dropout; autograd through the reference's own forward has.
    for per_expert in (False, True):
        case = layer_case(dropout=0.4, per_expert=per_expert, n=2, O=(5, 7), aux=True)
        inputs = Inputs(case, torch.float64)
        by_autograd, by_formula = inputs.step("reference"), inputs.reference_step()
        assert by_autograd.keys() == by_formula.keys()
        for key, value in by_formula.items():
            torch.testing.assert_close(value, by_autograd[key], rtol=1e-11, atol=1e-11, msg=key)


def test_topk_gate_takes_the_lower_expert_of_equal_logits():
    weights, indices = reference.topk_gate(torch.zeros(3, 5), 2, True)
    assert indices.tolist() == [[0, 1]] * 3
    assert torch.equal(weights, torch.full((3, 2), 0.5))
    logits = torch.tensor([[1.0, 3.0, 2.0, 3.0]])
    assert reference.topk_gate(logits, 3, True)[1].tolist() == [[1, 3, 2]]


def test_topk_gate_keeps_the_order_of_all_experts():
    weights, indices = reference.topk_gate(torch.tensor([[1.0, 3.0, 2.0]]), 3, False)
    assert indices.tolist() == [[0, 1, 2]]
    torch.testing.assert_close(weights, torch.tensor([[1.0, 3.0, 2.0]]).softmax(1))


def test_gate_of_zero_selects_nothing():
    inputs = Inputs(layer_case(gate="dense"), torch.float64)
    inputs.gate_weights[:, 1] = 0
    inputs.lora_a[0][4:8] = torch.nan
    assert torch.isfinite(inputs.step("reference")["y0"]).all()


def test_rows_and_indices_out_of_range_are_not_routed():
    gates = torch.rand(2, 3)
    rows = torch.tensor([0, -1, 2, 1, 2**31 - 1])
    gate = reference.dense_gate(Gate(gates, rows=rows), 5, 1, 3, gates.dtype)[:, 0]
    assert torch.equal(gate[[0, 3]], gates)
    assert gate[[1, 2, 4]].eq(0).all()
    indices = torch.tensor([[0, 3], [-1, 2], [2**31 - 1, -(2**31)], [1, 1]])
    gate = reference.dense_gate(Gate(torch.ones(4, 2), indices), 4, 1, 3, torch.float32)[:, 0]
    assert gate.tolist() == [[1, 0, 0], [0, 0, 1], [0, 0, 0], [0, 2, 0]]
