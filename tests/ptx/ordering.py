"""The detector of races between the threads of a program, in shared and in global memory.

The execution runs the threads of a warp in step, and `shared_memory.py` relies on it. Code that
nvcc compiles may not: each thread of a warp may run ahead, until a barrier of the warp or of the
program. So two accesses of different threads to the same word, one of which changes it, need a
barrier in between. Atomics need none among themselves.

Time counts the barriers that the launch ran, whichever program or warp did. An access bears the
time at which it ran. It comes before all accesses of its own thread, before those behind a later
barrier of its program, and before those of its warp behind a later barrier of the warp.
"""

from __future__ import annotations

import numpy as np

from ptx.errors import RaceError, Unsupported

# Bytes of a word: accesses to different words never conflict.
WORD = 4
# Accesses to the same word that a barrier must part if two threads make them.
CONFLICTS = {
    "load": ("store", "atomic"),
    "store": ("load", "store", "atomic"),
    "atomic": ("load", "store"),
}
# In the place of a thread or a warp: several of them, in no order; or none yet.
SEVERAL = -1
BEFORE_ALL = -1


class Latest:
    """The latest accesses of one kind to every word: their thread, its warp, and their time."""

    def __init__(self, words: int) -> None:
        self.thread = np.full(words, SEVERAL, np.int16)
        self.warp = np.full(words, SEVERAL, np.int16)
        self.time = np.full(words, BEFORE_ALL, np.int32)

    def precede(
        self,
        words: np.ndarray,
        threads: np.ndarray,
        program_barriers: np.ndarray,
        warp_barriers: np.ndarray,
    ) -> np.ndarray:
        """Return whether they come before accesses of these threads to these words, [n] each.

        program_barriers and warp_barriers: time of the last barrier of each one's program and warp.
        """
        time = self.time[words]
        return (
            (self.thread[words] == threads)
            | (time < program_barriers)
            | ((self.warp[words] == threads // 32) & (time < warp_barriers))
        )

    def add(self, words: np.ndarray, threads: np.ndarray, precede: np.ndarray, time: int) -> None:
        """Enter new accesses. They replace those that precede them, and join the others."""
        for latest, who in ((self.thread, threads), (self.warp, threads // 32)):
            both = np.where(precede | (latest[words] == who), who, SEVERAL)
            latest[words] = both
            # Of several threads that access the same word now, one has left its number.
            latest[words[latest[words] != both]] = SEVERAL
        self.time[words] = time


class Ordering:
    """The accesses and the barriers of a launch.

    shared: bytes of shared memory of a program. memory: bytes of global memory.
    """

    def __init__(self, programs: int, threads: int, shared: int, memory: int) -> None:
        self.time = 0
        # The time of the last barrier of every program, and of every warp.
        self.program_barriers = np.zeros(programs, np.int32)
        self.warp_barriers = np.zeros((programs, -(-threads // 32)), np.int32)
        self.shared_words = -(-shared // WORD)
        words = {"shared": programs * self.shared_words, "global": -(-memory // WORD)}
        self.latest = {
            (space, kind): Latest(count) for space, count in words.items() for kind in CONFLICTS
        }

    def barrier(self, programs: np.ndarray) -> None:
        """All threads of these programs waited for one another."""
        self.time += 1
        self.program_barriers[programs] = self.time

    def warp_barrier(self, programs: np.ndarray, warps: np.ndarray) -> None:
        """All threads of these warps, [n] each, waited for one another."""
        self.time += 1
        self.warp_barriers[programs, warps] = self.time

    def access(
        self,
        kind: str,
        space: str,
        at: np.ndarray,
        size: int,
        programs: np.ndarray,
        threads: np.ndarray,
    ) -> None:
        """Enter accesses of `size` bytes. Raise RaceError if another one is not ordered before.

        kind: a key of CONFLICTS. space: "shared" or "global".
        at: first bytes, from the start of the space on; programs and threads of each; all [n].
        """
        if size % WORD:
            raise Unsupported(f"the order of accesses of {size} bytes")
        words = at // WORD
        if space == "shared":
            words = words + programs * self.shared_words
        if size > WORD:
            count = size // WORD
            words = (words[:, None] + np.arange(count)).reshape(-1)
            programs, threads = programs.repeat(count), threads.repeat(count)
        barriers = self.program_barriers[programs], self.warp_barriers[programs, threads // 32]
        for other in CONFLICTS[kind]:
            if not self.latest[space, other].precede(words, threads, *barriers).all():
                raise RaceError(f"{kind}: no barrier behind the {other} of another thread")
        latest = self.latest[space, kind]
        latest.add(words, threads, latest.precede(words, threads, *barriers), self.time)
