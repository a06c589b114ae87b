"""Bytes counted from grids and tiles are the bytes that kernels load and store."""

from __future__ import annotations

import pytest
import torch

from benchmarks.model import traffic
from moelora_kernels.kernels.common import launcher
from support import arguments
from support.backends import SPLIT, in_parts, op_launcher
from support.cases import GROUPED, WIDE, Case
from support.ffn_inner_cases import FFN_INNER, FfnInputs
from support.inputs import Inputs
from support.op_checks import GROUPED_OPS, WIDE_OPS
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
    """The launches of every op of a case in the wide form, one after the other."""
    inputs = Inputs(case, torch.float16)
    if inputs.rows is not None:
        # A token without a gate row loads none: that depends on the data, and is not counted.
        inputs.rows.clamp_(0, len(inputs.gate_weights) - 1)
    calls = {op: arguments.calls(op, inputs)[0] for op in WIDE_OPS}
    with launcher.recording() as recorded:
        for op, args in calls.items():
            launch = op_launcher(op)
            (in_parts(launch, split) if op in SPLIT else launch)(*args)
    return recorded


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
    case = {**WIDE, "wide_rank": Case(ranks=(40, 100, 60), router_bias=True, aux=True)}[name]
    check_moved(launches(case, split), counted)


@pytest.mark.parametrize(
    "name",
    default_cases(
        (
            "plain",
            "eight_slots",
            "distinct_experts",
            "mostly_one",
            "empty",
            "long",
            "mixed_ranks",
            "large_ranks",
            "three_siblings",
            "unweighted",
            "per_pair",
            "float32_start",
            "dropout_per_expert",
            "float32_adapters",
        ),
        "plain",
        "distinct_experts",
        "mixed_ranks",
        "dropout_per_expert",
        "float32_adapters",
        "empty",
    ),
)
@pytest.mark.parametrize("op", [op for op in GROUPED_OPS if op != "route"])
def test_moved_is_what_grouped_kernels_load_and_store(op: str, name: str, counted) -> None:
    calls = arguments.calls(op, Inputs(GROUPED[name], torch.float16))
    with launcher.recording() as recorded:
        for args in calls:
            op_launcher(op)(*args)
    check_moved(recorded, counted)


@pytest.mark.parametrize("split", (1, 3))
@pytest.mark.parametrize("name", ("plain", "mixed_ranks", "dropout_per_expert", "four_slots"))
def test_moved_is_what_kernels_of_ffns_load_and_store(name: str, split: int, counted) -> None:
    inputs = FfnInputs(FFN_INNER[name]._replace(F=208), torch.float16)
    with launcher.recording() as recorded:
        in_parts(op_launcher("ffn_inner"), split)(*inputs.forward())
        in_parts(op_launcher("ffn_inner_backward"), split)(*inputs.backward())
    check_moved(recorded, counted)


@pytest.mark.parametrize("renormalize", (True, False))
def test_moved_is_what_the_gate_loads_and_stores(renormalize: bool, counted) -> None:
    logits, dweights = torch.randn(35, 7).half(), torch.randn(35, 3)
    with launcher.recording() as recorded:
        weights, experts = op_launcher("topk_gate")(logits, 3, renormalize, 1.0)
        args = dweights, weights, experts, logits, renormalize, 1.0
        op_launcher("topk_gate_backward")(*args)
    check_moved(recorded, counted)


def test_compulsory_is_every_tensor_once() -> None:
    case = WIDE["plain"]
    recorded = launches(case, 1)
    T, I = case.T, launcher.padded_width(case.I)  # noqa: E741
    R, E = sum(case.ranks), len(case.ranks)
    table = E * R * 2 + E * 4
    routing = T * (E * 4 + 2 * case.K * 4)
    expected = 2 * (T * I + R * I + E * I + 2 * T * R) + table + routing
    assert traffic.compulsory(recorded[0]) == expected
