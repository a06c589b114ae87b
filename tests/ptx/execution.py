"""Run the programs of a launch in step: batches, branches, and threads that part."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field

import numpy as np

from ptx import (  # noqa: F401
    arithmetic,
    atomics,
    bulk,
    clusters,
    control,
    copies,
    loads,
    mma,
    moves,
    warp,
    wgmma,
)
from ptx.build import BRANCHES, PROGRAM, WARP, Builder, Step
from ptx.errors import PtxError, RaceError, Unsupported
from ptx.global_memory import BASE, GlobalMemory
from ptx.mbarriers import Mbarriers
from ptx.ordering import Ordering
from ptx.program import Instruction, Program
from ptx.shared_memory import SharedMemory

# Threads that run in step. More fill the caches; fewer waste the time of NumPy's calls.
THREADS = 1 << 13
# Instructions of one batch before it counts as one that does not end.
MOST_INSTRUCTIONS = 3_000_000


@dataclass
class Block:
    """Instructions that run one after the other, and the branch behind them."""

    steps: list[Step]
    # Predicate of the branch (register, negated); None if there is none.
    guard: tuple[int, bool] | None
    # Where it goes if it is taken.
    target: int


@dataclass
class Batch:
    """Programs that run in step.

    registers       by index: [1 or programs, 1 or threads] raw bits
    programs        [programs, 1] uint32, their numbers
    parameters      uint8, the space of parameters
    ordering        checks the order of all accesses by thread; None: not checked
    late            cp.async and wgmma happen at their wait, not when they are issued
    cut             sums of tensor cores are cut, not rounded
    block           the block to run
    mask            the threads that run it; None: all
    waiting         block -> threads that wait to run it, for threads that have parted
    fenced          the registers at the last wgmma.fence; None before the first
    of_products     the registers that a wgmma wrote since
    pending         the registers that a wgmma writes whose wait has not come
    cluster         programs of a cluster
    mbarriers       None if the kernel has none
    stalled         whether threads have found that the phase of an mbarrier has not ended, since
                    the last branch
    blocked         the blocks whose threads try that again, and will not find another thing
    """

    registers: list[np.ndarray]
    programs: np.ndarray
    threads: int
    parameters: np.ndarray
    memory: GlobalMemory
    shared: SharedMemory
    late: bool
    cut: bool
    ordering: Ordering | None = None
    block: int = 0
    mask: np.ndarray | None = None
    waiting: dict[int, np.ndarray] = field(default_factory=dict)
    copies: list = field(default_factory=list)
    copy_groups: list = field(default_factory=list)
    products: list = field(default_factory=list)
    product_groups: list = field(default_factory=list)
    fenced: list[np.ndarray] | None = None
    of_products: set[int] = field(default_factory=set)
    pending: frozenset[int] = frozenset()
    cluster: int = 1
    mbarriers: Mbarriers | None = None
    stalled: bool = False
    blocked: set[int] = field(default_factory=set)

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.programs), self.threads

    def active(self, guard: tuple[int, bool] | None) -> np.ndarray | None:
        """Return which threads run an instruction, [1 or programs, 1 or threads]; None: all."""
        if guard is None:
            return self.mask
        index, negated = guard
        value = ~self.registers[index] if negated else self.registers[index]
        if self.mask is not None:
            return value & self.mask
        return None if value.all() else value

    def _addresses(self, address: np.ndarray, active: np.ndarray | None):
        if active is None:
            return np.broadcast_to(address, self.shape), self.programs
        active = np.broadcast_to(active, self.shape)
        programs = np.broadcast_to(self.programs, self.shape)[active]
        return np.broadcast_to(address, self.shape)[active], programs

    def load_global(self, address: np.ndarray, size: int, active: np.ndarray | None) -> np.ndarray:
        """Return the units that active threads load: [programs, threads], or [n] if not all do."""
        address, programs = self._addresses(address, active)
        return self.memory.load(address, size, programs)

    def store_global(
        self, address: np.ndarray, data: np.ndarray, active: np.ndarray | None
    ) -> None:
        """Store the units of active threads: [programs, threads], or [n] if not all do."""
        address, programs = self._addresses(address, active)
        self.memory.store(address, data, programs)

    def add_global(
        self, address: np.ndarray, data: np.ndarray, active: np.ndarray | None
    ) -> np.ndarray:
        """Add to the units of active threads, and return what each met: shaped like a load."""
        address, programs = self._addresses(address, active)
        return self.memory.add(address, data, programs)

    def check_order(
        self, kind: str, space: str, at: np.ndarray, size: int, active: np.ndarray | None
    ) -> None:
        """Raise RaceError if no barrier parts an access from one that it conflicts with."""
        if self.ordering is None:
            return
        active = np.broadcast_to(True if active is None else active, self.shape)
        rows, threads = np.nonzero(active)
        at = np.broadcast_to(at, self.shape)[active] - (BASE if space == "global" else 0)
        numbers = self.programs[rows, 0].astype(np.int64)
        self.ordering.access(kind, space, at, size, numbers, threads)

    def barrier(self, of_cluster: bool = False) -> None:
        """All threads of every program, or of every cluster, wait for one another."""
        self.shared.barrier()
        if self.mbarriers is not None:
            self.mbarriers.barrier(of_cluster)
        if self.ordering is not None:
            self.ordering.barrier(self.programs)

    def warp_barrier(self) -> None:
        """The threads of every warp that runs wait for one another."""
        if self.ordering is not None:
            runs = np.broadcast_to(True if self.mask is None else self.mask, self.shape)
            rows, warps = np.nonzero(runs[:, ::32])
            self.ordering.warp_barrier(self.programs[rows, 0], warps)

    def select(self, rows: np.ndarray) -> Batch:
        """Return a batch of some of the programs: whole clusters."""
        part, whole = copy.copy(self), len(self.programs)
        part.blocked = set(self.blocked)
        if len(rows) == whole:
            part.waiting = dict(self.waiting)
            return part

        def cut(value):
            return value if value is None or len(value) == 1 else value[rows]

        part.registers = [cut(value) for value in self.registers]
        # Which of them were written since is not known any more.
        part.fenced = None if self.fenced is None else part.registers.copy()
        part.programs = self.programs[rows]
        part.shared = self.shared.select(rows)
        if self.mbarriers is not None:
            part.mbarriers = self.mbarriers.select(rows, part.shared)
        part.mask = cut(self.mask)
        part.waiting = {block: mask[rows] for block, mask in self.waiting.items()}
        part.copies = [each.select(rows, self.shape) for each in self.copies]
        part.copy_groups = [
            [each.select(rows, self.shape) for each in group] for group in self.copy_groups
        ]
        part.products = [each.select(rows) for each in self.products]
        part.product_groups = [
            [each.select(rows) for each in group] for group in self.product_groups
        ]
        return part

    def go(self, block: int, mask: np.ndarray | None) -> None:
        """Send the threads that run to a block. Of threads that have parted the last ones go on."""
        if mask is not None:
            before = self.waiting.get(block)
            self.waiting[block] = mask if before is None else before | mask
            if self.stalled and block <= self.block:
                self.blocked.add(block)

    def end(self) -> None:
        """Threads have come to the end of the kernel. Raise PtxError if others never will."""
        if self.waiting:
            raise PtxError("threads wait for a phase of an mbarrier that does not end")
        self.mbarriers.end()

    def require_progress(self, block: int) -> None:
        """Raise PtxError if all threads go back to a block to wait for what none of them does."""
        if self.stalled and block <= self.block:
            raise PtxError("threads wait for a phase of an mbarrier that does not end")

    def resume(self) -> None:
        """Run the threads that are furthest behind, of those that need not wait for others."""
        ready = self.waiting.keys() - self.blocked
        if not ready:
            raise PtxError("threads wait for a phase of an mbarrier that does not end")
        self.stalled = False
        self.block = min(ready)
        mask = self.waiting.pop(self.block)
        self.mask = None if not self.waiting and mask.all() else mask


class Kernel:
    """A kernel that is ready to run."""

    def __init__(self, program: Program, threads: int, shared: int) -> None:
        """shared: the bytes of shared memory that the launch adds to those of the PTX."""
        self.program, self.threads = program, threads
        self.shared = program.shared + shared
        build = Builder(program, threads)
        self.blocks = _blocks(program, build)
        self.initial = build.initial
        self.grid, self.program_id = build.index["%nctaid.x"], build.index["%ctaid.x"]
        self.rank = build.index["%cluster_ctarank"]
        self.has_mbarriers = any(
            each.opcode.startswith(clusters.OPCODES) for each in program.instructions
        )
        # Instructions that all programs ran so far, and those of them that NumPy ran at once.
        self.executed = self.vectors = 0

    def launch(
        self,
        programs: int,
        parameters: list[int | bytes],
        memory: GlobalMemory,
        late: bool = False,
        cut: bool = False,
        by_thread: bool = False,
    ) -> None:
        """Run all programs.

        parameters: see `Program.pack`. by_thread: a program needs barriers between the accesses of
        any two threads (`ordering.py`), not only of two warps.
        """
        space, ordering = self.program.pack(parameters), None
        if by_thread:
            ordering = Ordering(programs, self.threads, self.shared, len(memory.bytes))
        cluster = self.program.cluster
        if programs % cluster:
            raise PtxError(f"{programs} programs in clusters of {cluster}")
        at_once = max(1, THREADS // self.threads // cluster) * cluster
        for first in range(0, programs, at_once):
            numbers = np.arange(first, min(first + at_once, programs), dtype=np.uint32)[:, None]
            registers = list(self.initial)
            registers[self.grid] = np.full((1, 1), programs, np.uint32)
            registers[self.program_id] = numbers
            if cluster > 1:
                registers[self.rank] = numbers % np.uint32(cluster)
            shared = SharedMemory(len(numbers), self.shared, self.threads)
            batch = Batch(
                registers, numbers, self.threads, space, memory, shared, late, cut, ordering,
                cluster=cluster,
            )  # fmt: skip
            if self.has_mbarriers:
                batch.mbarriers = Mbarriers(shared, self.threads, cluster, late)
            with np.errstate(all="ignore"):
                self._run(batch)
        memory.finish()

    def _run(self, batch: Batch) -> None:
        batches, count = [batch], 0
        while batches:
            batch = batches.pop()
            while batch is not None and batch.block < len(self.blocks):
                block = self.blocks[batch.block]
                count += len(block.steps) + 1
                if count > MOST_INSTRUCTIONS:
                    raise PtxError(f"{self.program.name} does not end")
                self._run_steps(block.steps, batch)
                self.executed += (len(block.steps) + 1) * len(batch.programs)
                batch = self._branch(block, batch, batches)
            if batch is not None and batch.mbarriers is not None:
                batch.end()
        self.vectors += count

    def _run_steps(self, steps: list[Step], batch: Batch) -> None:
        step = None
        try:
            if batch.mask is None:
                for step in steps:
                    if batch.pending and not batch.pending.isdisjoint(step.reads):
                        raise RaceError("reads a register that a pending wgmma writes")
                    step.run(batch)
            else:
                for step in steps:
                    _run_masked(step, batch)
        except PtxError as error:
            raise type(error)(f"{self.program.name} {step.instruction}: {error}") from None

    def _branch(self, block: Block, batch: Batch, batches: list[Batch]) -> Batch | None:
        """Return the batch that goes on, if one does; add others to `batches`."""
        following = batch.block + 1
        if block.guard is None:
            taken = np.ones((1, 1), bool)
        else:
            index, negated = block.guard
            taken = ~batch.registers[index] if negated else batch.registers[index]
        if batch.mask is None:
            if taken.all():
                batch.require_progress(block.target)
                batch.stalled, batch.block = False, block.target
                return batch
            if not taken.any():
                batch.stalled, batch.block = False, following
                return batch
        mask = np.ones(batch.shape, bool) if batch.mask is None else batch.mask
        yes, no = taken & mask, ~taken & mask
        # Programs all of whose threads go the same way need not wait for the others, unless they
        # are of one cluster.
        ways = yes.any(axis=1) + 2 * no.any(axis=1)
        if batch.cluster > 1:
            of_clusters = np.bitwise_or.reduce(ways.reshape(-1, batch.cluster), axis=1)
            ways = of_clusters.repeat(batch.cluster)
        for way in np.unique(ways):
            rows = np.flatnonzero(ways == way)
            part = batch.select(rows)
            if way == 3 or part.mask is not None:
                if way & 1:
                    part.go(block.target, yes[rows])
                if way & 2:
                    part.go(following, no[rows])
                part.resume()
            else:
                goes_to = block.target if way == 1 else following
                part.require_progress(goes_to)
                part.stalled, part.block = False, goes_to
            batches.append(part)
        return None


def _run_masked(step: Step, batch: Batch) -> None:
    """Run a step for some threads; registers of the others keep their values."""
    if step.together == PROGRAM or (step.together == WARP and not _whole_warps(batch.mask)):
        raise PtxError("threads that must run it together have parted")
    before = [batch.registers[i] for i in step.writes]
    step.run(batch)
    for i, value in zip(step.writes, before, strict=True):
        batch.registers[i] = np.where(batch.mask, batch.registers[i], value)


def _whole_warps(mask: np.ndarray) -> bool:
    """Return whether the threads of a mask [programs, threads] make up whole warps."""
    warps = mask.reshape(len(mask), -1, 32)
    return bool((warps == warps[..., :1]).all())


def _blocks(program: Program, build: Builder) -> list[Block]:
    """Cut a kernel into blocks, behind every branch and before every target of one."""
    instructions = program.instructions
    starts = {0}
    for ins in instructions:
        if ins.opcode in BRANCHES:
            starts.add(ins.number + 1)
            if ins.opcode != "ret":
                starts.add(_target(program, ins))
    starts.discard(len(instructions))
    order = sorted(starts)
    numbers = {start: number for number, start in enumerate(order)}
    steps = build.steps()
    blocks = []
    for number, start in enumerate(order):
        end = order[number + 1] if number + 1 < len(order) else len(instructions)
        last = instructions[end - 1]
        if last.opcode not in BRANCHES:
            blocks.append(Block(steps[start:end], None, number + 1))
            continue
        target = len(order)
        if last.opcode != "ret":
            target = numbers.get(_target(program, last), len(order))
        blocks.append(Block(steps[start : end - 1], build.predicate(last), target))
    return blocks


def _target(program: Program, ins: Instruction) -> int:
    (label,) = ins.operands
    if label not in program.labels:
        raise Unsupported(f"{program.name}: {ins}: no such label")
    return program.labels[label]
