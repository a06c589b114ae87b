"""Single instructions of one thread against their definitions, in Python's integers and torch."""

from __future__ import annotations

import itertools
import math
import operator
from fractions import Fraction

import numpy as np
import pytest
import torch

# The module fills the table of instructions.
from ptx import build
from ptx.errors import Unsupported
from ptx.harness import apply, run

BITS = {16: np.uint16, 32: np.uint32, 64: np.uint64}


def signed(value: int, bits: int) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


def edges(bits: int) -> list[int]:
    """Integers at which carries, signs and shifts go wrong."""
    top = 1 << bits
    return [0, 1, 2, 7, 31, 32, top // 3, top // 2 - 1, top // 2, top // 2 + 1, top - 2, top - 1]


def pairs(bits: int, second: int | None = None) -> list[tuple[int, int]]:
    return list(itertools.product(edges(bits), edges(second or bits)))


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


BINARY = {
    "add": operator.add,
    "sub": operator.sub,
    "mul.lo": operator.mul,
    "min": min,
    "max": max,
}


@pytest.mark.parametrize("kind", ("u16", "s16", "u32", "s32", "u64", "s64"))
@pytest.mark.parametrize("name", BINARY)
def test_integers(name: str, kind: str) -> None:
    bits = int(kind[1:])
    read = (lambda v: signed(v, bits)) if kind[0] == "s" else int
    values = pairs(bits)
    a, b = (np.array(side, BITS[bits]) for side in zip(*values, strict=True))
    d = apply(f"{name}.{kind} {{d}}, {{a}}, {{b}}", a, b, result=BITS[bits])
    expected = [BINARY[name](read(x), read(y)) % (1 << bits) for x, y in values]
    assert d.tolist() == expected


@pytest.mark.parametrize("kind", ("u32", "s32"))
def test_products_of_twice_the_width(kind: str) -> None:
    read = (lambda v: signed(v, 32)) if kind == "s32" else int
    values = pairs(32)
    a, b = (np.array(side, np.uint32) for side in zip(*values, strict=True))
    c = np.resize(np.array(edges(64), np.uint64), len(a))
    products = [read(x) * read(y) for x, y in values]
    high = apply(f"mul.hi.{kind} {{d}}, {{a}}, {{b}}", a, b, result=np.uint32)
    assert high.tolist() == [(p >> 32) % 2**32 for p in products]
    wide = apply(f"mul.wide.{kind} {{d}}, {{a}}, {{b}}", a, b, result=np.uint64)
    assert wide.tolist() == [p % 2**64 for p in products]
    added = apply(f"mad.wide.{kind} {{d}}, {{a}}, {{b}}, {{c}}", a, b, c, result=np.uint64)
    assert added.tolist() == [(p + z) % 2**64 for p, z in zip(products, c.tolist(), strict=True)]


@pytest.mark.parametrize("kind", ("u64", "s64"))
def test_high_halves_of_long_products(kind: str) -> None:
    read = (lambda v: signed(v, 64)) if kind == "s64" else int
    values = pairs(64)
    a, b = (np.array(side, np.uint64) for side in zip(*values, strict=True))
    high = apply(f"mul.hi.{kind} {{d}}, {{a}}, {{b}}", a, b, result=np.uint64)
    assert high.tolist() == [(read(x) * read(y) >> 64) % 2**64 for x, y in values]


@pytest.mark.parametrize("kind", ("u16", "s16", "u32", "s32", "u64", "s64"))
def test_quotients_and_remainders(kind: str) -> None:
    bits = int(kind[1:])
    read = (lambda v: signed(v, bits)) if kind[0] == "s" else int
    smallest = -(1 << bits - 1)
    values = [(x, y) for x, y in pairs(bits) if y and (read(x), read(y)) != (smallest, -1)]
    a, b = (np.array(side, BITS[bits]) for side in zip(*values, strict=True))
    quotients = [truncated(read(x), read(y)) for x, y in values]
    d = apply(f"div.{kind} {{d}}, {{a}}, {{b}}", a, b, result=BITS[bits])
    assert d.tolist() == [q % (1 << bits) for q in quotients]
    d = apply(f"rem.{kind} {{d}}, {{a}}, {{b}}", a, b, result=BITS[bits])
    expected = [
        (read(x) - q * read(y)) % (1 << bits) for (x, y), q in zip(values, quotients, strict=True)
    ]
    assert d.tolist() == expected


@pytest.mark.parametrize("name", ("and", "or", "xor"))
@pytest.mark.parametrize("bits", BITS)
def test_bits(name: str, bits: int) -> None:
    function = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}[name]
    values = pairs(bits)
    a, b = (np.array(side, BITS[bits]) for side in zip(*values, strict=True))
    d = apply(f"{name}.b{bits} {{d}}, {{a}}, {{b}}", a, b, result=BITS[bits])
    assert d.tolist() == [function(x, y) for x, y in values]


