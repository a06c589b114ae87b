"""Matrices that lie in the registers of a warp: which thread and register hold which element.

Lane l of a warp has g = l / 4 and t = l % 4 in all formulas. A register holds two values of 16 bits
or one of 32. Layouts are tables of indices into [registers, lanes, values of a register].
"""

from __future__ import annotations

from functools import cache

import numpy as np

from ptx import floats

LANES = np.arange(32)
G, T = LANES // 4, LANES % 4
# Type of an input -> bytes, columns of A in one instruction.
INPUTS = {"bf16": (2, 16), "f16": (2, 16), "tf32": (4, 8)}


def _table(rows: int, columns: int, positions: list) -> np.ndarray:
    """positions: [registers][values of a register] of (row, column), each [lanes]."""
    table = np.zeros((rows, columns), np.int64)
    for r, values in enumerate(positions):
        for v, (row, column) in enumerate(values):
            table[row, column] = (r * 32 + LANES) * len(values) + v
    return table.reshape(-1)


@cache
def layout(matrix: str, size: int) -> np.ndarray:
    """Return the table of a fragment of mma: A [16, K], B [K, 8] or C [16, 8]; K is 16 or 8.

    size: bytes of an element. C, and D, have float32.
    """
    pair = (0, 1) if size == 2 else (0,)
    if matrix == "A":
        if size == 2:
            places = [[(G + 8 * (r % 2), 2 * T + 8 * (r // 2) + v) for v in pair] for r in range(4)]
            return _table(16, 16, places)
        return _table(16, 8, [[(G + 8 * (r % 2), T + 4 * (r // 2))] for r in range(4)])
    if matrix == "B":
        if size == 2:
            return _table(16, 8, [[(2 * T + 8 * r + v, G) for v in pair] for r in range(2)])
        return _table(8, 8, [[(T + 4 * r, G)] for r in range(2)])
    return _table(16, 8, [[(G + 8 * (r // 2), 2 * T + r % 2)] for r in range(4)])


@cache
def accumulator(columns: int) -> np.ndarray:
    """Return the table of D of a wgmma for one warp: [16, columns] float32."""
    places = []
    for r in range(columns // 2):
        tile, part = divmod(r, 4)
        places.append([(G + 8 * (part // 2), 8 * tile + 2 * T + part % 2)])
    return _table(16, columns, places)


@cache
def inverse(table_bytes: bytes) -> np.ndarray:
    return np.argsort(np.frombuffer(table_bytes, np.int64))


def by_warp(value: np.ndarray, warps: int) -> np.ndarray:
    """Return a register [programs, threads] as [programs, warps, lanes]; sides of 1 stay."""
    if value.shape[1] == 1:
        return value[:, :, None]
    return value.reshape(value.shape[0], warps, 32)


def gather(values: list[np.ndarray], shape: tuple[int, int], table: np.ndarray) -> np.ndarray:
    """Return the matrix of every warp, [programs, warps, elements], in raw bits.

    values: registers of 32 bits. table: a layout; its elements have 16 or 32 bits.
    """
    programs, warps = shape[0], shape[1] // 32
    together = np.empty((programs, warps, len(values), 32), np.uint32)
    for r, value in enumerate(values):
        together[:, :, r] = by_warp(value, warps)
    kind = np.uint16 if len(table) == 64 * len(values) else np.uint32
    flat = together.view(kind).reshape(programs, warps, -1)
    return flat.take(table, axis=2)


def scatter(matrix: np.ndarray, table: np.ndarray) -> list[np.ndarray]:
    """Return the registers [programs, threads] of matrices [programs, warps, elements]."""
    programs, warps, count = matrix.shape
    flat = matrix.take(inverse(table.tobytes()), axis=2)
    flat = flat.reshape(programs, warps, count // 32, 32).transpose(2, 0, 1, 3)
    return list(np.ascontiguousarray(flat).reshape(count // 32, programs, warps * 32))


def numbers(bits: np.ndarray, kind: str) -> np.ndarray:
    """Return bf16, f16 or tf32 in float64. Tensor cores ignore the low 13 bits of a tf32."""
    if kind == "bf16":
        bits = floats.from_bf16(bits)
    elif kind == "f16":
        return bits.view(np.float16).astype(np.float64)
    else:
        bits = bits & np.uint32(0xFFFFE000)
    return bits.view(np.float32).astype(np.float64)


def multiply(a: np.ndarray, b: np.ndarray, c: np.ndarray, model: tuple[int, int] | None):
    """Return c + a b in float32: rounded once, or cut as a tensor core does.

    a [..., M, K] and b [..., K, N] float64; c [..., M, N] float32. model: (terms, extra bits) of
    `floats.truncated_sum`; None: the exact sum, rounded.
    """
    if model is None:
        return (np.matmul(a, b) + c).astype(np.float32)
    terms = a[..., :, None, :] * np.swapaxes(b, -1, -2)[..., None, :, :]
    return floats.truncated_sum(terms, c, *model)
