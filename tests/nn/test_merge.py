"""merge adds the delta of a task's formula to the weight; unmerge restores every bit."""

import pytest
import torch
from torch import nn

from moelora_kernels import (
    MoeLoraLinear,
    merge_and_unload,
    set_tasks,
)
from moelora_kernels.nn.merge import delta_weight, gate_of_task
from moelora_kernels.testing import assert_within_budget
from support.linears import IN, OUT, TASK, TASKS, make_layer, task_layer

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def softmax(logits):
    powers = [2.718281828459045**v for v in logits]
    return [p / sum(powers) for p in powers]


def selected(scores, experts):
    return [s if e in experts else 0.0 for e, s in enumerate(scores)]


def two_largest(logits):
    p = softmax(logits)
    order = sorted(range(len(p)), key=lambda e: -p[e])[:2]
    return [s / sum(p[e] for e in order) for s in selected(p, order)]


def at_least_a_quarter(logits):
    p = softmax(logits)
    return selected(p, [e for e in range(len(p)) if p[e] >= 0.25])


# name -> options, and the formula of the gate in plain Python: the task's logits -> the gate.
GATES = {
    "softmax": ({}, softmax),
    "temperature": ({"temperature": 2.0}, lambda g: softmax([v / 2 for v in g])),
    "sigmoid": (
        {"score": "sigmoid", "normalize": "none"},
        lambda g: [1 / (1 + 2.718281828459045**-v) for v in g],
    ),
    "topk": ({"top_k": 2}, two_largest),
    "threshold": (
        {"select": "threshold", "threshold": 0.25, "normalize": "none"},
        at_least_a_quarter,
    ),
    "always": ({"shared_expert": "always"}, lambda g: [*softmax(g), 1.0]),
    "complement": (
        {"shared_expert": "complement"},
        lambda g: [*softmax(g), 1 - max(softmax(g))],
    ),
    "ranks": ({"rank": (1, 4, 2, 3), "scaling": (1.0, -2.0, 0.5, 3.0)}, softmax),
    "share A": ({"share": "A"}, softmax),
    "noise": ({"noise": 3.0, "dropout": 0.5}, softmax),
}


def expected_delta(layer, gate):
    """Return sum_e scale_e gate_e B_e A_e, expert by expert."""
    config, delta, start = layer.config, torch.zeros(OUT, IN, dtype=torch.float64), 0
    for rank, scale, weight in zip(config.ranks(), config.scales(IN), gate, strict=True):
        columns = slice(start, start + rank)
        a = layer.lora_A if config.share == "A" else layer.lora_A[columns]
        delta += scale * weight * (layer.lora_B[:, columns].double() @ a.double())
        start += rank
    return delta.detach()


def logits_of(layer, task):
    embedding = layer.router.embedding.weight[task].tolist()
    rows = layer.router.gate.weight.tolist()
    return [sum(w * e for w, e in zip(row, embedding, strict=True)) for row in rows]


@pytest.mark.parametrize("training", (True, False))
@pytest.mark.parametrize("name", GATES)
def test_the_delta_matches_the_formula(name, training):
    """For every kind of task gate. In training, too, the weight has no noise and no dropout."""
    options, formula = GATES[name]
    layer = task_layer(**options).train(training)
    for task in (1, 2, TASKS):
        gate = formula(logits_of(layer, task))
        torch.testing.assert_close(
            gate_of_task(layer, task), torch.tensor(gate, dtype=torch.float64), rtol=0, atol=1e-12
        )
        torch.testing.assert_close(
            delta_weight(layer, task), expected_delta(layer, gate), rtol=1e-12, atol=1e-12
        )


