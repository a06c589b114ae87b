"""The time of a layer on a GPU, modelled from the machine code of its kernels. Nothing is measured.

A launch takes the largest of five times, and START:

    memory    every tensor that its programs ask for once, at the bandwidth of device memory
    L2        all bytes that its programs ask for, at the bandwidth of the L2 cache
    matrix    its products, at the rate of the tensor cores
    issue     all instructions, one per cycle in each quarter of a multiprocessor
    latency   the loads of a program that wait for each other, for each wave of programs

Programs run in waves of multiprocessors times blocks per multiprocessor. The last wave is not full:
a launch of 1.2 waves takes nearly as long as one of 2. ATen's products are modelled by their
operations and bytes, and the kernels in CUDA C++ by their source: `route` by the loads of a thread
that wait for each other, `cluster_shrink` by its bytes. The host's time is not in it.

Assumed: ATen's `addmm` and `addmm_` do not copy the matrix that they add to.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from benchmarks.model import traffic
from benchmarks.model.gpus import Gpu, blocks_per_multiprocessor
from benchmarks.model.launches import Layer
from benchmarks.model.machine_code import MachineCode
from benchmarks.model.work import work
from moelora_kernels.kernels.cluster_shrink import CLUSTER, TOKENS, blocks_at_once, fills_waves
from moelora_kernels.kernels.common.launcher import Launch, ceil_div
from moelora_kernels.kernels.grouped_expand import adds_router

# Microseconds of a launch that no limit explains: its start, the ramp and the gap before the next.
START = 4.0
LARGE_START = 2.5
# Microseconds of a load from device memory that nothing hides.
LOAD = 0.7
# Below this side, products of cuBLAS are assumed to take a tenth longer than their limit.
LARGE = 4096
# The part of the read of y that shows in y += x Wt.
READ_OF_Y = 0.25
# Rows and columns of a tile of cuBLAS.
PRODUCT_TILE = (128, 256)
# A product is skinny if one side is shorter than two tiles: the other operand is then read for few
# operations. 1024 tokens or more make a base product large, however wide its other sides are.
SKINNY = 512
# Threads of a block of `route`, and expert ids that a thread loads at a time.
ROUTE_THREADS, ROUTE_BATCH = 1024, 4
# `cluster_shrink`: features of a step, steps in flight, and instructions of a step of the warp that
# copies (counted in the SASS of R = 128).
CLUSTER_STEP, CLUSTER_STAGES, CLUSTER_INSTRUCTIONS = 64, 4, 170


class Modelled(NamedTuple):
    """The modelled time of one launch, in microseconds.

    Attributes:
        name: the kernel, or the product as text.
        direction: "forward" or "backward".
        limits: limit -> microseconds.
        start: microseconds beside the largest limit.
        programs: programs of the launch; 0 for a product of ATen.
        blocks: blocks per multiprocessor; 0 for a product of ATen.
        waves: programs over the blocks that run at the same time.
    """

    name: str
    direction: str
    limits: dict[str, float]
    start: float
    programs: int = 0
    blocks: int = 0
    waves: float = 0.0

    @property
    def limit(self) -> str:
        """The name of the largest limit."""
        return max(self.limits, key=self.limits.__getitem__)

    @property
    def us(self) -> float:
        """The modelled time."""
        return self.limits[self.limit] * tail(self.waves) + self.start


class Cell(NamedTuple):
    """A layer on a GPU at T tokens: its launches, those of the frozen linears and of the rival."""

    gpu: str
    layer: str
    tokens: int
    launches: list[Modelled]
    frozen: list[Modelled]
    rival: list[Modelled]

    @property
    def ratio(self) -> float:
        """The time of the layer over the time of the frozen linears."""
        return total(self.launches) / total(self.frozen)

    @property
    def rival_ratio(self) -> float:
        """The time of the rival over the time of the frozen linears."""
        return total(self.rival) / total(self.frozen)


def tail(waves: float) -> float:
    """Return how much longer a launch takes because its last wave is not full.

    Half of the loss counts: programs of the last wave have the bandwidth for themselves.
    """
    return 1.0 if waves <= 1.0 or waves >= 6.0 else 0.5 + 0.5 * math.ceil(waves) / waves


def kernel(launch: Launch, code: MachineCode, gpu: Gpu, direction: str) -> Modelled:
    """Return the modelled time of a recorded launch of a Triton kernel."""
    todo, moved = work(launch), sum(traffic.moved(launch))
    blocks = blocks_per_multiprocessor(code, gpu)
    waves = launch.programs / (gpu.multiprocessors * blocks)
    active = min(1.0, launch.programs / gpu.multiprocessors)
    instructions = code.loop * max(1, todo.steps) + todo.runs * (code.instructions - code.loop)
    warps_per_quarter = launch.programs / gpu.multiprocessors / active * code.threads / 32 / 4
    stages = max(1, launch.tile_config.stages - 1)
    loads = todo.busy * (1 + todo.steps / stages) + todo.dependent_loads
    limits = {
        # In balanced routing `reduce_chunks` moves nothing.
        "memory": min(traffic.compulsory(launch), moved) / (gpu.rates.tbytes * 1e6),
        "L2": moved / (gpu.l2 * active * 1e6),
        "matrix": todo.flops / (gpu.rates.tflops * active * 1e6),
        "issue": todo.busy * instructions * warps_per_quarter / (gpu.clock * 1e3),
        "latency": math.ceil(waves) * loads * LOAD if waves <= 1 else waves * loads * LOAD,
    }
    name = launch.kernel.fn.__name__.removesuffix("_kernel")
    return Modelled(name, direction, limits, START, launch.programs, blocks, waves)


def product(
    gpu: Gpu, name: str, direction: str, sizes: tuple[int, int, int], adds: bool = False
) -> Modelled:
    """Return the modelled time of a product [M, K] [K, N] of ATen, in bf16.

    sizes: M, K, N. adds: the result is added to a matrix in place, most of whose read is hidden.
    """
    M, K, N = sizes
    slower = 1.0 if max(M, N) >= LARGE else 1.1
    result = 2.0 * M * N
    skinny = min(K, N, M) < SKINNY
    # A skinny product reads and writes the matrix that it adds to. Arithmetic hides most of it in a
    # large product.
    once = 2.0 * (M * K + K * N) + result * (2.0 if adds and skinny else 1.0)
    limits = {
        "memory": slower * once / (gpu.rates.tbytes * 1e6),
        "matrix": slower * 2.0 * M * K * N / (gpu.rates.tflops * 1e6),
    }
    if skinny:
        # The matrix rate of large products includes their reads from L2.
        rows, columns = PRODUCT_TILE
        repeated = 2.0 * (M * K * math.ceil(N / columns) + K * N * math.ceil(M / rows))
        repeated += result * (2.0 if adds else 1.0)
        limits["L2"] = slower * repeated / (gpu.l2 * 1e6)
    shown = READ_OF_Y * result / (gpu.rates.tbytes * 1e6) if adds and not skinny else 0.0
    return Modelled(name, direction, limits, START if skinny else LARGE_START + shown)


def pointwise(gpu: Gpu, name: str, direction: str, moved: float, launches: int) -> Modelled:
    """Return the modelled time of launches of ATen or Inductor that move `moved` bytes."""
    limits = {"memory": moved / (gpu.rates.tbytes * 1e6)}
    return Modelled(name, direction, limits, START * launches)


def route(layer: Layer, gpu: Gpu) -> Modelled:
    """Return the modelled time of `route`, from csrc/cuda/route.cuh.

    Every block counts all pairs, and a block of each slot then passes over its tokens twice. LOAD
    is more than a load from L2 takes, and stands for the instructions between the loads too.
    """
    slots = len(layer.out_features) * layer.top_k
    tokens_at_once = ROUTE_BATCH * max(1, ROUTE_THREADS // slots)
    counting = math.ceil(layer.tokens / tokens_at_once) * math.ceil(slots / ROUTE_THREADS)
    sorting = 2 * math.ceil(layer.tokens / (ROUTE_BATCH * ROUTE_THREADS))
    # The ids are read by every block, and order is written.
    moved = 4.0 * layer.tokens * slots
    limits = {
        "memory": 2 * moved / (gpu.rates.tbytes * 1e6),
        "L2": (slots + 3) * moved / (gpu.l2 * min(1.0, (slots + 2) / gpu.multiprocessors) * 1e6),
        "latency": (counting + sorting) * LOAD,
    }
    return Modelled("route", "forward", limits, START)


def cluster_shrink(layer: Layer, gpu: Gpu) -> Modelled:
    """Return the modelled time of `cluster_shrink`, from csrc/cuda/shrink_gate.cuh.

    A multiprocessor runs one block. A cluster asks L2 once for A and the router's weight.
    """
    T, I, K = layer.tokens, layer.in_features, layer.top_k  # noqa: E741
    R, E = sum(layer.ranks), len(layer.ranks)
    blocks, at_once = ceil_div(T, TOKENS * CLUSTER) * CLUSTER, blocks_at_once(gpu.multiprocessors)
    active, waves = min(blocks, at_once) / gpu.multiprocessors, blocks / at_once
    steps, rounds = ceil_div(I, CLUSTER_STEP), max(1.0, waves)
    x, weights, results = 2.0 * T * I, 2.0 * (R + E) * I, T * (4.0 * R + 8.0 * K + 4.0 * E)
    limits = {
        "memory": (x + weights + results) / (gpu.rates.tbytes * 1e6),
        "L2": (x + weights * blocks / CLUSTER + results) / (gpu.l2 * active * 1e6),
        # Experts are padded to a multiple of 8 columns.
        "matrix": 2.0 * T * I * (R + ceil_div(E, 8) * 8) / (gpu.rates.tflops * active * 1e6),
        "issue": rounds * steps * CLUSTER_INSTRUCTIONS / (gpu.clock * 1e3),
        "latency": rounds * (1 + steps / CLUSTER_STAGES) * LOAD,
    }
    return Modelled("cluster_shrink", "forward", limits, START, blocks, 1, waves)


def with_cluster_shrink(launches: list[Modelled], layer: Layer, gpu: Gpu) -> list[Modelled]:
    """Return the launches with `cluster_shrink` in the place of Triton's shrink, if it is taken."""
    if not fills_waves(layer.tokens, gpu.multiprocessors):
        return launches
    triton = ("shrink_gate", "gate_partials")
    others = [launch for launch in launches if launch.name not in triton]
    return [cluster_shrink(layer, gpu), *others]


