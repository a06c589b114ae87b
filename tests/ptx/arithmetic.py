"""Integers, floats, bits and comparisons: d = op(a, b, ...) in every thread."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ptx.build import BITS, TYPES, Builder, Run, implements
from ptx.errors import Unsupported
from ptx.floats import SIGN, from_bf16, fused_multiply_add, maximum, minimum
from ptx.program import Instruction

INTEGERS = "{u16,s16,u32,s32,u64,s64}"


def _compute(build: Builder, ins: Instruction, function: Callable, typed: bool = True) -> Run:
    """d = function(a, ...), all of the type that ends the opcode."""
    kind = TYPES[ins.parts[-1]]
    size = 0 if kind == np.bool_ else kind.itemsize
    target, *sources = ins.operands
    indices = tuple(build.source(s, size) for s in sources)
    return build.compute(
        ins, function, build.target(target, size), indices, kind if typed else None
    )


@implements(f"add.{INTEGERS}", f"sub.{INTEGERS}")
def add(build: Builder, ins: Instruction) -> Run:
    """d = a + b or a - b modulo 2^n: the bits do not depend on the sign."""
    function = np.add if ins.parts[0] == "add" else np.subtract
    return _compute(build, ins, function, typed=False)


@implements("{add,sub,mul}{,.rn}.f32")
def add_float(build: Builder, ins: Instruction) -> Run:
    """d = a + b, a - b or a * b, rounded to nearest even; subnormals are kept."""
    functions = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
    return _compute(build, ins, functions[ins.parts[0]])


@implements("div{.rn,.full}.f32")
def divide_float(build: Builder, ins: Instruction) -> Run:
    """d = a / b, rounded to nearest. div.full may differ by 2 units in the last place."""
    return _compute(build, ins, np.divide)


@implements("fma.rn.f32")
def fma(build: Builder, ins: Instruction) -> Run:
    """d = a b + c, rounded once to nearest even."""
    return _compute(build, ins, fused_multiply_add)


@implements("ex2.approx.f32")
def exp2(build: Builder, ins: Instruction) -> Run:
    """d = 2^a; hardware may differ by 2 units in the last place."""
    return _compute(build, ins, lambda a: np.exp2(a.astype(np.float64)).astype(np.float32))


@implements("{min,max}.f32")
def minimum_float(build: Builder, ins: Instruction) -> Run:
    """d = min(a, b) or max(a, b); the other operand if one is NaN; -0 < +0."""
    return _compute(build, ins, minimum if ins.parts[0] == "min" else maximum)


@implements(f"{{min,max}}.{INTEGERS}")
def minimum_integer(build: Builder, ins: Instruction) -> Run:
    return _compute(build, ins, np.minimum if ins.parts[0] == "min" else np.maximum)


@implements("neg.{s16,s32,s64}")
def negate(build: Builder, ins: Instruction) -> Run:
    """d = -a modulo 2^n."""
    return _compute(build, ins, lambda a: ~a + a.dtype.type(1), typed=False)


@implements("{neg,abs}.f32")
def negate_float(build: Builder, ins: Instruction) -> Run:
    """d = -a or |a|: the sign bit is flipped or cleared, of a NaN too."""
    if ins.parts[0] == "neg":
        return _compute(build, ins, lambda a: a ^ SIGN, typed=False)
    return _compute(build, ins, lambda a: a & ~SIGN, typed=False)


@implements("abs.{bf16,f16,bf16x2,f16x2}")
def absolute_16(build: Builder, ins: Instruction) -> Run:
    """d = |a|, of both halves in x2: the sign bits are cleared, of a NaN too."""
    size, mask = (4, np.uint32(0x7FFF7FFF)) if ins.opcode.endswith("x2") else (2, np.uint16(0x7FFF))
    target, a = ins.operands
    sources = (build.source(a, size),)
    return build.compute(ins, lambda a: a & mask, build.target(target, size), sources)


def _truncated(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return a / b rounded toward zero; a for b = 0, whose result PTX leaves open."""
    b = np.where(b == 0, b.dtype.type(1), b)
    # NumPy rounds down.
    quotient = a // b
    negative = (a < 0) != (b < 0)
    return quotient + (negative & (quotient * b != a)).astype(a.dtype)


