"""The check against float64, the inputs, and the pieces of a measurement."""

import math

import pytest
import torch

from benchmarks.baselines.linear import PROVIDERS, Siblings
from benchmarks.measure import clocks, harness
from benchmarks.measure.check import Checker
from benchmarks.measure.inputs import draw_inputs, make_layer
from benchmarks.suites import shapes
from moelora_kernels.testing import ROUTINGS
from support.wrong_providers import (
    DetachesTheRouter,
    DropsLastColumn,
    ForgetsLastExpert,
    ReturnsNan,
    ScalesOneGradient,
)

CPU = torch.device("cpu")
QUICK_LINEAR = shapes.QUICK_CASES["linear"][0]
QUICK_QKV = shapes.QUICK_CASES["group"][0]


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize(
    ("broken", "mode", "worst"),
    (
        (ForgetsLastExpert, "fwd", "y"),
        (ScalesOneGradient, "fwd_bwd", "dB"),
        (DetachesTheRouter, "fwd_bwd", "drouter"),
        (ReturnsNan, "fwd", "y"),
        (DropsLastColumn, "fwd", "y"),
    ),
)
def test_wrong_provider_is_named(broken, mode, worst, dtype):
    layer = make_layer(QUICK_QKV, 8, 16, 2, dtype, CPU)
    x, dys = draw_inputs(layer, 33, "uniform")
    name, error, budget = Checker(layer, x, dys).verdict(Siblings(broken, layer), "mixture", mode)
    assert error > budget
    assert f".{worst}" in name


def test_right_providers_are_within_budget_where_rows_are_sampled():
    # 300 tokens: more than the 128 that are compared on a CPU, so dy is zero in some rows.
    layer = make_layer(QUICK_QKV, 8, 16, 2, torch.bfloat16, CPU)
    x, dys = draw_inputs(layer, 300, "skewed")
    checker = Checker(layer, x, dys)
    assert len(checker.rows) == 128
    assert checker.rows[0] == 0
    assert checker.rows[-1] == 299
    for provider in ("frozen", "plain_lora", "loop", "stacked", "grouped_mm", "moelora_grouped"):
        build, formula = PROVIDERS[provider]
        name, error, budget = checker.verdict(build(layer), formula, "fwd_bwd")
        assert error <= budget, (provider, name)


def test_masked_is_held_to_an_absolute_bound(monkeypatch):
    layer = make_layer(QUICK_LINEAR, 8, 16, 2, torch.float32, CPU)
    x, dys = draw_inputs(layer, 9, "uniform")
    wrong = lambda layer: Siblings(ForgetsLastExpert, layer)  # noqa: E731
    monkeypatch.setitem(PROVIDERS, "masked", (wrong, "mixture"))
    with pytest.raises(ArithmeticError, match="masked provider is wrong"):
        Checker(layer, x, dys)


@pytest.mark.parametrize("routing", list(ROUTINGS))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_no_routing_near_ties_after_rounding(routing, dtype):
    layer = make_layer(QUICK_QKV, 8, 16, 2, dtype, CPU)
    x, dys = draw_inputs(layer, 50, routing)
    assert x.dtype == dtype
    assert [dy.shape for dy in dys] == [(50, out) for out in QUICK_QKV.out_features]
    for adapter in layer.adapters:
        logits = x.double() @ adapter.router_weight.double().T + adapter.router_bias.double()
        ordered = logits.sort(dim=1, descending=True).values
        assert (ordered[:, 1] - ordered[:, 2]).min() > 0.4
        if routing == "one":
            assert (logits[:, 0] > 0.75).all()
        if routing == "empty":
            assert (logits[:, -1] < 0.75).all()


def test_inputs_are_the_same_every_time():
    layers = [make_layer(QUICK_LINEAR, 8, 16, 2, torch.bfloat16, CPU) for _ in range(2)]
    (x, dys), (again, dys_again) = (draw_inputs(layer, 7, "zipf") for layer in layers)
    assert torch.equal(x, again)
    assert torch.equal(dys[0], dys_again[0])


def test_saved_bytes_counts_what_backward_keeps():
    layer = make_layer(QUICK_LINEAR, 8, 16, 2, torch.float32, CPU)
    x = torch.randn(40, 72, requires_grad=True)
    kept = {
        name: harness.saved_bytes(PROVIDERS[name][0](layer), x)
        for name in PROVIDERS
        if name in ("frozen", "plain_lora", "masked")
    }
    assert kept["frozen"] == 0
    # h * scale [T, R] in fp32 is what the expand needs
    assert kept["plain_lora"] == 40 * 128 * 4
    # The mixture needs h [T, R] and the gate too, whoever computes it.
    assert kept["masked"] > kept["plain_lora"]


def test_quantile_interpolates():
    assert harness.quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert math.isclose(harness.quantile([0.0, 10.0], 0.1), 1.0)
    assert harness.quantile([4.0], 0.9) == 4.0


@pytest.mark.parametrize("provider", ("frozen", "moelora", "masked"))
def test_time_of_a_toy_layer(benchmark, provider):
    """For `pytest --benchmark-only`: forward + backward, so that a slowdown of the host shows."""
    layer = make_layer(QUICK_LINEAR, 8, 16, 2, torch.float32, CPU)
    x, dys = draw_inputs(layer, 33, "uniform")
    weights = clocks.ColdWeights(layer, cold_bytes=0)
    timed = harness.Timed(PROVIDERS[provider][0](layer), weights, x, dys, "fwd_bwd")
    benchmark.pedantic(timed.call, setup=timed.reset, rounds=10, warmup_rounds=2)


def test_cold_weights_turn_through_equal_copies():
    layer = make_layer(shapes.linear_case(40, 24), 4, 2, 2, torch.float32, CPU)
    size = layer.adapters[0].weight.nbytes
    weights = clocks.ColdWeights(layer, cold_bytes=3 * size - 1)
    provider = PROVIDERS["masked"][0](layer)
    parameters = weights.frozen_parameters(provider)
    assert len(parameters) == 1
    x, _ = draw_inputs(layer, 5, "uniform")
    expected, places = provider(x)[0], set()
    for _ in range(6):
        weights.rotate(parameters)
        places.add(parameters[0][0].data_ptr())
        assert torch.equal(provider(x)[0], expected)
    assert len(places) == 3
