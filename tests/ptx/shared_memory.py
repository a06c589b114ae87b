"""Shared memory of several programs, and the detector of races between the warps of a program."""

from __future__ import annotations

import numpy as np

from ptx.clocks import ACCESSES, BEFORE_ALL, KINDS, PRODUCTS, Clocks
from ptx.errors import AccessError, RaceError
from ptx.units import add_in_turn, unit

# The last write to a byte: nobody's; a cp.async that nobody waited for; one before the last
# barrier; FIRST_WARP + w: one of warp w since the last barrier.
NEVER, PENDING, VISIBLE, FIRST_WARP = 0, 1, 2, 3
# The reads of a byte since the last barrier: none; FIRST_WARP + w: of warp w; of several warps.
UNREAD, SEVERAL = 0, 255
# Bytes that a wgmma reads together: one row of a core matrix.
CHUNK = 16


class SharedMemory:
    """[programs, size] bytes, and three more arrays of that shape.

    writer        who wrote a byte last
    reader        who read a byte since the last barrier
    unfenced      whether the byte was written since the last fence.proxy.async
    wgmma_reads   [programs, size / 16]: how many wgmma that nobody waited for read a chunk
    touched       [programs, kinds, size / 16]: time of the last access to a chunk, and of the last
                  end of a wgmma that read it; None unless `clocks` give a time (`follow`)
    """

    clocks: Clocks | None = None
    touched: np.ndarray | None = None

    def __init__(self, programs: int, size: int, threads: int) -> None:
        self.programs, self.limit = programs, size
        self.size = -(-size // 128) * 128
        self.code = (np.arange(threads) // 32 + FIRST_WARP).astype(np.uint8)
        # By bytes of an access: the code of the warp of every byte of every thread.
        self.codes = {n: self.code.repeat(n) for n in (1, 2, 4, 8, 16)}
        shape = (programs, self.size)
        self.bytes = np.full(shape, 0xFF, np.uint8)
        self.writer = np.zeros(shape, np.uint8)
        self.reader = np.zeros(shape, np.uint8)
        self.unfenced = np.zeros(shape, bool)
        self.wgmma_reads = np.zeros((programs, self.size // CHUNK), np.int16)
        self.pending_wgmma = 0

    def follow(self, clocks: Clocks) -> None:
        """Enter the times of accesses, for bulk copies."""
        self.clocks = clocks
        self.touched = np.full((self.programs, KINDS, self.size // CHUNK), BEFORE_ALL, np.int32)

    def select(self, rows: np.ndarray) -> SharedMemory:
        """Return the memory of some of the programs."""
        part = object.__new__(SharedMemory)
        part.__dict__.update(self.__dict__)
        part.programs = len(rows)
        for name in ("bytes", "writer", "reader", "unfenced", "wgmma_reads"):
            setattr(part, name, getattr(self, name)[rows])
        if self.touched is not None:
            part.touched = self.touched[rows]
        return part

    def _units(self, at: np.ndarray, size: int, active: np.ndarray | None) -> np.ndarray:
        """Return the positions of the accesses of `size` bytes, in units of that size.

        at: [1 or programs, 1 or threads] first bytes. active: bool of that shape, or None for all.
        The result is [programs, threads], or [n] if there is `active`.
        """
        shape = (self.programs, len(self.code))
        if active is None:
            rows = np.arange(self.programs)[:, None]
            if at.shape[1] == 1:
                at = np.broadcast_to(at, (at.shape[0], shape[1]))
        else:
            rows, threads = np.nonzero(np.broadcast_to(active, shape))
            at = np.broadcast_to(at, shape)[rows, threads]
        if (at % size).any():
            raise AccessError(f"an address in shared memory is not a multiple of {size} bytes")
        if at.size and (at.min() < 0 or at.max() + size > self.limit):
            raise AccessError(f"byte {at.max()} of {self.limit} bytes of shared memory")
        where = (rows * self.size + at) // size
        if self.touched is not None:
            self.touched[rows, ACCESSES, at // CHUNK] = self.clocks.now
        return where

    def _codes(self, size: int, active: np.ndarray | None) -> np.ndarray:
        """Return the code of the warp of every byte that `_units` names."""
        if active is None:
            return self.codes[size]
        shape = (self.programs, len(self.code))
        _, threads = np.nonzero(np.broadcast_to(active, shape))
        return self.code[threads].repeat(size)

    def _flat(self, plane: np.ndarray, size: int) -> np.ndarray:
        return plane.reshape(-1).view(unit(size))

    def load(self, at: np.ndarray, size: int, active: np.ndarray | None = None) -> np.ndarray:
        """Return the units that active threads read: [programs, threads] or [n]."""
        where = self._units(at, size, active)
        self._check_read(where, size, self._codes(size, active))
        return self._flat(self.bytes, size)[where]

    def store(self, at: np.ndarray, data: np.ndarray, active: np.ndarray | None = None) -> None:
        """Write the units of active threads: [programs, threads] or [n]."""
        size = data.dtype.itemsize
        where = self._units(at, size, active)
        codes = self._codes(size, active)
        data = np.ascontiguousarray(np.broadcast_to(data, where.shape))
        self._check_write(where, size, codes, data)
        view = self._flat(self.bytes, size)
        view[where] = data
        if (view[where].view(np.uint8) != data.view(np.uint8)).any():
            raise RaceError("two threads write different values to the same byte")
        self._mark_written(where, size, codes)

    def add(self, at: np.ndarray, data: np.ndarray, active: np.ndarray | None) -> np.ndarray:
        """Add to the units of active threads, which take turns. Return what each of them met.

        `ordering.py` checks that barriers part them from loads and stores.
        """
        size = data.dtype.itemsize
        where = self._units(at, size, active)
        writer = self._flat(self.writer, size)
        before = writer[where].view(np.uint8)
        if (before < VISIBLE).any():
            raise RaceError(_problem_of_read(before.min()))
        writer[where] = np.full(size, VISIBLE, np.uint8).view(unit(size))
        return add_in_turn(self._flat(self.bytes, size), where, data)

    def begin_copy(self, at: np.ndarray, size: int, active: np.ndarray | None) -> None:
        """A cp.async is issued: from now on it may write at any time."""
        where = self._units(at, size, active)
        self._check_write(where, size, self._codes(size, active), None)
        self._flat(self.writer, size)[where] = np.full(size, PENDING, np.uint8).view(unit(size))

    def put_copy(self, at: np.ndarray, data: np.ndarray, active: np.ndarray | None) -> None:
        """The bytes of a cp.async arrive."""
        size = data.dtype.itemsize
        self._flat(self.bytes, size)[self._units(at, size, active)] = data

    def end_copy(self, at: np.ndarray, size: int, active: np.ndarray | None) -> None:
        """The threads of a cp.async waited for it: they see the bytes, and others do not yet."""
        where = self._units(at, size, active)
        self._mark_written(where, size, self._codes(size, active))

    def barrier(self) -> None:
        """bar.sync: every thread sees what the others wrote before it."""
        np.minimum(self.writer, VISIBLE, out=self.writer)
        self.reader.fill(UNREAD)

    def fence(self) -> None:
        """fence.proxy.async of all threads: wgmma sees what they wrote before it."""
        self.unfenced.fill(False)

    # --- wgmma

    def begin_wgmma(self, rows: np.ndarray, chunks: np.ndarray) -> None:
        """A wgmma of some programs is issued, which reads these chunks until its wait."""
        if chunks[-1] >= self.limit // CHUNK:
            raise AccessError(f"wgmma reads behind {self.limit} bytes of shared memory")
        where = rows[:, None], chunks
        writer = self.writer.reshape(self.programs, -1, CHUNK)[where]
        if (writer != VISIBLE).any():
            raise RaceError(_problem_of_read(writer[writer != VISIBLE][0]))
        if self.unfenced.reshape(self.programs, -1, CHUNK)[where].any():
            raise RaceError("wgmma reads bytes written since the last fence.proxy.async")
        self.wgmma_reads[where] += 1
        self.pending_wgmma += 1

    def end_wgmma(self, rows: np.ndarray, chunks: np.ndarray) -> None:
        """A wait saw the end of such a wgmma: in each thread for its own warp.

        Other warps of the group may still read. So the bytes may be written behind a barrier.
        """
        where = rows[:, None], chunks
        self.wgmma_reads[where] -= 1
        self.pending_wgmma -= 1
        self.reader.reshape(self.programs, -1, CHUNK)[where] = SEVERAL
        if self.touched is not None:
            self.touched[rows[:, None], PRODUCTS, chunks] = self.clocks.now

    # --- bulk copies

    def begin_bulk(self, row: int, at: np.ndarray, issuer: tuple[int, int]) -> None:
        """A bulk copy into bytes `at` of a program is issued by a warp: (program, warp)."""
        if at.max() >= self.limit:
            raise AccessError(f"byte {at.max()} of {self.limit} bytes of shared memory")
        chunks = np.unique(at // CHUNK)
        if (self.writer[row, at] == PENDING).any():
            raise RaceError("overwrites bytes under a pending cp.async")
        if self.unfenced[row, at].any():
            raise RaceError("cp.async.bulk overwrites bytes without a fence.proxy.async")
        if self.wgmma_reads[row, chunks].any():
            raise RaceError("overwrites bytes that a pending wgmma reads")
        for kind in (ACCESSES, PRODUCTS):
            if not self.clocks.knows(*issuer, row, kind, self.touched[row, kind, chunks].max()):
                raise RaceError("cp.async.bulk overwrites bytes that not all warps have released")
        self.writer[row, at] = PENDING

    def put_bulk(self, row: int, at: np.ndarray, values: np.ndarray) -> None:
        """The bytes of a bulk copy come."""
        self.bytes[row, at] = values

    def end_bulk(self, row: int, at: np.ndarray) -> None:
        """All threads see the bytes of a bulk copy; wgmma sees them without a fence."""
        self.writer[row, at], self.reader[row, at] = VISIBLE, UNREAD

    # --- the detector

    def _check_read(self, where: np.ndarray, size: int, codes: np.ndarray) -> None:
        writer = self._flat(self.writer, size)[where].view(np.uint8)
        visible = (writer == VISIBLE) | (writer == codes)
        if not visible.all():
            raise RaceError(_problem_of_read(writer[~visible][0]))
        reads = self._flat(self.reader, size)
        before = reads[where].view(np.uint8)
        now = np.where((before == UNREAD) | (before == codes), codes, np.uint8(SEVERAL))
        reads[where] = now.view(unit(size))
        # Of several warps that read the same byte now, one has left its code.
        several = np.flatnonzero(reads[where].view(np.uint8) != now)
        if several.size:
            flat = (where.reshape(-1, 1) * size + np.arange(size)).reshape(-1)
            self.reader.reshape(-1)[flat[several]] = SEVERAL

    def _check_write(
        self, where: np.ndarray, size: int, codes: np.ndarray, data: np.ndarray | None
    ) -> None:
        """data: the units to write; None if they are not known yet."""
        reader = self._flat(self.reader, size)[where].view(np.uint8)
        if ((reader != UNREAD) & (reader != codes)).any():
            raise RaceError("overwrites what another warp read since the last barrier")
        writer = self._flat(self.writer, size)[where].view(np.uint8)
        if (writer == PENDING).any():
            raise RaceError("overwrites bytes under a pending cp.async")
        others = (writer >= FIRST_WARP) & (writer != codes)
        if others.any():
            # Several warps may write the same values.
            same = data is not None and (
                self._flat(self.bytes, size)[where].view(np.uint8) == data.view(np.uint8)
            )
            if data is None or (others & ~same).any():
                raise RaceError("overwrites what another warp wrote since the last barrier")
        if self.pending_wgmma and self.wgmma_reads.reshape(-1)[where * size // CHUNK].any():
            raise RaceError("overwrites bytes that a pending wgmma reads")

    def _mark_written(self, where: np.ndarray, size: int, codes: np.ndarray) -> None:
        kind = unit(size)
        self._flat(self.writer, size)[where] = codes.view(kind)
        self._flat(self.unfenced, size)[where] = np.full(size, True).view(kind)


def _problem_of_read(writer: int) -> str:
    if writer == NEVER:
        return "reads bytes of shared memory that nobody wrote"
    if writer == PENDING:
        return "reads bytes under a pending cp.async"
    return "reads what was written since the last barrier"
