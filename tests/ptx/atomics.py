"""atom: read a word of memory and change it, in one step that no other access parts."""

from __future__ import annotations

import numpy as np

from ptx.build import Builder, Run, implements
from ptx.errors import Unsupported
from ptx.program import Instruction
from ptx.units import written


@implements("atom.{global,shared}.add.{u32,s32}")
def atomic_add(build: Builder, ins: Instruction) -> Run:
    """d = the word at an address, which then grows by b. Threads take turns in some order."""
    space, (target, at, b) = ins.parts[1], ins.operands
    d, (base, offset), addend = build.target(target, 4), build.address(at), build.source(b, 4)
    guard = build.predicate(ins)

    def run(batch) -> None:
        if batch.ordering is None:
            raise Unsupported("an atomic whose order is not checked by thread")
        r = batch.registers
        active = batch.active(guard)
        address = r[base].astype(np.int64) + offset
        data = np.broadcast_to(r[addend], batch.shape)
        if active is not None:
            data = data[np.broadcast_to(active, batch.shape)]
        if space == "global":
            value = batch.add_global(address, data, active)
        else:
            value = batch.shared.add(address, data, active)
        batch.check_order("atomic", space, address, 4, active)
        r[d] = written(r[d], value, active, batch.shape)

    return run
