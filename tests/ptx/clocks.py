"""What a warp knows of the other warps of its cluster: the order that barriers make.

Time counts events: arrivals, waits, barriers. An event bears the time at which it happened. A warp
that arrives at a barrier hands on all that it knows; a warp that waited for the barrier knows it
too. A program barrier and a cluster barrier join what their warps know.

There are two kinds of knowledge. Of the ACCESSES of another program a warp knows only through an
arrival and a wait of the scope of the cluster. That PRODUCTS (wgmma) have ended needs no scope,
because the end of a product is no access that waits in a cache: so the kernels of CUTLASS release
their tiles to copies.
"""

from __future__ import annotations

import numpy as np

# A time before all events.
BEFORE_ALL = -1
# Kinds of knowledge.
ACCESSES, PRODUCTS = 0, 1
KINDS = 2


class Clocks:
    """[programs, warps, kinds, cluster, warps] times: the warp of the first two numbers knows all
    events of a kind before that time of the warp of its cluster that the last two numbers name.

    Programs come in whole clusters: program p has rank p % cluster.
    """

    def __init__(self, programs: int, threads: int, cluster: int) -> None:
        self.now, self.cluster, self.warps = 1, cluster, -(-threads // 32)
        self.known = np.zeros((programs, self.warps, KINDS, cluster, self.warps), np.int32)

    def select(self, rows: np.ndarray) -> Clocks:
        """Return the clocks of some of the programs: whole clusters."""
        part = object.__new__(Clocks)
        part.__dict__.update(self.__dict__, known=self.known[rows])
        return part

    def release(self, rows: np.ndarray, warps: np.ndarray) -> np.ndarray:
        """These warps arrive at a barrier: return what they know, [n, kinds, cluster, warps]."""
        self.now += 1
        self.known[rows, warps, :, rows % self.cluster, warps] = self.now
        return self.known[rows, warps]

    def acquire(self, rows: np.ndarray, warps: np.ndarray, known: np.ndarray) -> None:
        """These warps waited for a barrier that hands on `known`, [n, kinds, cluster, warps]."""
        np.maximum.at(self.known, (rows, warps), known)

    def knows(self, row: int, warp: int, other: int, kind: int, time: int) -> bool:
        """Return whether a warp of `row` knows what all warps of `other` did at a time."""
        known = self.known[row, warp, kind, other % self.cluster] > time
        if other == row:
            # The warp knows what it did itself.
            known[warp] = True
        return bool(known.all())

    def barrier(self, ranks: int = 1) -> None:
        """All warps of every program waited for one another; ranks = cluster: of every cluster."""
        self.now += 1
        programs = np.arange(len(self.known))[:, None]
        warps = np.arange(self.warps)
        self.known[programs, warps, :, programs % self.cluster, warps] = self.now
        together = self.known.reshape(-1, ranks * self.warps, KINDS, self.cluster, self.warps)
        together[...] = together.max(axis=1, keepdims=True)
