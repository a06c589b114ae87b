"""What impl="auto" takes, on both sides of every threshold, and that what is asked for runs."""

from __future__ import annotations

import math

import pytest
import torch

from moelora_kernels import MoeLoraConfig, dispatch, native, ops
from moelora_kernels.dispatch import THRESHOLDS, choose_ffn, choose_impl, explain_choice
from support.cases import layer_case
from support.inputs import Inputs, assert_layer_within_budget
from support.linears import make_layer

SIZES = dict(in_features=64, out_features=64, num_experts=8, rank=1)
CPU = THRESHOLDS["cpu"]
grouped_is_there = pytest.mark.skipif(
    not native.available(), reason="without the native library auto never takes grouped on a CPU"
)


@pytest.fixture
def every_op(monkeypatch):
    """A machine that serves the grouped ops on every device."""
    monkeypatch.setattr(dispatch, "_fast_ops_problem", lambda device: None)


@pytest.mark.parametrize("top_k", (1, 2, 7))
@pytest.mark.parametrize("name", THRESHOLDS)
def test_both_sides_of_every_threshold(name, top_k, every_op, monkeypatch):
    monkeypatch.setattr(dispatch, "device_class", lambda device: name)
    threshold = THRESHOLDS[name]
    most = math.floor(threshold.columns * top_k)
    for total, tokens, expected, word in (
        (most, threshold.tokens, "wide", "not above"),
        (most + 1, threshold.tokens, "grouped", "is above"),
        (most + 1, threshold.tokens - 1, "wide", f"below {threshold.tokens} tokens"),
        (most, threshold.tokens - 1, "wide", "below"),
        (most + 1, 2**20, "grouped", "is above"),
    ):
        given = dict(SIZES, tokens=tokens, top_k=top_k, total_rank=total)
        choice = explain_choice("cpu", **given)
        assert choice.impl == expected, (total, tokens)
        assert word in choice.reason, choice
        assert name in choice.reason
        few = {k: given[k] for k in ("tokens", "top_k", "total_rank", "num_experts")}
        assert choose_impl("cpu", **few) == expected


@pytest.mark.parametrize("name", THRESHOLDS)
def test_both_sides_of_the_limit_of_fused_ffns(name, every_op, monkeypatch):
    monkeypatch.setattr(dispatch, "device_class", lambda device: name)
    limit, in_tiles = THRESHOLDS[name].ffn_rank, THRESHOLDS[name].ffn_in_tiles
    assert limit is not None
    assert in_tiles == (name != "cpu")

    def choose(dtype: torch.dtype, total_rank: int, top_k: int = 2) -> str:
        return choose_ffn("cpu", dtype=dtype, total_rank=total_rank, top_k=top_k)

    elsewhere = "grouped" if in_tiles else "fused"
    for dtype in (torch.bfloat16, torch.float16):
        assert choose(dtype, limit) == "fused"
        assert choose(dtype, limit + 1) == "grouped"
        assert choose(dtype, limit, 16) == "fused"
        assert choose(dtype, limit, 17) == elsewhere
    assert choose(torch.float32, limit) == elsewhere
    monkeypatch.setattr(dispatch, "_fast_ops_problem", lambda device: "no library")
    assert choose(torch.bfloat16, limit) == "grouped"