def test_how_many_bits_are_set() -> None:
    a = np.array(edges(32), np.uint32)
    d = apply("popc.b32 {d}, {a}", a, result=np.uint32)
    assert d.tolist() == [x.bit_count() for x in a.tolist()]


@pytest.mark.parametrize(
    "opcode", ("shl.b16", "shl.b32", "shl.b64", "shr.u16", "shr.u64", "shr.s32")
)
def test_shifts(opcode: str) -> None:
    """Shifts of all bits and more leave 0, or the sign."""
    bits = int(opcode[-2:])
    read = (lambda v: signed(v, bits)) if ".s" in opcode else int
    function = operator.lshift if opcode.startswith("shl") else operator.rshift
    values = list(itertools.product(edges(bits), (0, 1, 5, bits - 1, bits, bits + 1, 70, 70000)))
    a = np.array([x for x, _ in values], BITS[bits])
    b = np.array([y for _, y in values], np.uint32)
    d = apply(f"{opcode} {{d}}, {{a}}, {{b}}", a, b, result=BITS[bits])
    assert d.tolist() == [function(read(x), y) % (1 << bits) for x, y in values]
    for amount in (0, 3, bits, 200):
        d = apply(f"{opcode} {{d}}, {{a}}, {amount}", a, result=BITS[bits])
        assert d.tolist() == [function(read(x), amount) % (1 << bits) for x, _ in values]


@pytest.mark.parametrize("position", (0, 3, 24))
def test_bit_fields(position: int) -> None:
    a = np.array(edges(32), np.uint32)
    length = 8
    fields = [(x >> position) % 256 for x in a.tolist()]
    d = apply(f"bfe.u32 {{d}}, {{a}}, {position}, {length}", a, result=np.uint32)
    assert d.tolist() == fields
    d = apply(f"bfe.s32 {{d}}, {{a}}, {position}, {length}", a, result=np.uint32)
    assert d.tolist() == [signed(x, 8) % 2**32 for x in fields]


def test_bytes_of_two_registers() -> None:
    a, b = np.array([0x33221100], np.uint32), np.array([0x77E65544], np.uint32)
    choices = {"0x7531": 0x77553311, "0x0246": 0x002244E6, "0xE0F0": 0xFF000000}
    for choice, expected in choices.items():
        d = apply(f"prmt.b32 {{d}}, {{a}}, {{b}}, {choice}U", a, b, result=np.uint32)
        assert hex(d[0]) == hex(expected), choice


@pytest.mark.parametrize("name", ("eq", "ne", "lt", "le", "gt", "ge"))
@pytest.mark.parametrize("kind", ("u16", "s16", "u32", "s32", "u64", "s64"))
def test_comparisons_of_integers(kind: str, name: str) -> None:
    bits = int(kind[1:])
    read = (lambda v: signed(v, bits)) if kind[0] == "s" else int
    values = pairs(bits)
    a, b = (np.array(side, BITS[bits]) for side in zip(*values, strict=True))
    d = apply(f"setp.{name}.{kind} {{d}}, {{a}}, {{b}}", a, b, result=bool)
    assert d.tolist() == [getattr(operator, name)(read(x), read(y)) for x, y in values]


FLOATS = [0.0, -0.0, 1.0, -1.5, 1e-45, -1e-40, 3e38, -3e38, math.inf, -math.inf, math.nan, 1 / 3]


def float_pairs() -> tuple[np.ndarray, np.ndarray]:
    values = list(itertools.product(FLOATS, FLOATS))
    return tuple(np.array(side, np.float32) for side in zip(*values, strict=True))


