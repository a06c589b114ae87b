"""cp.async: copies from global to shared memory that end when a thread waits for them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ptx.build import PROGRAM, Builder, Run, implements
from ptx.errors import Unsupported
from ptx.program import Instruction
from ptx.units import unit


class Copy(NamedTuple):
    """A cp.async that no thread has waited for."""

    # First bytes in shared memory, [1 or programs, threads].
    to: np.ndarray
    # The units that are written, [programs, threads] or [n].
    data: np.ndarray
    # Which threads copy; None: all.
    active: np.ndarray | None

    def select(self, rows: np.ndarray, shape: tuple[int, int]) -> Copy:
        """Return the copy of some of the programs."""
        to, data, active = self
        if active is not None:
            active = np.broadcast_to(active, shape)
            whole = np.zeros(shape, data.dtype)
            whole[active] = data
            active, data = active[rows], whole[rows][active[rows]]
        else:
            data = data[rows]
        return Copy(to if len(to) == 1 else to[rows], data, active)

    def end(self, batch) -> None:
        """Make the bytes visible to the threads that waited."""
        if batch.late:
            batch.shared.put_copy(self.to, self.data, self.active)
        batch.shared.end_copy(self.to, self.data.dtype.itemsize, self.active)


@implements("cp.async.{ca,cg}.shared.global")
def copy(build: Builder, ins: Instruction) -> Run:
    """Copy 4, 8 or 16 bytes; only the first `source size` are read, and the rest become zeros."""
    to_base, to_offset = build.address(ins.operands[0])
    from_base, from_offset = build.address(ins.operands[1])
    size = int(ins.operands[2], 0)
    source_size = build.source(ins.operands[3], 4) if len(ins.operands) > 3 else None
    if size not in (4, 8, 16) or (ins.parts[2] == "cg" and size != 16):
        raise Unsupported(f"a copy of {size} bytes")
    guard = build.predicate(ins)

    def run(batch) -> None:
        r = batch.registers
        active = batch.active(guard)
        to = r[to_base].astype(np.int64) + to_offset
        source = r[from_base].astype(np.int64) + from_offset
        to = np.broadcast_to(to, (to.shape[0], batch.shape[1]))
        data = np.zeros(batch.shape, unit(size))
        reads = active
        if source_size is not None:
            whole = r[source_size] == size
            if (~whole & (r[source_size] != 0)).any():
                raise Unsupported("a copy of fewer bytes than its size")
            if not whole.all():
                reads = whole if active is None else whole & active
        if reads is None:
            data[...] = batch.load_global(source, size, None)
        else:
            data[np.broadcast_to(reads, batch.shape)] = batch.load_global(source, size, reads)
        if active is not None:
            data = data[np.broadcast_to(active, batch.shape)]
        batch.shared.begin_copy(to, size, active)
        if not batch.late:
            batch.shared.put_copy(to, data, active)
        batch.copies.append(Copy(to, data, active))

    return run


@implements("cp.async.commit_group", together=PROGRAM)
def commit(build: Builder, ins: Instruction) -> Run:
    """The copies since the last commit make a group."""

    def run(batch) -> None:
        batch.copy_groups.append(batch.copies)
        batch.copies = []

    return run


@implements("cp.async.wait_group", together=PROGRAM)
def wait(build: Builder, ins: Instruction) -> Run:
    """Wait until at most N groups are pending."""
    left = int(ins.operands[0])

    def run(batch) -> None:
        while len(batch.copy_groups) > left:
            for pending in batch.copy_groups.pop(0):
                pending.end(batch)

    return run
