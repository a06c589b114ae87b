"""Barriers and fences of a program. Branches are run by `execution`."""

from __future__ import annotations

from ptx.build import PROGRAM, Builder, Run, implements
from ptx.errors import Unsupported
from ptx.program import Instruction


@implements("bar.sync", together=PROGRAM)
def barrier(build: Builder, ins: Instruction) -> Run:
    """All threads of a program wait for one another."""
    if ins.operands != ("0",) or ins.predicate is not None:
        raise Unsupported("a barrier of some threads")
    return lambda batch: batch.barrier()


@implements("fence.proxy.async.shared::cta", "fence.proxy.async", together=PROGRAM)
def proxy_fence(build: Builder, ins: Instruction) -> Run:
    """Writes to shared memory before it are visible to the products of wgmma behind it."""
    return lambda batch: batch.shared.fence()
