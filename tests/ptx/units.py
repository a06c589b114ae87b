"""Accesses of 1 to 16 bytes as single elements of a NumPy array."""

from __future__ import annotations

import numpy as np

# Bytes of an access -> a dtype of that width whose elements are copied bit by bit.
UNITS = {
    1: np.dtype(np.uint8), 2: np.dtype(np.uint16), 4: np.dtype(np.uint32), 8: np.dtype(np.uint64),
    16: np.dtype(np.complex128),
}  # fmt: skip


def unit(size: int) -> np.dtype:
    """Return the dtype of accesses of `size` bytes."""
    return UNITS[size]


def elements(values: np.ndarray, kind: np.dtype) -> np.ndarray:
    """Return units [...] as elements [..., elements of a unit]."""
    values = np.ascontiguousarray(values)
    return values.view(kind).reshape(*values.shape, values.dtype.itemsize // kind.itemsize)


def add_in_turn(view: np.ndarray, places: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Add each value to the element at its place, one after the other. Return what each met there.

    view: [n]. places and values have the same shape.
    """
    order = np.argsort(places, axis=None, kind="stable")
    place, value = places.reshape(-1)[order], values.reshape(-1)[order]
    before = np.cumsum(value, dtype=value.dtype) - value
    first = np.searchsorted(place, place)
    met = np.empty_like(value)
    met[order] = view[place] + before - before[first]
    np.add.at(view, place, value)
    return met.reshape(places.shape)


def written(
    register: np.ndarray, values: np.ndarray, active: np.ndarray | None, shape: tuple[int, int]
) -> np.ndarray:
    """Return a register after the active threads have written it: one value for each of them.

    active: which threads; None if all of them are.
    """
    if active is None:
        return values
    result = np.broadcast_to(register, shape).copy()
    result[np.broadcast_to(active, shape)] = values
    return result


def units(values: list[np.ndarray], shape: tuple[int, int]) -> np.ndarray:
    """Return the vector of each thread, [programs, threads], as one unit."""
    if len(values) == 1:
        return np.broadcast_to(values[0], shape)
    together = np.empty((*shape, len(values)), values[0].dtype)
    for k, value in enumerate(values):
        together[..., k] = value
    return together.view(unit(together.itemsize * len(values)))[..., 0]