def total(launches: Iterable[Modelled]) -> float:
    """Return the sum of the modelled times."""
    return sum(launch.us for launch in launches)


def frozen(layer: Layer, gpu: Gpu) -> list[Modelled]:
    """Return the products of the frozen linears: x Wt, and dx = dy W."""
    T, I = layer.tokens, layer.in_features  # noqa: E741
    rows = []
    for i, O in enumerate(layer.out_features):  # noqa: E741
        rows.append(product(gpu, "x Wt", "forward", (T, I, O)))
        rows.append(product(gpu, "dy W", "backward", (T, O, I), adds=i > 0))
    return rows


def other_launches(layer: Layer, gpu: Gpu) -> list[Modelled]:
    """Return the launches of a layer of the package that are not Triton's: `route`, and ATen's."""
    T, I = layer.tokens, layer.in_features  # noqa: E741
    rows, R = [], sum(layer.ranks)
    if layer.grouped:
        rows.append(route(layer, gpu))
    for O in layer.out_features:  # noqa: E741
        if not layer.grouped:
            rows.append(product(gpu, "u Bt", "forward", (T, R, O)))
        rows.append(product(gpu, "y += x Wt", "forward", (T, I, O), adds=True))
        rows.append(product(gpu, "dx += dy W", "backward", (T, O, I), adds=True))
    if layer.grouped and layer.gate == "router" and not layer.renormalize:
        E = len(layer.ranks)
        L = E * len(layer.out_features)
        if not adds_router(T, E, L):
            rows.append(product(gpu, "dx += dlogits Wr", "backward", (T, L, I), adds=True))
    return rows


