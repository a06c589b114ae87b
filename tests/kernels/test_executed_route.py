"""The device code of `route` without a device: its results on the host, and what nvcc makes of it.

tests/kernels/emulation runs the blocks one by one, their threads as coroutines in several orders.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moelora_kernels import reference
from moelora_kernels.types import CHUNK, TILE, count_tiles
from support.backends import REQUIRED
from support.route_cases import CASES, NAMES, drawn
from support.selection import default_cases

ROOT = Path(__file__).resolve().parents[2]
GUARD, GARBAGE = 16, -77
LOWEST_FIRST, HIGHEST_FIRST, SHUFFLED = 0, 1, 2


@pytest.fixture(scope="module")
def emulation(tmp_path_factory) -> ctypes.CDLL:
    """tests/kernels/emulation/route.cpp as a library."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None and not REQUIRED:
        pytest.skip("needs a C++ compiler")
    library = tmp_path_factory.mktemp("emulation") / "route.so"
    source = ROOT / "tests" / "kernels" / "emulation" / "route.cpp"
    flags = ["-std=c++20", "-O1", "-fPIC", "-shared", f"-I{ROOT / 'csrc'}", "-Wno-unknown-pragmas"]
    subprocess.run([compiler, *flags, source, "-o", library], check=True)
    loaded = ctypes.CDLL(str(library))
    loaded.route.restype = ctypes.c_char_p
    return loaded


def planned(emulation: ctypes.CDLL, pairs: int, experts: int, of_sibling: int) -> tuple[int, int]:
    """Warps of a block and its bytes of shared memory."""
    found = (ctypes.c_int64 * 2)()
    sizes = [ctypes.c_int64(size) for size in (pairs, experts, of_sibling)]
    emulation.plan(*sizes, ctypes.byref(found, 0), ctypes.byref(found, 8))
    return found[0], found[1]


def emulate(
    emulation: ctypes.CDLL,
    indices: Tensor,
    num_experts: int,
    siblings: int,
    tile: int,
    chunk: int,
    warps: int = 2,
    schedule: int = LOWEST_FIRST,
) -> list[Tensor]:
    """The routing arrays as the device code gives them."""
    pairs, experts = indices.numel(), siblings * num_experts
    tokens, slots = indices.shape if pairs else (0, 0)
    tiles = [count_tiles(pairs, experts, size) for size in (tile, chunk)]
    lengths = [pairs, experts + 1, *(2 * count for count in tiles)]
    outputs = [torch.full((n + GUARD,), GARBAGE, dtype=torch.int32) for n in lengths]
    sizes = [tokens, slots, num_experts, siblings, tile, chunk, *tiles]
    problem = emulation.route(
        ctypes.c_void_p(indices.data_ptr()),
        ctypes.c_int64(indices.element_size()),
        (ctypes.c_int64 * 2)(*indices.stride()),
        (ctypes.c_int64 * len(sizes))(*sizes),
        *(ctypes.c_void_p(output.data_ptr()) for output in outputs),
        ctypes.c_int64(warps),
        ctypes.c_int64(schedule),
    )
    assert problem is None, problem.decode()
    for name, output, length in zip(NAMES, outputs, lengths, strict=True):
        assert (output[length:] == GARBAGE).all(), f"{name}: written beyond its end"
    order, offsets, *maps = (o[:n] for o, n in zip(outputs, lengths, strict=True))
    return [order, offsets, *(each.view(-1, 2) for each in maps)]


def check(emulation: ctypes.CDLL, *arguments, **options) -> None:
    expected = reference.route(*arguments)
    for name, one, other in zip(
        NAMES, emulate(emulation, *arguments, **options), expected, strict=True
    ):
        assert torch.equal(one, other), name


@pytest.mark.parametrize("warps", (1, 2, 4))
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(emulation, name: str, warps: int) -> None:
    check(emulation, *CASES[name], TILE, CHUNK, warps=warps)


@pytest.mark.parametrize("sizes", ((1, 3), (3, 64)), ids=str)
@pytest.mark.parametrize("schedule", (HIGHEST_FIRST, SHUFFLED, 3))
@pytest.mark.parametrize("name", ("zipf-3", "adversarial-torch.int64", "one-2", "every_third"))
def test_any_order_of_threads(emulation, name: str, schedule: int, sizes: tuple[int, int]) -> None:
    """Between two barriers threads do not see one another."""
    check(emulation, *CASES[name], *sizes, warps=3, schedule=schedule)


# (T, E, K, siblings, warps), each for what the cases above do not reach.
LARGE = {
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


@pytest.mark.parametrize("name", LARGE)
def test_large_cases(emulation, name: str) -> None:
    tokens, experts, top_k, siblings, warps = LARGE[name]
    indices = drawn("uniform", tokens, experts, top_k, siblings)
    indices[1::5, 0] = -1
    arguments = (indices.int(), experts, siblings, TILE, CHUNK)
    check(emulation, *arguments, warps=warps, schedule=SHUFFLED)


def test_the_plan_fits_every_device(emulation) -> None:
    """48 KiB need no permission; where not even one warp fits there is no shared memory at all."""
    assert planned(emulation, 16384, 8, 8) == (32, 4 * (2 * 9 + 32 * 9 + 32))
    assert planned(emulation, 1, 8, 8)[0] == 1
    assert planned(emulation, 0, 8, 8)[0] == 1
    assert planned(emulation, 100, 8, 8)[0] == 4
    assert planned(emulation, 2**31 - 1, 256, 256)[0] == 32
    assert planned(emulation, 1 << 16, 4000, 4000)[0] == 1
    assert planned(emulation, 1 << 16, 5000, 5000) == (32, 0)
    for experts in range(1, 5000, 7):
        for siblings in (1, 3):
            warps, shared = planned(emulation, 1 << 16, siblings * experts, experts)
            assert warps in (1, 2, 4, 8, 16, 32)
            assert 0 <= shared <= 48 << 10


KERNELS = """
#include "cuda/route.cuh"
using moelora::RouteArguments;
template __global__ void moelora::route_kernel<int, true>(RouteArguments, const int*, int*);
template __global__ void moelora::route_kernel<int, false>(RouteArguments, const int*, int*);
template __global__ void moelora::route_kernel<long, true>(RouteArguments, const long*, int*);
template __global__ void moelora::route_kernel<long, false>(RouteArguments, const long*, int*);
"""


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
@pytest.mark.parametrize("architecture", default_cases(("80", "89", "90a", "100"), "90a"))
def test_compiles_without_spills(tmp_path: Path, architecture: str) -> None:
    """1024 threads share 65536 registers."""
    source = tmp_path / "route.cu"
    source.write_text(KERNELS)
    done = subprocess.run(
        ["nvcc", "-std=c++20", "-O3", "-cubin", f"-arch=sm_{architecture}", f"-I{ROOT / 'csrc'}",
         "-Xptxas=-v", "-Werror=all-warnings", source, "-o", tmp_path / "route.cubin"],
        capture_output=True,
        text=True,
    )  # fmt: skip
    if "Value 'sm_100' is not defined" in done.stderr:
        pytest.skip("this nvcc does not know sm_100")
    assert done.returncode == 0, done.stderr
    registers = [int(n) for n in re.findall(r"Used (\d+) registers", done.stderr)]
    assert len(registers) == 4
    assert max(registers) <= 64
    stack = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores", done.stderr)
    assert stack == [("0", "0")] * 4
