"""The CUDA code of the shrink whose clusters share A, compiled by nvcc and executed on a CPU.

Every execution checks that a wait for its mbarrier parts the copies of a tile from its products,
that a tile is not overwritten before all warps of the cluster have released it, and what
`tests/ptx` checks of every kernel. So the result does not depend on the order in which threads run.
"""

from __future__ import annotations

import re
import subprocess
from functools import partial

import pytest
import torch

from moelora_kernels import reference
from ptx.errors import PtxError
from support import shrink_ptx
from support.arguments import calls
from support.cases import Case
from support.inputs import Inputs
from support.nvcc import CUDA, compile_source, needs_nvcc
from support.op_checks import compare
from support.selection import default_cases
from support.shrink_ptx import CASES, R64, R128

pytestmark = needs_nvcc

each_time = pytest.mark.parametrize("late", (False, True), ids=("early", "late"))


def arguments_of(case: Case) -> list:
    (arguments,) = calls("shrink_gate", Inputs(case, torch.bfloat16))
    return arguments


@each_time
@pytest.mark.parametrize("case", default_cases(CASES, "short", "tails", "mixed_ranks"))
def test_equals_the_reference(case: Case, late: bool) -> None:
    implementation = partial(shrink_ptx.execute, late=late)
    compare("shrink_gate", implementation, arguments_of(case), torch.bfloat16)


def test_sums_that_are_cut() -> None:
    implementation = partial(shrink_ptx.execute, cut=True)
    compare("shrink_gate", implementation, arguments_of(CASES["tails"]), torch.bfloat16, True)


def test_values_that_are_not_finite() -> None:
    """A NaN is the largest logit; an infinite h of an expert with a gate of 0 gives u = 0."""
    inputs = Inputs(Case(T=9, I=128, ranks=R64), torch.bfloat16)
    inputs.x[3] = float("nan")
    inputs.x[5, 0] = float("inf")
    inputs.lora_a[0][:8, 1] = float("inf")
    (arguments,) = calls("shrink_gate", inputs)
    expected = reference.shrink_gate(*arguments)
    for actual, value in zip(shrink_ptx.execute(*arguments), expected, strict=True):
        torch.testing.assert_close(actual, value, rtol=0.02, atol=0.02, equal_nan=True)


def test_compiles_without_spills() -> None:
    """And the compiler does not say that it makes products wait for one another."""
    flags = ("-cubin", "-arch=sm_90a", "-Xptxas=-v", "-Werror=all-warnings")
    headers = dict.fromkeys(shrink_ptx.HEADERS)
    try:
        _, messages = compile_source(shrink_ptx.KERNELS, *flags, headers=headers)
    except subprocess.CalledProcessError as error:
        raise AssertionError(error.stderr) from None
    assert len(re.findall(r"0 bytes stack frame, 0 bytes spill stores", messages)) == 4
    assert "serialized" not in messages


# --- planted faults -----------------------------------------------------------------------------

FAULTED = Case(T=200, I=1000, ranks=R128, router_bias=True)


def noticed(**options) -> bool:
    """Return whether an execution fails, or returns other values than the reference."""
    for late in (False, True):
        try:
            implementation = partial(shrink_ptx.execute, late=late, **options)
            compare("shrink_gate", implementation, arguments_of(FAULTED), torch.bfloat16)
        except (PtxError, AssertionError):
            return True
    return False


def test_nothing_is_noticed_without_a_fault() -> None:
    assert not noticed()


# What is wrong -> header, text, and what takes its place.
SHRINK, HOPPER = shrink_ptx.HEADERS
SOURCE = {
    "no fence behind the barriers": (SHRINK, "    fence_barriers();\n", ""),
    "no barrier of the cluster at the start": (
        SHRINK, "  }\n  synchronise_cluster();\n\n  // Copies", "  }\n\n  // Copies",
    ),
    "no barrier of the cluster at the end": (
        SHRINK, "at its barriers.\n  synchronise_cluster();", "at its barriers.",
    ),
    "no wait for the tiles": (SHRINK, "    wait_for(full + stage * 8, step / STAGES % 2);\n", ""),
    "a wait for the phase before": (SHRINK, "step / STAGES % 2);\n    const", "1);\n    const"),
    "no wait for the release": (
        SHRINK, "      wait_for(empty + refilled % STAGES * 8, refilled / STAGES % 2);\n", "",
    ),
    "a release before the products end": (SHRINK, "wait_for_products<1>();", ""),
    "a release one step early": (SHRINK, "const int ended = step - 1;", "const int ended = step;"),
    "a release of one warp": (SHRINK, "lane < SHRINK_CLUSTER)", "lane < 4 && warp == 0)"),
    "a release to three blocks": (SHRINK, "lane < SHRINK_CLUSTER)", "lane < 3)"),
    "one arrival too few is counted": (SHRINK, "SHRINK_CLUSTER * SHRINK_WARPS);", "15);"),
    "a stage is filled two steps early": (SHRINK, "int LAG = 2;", "int LAG = 0;"),
    "no wait for the last products": (SHRINK, "  wait_for_products<0>();\n", ""),
    "a share of A is left out": (SHRINK, "(1 << SHRINK_CLUSTER) - 1;", "7;"),
    "a block reads the share of its neighbour": (
        SHRINK, "column, row, barrier, ALL", "column, row ^ SHARE, barrier, ALL",
    ),
    "the router of every block": (SHRINK, "    if (rank == 0) share_tile(", "    share_tile("),
    "fewer bytes are expected": (SHRINK, "(barrier, Memory::STAGE);", "(barrier, Memory::A);"),
    "the next columns are the first": (SHRINK, "right + k * NEXT_COLUMNS);", "right);"),
    "no fence before the products": (SHRINK, "    begin_products();\n", ""),
    "no bias": (SHRINK, "logits[i] + bias;", "logits[i];"),
    "gates of the row below": (SHRINK, "gates + row * E8;", "gates + (row ^ 1) * E8;"),
    "no barrier between logits and gates": (
        SHRINK, "  }\n  __syncwarp();\n  const int64_t token", "  }\n  const int64_t token",
    ),
    "no barrier between gates and u": (
        SHRINK, "  }\n  __syncwarp();\n\n  // h and u.", "  }\n\n  // h and u.",
    ),
    "tokens behind the last": (SHRINK, "      if (in_bounds) {", "      if (true) {"),
    "u of an h that is not rounded": (SHRINK, "gate[experts.y], values.y)", "gate[experts.y], 1)"),
    "a tie goes to the last": (SHRINK, "key > best_key)", "key >= best_key - 1.0f)"),
    "four releases to the own block": (
        HOPPER, "mapa.shared::cluster.u32 %0, %1, %2;", "mov.u32 %0, %1;",
    ),
    "rows of another pitch": (HOPPER, "EIGHT_ROWS = 8 * TILE_ROW", "EIGHT_ROWS = 4 * TILE_ROW"),
    "no swizzle": (HOPPER, "SWIZZLE_128B = 1;", "SWIZZLE_128B = 0;"),
}  # fmt: skip


@pytest.mark.parametrize(
    "fault", default_cases(SOURCE, "no wait for the tiles", "no wait for the release")
)
def test_a_fault_in_the_source(fault: tuple[str, str, str]) -> None:
    name, text, place = fault
    source = (CUDA / name).read_text()
    assert source.count(text) == 1
    assert noticed(changes=((name, source.replace(text, place)),))