def compiled_rival(layer: Layer, gpu: Gpu) -> list[Modelled]:
    """Return the launches of a wide LoRA with a mask: six lines of PyTorch under torch.compile."""
    T, I = layer.tokens, layer.in_features  # noqa: E741
    R, E = sum(layer.ranks), len(layer.ranks)
    rows = []
    for O in layer.out_features:  # noqa: E741
        forward = [
            product(gpu, "x At", "forward", (T, I, R)),
            pointwise(gpu, "u = gate h", "forward", 2.0 * 3 * T * R, 1),
            product(gpu, "x Wt", "forward", (T, I, O)),
            product(gpu, "y += u Bt", "forward", (T, R, O), adds=True),
        ]
        backward = [
            product(gpu, "dy B", "backward", (T, O, R)),
            pointwise(gpu, "dh, dgate", "backward", 2.0 * 4 * T * R, 2),
            product(gpu, "dyt u", "backward", (O, T, R)),
            product(gpu, "dht x", "backward", (R, T, I)),
            product(gpu, "dy W", "backward", (T, O, I)),
            product(gpu, "dx += dh A", "backward", (T, R, I), adds=True),
        ]
        if layer.gate == "router":
            forward.append(product(gpu, "x Wrt", "forward", (T, I, E)))
            forward.append(pointwise(gpu, "softmax, top-k, mask", "forward", 12.0 * T * E, 3))
            backward.append(pointwise(gpu, "softmax backward", "backward", 12.0 * T * E, 1))
            backward.append(product(gpu, "dlogitst x", "backward", (E, T, I)))
            backward.append(product(gpu, "dx += dlogits Wr", "backward", (T, E, I), adds=True))
        rows += forward + backward
    return rows
