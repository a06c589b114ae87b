"""The CUDA code of `route`, compiled by nvcc and executed on a CPU; and planted faults.

Every execution checks that accesses are aligned and inside of the arrays, that blocks do not share
memory, and that a barrier parts any two accesses of different threads of which one is a write
(`tests/ptx`). So the result does not depend on the order in which threads run.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from moelora_kernels import reference
from moelora_kernels.types import CHUNK, TILE
from ptx.errors import PtxError
from support.nvcc import needs_nvcc
from support.route_cases import CASES, NAMES, drawn
from support.route_ptx import KERNELS, ROUTE, compile_ptx, compile_route, execute
from support.route_ptx import route_plan as plan
from support.selection import default_cases, exhaustive

pytestmark = needs_nvcc
each_architecture = pytest.mark.parametrize("architecture", ("80", "90a"))
each_memory = pytest.mark.parametrize("in_shared", (True, False), ids=("shared", "global"))


def difference(*arguments, **options) -> str | None:
    """Return the name of a routing array that is not that of the reference, or None."""
    expected = reference.route(*arguments)
    for name, one, other in zip(NAMES, execute(*arguments, **options), expected, strict=True):
        if not torch.equal(one, other):
            return name
    return None


@each_architecture
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name: str, architecture: str) -> None:
    assert difference(*CASES[name], TILE, CHUNK, architecture=architecture) is None


@exhaustive
@each_memory
@pytest.mark.parametrize(("warps", "sizes"), ((1, (64, 1)), (2, (1, 3)), (4, (3, 64))), ids=str)
@pytest.mark.parametrize("name", CASES)
def test_any_number_of_warps(
    name: str, warps: int, sizes: tuple[int, int], in_shared: bool
) -> None:
    assert difference(*CASES[name], *sizes, warps=warps, in_shared=in_shared) is None


# (T, E, K, siblings, warps), each for what the cases above do not reach.
SHAPES = {
    # Nine bits of a label, a scan of several numbers per thread.
    "many_experts": (333, 256, 8, 1, 4),
    # Several batches of tokens per warp, whole ones and one that ends in the middle of a warp.
    "long": (2000, 5, 2, 1, 2),
    # One warp of a block has no token, the one before less than 32.
    "idle_warp": (33, 5, 2, 1, 4),
    # More slots than threads; fewer threads that count than there are.
    "many_slots": (3, 40, 36, 1, 1),
    "odd_slots": (70, 9, 3, 1, 2),
    "many_siblings": (40, 150, 1, 7, 2),
}


def indices(routing: str, T: int, E: int, K: int, siblings: int = 1) -> Tensor:
    """Return experts [T, n K], some of which are not routed; int32 if T is odd, else int64."""
    experts = drawn(routing, T, E, K, siblings)
    experts[1::5, 0] = -1
    return experts.int() if T % 2 else experts


@each_memory
@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name: str, in_shared: bool) -> None:
    T, E, K, siblings, warps = SHAPES[name]
    arguments = indices("uniform", T, E, K, siblings), E, siblings, TILE, CHUNK
    assert difference(*arguments, warps=warps, in_shared=in_shared) is None


# (routing, T, E, K, siblings), launched as planned.
PLANNED = {
    "one_expert": ("uniform", 301, 1, 1, 3),
    # 32 warps, and then 16, count in shared memory.
    "359_experts": ("zipf", 600, 359, 2, 1),
    "360_experts": ("zipf", 601, 360, 2, 1),
    # One warp does, and then all warps count in global memory.
    "4094_experts": ("uniform", 601, 4094, 2, 1),
    "4095_experts": ("uniform", 600, 4095, 2, 1),
    "siblings_beyond_shared_memory": ("uniform", 601, 3000, 2, 3),
    # More than 2^16 pairs.
    "80000_pairs": ("zipf", 40_000, 8, 2, 1),
    "identical_experts": ("one", 70_003, 8, 1, 1),
    "262144_pairs": ("uniform", 32_768, 128, 8, 1),
    "empty_experts": ("empty", 20_001, 64, 4, 2),
}


@each_architecture
@pytest.mark.parametrize("case", default_cases(PLANNED, "one_expert", "4095_experts"))
def test_launches_as_planned(case: tuple, architecture: str) -> None:
    routing, T, E, K, siblings = case
    arguments = indices(routing, T, E, K, siblings), E, siblings, TILE, CHUNK
    assert difference(*arguments, architecture=architecture) is None


def test_the_plan_fits_every_device() -> None:
    """48 KiB need no permission. If one warp does not fit there is no shared memory at all."""
    assert plan(16384, 8, 8) == (32, 4 * (2 * 9 + 32 * 9 + 32))
    assert plan(1, 8, 8).warps == 1
    assert plan(0, 8, 8).warps == 1
    assert plan(100, 8, 8).warps == 4
    assert plan(2**31 - 1, 256, 256).warps == 32
    assert [plan(1 << 16, E, E).warps for E in (359, 360)] == [32, 16]
    assert plan(1 << 16, 4094, 4094) == (1, 4 * (3 * 4095 + 1))
    assert plan(1 << 16, 4095, 4095) == (32, 0)
    for experts in range(1, 5000, 7):
        for siblings in (1, 3):
            warps, shared = plan(1 << 16, siblings * experts, experts)
            assert warps in (1, 2, 4, 8, 16, 32)
            assert 0 <= shared <= 48 << 10


@pytest.mark.parametrize("architecture", default_cases(("80", "89", "90a", "100", "120"), "90a"))
def test_compiles_without_spills(architecture: str) -> None:
    """1024 threads share 65536 registers."""
    flags = ("-cubin", f"-arch=sm_{architecture}", "-Xptxas=-v", "-Werror=all-warnings")
    try:
        _, messages = compile_route(KERNELS, *flags)
    except subprocess.CalledProcessError as error:
        if f"Value 'sm_{architecture}' is not defined" in error.stderr:
            pytest.skip(f"this nvcc does not know sm_{architecture}")
        raise AssertionError(error.stderr) from None
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", messages)]
    assert len(registers) == 4
    assert max(registers) <= 64
    stack = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", messages)
    assert stack == [("0", "0")] * 4


# --- planted faults -----------------------------------------------------------------------------

# (experts, E, siblings), and the warps of a block: several batches per warp; more counters than
# threads; ids outside of the range.
FAULTED = (
    ((indices("zipf", 700, 5, 2, 2), 5, 2), 4),
    ((indices("uniform", 132, 40, 2, 2), 40, 2), 2),
    (CASES["adversarial-torch.int64"], 2),
)


def noticed(in_shared: bool = True, **options) -> bool:
    """Return whether an execution fails, or returns other arrays than the reference."""
    for routing, warps in FAULTED:
        arguments = *routing, TILE, CHUNK
        try:
            if difference(*arguments, warps=warps, in_shared=in_shared, **options):
                return True
        except PtxError:
            return True
    return False


# Instruction -> what takes its place.
INSTRUCTIONS = {
    "__syncthreads": (r"bar\.sync\s+0;", ""),
    "__syncwarp": (r"bar\.warp\.sync\s+-1;", ""),
    "atomicAdd": (
        r"atom\.(\w+)\.add\.u32\s+(%r\d+), (\[[^\]]+\]), (%r\d+);",
        r"ld.\1.u32 \2, \3; add.u32 \2, \2, \4; st.\1.u32 \3, \2;",
    ),
}


def one_at_a_time(instruction: str, in_shared: bool) -> list[Callable[[str], str]]:
    """Return the changes of PTX, each of one instruction of the kernel for int64."""
    pattern, place = INSTRUCTIONS[instruction]
    ptx = compile_ptx("90a")
    start = re.search(rf"\.entry\s+\w*route_kernelIlLb{int(in_shared)}E", ptx).end()
    end = ptx.find(".entry", start)
    matches = list(re.compile(pattern).finditer(ptx, start, end if end > 0 else len(ptx)))
    return [
        lambda ptx, m=match: ptx[: m.start()] + m.expand(place) + ptx[m.end() :]
        for match in matches
    ]


def test_nothing_is_noticed_without_a_fault() -> None:
    assert not noticed()
    assert not noticed(in_shared=False)


@each_memory
@pytest.mark.parametrize("instruction", INSTRUCTIONS)
def test_an_instruction_that_is_missing(instruction: str, in_shared: bool) -> None:
    """Every one is noticed: 13 barriers, 8 of warps and 10 atomics in each kernel."""
    changes = one_at_a_time(instruction, in_shared)
    missed = [n for n, change in enumerate(changes) if not noticed(in_shared, change=change)]
    assert len(changes) >= {"__syncthreads": 8, "__syncwarp": 2, "atomicAdd": 2}[instruction]
    assert not missed, f"{missed} of {len(changes)}"


# What is wrong -> text of route.cuh, and what takes its place.
SOURCE = {
    "a token too many is read": ("if (t < end) {", "if (t <= end) {"),
    "not routed means expert 0": ("static_cast<int>(id) : E;", "static_cast<int>(id) : 0;"),
    "a negative expert is routed": ("id >= 0 && id < E ?", "id < E ?"),
    "the high half of an id is lost": ("const int64_t id = ids", "const int id = ids"),
    "a run of one is not counted": ("if (run > 0) atomicAdd", "if (run > 1) atomicAdd"),
    "the last run is not counted": ("    counter.flush();\n  }\n}", "  }\n}"),
    "a slot counts as earlier than itself": ("(slot < block_slot ?", "(slot <= block_slot ?"),
    "the last counter is not zeroed": ("n < sums - counters; n", "n < sums - counters - 1; n"),
    "one counter too few": ("warps * (E + 1) + warps;", "warps * (E + 1) + warps - 1;"),
    "a share goes on behind the end": (": count;\n", ": begin + share;\n"),
    "a warp's sum is left out": ("if (w < warp) before", "if (w + 1 < warp) before"),
    "a lane adds its own sum twice": ("before = up_to - thread_sum", "before = up_to"),
    "the last batch of a warp is lost": ("first < share.end;", "first + BATCH * WARP < share.end;"),
    "the highest bit of a label is ignored": ("while (a.E >> bits)", "while (a.E >> bits > 1)"),
    "a lane counts as lower than itself": ("(1u << lane) - 1;", "(2u << lane) - 1;"),
    "every peer moves the position": ("valid && (peers & lower_lanes) == 0", "valid"),
    "not routed has no tiles": ("e <= a.N; e +=", "e < a.N; e +="),
    "a tile too many": ("m < count; m", "m <= count; m"),
    "the first of several experts gets a tile": ("[middle] <= m", "[middle] < m"),
    "the last tile has no expert": ("if (m < used) {", "if (m + 1 < used) {"),
}


@exhaustive
@pytest.mark.parametrize("fault", SOURCE)
def test_a_fault_in_the_source(fault: str) -> None:
    text, place = SOURCE[fault]
    source = ROUTE.read_text()
    assert source.count(text) == 1
    assert noticed(header=source.replace(text, place))
