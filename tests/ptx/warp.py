"""Exchanges between the threads of a warp."""

from __future__ import annotations

import numpy as np

from ptx.build import Builder, Run, implements
from ptx.errors import Unsupported
from ptx.fragments import by_warp
from ptx.program import Instruction

LANES = np.arange(32)


WHOLE_WARP = 0xFFFFFFFF


def _require_whole_warp(batch, mask: int) -> None:
    """Raise if the mask of an instruction does not name all threads of its warp."""
    if (batch.registers[mask] != WHOLE_WARP).any():
        raise Unsupported("some threads of a warp")


@implements("shfl.sync.{bfly,idx}.b32", together=True)
def shuffle(build: Builder, ins: Instruction) -> Run:
    """d = a of lane (own lane xor b), or of lane b % 32."""
    target, a, b, clamp, mask = ins.operands
    members = build.source(mask, 4)
    if build.value(clamp) != 31 or ins.predicate is not None:
        raise Unsupported("a part of a warp")
    butterfly = ins.parts[2] == "bfly"
    d, value, lane = build.target(target, 4), build.source(a, 4), build.source(b, 4)

    def run(batch) -> None:
        _require_whole_warp(batch, members)
        r, warps = batch.registers, batch.shape[1] // 32
        by = by_warp(r[lane], warps).astype(np.int64)
        source = (LANES ^ by if butterfly else by + 0 * LANES) % 32
        values = by_warp(r[value], warps)
        if values.shape[2] == 1:
            r[d] = r[value]
            return
        shape = np.broadcast_shapes(values.shape, source.shape)
        result = np.take_along_axis(
            np.broadcast_to(values, shape), np.broadcast_to(source, shape), axis=2
        )
        r[d] = result.reshape(shape[0], batch.shape[1])

    return run


@implements("redux.sync.{min,max}.{s32,u32}", together=True)
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
        whole = np.broadcast_to(result, (len(result), batch.shape[1] // 32, 32))
        batch.registers[d] = whole.reshape(len(result), batch.shape[1])

    return run
