"""Moves, selections and conversions between formats."""

from __future__ import annotations

import numpy as np

from ptx import floats
from ptx.build import BITS, TYPES, Builder, Run, implements
from ptx.program import PARAMETERS, Instruction


@implements("mov.{b16,u16,s16,b32,u32,s32,f32,b64,u64,s64,pred}")
def move(build: Builder, ins: Instruction) -> Run:
    """d = a, or the halves or quarters of a wider register, the lowest first."""
    kind = TYPES[ins.parts[1]]
    size = 0 if kind == np.bool_ else kind.itemsize
    target, source = ins.operands
    if target.startswith("{"):
        return _unpack(build, ins, build.vector(target), build.source(source, size), size)
    if source.startswith("{"):
        return _pack(build, ins, target, build.vector(source), size)
    a, d = build.source(source, size), build.target(target, size)

    def run(batch) -> None:
        batch.registers[d] = batch.registers[a]

    return build.guarded(ins, run, [d])


def _unpack(build: Builder, ins: Instruction, names: list[str], source: int, size: int) -> Run:
    part = size // len(names)
    # "_" takes a part that nobody reads.
    targets = [(8 * part * k, build.target(n, part)) for k, n in enumerate(names) if n != "_"]
    bits, kind = BITS[size], BITS[part]

    def run(batch) -> None:
        value = batch.registers[source]
        for shift, target in targets:
            batch.registers[target] = (value >> bits(shift)).astype(kind)

    return build.guarded(ins, run, [target for _, target in targets])


def _pack(build: Builder, ins: Instruction, target: str, names: list[str], size: int) -> Run:
    part = size // len(names)
    sources = tuple(build.source(name, part) for name in names)
    kind = BITS[size]

    def function(*values: np.ndarray) -> np.ndarray:
        result = values[0].astype(kind)
        for k, value in enumerate(values[1:], 1):
            result = result | (value.astype(kind) << kind(8 * part * k))
        return result

    return build.compute(ins, function, build.target(target, size), sources)


@implements("selp.{b16,u16,s16,b32,u32,s32,f32,b64,u64,s64}")
def select(build: Builder, ins: Instruction) -> Run:
    """d = a if p, else b."""
    size = TYPES[ins.parts[1]].itemsize
    target, a, b, p = ins.operands
    sources = build.source(p, 0), build.source(a, size), build.source(b, size)
    return build.compute(ins, np.where, build.target(target, size), sources)


@implements("cvta.to.global.u64")
def global_address(build: Builder, ins: Instruction) -> Run:
    """d = the generic address a as one of global memory: the same number."""
    target, a = ins.operands
    return build.compute(ins, lambda a: a, build.target(target, 8), (build.source(a, 8),))


@implements("cvta.param.u64")
def parameter_address(build: Builder, ins: Instruction) -> Run:
    """d = the generic address of byte a of the parameters."""
    target, a = ins.operands
    start = np.uint64(PARAMETERS)
    return build.compute(ins, lambda a: a + start, build.target(target, 8), (build.source(a, 8),))


@implements("prmt.b32")
def permute(build: Builder, ins: Instruction) -> Run:
    """Byte k of d = byte c[4k : 4k+3] of (b, a); its sign alone, 8 times, if bit 4k+3 of c is 1."""
    target, a, b, c = ins.operands

    def function(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
        both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
        result = np.uint32(0)
        for k in range(4):
            choice = (c >> np.uint32(4 * k)) & np.uint32(15)
            byte = (both >> ((choice & np.uint32(7)).astype(np.uint64) * np.uint64(8))).astype("u1")
            sign = np.where(byte & 0x80, np.uint8(0xFF), np.uint8(0))
            byte = np.where(choice & np.uint32(8), sign, byte)
            result = result | (byte.astype(np.uint32) << np.uint32(8 * k))
        return result

    return build.compute(
        ins, function, build.target(target, 4), tuple(build.source(s, 4) for s in (a, b, c))
    )


@implements("cvt.{u16,s16,u32,s32,u64,s64}.{u16,s16,u32,s32,u64,s64}")
def convert_integer(build: Builder, ins: Instruction) -> Run:
    """d = a, cut, or extended by zeros or by the sign of a signed a.

    The register of a may be wider than its type: the type then reads the low bits.
    """
    to, source = TYPES[ins.parts[1]], TYPES[ins.parts[2]]
    target, a = ins.operands
    bits, low_bits = BITS[to.itemsize], BITS[source.itemsize]
    size = max(source.itemsize, build.width(a)) if a.startswith("%") else source.itemsize
    return build.compute(
        ins,
        lambda a: a.astype(low_bits).view(source).astype(to).view(bits),
        build.target(target, to.itemsize),
        (build.source(a, size),),
    )


# Opcode -> function of raw bits, and the bytes of d and a.
_CONVERSIONS = {
    "cvt.f32.bf16": (floats.from_bf16, 4, 2),
    "cvt.f32.f16": (floats.from_f16, 4, 2),
    "cvt.rn.bf16.f32": (floats.to_bf16, 2, 4),
    "cvt.rn.f16.f32": (floats.to_f16, 2, 4),
    "cvt.rna.tf32.f32": (floats.to_tf32, 4, 4),
}


@implements(*_CONVERSIONS)
def convert_float(build: Builder, ins: Instruction) -> Run:
    """d = a in another format: .rn rounds to nearest even, .rna ties away from zero."""
    function, to, source = _CONVERSIONS[ins.opcode]
    target, a = ins.operands
    return build.compute(ins, function, build.target(target, to), (build.source(a, source),))


@implements("cvt.rn.{bf16x2,f16x2}.f32")
def convert_pair(build: Builder, ins: Instruction) -> Run:
    """The high half of d = a, the low half = b, both rounded to nearest even."""
    to = floats.to_bf16 if ins.parts[2] == "bf16x2" else floats.to_f16
    target, a, b = ins.operands

    def function(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (to(a).astype(np.uint32) << np.uint32(16)) | to(b)

    sources = build.source(a, 4), build.source(b, 4)
    return build.compute(ins, function, build.target(target, 4), sources)


@implements("cvt.rzi.s32.f32")
def convert_to_integer(build: Builder, ins: Instruction) -> Run:
    """d = a without its fraction, at the nearest limit if it does not fit; 0 for NaN."""
    target, a = ins.operands

    def function(a: np.ndarray) -> np.ndarray:
        whole = np.nan_to_num(np.trunc(a.view(np.float32).astype(np.float64)), nan=0.0)
        return whole.clip(-(2**31), 2**31 - 1).astype(np.int32).view(np.uint32)

    return build.compute(ins, function, build.target(target, 4), (build.source(a, 4),))


@implements("cvt.rn.f32.{u32,s32}")
def convert_to_float(build: Builder, ins: Instruction) -> Run:
    """d = the integer a, rounded to nearest even."""
    source = TYPES[ins.parts[3]]
    target, a = ins.operands
    return build.compute(
        ins,
        lambda a: a.view(source).astype(np.float32).view(np.uint32),
        build.target(target, 4),
        (build.source(a, 4),),
    )