@pytest.mark.parametrize("name", ("eq", "ne", "lt", "le", "gt", "ge"))
def test_comparisons_of_floats(name: str) -> None:
    """With a NaN they are false, and those that end with u are true."""
    a, b = float_pairs()
    nan = np.isnan(a) | np.isnan(b)
    plain = getattr(operator, name)(a, b)
    for opcode, expected in ((name, plain & ~nan), (f"{name}u", plain | nan)):
        d = apply(f"setp.{opcode}.f32 {{d}}, {{a}}, {{b}}", a.view("u4"), b.view("u4"), result=bool)
        assert d.tolist() == expected.tolist(), opcode
    d = apply("setp.num.f32 {d}, {a}, {b}", a.view("u4"), b.view("u4"), result=bool)
    assert d.tolist() == (~nan).tolist()


def same_floats(actual: np.ndarray, expected: np.ndarray) -> bool:
    """Whether the bits are equal; every NaN is equal to every NaN."""
    nan = np.isnan(expected)
    return bool(
        (np.isnan(actual) == nan).all()
        and (actual.view("u4")[~nan] == expected.view("u4")[~nan]).all()
    )


@pytest.mark.parametrize("name", ("add", "sub", "mul", "div.rn"))
def test_floats(name: str) -> None:
    """IEEE 754, with subnormals."""
    a, b = float_pairs()
    names = {"add": torch.add, "sub": torch.sub, "mul": torch.mul, "div.rn": torch.div}
    expected = names[name](torch.tensor(a), torch.tensor(b)).numpy()
    d = apply(f"{name}.f32 {{d}}, {{a}}, {{b}}", a.view("u4"), b.view("u4"), result=np.uint32)
    assert same_floats(d.view(np.float32), expected)


def test_signs() -> None:
    a = np.array(FLOATS, np.float32).view(np.uint32)
    negated = apply("neg.f32 {d}, {a}", a, result=np.uint32)
    assert negated.tolist() == [bits ^ 1 << 31 for bits in a.tolist()]
    assert apply("abs.f32 {d}, {a}", negated, result=np.uint32).tolist() == [
        bits & ~(1 << 31) for bits in a.tolist()
    ]


@pytest.mark.parametrize("kind", ("bf16", "f16"))
def test_signs_and_comparisons_of_16_bits(kind: str) -> None:
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16}[kind]
    a, b = (torch.from_numpy(side).to(dtype) for side in float_pairs())
    a_bits, b_bits = (t.view(torch.int16).numpy().view(np.uint16) for t in (a, b))
    absolute = apply(f"abs.{kind} {{d}}, {{a}}", a_bits, result=np.uint16)
    assert absolute.tolist() == (a_bits & 0x7FFF).tolist()
    both = b_bits.astype(np.uint32) << 16 | a_bits
    absolute = apply(f"abs.{kind}x2 {{d}}, {{a}}", both, result=np.uint32)
    assert absolute.tolist() == (both & 0x7FFF7FFF).tolist()
    swapped = a_bits.astype(np.uint32) << 16 | b_bits
    for name in ("eq", "ne", "lt", "ge"):
        nan = a.isnan() | b.isnan()
        d = apply(f"setp.{name}u.{kind} {{d}}, {{a}}, {{b}}", a_bits, b_bits, result=bool)
        assert d.tolist() == (getattr(operator, name)(a.float(), b.float()) | nan).tolist()
        forward = (getattr(operator, name)(a.float(), b.float()) & ~nan).tolist()
        backward = (getattr(operator, name)(b.float(), a.float()) & ~nan).tolist()
        d = apply(f"setp.{name}.{kind} {{d}}, {{a}}, {{b}}", a_bits, b_bits, result=bool)
        assert d.tolist() == forward
        for pair, expected in (("{d}|%p9", forward), ("%p9|{d}", backward)):
            d = apply(f"setp.{name}.{kind}x2 {pair}, {{a}}, {{b}}", both, swapped, result=bool)
            assert d.tolist() == expected


