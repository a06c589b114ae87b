"""Exchanges between the threads of a warp, and their barrier."""

from __future__ import annotations

import numpy as np

from ptx.build import WARP, Builder, Run, implements
from ptx.errors import Unsupported
from ptx.fragments import by_warp
from ptx.program import Instruction

LANES = np.arange(32)
WHOLE_WARP = 0xFFFFFFFF


def _require(batch, register: int, value: int, problem: str) -> None:
    """Raise Unsupported if a register has another value in a thread that runs the instruction."""
    wrong = batch.registers[register] != value
    if batch.mask is not None:
        wrong = wrong & batch.mask
    if wrong.any():
        raise Unsupported(problem)


def _require_whole_warp(batch, mask: int) -> None:
    """Raise if the mask of an instruction does not name all threads of its warp."""
    _require(batch, mask, WHOLE_WARP, "some threads of a warp")


def _of_every_lane(result: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return a result [programs, warps, 1] as a register [programs, threads]."""
    programs, threads = len(result), shape[1]
    return np.broadcast_to(result, (programs, threads // 32, 32)).reshape(programs, threads)


@implements("bar.warp.sync", together=WARP)
def warp_barrier(build: Builder, ins: Instruction) -> Run:
    """The threads of a warp wait for one another, and see what the others wrote before it."""
    (mask,) = ins.operands
    members = build.source(mask, 4)
    if ins.predicate is not None:
        raise Unsupported("a predicate")

    def run(batch) -> None:
        _require_whole_warp(batch, members)
        batch.warp_barrier()

    return run


# Function of the own lane and b; the lane from which d comes may lie outside of the warp.
_SOURCES = {
    "bfly": lambda lane, b: lane ^ b % 32,
    "idx": lambda lane, b: b % 32 + 0 * lane,
    "up": lambda lane, b: lane - b,
}


@implements("shfl.sync.{bfly,idx,up}.b32", together=WARP)
def shuffle(build: Builder, ins: Instruction) -> Run:
    """d = a of lane (own lane xor b), of lane b, or of lane (own lane - b).

    Outside of the warp d = a of the own lane, and the second result, a predicate, is false.
    """
    targets, a, b, clamp, mask = ins.operands
    if ins.predicate is not None:
        raise Unsupported("a predicate")
    sources, last = _SOURCES[ins.parts[2]], 0 if ins.parts[2] == "up" else 31
    members, limit = build.source(mask, 4), build.source(clamp, 4)
    target, *predicate = targets.split("|")
    d, inside = build.target(target, 4), [build.target(name, 0) for name in predicate]
    value, lane = build.source(a, 4), build.source(b, 4)

    def run(batch) -> None:
        _require_whole_warp(batch, members)
        _require(batch, limit, last, "a part of a warp")
        r, warps = batch.registers, batch.shape[1] // 32
        source = sources(LANES, by_warp(r[lane], warps).astype(np.int64))
        valid = source >= 0
        values = by_warp(r[value], warps)
        shape = (max(len(values), len(source)), warps, 32)
        result = np.take_along_axis(
            np.broadcast_to(values, shape),
            np.broadcast_to(np.where(valid, source, LANES), shape),
            axis=2,
        )
        r[d] = result.reshape(shape[0], batch.shape[1])
        for p in inside:
            r[p] = np.broadcast_to(valid, shape).reshape(shape[0], batch.shape[1])

    return run


@implements("vote.sync.ballot.b32", together=WARP)
def ballot(build: Builder, ins: Instruction) -> Run:
    """Bit l of d = the predicate a of lane l."""
    target, a, mask = ins.operands
    if ins.predicate is not None:
        raise Unsupported("a predicate")
    members, d, value = build.source(mask, 4), build.target(target, 4), build.source(a, 0)

    def run(batch) -> None:
        _require_whole_warp(batch, members)
        votes = batch.registers[value]
        votes = np.broadcast_to(votes, (len(votes), batch.shape[1])).reshape(len(votes), -1, 32)
        bits = np.where(votes, np.uint32(1) << LANES.astype(np.uint32), np.uint32(0))
        result = np.bitwise_or.reduce(bits, axis=2, keepdims=True)
        batch.registers[d] = _of_every_lane(result, batch.shape)

    return run


@implements("redux.sync.{min,max}.{s32,u32}", together=WARP)
def reduce(build: Builder, ins: Instruction) -> Run:
    """d = the smallest or largest a of the warp."""
    target, a, mask = ins.operands
    members = build.source(mask, 4)
    if ins.predicate is not None:
        raise Unsupported("a predicate")
    d, value = build.target(target, 4), build.source(a, 4)
    kind = np.int32 if ins.parts[3] == "s32" else np.uint32
    function = np.min if ins.parts[2] == "min" else np.max

    def run(batch) -> None:
        _require_whole_warp(batch, members)
        values = by_warp(batch.registers[value], batch.shape[1] // 32).view(kind)
        result = function(values, axis=2, keepdims=True).view(np.uint32)
        batch.registers[d] = _of_every_lane(result, batch.shape)

    return run