@pytest.mark.parametrize("experts", (1, 3))
def test_without_a_router_every_gate_is_one(experts):
    """Plain LoRA with one or several experts needs no task."""
    layer = make_layer(router=None, num_experts=experts, router_bias=False)
    expected = expected_delta(layer, [1.0] * experts)
    for task in (None, 5):
        torch.testing.assert_close(delta_weight(layer, task), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", ((4,), (1, 4)), ids=str)
def test_an_external_gate_is_merged(shape):
    layer = make_layer(router="external", router_bias=False).eval()
    gate = torch.rand(shape, dtype=torch.float64)
    x = torch.randn(5, IN, dtype=torch.float64)
    y = layer(x, gate.view(1, 4))
    layer.merge(gate)
    torch.testing.assert_close(layer(x), y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        layer.weight, layer.base_layer.weight + expected_delta(layer, gate.flatten().tolist())
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_sixteen_tasks_within_one_rounding(dtype):
    """W + delta W is rounded once, and the error of y is within the unmerged layer's budget."""
    layer = task_layer(dtype, nn.Linear(IN, OUT, dtype=dtype))
    x = torch.randn(9, IN).to(dtype)
    weights = []
    for task in range(1, TASKS + 1):
        set_tasks(layer, [task])
        unmerged = layer(x).detach()
        gate = gate_of_task(layer, task).double()
        by_formula = torch.tensor(softmax(logits_of(layer, task)), dtype=torch.float64)
        torch.testing.assert_close(gate, by_formula, rtol=1e-5, atol=0)
        exact = layer.base_layer.weight.double() + expected_delta(layer, gate.tolist())
        layer.merge(task)
        # Half a unit in the last place. The float64 sums and the cast through float32 add little.
        band = torch.finfo(dtype).eps / 2 * exact.abs() * (1 + 1e-3)
        band += torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        assert ((layer.weight.double() - exact).abs() <= band).all(), task
        truth = x.double() @ exact.t() + layer.bias.double()
        assert_within_budget({"y": layer(x)}, {"y": truth}, {"y": unmerged}, dtype)
        weights.append(layer.weight.clone())
        layer.unmerge()
    assert all(not torch.equal(a, b) for i, a in enumerate(weights) for b in weights[:i])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unmerge_restores_the_bits_and_merge_repeats_them(dtype):
    """A subtraction of the delta would not restore the bits."""
    layer = task_layer(dtype, nn.Linear(IN, OUT, dtype=dtype))
    x = torch.randn(4, IN).to(dtype)
    before = {n: t.clone() for n, t in layer.state_dict().items()}
    parameter = layer.weight
    set_tasks(layer, [1])
    y = layer(x)
    first = {}
    for task in [*range(1, TASKS + 1)] * 2:
        layer.merge(task=task)
        assert not torch.equal(layer.weight, parameter)
        assert torch.equal(first.setdefault(task, layer.weight.clone()), layer.weight)
        layer.unmerge()
        assert layer.weight is parameter
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert torch.equal(layer(x), y)


def test_an_expert_with_gate_zero_adds_nothing():
    """A gate of zero selects nothing: NaN * 0 would put NaN into the whole weight."""
    layer = task_layer(top_k=2)
    gate = gate_of_task(layer, 3)
    expected = delta_weight(layer, 3)
    off = [e for e in range(4) if gate[e] == 0]
    assert len(off) == 2
    with torch.no_grad():
        for e in off:
            layer.lora_A[3 * e : 3 * e + 3] = float("nan")
            layer.lora_B[:, 3 * e : 3 * e + 3] = float("inf")
    assert torch.equal(delta_weight(layer, 3), expected)
    a, b = layer.export_lora(3)
    torch.testing.assert_close(b @ a, expected, rtol=1e-12, atol=1e-12)


def test_svd_segments_merge_into_the_reduced_base():
    """The base was reduced for its experts: the layer has a merged weight, but no LoRA."""
    options = dict(TASK, init="svd_segments", rank=2)
    base = nn.Linear(IN, OUT, dtype=torch.float64)
    layer = MoeLoraLinear.from_linear(base, num_experts=4, **options).eval()
    x = torch.randn(5, IN, dtype=torch.float64)
    set_tasks(layer, [2])
    y = layer(x)
    with pytest.raises(ValueError, match="init='svd_segments' reduced the base"):
        layer.export_lora(2)
    linear = merge_and_unload(layer, 2)
    torch.testing.assert_close(linear(x), y, rtol=1e-12, atol=1e-12)
    assert not hasattr(linear, "is_reduced")