@pytest.mark.parametrize("name", ("min", "max"))
def test_smaller_and_larger_float(name: str) -> None:
    """A NaN gives the other operand; -0 is smaller than +0."""
    a, b = float_pairs()
    function = min if name == "min" else max
    expected = [
        y if math.isnan(x) else x if math.isnan(y)
        else function((x, y), key=lambda v: (v, math.copysign(1, v)))
        for x, y in zip(a.tolist(), b.tolist(), strict=True)
    ]  # fmt: skip
    d = apply(f"{name}.f32 {{d}}, {{a}}, {{b}}", a.view("u4"), b.view("u4"), result=np.uint32)
    assert same_floats(d.view(np.float32), np.array(expected, np.float32))


def nearest_float32(value: Fraction) -> float:
    """Return the float32 that is nearest to a fraction, the even one of two."""
    near = np.float32(float(value))
    below, above = (np.nextafter(near, np.float32(side)) for side in (-np.inf, np.inf))
    return min(
        (near, below, above),
        key=lambda f: (abs(Fraction(float(f)) - value), int(np.float32(f).view(np.uint32)) & 1),
    )


def test_fused_multiply_add_rounds_once() -> None:
    generator = np.random.default_rng(0)
    a, b = (generator.standard_normal(2000).astype(np.float32) for _ in range(2))
    # Sums near a product, and sums that end half a unit in the last place beside a float32.
    c = np.where(np.arange(2000) % 2, -(a * b), (a * b) * np.float32(2**-25))
    c = np.where(np.arange(2000) % 5 == 0, np.float32(2**-60), c).astype(np.float32)
    a[::5], b[::5] = np.float32(1 + 2**-12), np.float32(1 + 2**-12)
    expected = [
        nearest_float32(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)))
        for x, y, z in zip(a, b, c, strict=True)
    ]
    results = [
        apply(
            "fma.rn.f32 {d}, {a}, {b}, {c}",
            *(part.view("u4") for part in parts),
            result=np.uint32,
        )
        for parts in zip(*(np.split(v, 4) for v in (a, b, c)), strict=True)
    ]
    actual = np.concatenate(results).view(np.float32)
    assert actual.tolist() == [float(e) for e in expected]


def test_conversions_between_floats() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.cat([
        torch.tensor(FLOATS),
        torch.randn(400, generator=generator) * torch.logspace(-45, 38, 400),
        # Ties, of float16 and of bfloat16.
        torch.tensor([1 + 2**-11, 1 + 3 * 2**-11, 1 + 2**-8, 1 + 3 * 2**-8, 65520.0, 2**-25]),
    ])  # fmt: skip
    bits = a.numpy().view(np.uint32)
    for name, dtype in (("bf16", torch.bfloat16), ("f16", torch.float16)):
        expected = a.to(dtype)
        d = apply(f"cvt.rn.{name}.f32 {{d}}, {{a}}", bits, result=np.uint16)
        assert torch.equal(
            torch.from_numpy(d.view(np.int16)).view(dtype).nan_to_num(7.0), expected.nan_to_num(7.0)
        )
        back = apply(f"cvt.f32.{name} {{d}}, {{a}}", d, result=np.uint32).view(np.float32)
        assert same_floats(back, expected.float().numpy())
        both = apply(f"cvt.rn.{name}x2.f32 {{d}}, {{a}}, {{b}}", bits, bits[::-1], result=np.uint32)
        assert (both >> 16).tolist() == d.tolist()
        assert (both & 0xFFFF).tolist() == d[::-1].tolist()
        # NaN has one form.
        assert d[np.isnan(a.numpy())].tolist() == [0x7FFF]


def test_tf32_has_10_bits_and_rounds_ties_away_from_zero() -> None:
    one = 0x3F800000
    cases = {
        one + 0x0FFF: one, one + 0x1000: one + 0x2000, one + 0x3000: one + 0x4000,
        (one + 0x1000) | 1 << 31: (one + 0x2000) | 1 << 31, 0x7F800000: 0x7F800000,
        0x7F7FFFFF: 0x7F800000,
    }  # fmt: skip
    a = np.array(list(cases), np.uint32)
    d = apply("cvt.rna.tf32.f32 {d}, {a}", a, result=np.uint32)
    assert d.tolist() == list(cases.values())