@pytest.mark.parametrize(
    ("capability", "name"),
    (
        ((8, 0), "sm_80"),
        ((8, 9), "sm_89"),
        ((9, 0), "sm_90"),
        ((10, 0), "sm_100"),
        ((12, 0), "sm_120"),
        ((7, 5), None),
    ),
    ids=str,
)
def test_a_gpu_is_of_its_compute_capability(capability, name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    dispatch._device_class.cache_clear()
    try:
        assert dispatch.device_class("cuda") == (name or "cuda")
        assert dispatch.device_class("cpu") == "cpu"
    finally:
        dispatch._device_class.cache_clear()


@pytest.mark.parametrize(
    ("options", "reason"),
    (
        (dict(top_k=None), "a dense gate uses every expert"),
        # All of the experts are as dense as a gate gets.
        (dict(top_k=8), "a dense gate uses every expert"),
        (dict(top_k=1, share_a=True), "experts that share A"),
    ),
    ids=str,
)
def test_layers_without_a_grouped_form_run_wide(options, reason, every_op):
    choice = explain_choice("cpu", tokens=2**20, **{**SIZES, "rank": 4096}, **options)
    assert choice.impl == "wide"
    assert reason in choice.reason
    assert f"R = {8 * 4096}" in choice.reason


def test_without_the_native_library_a_cpu_runs_wide(monkeypatch):
    """The reference of the grouped ops computes every expert for every pair."""
    monkeypatch.setattr(native, "available", lambda: False)
    monkeypatch.setattr(native, "reason", lambda: "not built")
    dispatch._missing_ops.cache_clear()
    try:
        choice = explain_choice("cpu", tokens=2**20, **{**SIZES, "rank": 4096}, top_k=1)
    finally:
        dispatch._missing_ops.cache_clear()
    assert choice.impl == "wide"
    assert "the native library is missing (not built)" in choice.reason


def ranks_of(total):
    """Ranks that sum to `total`."""
    return (8,) * (total // 8) + ((total % 8,) if total % 8 else ())


AROUND = {
    "rank just below": (math.floor(CPU.columns * 2), CPU.tokens, "wide"),
    "rank and tokens just above": (math.floor(CPU.columns * 2) + 1, CPU.tokens, "grouped"),
    "tokens just below": (math.floor(CPU.columns * 2) + 1, CPU.tokens - 1, "wide"),
}


class Watched:
    """An op that counts its calls."""

    def __init__(self, op):
        self.op, self.calls = op, 0

    def __call__(self, *arguments, **options):
        self.calls += 1
        return self.op(*arguments, **options)


@pytest.fixture
def calls(monkeypatch):
    """Formulation -> how often its forward and its backward ran: a function to ask for it."""
    watched = {
        n: Watched(getattr(ops, n)) for f in ("wide", "grouped") for n in (f, f"{f}_backward")
    }
    for name, op in watched.items():
        monkeypatch.setattr(ops, name, op)
    return lambda: {name: op.calls for name, op in watched.items() if op.calls}


@grouped_is_there
@pytest.mark.parametrize("name", AROUND)
def test_auto_runs_what_it_says(name, calls):
    total, tokens, expected = AROUND[name]
    Inputs(layer_case(T=tokens, ranks=ranks_of(total)), torch.float32).step("auto")
    assert calls() == {expected: 1, f"{expected}_backward": 1}


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", AROUND)
def test_formulations_agree_around_the_threshold(name, dtype):
    """A step more or fewer tokens must not show in a loss curve."""
    total, tokens, _ = AROUND[name]
    inputs = Inputs(layer_case(T=tokens, ranks=ranks_of(total), aux=True), dtype)
    for impl in ("wide", "grouped", "auto"):
        assert_layer_within_budget(inputs, impl)


@pytest.mark.parametrize("impl", ("wide", "grouped"))
def test_an_explicit_choice_is_followed(impl, calls):
    """On either side of the thresholds, in the functional form and in a layer."""
    for tokens, ranks in ((3, (1, 1, 1)), (CPU.tokens, ranks_of(math.floor(CPU.columns * 2) + 1))):
        Inputs(layer_case(T=tokens, ranks=ranks), torch.float32).step(impl)
    assert calls() == {impl: 2, f"{impl}_backward": 2}
    make_layer(torch.float32, impl=impl)(torch.randn(3, 12)).sum().backward()
    assert calls() == {impl: 3, f"{impl}_backward": 3}


def test_the_reference_calls_no_op_of_a_layer(calls):
    Inputs(layer_case(), torch.float32).step("reference")
    assert not calls()


@pytest.mark.parametrize("gate", ({"gate": "dense"}, {"K": 4}, {"share_a": True}), ids=str)
def test_grouped_is_refused_with_the_reason(gate):
    inputs = Inputs(layer_case(**gate), torch.float64)
    with pytest.raises(ValueError, match=r"^impl: 'grouped' is not supported for this layer: .+"):
        inputs.forward(impl="grouped")


@pytest.mark.parametrize(
    "options",
    (
        dict(top_k=2),
        dict(top_k=2, router="mlp", shared_expert="always"),
        dict(top_k=1, normalize="none", noise=0.1, rank=(1, 2, 3, 4, 5, 6, 7, 8)),
        dict(top_k=7, score="identity", normalize="softmax", shared_expert="complement"),
    ),
    ids=str,
)
def test_a_config_that_can_run_grouped_may_say_so(options):
    config = MoeLoraConfig(impl="grouped", **options)
    assert config.is_sparse()
    assert config.replace(impl="auto").replace(impl="grouped") == config
    make_layer(impl="grouped", **{"num_experts": 8, **options})(torch.randn(4, 12).double())


@grouped_is_there
@pytest.mark.filterwarnings("error:.*lru_cache")  # traced into, where it is to be a constant
def test_auto_compiles_once_on_each_side_of_the_threshold(monkeypatch):
    """T is not a constant of the graph: only its side of the threshold is."""
    # Compiled graphs have a side of T = 0 and one of T = 1 anyway.
    threshold = CPU._replace(tokens=4)
    monkeypatch.setitem(dispatch.THRESHOLDS, "cpu", threshold)
    ranks = ranks_of(math.floor(CPU.columns * 2) + 1)
    inputs = Inputs(layer_case(T=1, ranks=ranks, I=8, O=8), torch.float32)
    compiled = torch.compile(
        lambda x: inputs.forward(x)[0][0],
        backend="aot_eager", fullgraph=True, dynamic=True,
    )  # fmt: skip
    seen = set()
    for tokens in (13, 4, 12, 3, 5, 2):
        side = tokens < threshold.tokens
        x = torch.randn(tokens, 8)
        with torch._dynamo.config.patch(error_on_recompile=side in seen):
            found = compiled(x)
        seen.add(side)
        torch.testing.assert_close(found, inputs.forward(x)[0][0])
