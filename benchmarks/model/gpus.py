"""Data-sheet sizes of GPUs, and the rates that they are assumed to reach: nothing was measured."""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.model.machine_code import MachineCode
from benchmarks.model.roofline import ASSUMED, Rates


class Gpu(NamedTuple):
    """A GPU of the model.

    Attributes:
        rates: bf16 products [TFLOP/s] and device memory [TB/s], assumed.
        architecture: the architecture that kernels are compiled for.
        multiprocessors: their number.
        l2: bytes that the L2 cache hands to all multiprocessors [TB/s], assumed.
        clock: cycles [GHz].
        shared: bytes of shared memory of a multiprocessor; every block takes 1 KiB beside its own.
        threads: threads of a multiprocessor at most.
        blocks: blocks of a multiprocessor at most.
    """

    rates: Rates
    architecture: str
    multiprocessors: int
    l2: float
    clock: float
    shared: int
    threads: int
    blocks: int


# The L2 rates are 45 bytes for each multiprocessor and nanosecond on the H100 and the H200, 37 on
# the A100, 35 on the L40S and 61 on the B200.
GPUS = {
    "A100": Gpu(ASSUMED["NVIDIA A100-SXM4-80GB"], "sm_80", 108, 4.0, 1.41, 164 << 10, 2048, 32),
    "L40S": Gpu(ASSUMED["NVIDIA L40S"], "sm_89", 142, 5.0, 2.3, 100 << 10, 1536, 24),
    "H100": Gpu(ASSUMED["NVIDIA H100 80GB HBM3"], "sm_90", 132, 6.0, 1.75, 228 << 10, 2048, 32),
    "H200": Gpu(ASSUMED["NVIDIA H200"], "sm_90", 132, 6.0, 1.75, 228 << 10, 2048, 32),
    "B200": Gpu(ASSUMED["NVIDIA B200"], "sm_100", 148, 9.0, 1.85, 228 << 10, 2048, 32),
}

# Registers of a multiprocessor, and how many a warp gets at a time.
REGISTERS, REGISTER_UNIT = 65536, 256


def blocks_per_multiprocessor(code: MachineCode, gpu: Gpu) -> int:
    """Return how many blocks of a kernel run on one multiprocessor at the same time.

    Registers, shared memory, threads or the number of blocks is the limit.
    """
    warps = code.threads // 32
    registers_of_warp = -(-code.registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
    return min(
        REGISTERS // registers_of_warp // warps,
        gpu.shared // (code.shared + 1024),
        gpu.threads // code.threads,
        gpu.blocks,
    )