@pytest.mark.parametrize(
    ("opcode", "from_bits", "to_bits"),
    (
        ("cvt.s64.s32", 32, 64),
        ("cvt.u64.u32", 32, 64),
        ("cvt.u32.u64", 64, 32),
        ("cvt.u16.u32", 32, 16),
        ("cvt.u32.u16", 16, 32),
        ("cvt.s32.s16", 16, 32),
    ),
)
def test_conversions_between_integers(opcode: str, from_bits: int, to_bits: int) -> None:
    read = (lambda v: signed(v, from_bits)) if opcode.endswith(f"s{from_bits}") else int
    a = np.array(edges(from_bits), BITS[from_bits])
    d = apply(f"{opcode} {{d}}, {{a}}", a, result=BITS[to_bits])
    assert d.tolist() == [read(x) % (1 << to_bits) for x in a.tolist()]


@pytest.mark.parametrize("opcode", ("cvt.s64.s32", "cvt.u64.u32", "cvt.s32.s16"))
def test_a_conversion_reads_the_low_bits_of_a_wider_register(opcode: str) -> None:
    kind, from_bits = opcode.split(".")[2][0], int(opcode.split(".")[2][1:])
    a = np.array(edges(64), np.uint64)
    to_bits = int(opcode.split(".")[1][1:])
    d = apply(f"{opcode} {{d}}, {{a}}", a, result=BITS[to_bits])
    low = [x % (1 << from_bits) for x in a.tolist()]
    read = [signed(x, from_bits) for x in low] if kind == "s" else low
    assert d.tolist() == [x % (1 << to_bits) for x in read]


def test_integers_of_floats_are_cut_and_saturate() -> None:
    values = [0.0, -0.0, 2.9, -2.9, 255.0, 1e10, -1e10, np.inf, -np.inf, np.nan]
    a = np.array(values, np.float32).view(np.uint32)
    d = apply("cvt.rzi.s32.f32 {d}, {a}", a, result=np.uint32).view(np.int32)
    limits = [2**31 - 1, -(2**31)]
    assert d.tolist() == [0, 0, 2, -2, 255, *limits, *limits, 0]


def test_selections_and_parts_of_registers() -> None:
    a, b = np.array([1, 2, 3], np.uint32), np.array([7, 8, 9], np.uint32)
    p = np.array([True, False, True])
    assert apply("selp.b32 {d}, {a}, {b}, {c}", a, b, p, result=np.uint32).tolist() == [1, 8, 3]
    wide = apply("mov.b64 {d}, {{{a}, {b}}}", a, b, result=np.uint64)
    assert wide.tolist() == [x | y << 32 for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    assert apply("mov.b64 {{_, {d}}}, {a}", wide, result=np.uint32).tolist() == b.tolist()
    assert apply("mov.b64 {{{d}, _}}, {a}", wide, result=np.uint32).tolist() == a.tolist()


def test_an_address_of_global_memory_is_the_generic_one() -> None:
    a = np.array(edges(64), np.uint64)
    assert (apply("cvta.to.global.u64 {d}, {a}", a, result=np.uint64) == a).all()


def test_a_false_predicate_keeps_the_register() -> None:
    a, p = np.array([5, 6], np.uint32), np.array([True, False])
    d = apply("mov.b32 {d}, 1; @{b} add.s32 {d}, {a}, 2", a, p, result=np.uint32)
    assert d.tolist() == [7, 1]
    d = apply("mov.b32 {d}, 1; @!{b} add.s32 {d}, {a}, 2", a, p, result=np.uint32)
    assert d.tolist() == [1, 8]


@pytest.mark.parametrize(
    "instruction",
    (
        "sin.approx.f32 %r1, %r2;",
        "add.sat.s32 %r1, %r2, %r3;",
        "ld.volatile.global.b32 %r1, [%rd0];",
        "add.s32 %r1, %rd2, 3;",
        "bar.sync 1;",
    ),
)
def test_what_is_not_implemented_raises_by_name(instruction: str) -> None:
    with pytest.raises(Unsupported, match=instruction.split()[0]):
        run(instruction, np.zeros(1, np.uint32))


def test_an_opcode_is_entered_once() -> None:
    assert build.expand("ld{,.v2}.b{8,16}") == ["ld.b8", "ld.b16", "ld.v2.b8", "ld.v2.b16"]
    assert len(build.TABLE) > 300