@implements(f"{{div,rem}}.{INTEGERS}")
def divide(build: Builder, ins: Instruction) -> Run:
    """d = a / b toward zero, or the remainder, which has the sign of a."""
    if ins.parts[0] == "div":
        return _compute(build, ins, _truncated)
    return _compute(build, ins, lambda a, b: a - _truncated(a, b) * b)


@implements(f"mul.lo.{INTEGERS}")
def multiply_low(build: Builder, ins: Instruction) -> Run:
    """d = the low half of a b."""
    return _compute(build, ins, np.multiply, typed=False)


@implements("mul.hi.{u32,s32,u64,s64}")
def multiply_high(build: Builder, ins: Instruction) -> Run:
    """d = the high half of a b."""
    kind = TYPES[ins.parts[2]]
    bits = 8 * kind.itemsize

    def function(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        # Python's integers hold every product.
        return (a.astype(object) * b.astype(object) >> bits).astype(kind)

    return _compute(build, ins, function)


@implements("mul.wide.{u16,s16,u32,s32}", "mad.wide.{u16,s16,u32,s32}")
def multiply_wide(build: Builder, ins: Instruction) -> Run:
    """d = a b (+ c), with d and c twice as wide as a and b."""
    kind = TYPES[ins.parts[2]]
    size = 2 * kind.itemsize
    wide = np.dtype(f"{kind.kind}{size}")
    target, a, b, *c = ins.operands
    factors = build.source(a, kind.itemsize), build.source(b, kind.itemsize)
    rest = tuple(build.source(each, size) for each in c)

    def function(a: np.ndarray, b: np.ndarray, *c: np.ndarray) -> np.ndarray:
        product = (a.view(kind).astype(wide) * b.view(kind).astype(wide)).view(BITS[size])
        return product + c[0] if c else product

    return build.compute(ins, function, build.target(target, size), (*factors, *rest))


@implements(f"mad.lo.{INTEGERS}")
def multiply_add(build: Builder, ins: Instruction) -> Run:
    """d = the low half of a b + c."""
    return _compute(build, ins, lambda a, b, c: a * b + c, typed=False)


@implements("{and,or,xor}.{b16,b32,b64,pred}")
def bitwise(build: Builder, ins: Instruction) -> Run:
    functions = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
    return _compute(build, ins, functions[ins.parts[0]], typed=False)


@implements("not.{b16,b32,b64,pred}")
def invert(build: Builder, ins: Instruction) -> Run:
    return _compute(build, ins, np.invert, typed=False)


@implements("shl.{b16,b32,b64}", "shr.{b16,b32,b64,u16,u32,u64,s16,s32,s64}")
def shift(build: Builder, ins: Instruction) -> Run:
    """d = a << b or a >> b. Shifts of n bits and more leave 0, or the sign of a signed a."""
    kind = TYPES[ins.parts[1]]
    size = kind.itemsize
    target, a, b = ins.operands
    operator = np.left_shift if ins.parts[0] == "shl" else np.right_shift
    largest = 8 * size
    d, first = build.target(target, size), build.source(a, size)
    if not b.startswith("%"):
        # NumPy's shifts take any amount, too: of `largest` bits and more they leave 0 or the sign.
        amount = build.constant(min(build.value(b), largest), size)
        return build.compute(ins, operator, d, (first, amount), kind)
    second = build.source(b, 4)

    def function(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return operator(a.view(kind), np.minimum(b, largest).astype(kind)).view(BITS[size])

    return build.compute(ins, function, d, (first, second))


@implements("popc.b32")
def count_bits(build: Builder, ins: Instruction) -> Run:
    """d = how many bits of a are 1."""
    return _compute(build, ins, lambda a: np.bitwise_count(a).astype(np.uint32), typed=False)


@implements("bfe.{u32,s32}")
def extract_bits(build: Builder, ins: Instruction) -> Run:
    """d = c bits of a from bit b on, extended by zeros or by the sign."""
    target, a, *field = ins.operands
    if any(each.startswith("%") for each in field):
        raise Unsupported("a position or length in a register")
    position, length = (int(each, 0) for each in field)
    if not 0 < length <= 32 - position:
        raise Unsupported(f"{length} bits from bit {position} on")
    kind = TYPES[ins.parts[1]].type
    left, right = np.uint32(32 - position - length), kind(32 - length)
    return build.compute(
        ins,
        lambda a: ((a << left).view(kind) >> right).view(np.uint32),
        build.target(target, 4),
        (build.source(a, 4),),
    )


def _is_number(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return ~(np.isnan(a) | np.isnan(b))


# With a NaN the comparisons of floats are false.
COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal,
}  # fmt: skip


@implements(
    f"setp.{{eq,ne,lt,le,gt,ge}}.{INTEGERS}",
    "setp.{eq,ne}.{b16,b32,b64}",
    "setp.{eq,ne,lt,le,gt,ge,equ,neu,ltu,leu,gtu,geu,num,nan}.f32",
)
def compare(build: Builder, ins: Instruction) -> Run:
    """p = a op b. Of floats, "ltu" is "lt" or a NaN, "num" is no NaN, "nan" is a NaN."""
    _, name, type_name = ins.parts
    kind = TYPES[type_name]
    target, a, b = ins.operands
    sources = tuple(build.source(each, kind.itemsize) for each in (a, b))
    function = COMPARE.get(name)
    if type_name == "f32":
        function = _compare_floats(name)
    view = kind if kind.kind in "if" else BITS[kind.itemsize]
    return build.compute(
        ins, lambda a, b: function(a.view(view), b.view(view)), build.target(target, 0), sources
    )


def _compare_floats(name: str) -> Callable:
    if name == "num":
        return _is_number
    if name == "nan":
        return lambda a, b: ~_is_number(a, b)
    if name == "ne":
        return lambda a, b: (a != b) & _is_number(a, b)
    if name.endswith("u"):
        # "equ", "ltu", ...
        ordered = _compare_floats(name[:-1])
        return lambda a, b: ordered(a, b) | ~_is_number(a, b)
    return COMPARE[name]


# Raw bits -> numbers.
READ_16 = {
    "bf16": lambda bits: from_bf16(bits).view(np.float32),
    "f16": lambda bits: bits.view(np.float16),
}


@implements("setp.{eq,ne,lt,le,gt,ge,equ,neu,ltu,leu,gtu,geu}.{bf16,f16}")
def compare_16(build: Builder, ins: Instruction) -> Run:
    """p = a op b; with a NaN it is false, and true for "equ", "neu", ..."""
    _, name, kind = ins.parts
    read, function = READ_16[kind], _compare_floats(name)
    target, *operands = ins.operands
    return build.compute(
        ins,
        lambda a, b: function(read(a), read(b)),
        build.target(target, 0),
        tuple(build.source(each, 2) for each in operands),
    )


@implements("setp.{eq,ne,lt,le,gt,ge}.{bf16x2,f16x2}")
def compare_pair(build: Builder, ins: Instruction) -> Run:
    """p|q = a op b of the low halves | of the high halves; false with a NaN."""
    _, name, kind = ins.parts
    read, function = READ_16[kind.removesuffix("x2")], _compare_floats(name)
    targets, *operands = ins.operands
    first, second = (build.source(each, 4) for each in operands)
    p, q = (build.target(each.strip(), 0) for each in targets.split("|"))

    def run(batch) -> None:
        r = batch.registers
        a, b = r[first], r[second]
        low = function(read(a.astype(np.uint16)), read(b.astype(np.uint16)))
        shift = np.uint32(16)
        r[q] = function(read((a >> shift).astype(np.uint16)), read((b >> shift).astype(np.uint16)))
        r[p] = low

    return build.guarded(ins, run, [p, q])
