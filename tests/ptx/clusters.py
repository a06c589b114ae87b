"""Clusters of programs: mbarriers, and the barrier and the addresses of a cluster."""

from __future__ import annotations

import numpy as np

from ptx.build import PROGRAM, Builder, Run, implements
from ptx.errors import PtxError, Unsupported
from ptx.mbarriers import RANK_BIT
from ptx.program import Instruction
from ptx.units import written

# Instructions that need `Batch.mbarriers`.
OPCODES = ("mbarrier.", "barrier.cluster.", "cp.async.bulk.", "mapa.")


def threads_of(batch, guard) -> tuple[np.ndarray | None, np.ndarray, np.ndarray]:
    """Return (active, rows, threads) of the threads that run an instruction; the last two [n]."""
    active = batch.active(guard)
    rows, threads = np.nonzero(np.broadcast_to(True if active is None else active, batch.shape))
    return active, rows, threads


def values_of(batch, register: int, rows: np.ndarray, threads: np.ndarray) -> np.ndarray:
    """Return a register of these threads, [n] int64."""
    value = np.broadcast_to(batch.registers[register], batch.shape)[rows, threads]
    return value.astype(np.int64)


@implements("mbarrier.init.shared::cta.b64")
def initialise(build: Builder, ins: Instruction) -> Run:
    """Make an mbarrier whose phases count so many arrivals."""
    (base, offset), count = build.address(ins.operands[0]), build.source(ins.operands[1], 4)
    guard = build.predicate(ins)

    def run(batch) -> None:
        _, rows, threads = threads_of(batch, guard)
        address = values_of(batch, base, rows, threads) + offset
        counts = values_of(batch, count, rows, threads)
        batch.mbarriers.initialise(rows, threads // 32, address, counts)

    return run


@implements("fence.mbarrier_init.release.cluster")
def fence(build: Builder, ins: Instruction) -> Run:
    """Order the initialisations of a thread before what other programs and copies do."""
    guard = build.predicate(ins)

    def run(batch) -> None:
        _, rows, threads = threads_of(batch, guard)
        batch.mbarriers.fence(rows, threads // 32)

    return run


@implements(
    "mbarrier.arrive{,.release.cta}.shared::cta.b64",
    "mbarrier.arrive{,.release.cluster}.shared::cluster.b64",
    "mbarrier.arrive.release.cluster.shared::cta.b64",
    "mbarrier.arrive.expect_tx{,.release.cta}.shared::cta.b64",
)
def arrive(build: Builder, ins: Instruction) -> Run:
    """Arrive once; expect_tx: the phase at hand then waits for so many more bytes of copies."""
    state, at, *count = ins.operands
    if state != "_":
        raise Unsupported("the state of an mbarrier")
    expects = "expect_tx" in ins.parts
    if len(count) != expects:
        raise Unsupported("several arrivals")
    base, offset = build.address(at)
    size = build.source(count[0], 4) if expects else None
    guard, of_cluster = build.predicate(ins), "cluster" in ins.parts

    def run(batch) -> None:
        _, rows, threads = threads_of(batch, guard)
        address = values_of(batch, base, rows, threads) + offset
        if expects:
            counts = values_of(batch, size, rows, threads)
            batch.mbarriers.expect(rows, threads // 32, address, counts)
        batch.mbarriers.arrive(rows, threads // 32, address, of_cluster)
        batch.blocked.clear()

    return run


@implements("mbarrier.try_wait.parity{,.acquire.cta,.acquire.cluster}.shared::cta.b64")
def test(build: Builder, ins: Instruction) -> Run:
    """p = whether the phase of a parity has ended. Threads that find it false should try again."""
    target, at, parity = ins.operands[:3]
    p, (base, offset), phase = build.target(target, 0), build.address(at), build.source(parity, 4)
    guard, of_cluster = build.predicate(ins), "cluster" in ins.parts

    def run(batch) -> None:
        active, rows, threads = threads_of(batch, guard)
        address = values_of(batch, base, rows, threads) + offset
        parities = values_of(batch, phase, rows, threads)
        if (parities > 1).any():
            raise PtxError("a parity that is neither 0 nor 1")
        result = batch.mbarriers.test(rows, threads, address, parities, of_cluster)
        batch.stalled = not result.all()
        result = result.reshape(batch.shape) if active is None else result
        batch.registers[p] = written(batch.registers[p], result, active, batch.shape)

    return run


@implements("mapa.shared::cluster.u32")
def map_address(build: Builder, ins: Instruction) -> Run:
    """d = the address, in the cluster, of the byte of rank b that has address a in a program."""
    target, a, b = ins.operands
    d, address, rank = build.target(target, 4), build.source(a, 4), build.source(b, 4)
    cluster, guard = build.program.cluster, build.predicate(ins)

    def run(batch) -> None:
        r = batch.registers
        _, rows, threads = threads_of(batch, guard)
        if (values_of(batch, rank, rows, threads) >= cluster).any():
            raise PtxError("a rank that the cluster does not have")
        r[d] = ((r[rank] + np.uint32(1)) << np.uint32(RANK_BIT)) | r[address]

    return build.guarded(ins, run, [d])


@implements("barrier.cluster.arrive{,.release}.aligned", together=PROGRAM)
def arrive_at_cluster(build: Builder, ins: Instruction) -> Run:
    """Does nothing by itself, because the wait must follow at once."""
    following = build.program.instructions[ins.number + 1 : ins.number + 2]
    if ins.predicate or not following or not following[0].opcode.startswith("barrier.cluster.wait"):
        raise Unsupported("an arrival at the barrier of a cluster without a wait behind it")
    return lambda batch: None


@implements("barrier.cluster.wait{,.acquire}.aligned", together=PROGRAM)
def wait_for_cluster(build: Builder, ins: Instruction) -> Run:
    """All threads of a cluster wait for one another."""
    return lambda batch: batch.barrier(of_cluster=True)
