"""Global memory: the tensors of a launch, with guard bands, and the checks of every access."""

from __future__ import annotations

import numpy as np

from ptx.errors import AccessError, RaceError
from ptx.units import add_in_turn, unit

BASE = 1 << 32
# A tensor begins at a multiple of this.
ALIGNMENT = 512
# Bytes between two tensors, at least; and half as many as the larger of them. A tile of rows that
# hangs over the end of a tensor ends there.
GUARD = 1 << 15
# The values of the bytes that no tensor has.
POISON = 0xFB
NOBODY = -1


class GlobalMemory:
    """The tensors of one launch.

    Programs of a launch run in any order. So no byte may be written by two programs, or be written
    by one and read by another.
    """

    def __init__(self, tensors: list[tuple[np.ndarray, int]]) -> None:
        """tensors: (bytes, remainder of the address by 16) of each."""
        self.starts = []
        end = 0
        for data, remainder in tensors:
            guard = max(GUARD, len(data) // 2)
            self.starts.append(-(-(end + guard) // ALIGNMENT) * ALIGNMENT + remainder)
            end = self.starts[-1] + len(data) + guard
        end = -(-end // ALIGNMENT) * ALIGNMENT
        self.bytes = np.full(end, POISON, np.uint8)
        # By byte: the tensor; the program that wrote it.
        self.tensor = np.full(end, NOBODY, np.int16)
        self.writer = np.full(end, NOBODY, np.int32)
        self.lengths = [len(data) for data, _ in tensors]
        for number, ((data, _), start) in enumerate(zip(tensors, self.starts, strict=True)):
            self.bytes[start : start + len(data)] = data
            self.tensor[start : start + len(data)] = number
        # By tensor: whether a program loaded from it or stored to it.
        self.loaded = np.zeros(len(tensors), bool)
        self.stored = np.zeros(len(tensors), bool)
        # Of every load: first bytes, number of bytes, programs.
        self.loads: list[tuple[np.ndarray, int, np.ndarray]] = []

    def address(self, tensor: int) -> int:
        """Return the address of a tensor."""
        return BASE + self.starts[tensor]

    def contents(self, tensor: int) -> np.ndarray:
        """Return the bytes of a tensor."""
        start = self.starts[tensor]
        return self.bytes[start : start + self.lengths[tensor]]

    def _positions(self, address: np.ndarray, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the first byte and the tensor of every access. Raise AccessError if it is wrong.

        address: [n] or [programs, threads] uint64, of active threads.
        """
        first = address.astype(np.int64) - BASE
        if (first % size).any():
            raise AccessError(f"an address is not a multiple of {size} bytes")
        if first.size and (first.min() < 0 or first.max() + size > len(self.bytes)):
            raise AccessError(f"{size} bytes outside of every tensor")
        tensor = self.tensor[first]
        wrong = (tensor == NOBODY) | (tensor != self.tensor[first + size - 1])
        if wrong.any():
            raise AccessError(self._describe(int(first[wrong][0]), size))
        return first, tensor

    def _describe(self, first: int, size: int) -> str:
        near = min(
            range(len(self.starts)),
            key=lambda t: min(
                abs(first - self.starts[t]), abs(first - self.starts[t] - self.lengths[t])
            ),
        )
        return (
            f"{size} bytes outside of every tensor: at byte {first - self.starts[near]} of tensor "
            f"{near}, which has {self.lengths[near]}"
        )

    def load(self, address: np.ndarray, size: int, programs: np.ndarray) -> np.ndarray:
        """Return the units at the addresses of active threads.

        programs: the program of each, in a shape that broadcasts to that of `address`.
        """
        first, tensor = self._positions(address, size)
        self.loaded[tensor] = True
        self.loads.append((first, size, programs))
        return self.bytes.view(unit(size))[first // size]

    def store(self, address: np.ndarray, data: np.ndarray, programs: np.ndarray) -> None:
        """Write the units of active threads. Raise RaceError if another program wrote there."""
        size = data.dtype.itemsize
        first = self._written(address, size, programs)
        view = self.bytes.view(unit(size))
        view[first // size] = data
        if (view[first // size].view(np.uint8) != np.ascontiguousarray(data).view(np.uint8)).any():
            raise RaceError("two threads write different values to the same byte")

    def add(self, address: np.ndarray, data: np.ndarray, programs: np.ndarray) -> np.ndarray:
        """Add to the units of active threads, which take turns. Return what each of them met."""
        size = data.dtype.itemsize
        first = self._written(address, size, programs)
        return add_in_turn(self.bytes.view(unit(size)), first // size, data)

    def _written(self, address: np.ndarray, size: int, programs: np.ndarray) -> np.ndarray:
        """Enter writes of active threads, and return their first bytes."""
        first, tensor = self._positions(address, size)
        self.stored[tensor] = True
        every = first[..., None] + np.arange(size)
        programs = np.broadcast_to(programs, first.shape)[..., None]
        before = self.writer[every]
        self.writer[every] = programs
        # Two programs that write together: one of them finds the other's number.
        if ((before != NOBODY) & (before != programs)).any() or (
            self.writer[every] != programs
        ).any():
            raise RaceError("two programs write the same byte")
        return first

    def finish(self) -> None:
        """Raise RaceError if a program read a byte that another program wrote."""
        if not (self.loaded & self.stored).any():
            return
        for first, size, programs in self.loads:
            writer = self.writer[first[..., None] + np.arange(size)]
            programs = np.broadcast_to(programs, first.shape)[..., None]
            if ((writer != NOBODY) & (writer != programs)).any():
                tensor = self.tensor[first.flat[0]]
                raise RaceError(f"a program reads what another writes in tensor {tensor}")
