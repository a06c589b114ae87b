"""Compile csrc/cuda/shrink_gate.cuh with nvcc, and execute its PTX on a CPU (`tests/ptx`)."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Sequence
from functools import cache, lru_cache

import numpy as np
import torch
from torch import Tensor

from moelora_kernels.types import Dropout, Gate, Mixture, RouterTensors
from ptx.bulk import tensor_map
from ptx.execution import Kernel
from ptx.global_memory import GlobalMemory
from ptx.program import parse
from support.cases import Case
from support.nvcc import compile_source

HEADERS = ("shrink_gate.cuh", "hopper.cuh")
# (columns of rank space, experts rounded up): the kernels.
SHAPES = ((128, 8), (128, 16), (64, 8), (64, 16))
_MAPS = ", ".join(["const __grid_constant__ CUtensorMap"] * 3)
KERNELS = '#include "shrink_gate.cuh"\n' + "".join(
    f"template __global__ void moelora::shrink_gate_kernel<{R}, {E}>({_MAPS}, "
    "const __grid_constant__ moelora::ShrinkArguments);\n"
    for R, E in SHAPES
)
TOKENS, STEP, CLUSTER, THREADS, STAGES = 64, 64, 4, 128, 6
MOST_EXPERTS = 16
# In memory that the kernel writes.
GARBAGE = 0x5A
# Ranks whose sum is the number in the name.
R128, R64 = (16,) * 8, (8,) * 8
CASES = {
    # Less steps than stages; one token.
    "short": Case(T=1, I=192, ranks=R128),
    # A tile that ends inside, blocks without tokens; a step that ends inside; more steps than
    # stages, so that tiles are filled again, some of them twice.
    "tails": Case(T=300, I=1000, ranks=R128, router_bias=True),
    "long": Case(T=70, I=1472, ranks=R64, renormalize=False, temperature=0.7),
    "all_experts": Case(T=64, I=448, ranks=(32, 32), K=2),
    "one_of_sixteen": Case(T=65, I=512, ranks=(8,) * 16, K=1),
    "mixed_ranks": Case(T=130, I=512, ranks=(3, 40, 1, 20), K=3, router_bias=True),
    "nine_experts": Case(T=100, I=640, ranks=(16,) * 7 + (8, 8), K=4, renormalize=False),
    "two_clusters": Case(T=513, I=832, ranks=R128),
}


@cache
def compile_ptx(changes: tuple[tuple[str, str], ...] = ()) -> str:
    """Return the PTX of all kernels. changes: pairs of a header's name and another text of it."""
    headers = {**dict.fromkeys(HEADERS), **dict(changes)}
    ptx, _ = compile_source(KERNELS, "-ptx", "-arch=compute_90a", headers=headers)
    return ptx.decode()


@lru_cache(maxsize=8)
def kernel(ptx: str, R: int, E: int) -> Kernel:
    """Return one of the kernels, ready to run."""
    (name,) = re.findall(rf"\.entry\s+(\w*shrink_gate_kernelILi{R}ELi{E}E\w*)", ptx)
    stage = (TOKENS + R + E) * 128
    shared = STAGES * stage + 2 * STAGES * 8 + TOKENS * E * 4 + R * 4
    return Kernel(parse(ptx, name), THREADS, shared)


def execute(
    x: Tensor,
    lora_a: Sequence[Tensor],
    router: RouterTensors,
    gate: Gate,
    mixture: Mixture,
    dropout: Dropout,
    *,
    late: bool = False,
    cut: bool = False,
    changes: tuple[tuple[str, str], ...] = (),
    change: Callable[[str], str] = lambda ptx: ptx,
) -> tuple[Tensor, ...]:
    """Return what `shrink_gate` returns, launched like csrc/cuda/shrink_gate.cu.

    late: copies and products happen when a thread has to wait for them. cut: sums of products are
    cut. changes: see `compile_ptx`. change: PTX -> PTX; both plant faults.
    """
    (a,), (weight,) = lora_a, router.weight
    (T, I), R, E = x.shape, a.shape[0], len(mixture.ranks)  # noqa: E741
    K, padded = mixture.router_top_k, -(-E // 8) * 8
    bias = router.bias[0].float() if router.bias else None
    inputs = [_bytes(x), _bytes(a), _bytes(weight)]
    if bias is not None:
        inputs.append(_bytes(bias))
    sizes = [2 * T * R, 2 * T * R, 4 * T * K, 4 * T * K if K < E else 0, 4 * T * E]
    outputs = [np.full(size, GARBAGE, np.uint8) for size in sizes]
    memory = GlobalMemory([(array, 0) for array in (*inputs, *outputs)])
    addresses = [memory.address(i) for i in range(len(inputs) + len(outputs))]
    h, u, weights, experts, logits = addresses[len(inputs) :]
    arguments = struct.pack(
        "<q4if16f16i4x6Q",
        T, -(-I // STEP), E, K, mixture.renormalize, mixture.temperature,
        *_padded(mixture.scaling), *_padded(np.cumsum(mixture.ranks).tolist()),
        0 if bias is None else addresses[3], h, u, weights, experts if K < E else 0, logits,
    )  # fmt: skip
    maps = [
        tensor_map(address, rows, I, 2 * I, box, STEP, 2)
        for address, rows, box in zip(
            addresses, (T, R, E), (TOKENS, R // CLUSTER, padded), strict=False
        )
    ]
    blocks = -(-T // (TOKENS * CLUSTER)) * CLUSTER
    ready = kernel(change(compile_ptx(changes)), R, padded)
    ready.launch(blocks, [*maps, arguments], memory, late, cut, by_thread=True)
    shapes = [(T, R), (T, R), (T, K), (T, K) if K < E else (0,), (T, E)]
    dtypes = [x.dtype, x.dtype, torch.float32, torch.int32, torch.float32]
    return tuple(
        torch.frombuffer(bytearray(memory.contents(len(inputs) + i)), dtype=dtype).view(shape)
        if 0 not in shape
        else torch.empty(shape, dtype=dtype)
        for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True))
    )


def _padded(values: Sequence[float]) -> list[float]:
    return [*values, *[0] * (MOST_EXPERTS - len(values))]


def _bytes(tensor: Tensor) -> np.ndarray:
    return tensor.contiguous().view(torch.uint8).numpy().reshape(-1)
