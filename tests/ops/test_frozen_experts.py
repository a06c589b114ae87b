"""grouped_weight_grad skips the pairs of frozen experts."""

from __future__ import annotations

import mmap
import resource

import numpy as np
import pytest
import torch

from moelora_kernels import ops, reference
from moelora_kernels.types import NO_DROPOUT
from support import arguments
from support.backends import (
    DTYPES,
    INTERPRETED,
    Backend,
    each_cpu_backend_and_sm_90,
    needs_library,
    needs_triton,
)
from support.cases import GROUPED
from support.inputs import Inputs

# Two experts, different ranks, siblings, several chunks of an expert, dropout.
CASES = (
    "plain", "mixed_ranks", "three_siblings", "long", "mostly_one", "dropout_per_expert",
    "per_pair", "nothing_routed", "no_token",
)  # fmt: skip


def frozen_sets(ranks) -> list[tuple[int, ...]]:
    """Return some sets of experts: one, all but the last, all."""
    E = len(ranks)
    return [(0,), tuple(range(E - 1)), tuple(range(E))]


@each_cpu_backend_and_sm_90
@pytest.mark.parametrize("case", CASES)
def test_frozen_experts_are_zero_and_all_others_have_the_same_bits(
    case: str, backend: Backend
) -> None:
    """Also if the pairs of frozen experts hold NaN."""
    inputs = backend.inputs(GROUPED[case], DTYPES["fp16"])
    call = arguments.grouped_weight_grad(inputs)[:-1]
    run = backend.implementation("grouped_weight_grad")
    ranks, offsets = inputs.case.ranks, call[4].offsets.tolist()
    E = len(ranks)
    da, db = run(*call, ())
    for frozen in frozen_sets(ranks):
        dh, u = call[1].clone(), call[3].clone()
        for expert in range(inputs.case.n * E):
            if expert % E in frozen:
                rows = slice(offsets[expert], offsets[expert + 1])
                dh[rows] = u[rows] = torch.nan
        actual_da, actual_db = run(call[0], dh, call[2], u, *call[4:], frozen)
        for i, (matrix, plain) in enumerate(zip(actual_db, db, strict=True)):
            pairs = zip(matrix.split(ranks, dim=1), plain.split(ranks, dim=1), strict=True)
            rows = da.split(sum(ranks))[i].split(ranks), actual_da.split(sum(ranks))[i].split(ranks)
            for e, (block, unfrozen) in enumerate(pairs):
                assert torch.equal(block, 0 * unfrozen if e in frozen else unfrozen), (frozen, e)
                expected = 0 * rows[0][e] if e in frozen else rows[0][e]
                assert torch.equal(rows[1][e], expected), (frozen, e)


@pytest.mark.parametrize("frozen", ((), (1,), (0, 2)))
def test_the_reference_equals_the_sums_of_the_experts_that_train(frozen: tuple[int, ...]) -> None:
    inputs = Inputs(GROUPED["plain"], torch.float64)
    call = arguments.grouped_weight_grad(inputs)[:-1]
    da, (db,) = reference.grouped_weight_grad(*call)
    ranks = inputs.case.ranks
    actual_da, (actual_db,) = reference.grouped_weight_grad(*call, frozen)
    for e, (a, b) in enumerate(zip(da.split(ranks), db.split(ranks, dim=1), strict=True)):
        factor = 0.0 if e in frozen else 1.0
        assert torch.equal(actual_da.split(ranks)[e], factor * a)
        assert torch.equal(actual_db.split(ranks, dim=1)[e], factor * b)


@needs_triton
@pytest.mark.skipif(not INTERPRETED, reason="counts the products of the interpreter")
def test_the_kernel_multiplies_nothing_for_frozen_experts(monkeypatch) -> None:
    """The number of products falls by those of the frozen experts' pairs."""
    from support.backends import TRITON

    inputs = TRITON.inputs(GROUPED["plain"], DTYPES["fp32"])
    call = arguments.grouped_weight_grad(inputs)[:-1]
    counts, matmul = [], np.matmul

    def counting(*args, **options):
        counts[-1] += 1
        return matmul(*args, **options)

    monkeypatch.setattr(np, "matmul", counting)
    ranks = inputs.case.ranks
    for frozen in ((), (0,), (0, 1), tuple(range(len(ranks)))):
        counts.append(0)
        TRITON.implementation("grouped_weight_grad")(*call, frozen)
    assert counts[0] > counts[1] > counts[2] > counts[3] == 0


@needs_triton
def test_the_ptx_executes_fewer_instructions() -> None:
    pytest.importorskip("triton")
    from moelora_kernels.kernels import grouped_weight_grad
    from ptx.launcher import executed
    from support.backends import SM_90

    inputs = SM_90.inputs(GROUPED["four_slots"], DTYPES["fp16"])
    call = arguments.grouped_weight_grad(inputs)[:-1]
    counts = []
    for frozen in ((0,), (0, 1, 2)):
        with executed("sm_90") as executor:
            grouped_weight_grad.launch(*call, frozen)
        counts.append(executor.instructions)
    assert counts[1] < 0.5 * counts[0]


@needs_library
def test_the_cpu_reads_no_rows_of_frozen_experts() -> None:
    """The pages of x that a call touches for the first time are page faults.

    Expert 0 has the first half of the tokens, expert 1 the second half.
    """
    T, I, rank = 2048, 4096, 1  # noqa: E741
    experts = (torch.arange(T) >= T // 2).int()[:, None]
    routing = ops.route(experts, 2)
    dh = torch.ones(T, rank)
    faults = []
    for frozen in ((), (0,), (0, 1)):
        with mmap.mmap(-1, 4 * T * I) as memory:
            memory.madvise(mmap.MADV_NOHUGEPAGE)
            x = torch.frombuffer(memory, dtype=torch.float32).view(T, I)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            da, _ = ops.grouped_weight_grad(
                x, dh, [x.new_ones(T, 1)], dh, routing, (rank,) * 2, NO_DROPOUT, x.dtype, frozen
            )
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
            assert not da.any()
            del x, da
    pages = 4 * T * I // mmap.PAGESIZE
    assert faults[0] > 0.9 * pages
    assert 0.4 * pages < faults[1] < 0.6 * pages
    assert faults[2] < 0.1 * pages


def test_the_layer_tells_the_op_which_experts_are_frozen(monkeypatch) -> None:
    """Every form that sums by expert passes them: linears, and whole-FFN experts."""
    from moelora_kernels import freeze_experts
    from support.ffns import HIDDEN, make_ffn
    from support.linears import IN, make_layer

    seen = []
    for module, name in ((ops, "grouped_weight_grad"), (ops, "grouped_backward")):
        function = getattr(module, name)

        def spy(*args, function=function):
            seen.append(args[-1])
            return function(*args)

        monkeypatch.setattr(module, name, spy)
    for layer, width, calls in (
        (make_layer(impl="grouped"), IN, 1),
        (make_ffn(), HIDDEN, 3),
        (make_ffn(activation=torch.tanh), HIDDEN, 3),
    ):
        seen.clear()
        freeze_experts(layer, [1, 3])
        layer(torch.randn(7, width, dtype=torch.float64)).sum().backward()
        assert seen == [(1, 3)] * calls
