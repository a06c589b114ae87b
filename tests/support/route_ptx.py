"""Compile csrc/cuda/route.cuh with nvcc, and execute its PTX on a CPU (`tests/ptx`)."""

from __future__ import annotations

import ctypes
import re
import struct
import tempfile
from collections.abc import Callable
from functools import cache, lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moelora_kernels.types import count_tiles
from ptx.execution import Kernel
from ptx.global_memory import GlobalMemory
from ptx.program import parse
from support.nvcc import CUDA, compile_source

ROUTE = CUDA / "route.cuh"

# The kernels for ids of 32 and of 64 bits, with counters in shared and in global memory.
KERNELS = """
#include "route.cuh"
using moelora::RouteArguments;
template __global__ void moelora::route_kernel<int, true>(RouteArguments, const int*, int*);
template __global__ void moelora::route_kernel<int, false>(RouteArguments, const int*, int*);
template __global__ void moelora::route_kernel<long, true>(RouteArguments, const long*, int*);
template __global__ void moelora::route_kernel<long, false>(RouteArguments, const long*, int*);
"""
# The functions of the host that choose a launch.
PLAN = """
#include "route.cuh"
extern "C" void plan(int64_t P, int64_t N, int64_t E, int64_t* warps, int64_t* shared) {
  const moelora::RoutePlan plan = moelora::route_plan(P, N, E);
  *warps = plan.warps;
  *shared = plan.shared;
}
extern "C" int64_t counters(int64_t N, int64_t E, int64_t warps) {
  return moelora::route_counters(N, E, warps);
}
"""
WARP = 32
# In memory that the kernel writes. As a position or an expert it leads out of every tensor.
GARBAGE = 0x5A5A5A5A


class Plan(NamedTuple):
    """The warps of a block, and its bytes of shared memory; 0: it counts in global memory."""

    warps: int
    shared: int


def compile_route(text: str, *flags: str, header: str | None = None) -> tuple[bytes, str]:
    """See `compile_source`. header: the text of route.cuh; None: as it is."""
    return compile_source(text, *flags, headers={"route.cuh": header})


@cache
def compile_ptx(architecture: str, header: str | None = None) -> str:
    """Return the PTX of all kernels for an architecture, "80" or "90a"."""
    ptx, _ = compile_route(KERNELS, "-ptx", f"-arch=compute_{architecture}", header=header)
    return ptx.decode()


@cache
def host_library(header: str | None = None) -> ctypes.CDLL:
    """Return the functions of PLAN."""
    flags = ("-shared", "-cudart=none", "-Xcompiler=-fPIC")
    code, _ = compile_route(PLAN, *flags, header=header)
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        file.write(code)
        file.flush()
        library = ctypes.CDLL(file.name)
    library.counters.restype = ctypes.c_int64
    return library


def route_plan(pairs: int, experts: int, of_sibling: int, header: str | None = None) -> Plan:
    """Return the plan for P pairs and N = n E experts."""
    warps, shared = ctypes.c_int64(), ctypes.c_int64()
    sizes = [ctypes.c_int64(size) for size in (pairs, experts, of_sibling)]
    host_library(header).plan(*sizes, ctypes.byref(warps), ctypes.byref(shared))
    return Plan(warps.value, shared.value)


def route_counters(experts: int, of_sibling: int, warps: int, header: str | None = None) -> int:
    """Return how many ints a block counts with."""
    sizes = [ctypes.c_int64(size) for size in (experts, of_sibling, warps)]
    return host_library(header).counters(*sizes)


@lru_cache(maxsize=16)
def kernel(ptx: str, id_bytes: int, warps: int, shared: int) -> Kernel:
    """Return one of the kernels, ready to run. shared: bytes; 0: the kernel that uses none."""
    template = f"I{'l' if id_bytes == 8 else 'i'}Lb{int(shared > 0)}E"
    (name,) = re.findall(rf"\.entry\s+(\w*route_kernel{template}\w*)", ptx)
    return Kernel(parse(ptx, name), warps * WARP, shared)


def execute(
    experts: Tensor,
    num_experts: int,
    siblings: int,
    tile: int,
    chunk: int,
    *,
    architecture: str = "90a",
    warps: int | None = None,
    in_shared: bool = True,
    header: str | None = None,
    change: Callable[[str], str] = lambda ptx: ptx,
) -> tuple[Tensor, ...]:
    """Return order, offsets, tiles and chunks, launched like `route` of csrc/cuda/route.cu.

    warps and in_shared: in the place of the plan's choice, where the counters are as well.
    header: the text of route.cuh. change: PTX -> PTX, to plant faults.
    """
    P, N = experts.numel(), siblings * num_experts
    T, S = experts.shape if P else (0, 0)
    plan = route_plan(P, N, num_experts, header)
    if warps is not None:
        words = route_counters(N, num_experts, warps, header)
        plan = Plan(warps, 4 * words if in_shared else 0)
    blocks = S + 2
    counts = [count_tiles(P, N, size) for size in (tile, chunk)]
    lengths = [P, N + 1, *(2 * count for count in counts)]
    if not plan.shared:
        lengths.append(blocks * route_counters(N, num_experts, plan.warps, header))
    ids = torch.empty(0, dtype=torch.uint8).set_(experts.untyped_storage()).numpy()
    outputs = [np.full(length, GARBAGE, np.int32) for length in lengths]
    memory = GlobalMemory([(array.view(np.uint8), 0) for array in (ids, *outputs)])
    pointers = [memory.address(1 + number) for number in range(len(outputs))]
    arguments = struct.pack(
        "<3q2i7q4Q",
        T, S, experts.shape[1] // siblings, num_experts, N, P, *experts.stride(), tile, chunk,
        *counts, *pointers[:4],
    )  # fmt: skip
    first = memory.address(0) + experts.storage_offset() * experts.element_size()
    scratch = 0 if plan.shared else pointers[4]
    ptx = change(compile_ptx(architecture, header))
    ready = kernel(ptx, experts.element_size(), *plan)
    ready.launch(blocks, [arguments, first, scratch], memory, by_thread=True)
    order, offsets, *maps = (
        torch.from_numpy(memory.contents(1 + number).view(np.int32).copy()) for number in range(4)
    )
    return order, offsets, *(each.view(-1, 2) for each in maps)
