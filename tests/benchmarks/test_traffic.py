"""Bytes counted from grids and tiles are the bytes that kernels load and store."""

from __future__ import annotations

import pytest
import torch

from benchmarks.model import traffic
from moelora_kernels import reference
from moelora_kernels.kernels import (
    grouped_expand,
    grouped_shrink,
    grouped_shrink_backward,
    grouped_weight_grad,
    router,
    shrink_dx,
    shrink_gate,
    shrink_gate_backward,
    topk_gate,
    weight_grad,
)
from moelora_kernels.kernels.common import launcher
from support import grouped_cases
from support.op_cases import CASES, Case, Inputs, forward_of
from support.selection import default_cases

pytestmark = pytest.mark.skipif(not launcher.INTERPRET, reason="needs Triton's interpreter")


@pytest.fixture
def counted(monkeypatch):
    """[bytes loaded, bytes stored] by interpreted kernels, under their masks."""
    from triton.runtime.interpreter import InterpreterBuilder

    found = [0, 0]

    def count(which: int, name: str) -> None:
        original = getattr(InterpreterBuilder, name)

        def counting(self, pointers, *rest):
            mask = rest[0] if which == 0 else rest[1]
            element = pointers.get_element_ty().primitive_bitwidth // 8
            found[which] += int(mask.data.sum()) * element
            return original(self, pointers, *rest)

        monkeypatch.setattr(InterpreterBuilder, name, counting)

    count(0, "create_masked_load")
    count(1, "create_masked_store")
    return found


def launches(case: Case, split: int) -> list:
    """The launches of every op of a case, one after the other."""
    inputs = Inputs(case, torch.float16)
    if inputs.rows is not None:
        # A token without a gate row loads none: that depends on the data, and is not counted.
        inputs.rows.clamp_(0, len(inputs.gates) - 1)
    forward = forward_of(inputs)
    back = reference.shrink_gate_backward(*inputs.backward(forward))
    with launcher.recording() as found:
        shrink_gate.launch(*inputs.shrink(), split=split)
        shrink_gate_backward.launch(*inputs.backward(forward), split=split)
        shrink_dx.launch(*inputs.shrink_dx(back))
        weight_grad.launch(*inputs.weight_grad(forward, back), split=split)
    return found


def check_moved(found: list, counted: list) -> None:
    moved = [traffic.moved(launch) for launch in found]
    assert counted == [sum(sizes) for sizes in zip(*moved, strict=True)]


@pytest.mark.parametrize("split", (1, 3))
@pytest.mark.parametrize(
    "name",
    default_cases(
        (
            "plain",
            "all_experts",
            "softmax_before_topk",
            "mixed_ranks",
            "siblings",
            "siblings_sparse",
            "one_row",
            "rows_int64",
            "share_a",
            "dropout",
            "dropout_per_expert",
            "float32_adapters",
            "wide_rank",
        ),
        "plain",
        "mixed_ranks",
        "dropout_per_expert",
        "float32_adapters",
        "rows_int64",
    ),
)
def test_moved_is_what_kernels_load_and_store(name: str, split: int, counted) -> None:
    case = {**CASES, "wide_rank": Case(ranks=(40, 100, 60), bias=True, chained=True)}[name]
    check_moved(launches(case, split), counted)


# Launchers of the grouped formulation, whose arguments `grouped_cases` makes.
GROUPED = {
    "router_logits": router.launch_logits,
    "grouped_shrink": grouped_shrink.launch,
    "grouped_shrink_backward": grouped_shrink_backward.launch,
    "grouped_expand": grouped_expand.launch,
    "grouped_weight_grad": grouped_weight_grad.launch,
    "router_grad": router.launch_grad,
}


@pytest.mark.parametrize(
    "name",
    default_cases(
        (
            "plain",
            "eight_slots",
            "mostly_one",
            "empty",
            "long",
            "mixed_ranks",
            "large_ranks",
            "three_siblings",
            "unweighted",
            "by_pair",
            "float32_start",
            "dropout_per_expert",
            "float32_adapters",
        ),
        "plain",
        "mixed_ranks",
        "dropout_per_expert",
        "float32_adapters",
        "empty",
    ),
)
@pytest.mark.parametrize("op", GROUPED)
def test_moved_is_what_grouped_kernels_load_and_store(op: str, name: str, counted) -> None:
    inputs = grouped_cases.Inputs(grouped_cases.CASES[name], torch.float16)
    calls = inputs.calls(op)
    with launcher.recording() as found:
        for arguments in calls:
            GROUPED[op](*arguments)
    check_moved(found, counted)


@pytest.mark.parametrize("renormalize", (True, False))
def test_moved_is_what_the_gate_loads_and_stores(renormalize: bool, counted) -> None:
    logits, dweights = torch.randn(35, 7).half(), torch.randn(35, 3)
    with launcher.recording() as found:
        weights, indices = topk_gate.launch(logits, 3, renormalize, 1.0)
        topk_gate.launch_backward(dweights, weights, indices, logits, renormalize, 1.0)
    check_moved(found, counted)


def test_compulsory_is_every_tensor_once() -> None:
    found = launches(CASES["plain"], 1)
    case = CASES["plain"]
    T, I, R, E = case.T, case.I, sum(case.ranks), len(case.ranks)  # noqa: E741
    table = E * R * 2 + E * 4
    routing = T * (E * 4 + 2 * case.top_k * 4)
    expected = 2 * (T * I + R * I + E * I + 2 * T * R) + table + routing
    assert traffic.compulsory(found[0]) == expected
