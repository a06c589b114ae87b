"""mma.sync, ldmatrix and stmatrix: the matrices of a warp."""

from __future__ import annotations

import numpy as np

from ptx import fragments
from ptx.build import PROGRAM, Builder, Run, implements
from ptx.errors import Unsupported
from ptx.program import Instruction

# Terms that an mma adds at a time, and bits that it keeps beside 24, on A100 (`truncated_sum`).
SUMS = {"bf16": (8, 1), "f16": (8, 1), "tf32": (4, 1)}


@implements(
    "mma.sync.aligned.m16n8k16.row.col.f32.{bf16.bf16,f16.f16}.f32",
    "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32",
    together=PROGRAM,
)
def mma(build: Builder, ins: Instruction) -> Run:
    """D = A B + C of every warp: A [16, K], B [K, 8], C and D [16, 8]."""
    kind = ins.parts[-2]
    size, K = fragments.INPUTS[kind]
    d = [build.target(name, 4) for name in build.vector(ins.operands[0])]
    a, b, c = (
        [build.source(name, 4) for name in build.vector(operand)] for operand in ins.operands[1:]
    )
    layouts = fragments.layout("A", size), fragments.layout("B", size), fragments.layout("C", 4)

    def run(batch) -> None:
        r, shape = batch.registers, batch.shape
        lead = shape[0], shape[1] // 32
        left, right = (
            fragments.numbers(fragments.gather([r[i] for i in each], shape, table), kind)
            for each, table in ((a, layouts[0]), (b, layouts[1]))
        )
        start = fragments.gather([r[i] for i in c], shape, layouts[2]).view(np.float32)
        result = fragments.multiply(
            left.reshape(*lead, 16, K),
            right.reshape(*lead, K, 8),
            start.reshape(*lead, 16, 8),
            SUMS[kind] if batch.cut else None,
        )
        bits = result.reshape(*lead, 128).view(np.uint32)
        for i, value in zip(d, fragments.scatter(bits, layouts[2]), strict=True):
            r[i] = value

    return build.guarded(ins, run, d)


def _rows(batch, at: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the addresses of rows, and which threads give one: lane l that of row l % 8 of l / 8.

    Lanes from 8 count on give none.
    """
    at = np.broadcast_to(at, (at.shape[0], batch.shape[1]))
    active = (np.arange(batch.shape[1]) % 32 < 8 * count)[None, :]
    return at, None if count == 4 else active


@implements("ldmatrix.sync.aligned.m8n8.{x1,x2,x4}{,.trans}.shared.b16", together=PROGRAM)
def ldmatrix(build: Builder, ins: Instruction) -> Run:
    """Load 8 x 8 matrices of 16 bits: lane l gets elements (g, 2t), (g, 2t + 1) of each.

    With .trans it gets (2t, g), (2t + 1, g).
    """
    d = [build.target(name, 4) for name in build.vector(ins.operands[0])]
    base, offset = build.address(ins.operands[1])
    count, transposed = len(d), ins.parts[5] == "trans"
    if f"x{count}" != ins.parts[4]:
        raise Unsupported(f"{count} registers")
    g, t = fragments.G, fragments.T
    low, high = (8 * g + 2 * t, 8 * g + 2 * t + 1)
    if transposed:
        low, high = 16 * t + g, 16 * t + 8 + g

    def run(batch) -> None:
        at, active = _rows(batch, batch.registers[base].astype(np.int64) + offset, count)
        rows = batch.shared.load(at, 16, active)
        values = np.ascontiguousarray(rows).view(np.uint16)
        values = values.reshape(*batch.shape[:1], batch.shape[1] // 32, count, 64)
        pairs = values[..., low].astype(np.uint32)
        pairs |= values[..., high].astype(np.uint32) << np.uint32(16)
        for k, i in enumerate(d):
            batch.registers[i] = np.ascontiguousarray(pairs[:, :, k]).reshape(batch.shape)

    return build.guarded(ins, run, d)


@implements("stmatrix.sync.aligned.m8n8.{x1,x2,x4}{,.trans}.shared.b16", together=PROGRAM)
def stmatrix(build: Builder, ins: Instruction) -> Run:
    """Store 8 x 8 matrices of 16 bits; the inverse of ldmatrix."""
    base, offset = build.address(ins.operands[0])
    sources = [build.source(name, 4) for name in build.vector(ins.operands[1])]
    count, transposed = len(sources), ins.parts[5] == "trans"
    if f"x{count}" != ins.parts[4] or ins.predicate is not None:
        raise Unsupported(f"{count} registers, or a predicate")
    g, t = fragments.G, fragments.T
    low, high = (8 * g + 2 * t, 8 * g + 2 * t + 1)
    if transposed:
        low, high = 16 * t + g, 16 * t + 8 + g

    def run(batch) -> None:
        r, warps = batch.registers, batch.shape[1] // 32
        at, active = _rows(batch, r[base].astype(np.int64) + offset, count)
        values = np.empty((batch.shape[0], warps, count, 64), np.uint16)
        for k, i in enumerate(sources):
            value = fragments.by_warp(r[i], warps)
            values[:, :, k, low] = value.astype(np.uint16)
            values[:, :, k, high] = (value >> np.uint32(16)).astype(np.uint16)
        rows = values.reshape(-1, 8).view(np.complex128)[:, 0]
        if active is None:
            rows = rows.reshape(batch.shape)
        batch.shared.store(at, rows, active)

    return run
