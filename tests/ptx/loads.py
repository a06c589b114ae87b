"""ld and st: parameters, global and shared memory."""

from __future__ import annotations

import numpy as np

from ptx.build import BITS, TYPES, Builder, Run, implements
from ptx.errors import AccessError, Unsupported
from ptx.program import Instruction
from ptx.units import elements, units, written

_ACCESS = "{,.v2,.v4}.{b8,u8,s8,b16,u16,s16,b32,u32,s32,f32,b64,u64,s64}"


@implements("ld.param{,.v2,.v4}.{b32,u32,s32,f32,b64,u64,s64}")
def load_parameter(build: Builder, ins: Instruction) -> Run:
    """d = 1, 2 or 4 values in the space of parameters, extended like those of other loads."""
    kind, names = TYPES[ins.parts[-1]], build.vector(ins.operands[0])
    size = kind.itemsize * len(names)
    targets = [build.target(name) for name in names]
    kinds = [_register_kind(build.width(name), kind) for name in names]
    base, offset = build.address(ins.operands[1])

    guard = build.predicate(ins)

    def run(batch) -> None:
        at = batch.registers[base].astype(np.int64) + offset
        active = batch.active(guard)
        if active is not None and at.size > 1:
            # Other threads may not have an address.
            at, active = np.broadcast_to(at, batch.shape), np.broadcast_to(active, batch.shape)
            at = np.where(active, at, at[active][0])
        if (at % size).any() or at.min() < 0 or at.max() + size > len(batch.parameters):
            raise AccessError("a misaligned address, or one outside of the parameters")
        values = batch.parameters.view(kind)
        for k, (target, (wide, bits)) in enumerate(zip(targets, kinds, strict=True)):
            value = values[at // kind.itemsize + k]
            batch.registers[target] = value.astype(wide, copy=False).view(bits)

    return build.guarded(ins, run, targets)


@implements(f"ld.global{_ACCESS}", f"ld.shared{_ACCESS}")
def load(build: Builder, ins: Instruction) -> Run:
    """d = 1, 2 or 4 values at an address that is a multiple of all their bytes.

    A register that is wider than the value takes it extended by zeros, or by its sign.
    """
    kind, names = TYPES[ins.parts[-1]], build.vector(ins.operands[0])
    size = kind.itemsize * len(names)
    targets = [build.target(name) for name in names]
    kinds = [_register_kind(build.width(name), kind) for name in names]
    base, offset = build.address(ins.operands[1])
    guard, space = build.predicate(ins), ins.parts[1]

    def run(batch) -> None:
        r = batch.registers
        active = batch.active(guard)
        at = r[base].astype(np.int64) + offset
        if space == "global":
            values = batch.load_global(at, size, active)
        else:
            values = batch.shared.load(at, size, active)
        batch.check_order("load", space, at, size, active)
        parts = elements(values, kind)
        for k, (target, (wide, bits)) in enumerate(zip(targets, kinds, strict=True)):
            value = np.ascontiguousarray(parts[..., k].astype(wide, copy=False)).view(bits)
            r[target] = written(r[target], value, active, batch.shape)

    return run


def _register_kind(width: int, kind: np.dtype) -> tuple[np.dtype, type]:
    """Return the dtype to which a loaded value is extended, and the bits of the register."""
    if width < kind.itemsize:
        raise Unsupported(f"a register of {width} bytes for a value of {kind.itemsize}")
    wide = np.dtype(f"{kind.kind}{width}") if kind.kind in "iu" else kind
    return wide, BITS[width]


@implements(f"st.global{_ACCESS}", f"st.shared{_ACCESS}")
def store(build: Builder, ins: Instruction) -> Run:
    """Write 1, 2 or 4 values; of a wider register the low bytes."""
    kind = BITS[TYPES[ins.parts[-1]].itemsize]
    base, offset = build.address(ins.operands[0])
    sources = [_stored(build, text, kind) for text in build.vector(ins.operands[1])]
    guard, space = build.predicate(ins), ins.parts[1]

    def run(batch) -> None:
        r = batch.registers
        active = batch.active(guard)
        at = r[base].astype(np.int64) + offset
        data = units([r[s].astype(kind, copy=False) for s in sources], batch.shape)
        if active is not None:
            data = data[np.broadcast_to(active, batch.shape)]
        if space == "global":
            batch.store_global(at, data, active)
        else:
            batch.shared.store(at, data, active)
        batch.check_order("store", space, at, data.dtype.itemsize, active)

    return run


def _stored(build: Builder, text: str, kind: type) -> int:
    """Return the register of a stored value, which has its bytes or more."""
    size = np.dtype(kind).itemsize
    if not text.startswith("%"):
        return build.constant(build.value(text), size)
    width = build.width(text)
    if width < size:
        raise Unsupported(f"{text} has fewer than {size} bytes")
    return build.source(text, width)
