"""Number formats in raw bits, and the sums of tensor cores."""

from __future__ import annotations

import numpy as np

SIGN = np.uint32(1 << 31)
NAN_16 = np.uint16(0x7FFF)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """bfloat16 -> float32, in raw bits."""
    return bits.astype(np.uint32) << np.uint32(16)


def from_f16(bits: np.ndarray) -> np.ndarray:
    """float16 -> float32, in raw bits."""
    return bits.view(np.float16).astype(np.float32).view(np.uint32)


def to_bf16(bits: np.ndarray) -> np.ndarray:
    """float32 -> bfloat16, to nearest even; every NaN becomes 0x7FFF."""
    half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    rounded = ((bits + half) >> np.uint32(16)).astype(np.uint16)
    nan = (bits & ~SIGN) > np.uint32(0x7F800000)
    return np.where(nan, NAN_16, rounded)


def to_f16(bits: np.ndarray) -> np.ndarray:
    """float32 -> float16, to nearest even; every NaN becomes 0x7FFF."""
    value = bits.view(np.float32)
    return np.where(np.isnan(value), NAN_16, value.astype(np.float16).view(np.uint16))


def to_tf32(bits: np.ndarray) -> np.ndarray:
    """float32 -> the nearest with 10 bits of fraction, ties away from zero; NaN and inf stay."""
    rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    finite = (bits & np.uint32(0x7F800000)) != np.uint32(0x7F800000)
    return np.where(finite, rounded, bits)


def minimum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The smaller of two float32; the other one if one is NaN; -0 < +0."""
    zeros = (a == 0) & (b == 0)
    signs = (a.view(np.uint32) | b.view(np.uint32)).view(np.float32)
    return np.where(zeros, signs, np.fmin(a, b))


def maximum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The larger of two float32; the other one if one is NaN; -0 < +0."""
    zeros = (a == 0) & (b == 0)
    signs = (a.view(np.uint32) & b.view(np.uint32)).view(np.float32)
    return np.where(zeros, signs, np.fmax(a, b))


def fused_multiply_add(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a b + c in float32, rounded once.

    In float64 the product is exact. The sum is rounded to odd, so that rounding it again to float32
    gives the same as rounding the exact sum once.
    """
    product = a.astype(np.float64) * b.astype(np.float64)
    c = c.astype(np.float64)
    total = product + c
    # The exact error of the sum (Knuth's two-sum).
    part = total - product
    lost = (product - (total - part)) + (c - part)
    bits = np.ascontiguousarray(total).view(np.int64)
    inexact = np.isfinite(total) & (lost != 0) & (bits & 1 == 0)
    # One step of the bits away from zero if the error has the sign of the sum, else toward zero.
    step = np.where((lost > 0) == (total > 0), 1, -1)
    odd = np.where(inexact, bits + step, bits).view(np.float64)
    return odd.astype(np.float32)


def truncated_sum(terms: np.ndarray, c: np.ndarray, block: int, extra: int) -> np.ndarray:
    """Return c + the sum of the terms along the last axis, cut as tensor cores cut it.

    `block` terms and c at a time are aligned to the largest exponent among them, cut to 24 + extra
    bits, and their sum is cut to the 24 bits of a float32. This is the model that published tests
    of NVIDIA's tensor cores agree with (Fasi, Higham, Mikaitis, Pranesh 2021).

    terms: [..., K] float64. c: [...] float32. The result is float32.
    """
    total = c.astype(np.float64)
    for first in range(0, terms.shape[-1], block):
        group = np.concatenate([terms[..., first : first + block], total[..., None]], axis=-1)
        largest = np.abs(group).max(axis=-1, keepdims=True)
        unit = _unit(largest, 23 + extra)
        aligned = np.trunc(group / unit) * unit
        total = np.where(np.isfinite(largest), aligned, group).sum(axis=-1)
        unit = _unit(np.abs(total), 23)
        total = np.where(np.isfinite(total), np.trunc(total / unit) * unit, total)
    return total.astype(np.float32)


def _unit(value: np.ndarray, bits: int) -> np.ndarray:
    """Return 2^(exponent of the value - bits); 1 for zero and for non-finite values."""
    usable = np.isfinite(value) & (value > 0)
    _, exponent = np.frexp(np.where(usable, value, 1.0))
    return np.where(usable, np.ldexp(1.0, exponent - 1 - bits), 1.0)
