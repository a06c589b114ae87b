"""mbarrier: barriers in shared memory whose phases count arrivals and the bytes of copies.

A phase ends when no arrival is pending and no byte. Threads wait for the end of a phase by its
parity. `clocks.py` follows what a wait makes known: a copy that overwrites bytes before all warps
that read them have said so is noticed, and so is a barrier that is used before its initialisation
is known, and a program that ends before others are done with its barriers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np

from ptx.clocks import ACCESSES, BEFORE_ALL, Clocks
from ptx.errors import AccessError, PtxError, RaceError, Unsupported
from ptx.shared_memory import SharedMemory

# Bits of an address in the shared memory of a cluster that say where in its program it lies. Above
# them: 0 for the own program, or 1 + rank.
RANK_BIT = 24
# Arrivals that an mbarrier can count.
MOST_ARRIVALS = (1 << 20) - 1


@dataclass
class Mbarrier:
    """The mbarriers that programs have at one address: arrays [programs] of

    count         arrivals of a phase; 0 before the initialisation
    pending       arrivals that the phase at hand waits for
    bytes         bytes that it waits for; negative if copies came before they were announced
    phase         number of the phase
    warp, time    the warp that initialised it, and when; fenced: whether a fence followed
    carrying      [programs, kinds, cluster, warps]: what arrivals of this phase know
    carried       [programs, kinds, cluster, warps]: what the last phase that ended hands on
    """

    count: np.ndarray
    pending: np.ndarray
    bytes: np.ndarray
    phase: np.ndarray
    warp: np.ndarray
    time: np.ndarray
    fenced: np.ndarray
    carrying: np.ndarray
    carried: np.ndarray

    @classmethod
    def none(cls, like: np.ndarray) -> Mbarrier:
        """Return mbarriers that nobody initialised; like: [programs, kinds, cluster, warps]."""
        numbers = (np.zeros(len(like), np.int64) for _ in range(6))
        return cls(*numbers, np.zeros(len(like), bool), np.zeros_like(like), np.zeros_like(like))

    def select(self, rows: np.ndarray) -> Mbarrier:
        """Return those of some of the programs."""
        return Mbarrier(*(getattr(self, field.name)[rows] for field in fields(self)))

    def advance(self) -> None:
        """Begin the next phase in programs in which one has ended."""
        ended = (self.count > 0) & (self.pending == 0) & (self.bytes == 0)
        self.phase[ended] += 1
        self.pending[ended] = self.count[ended]
        self.carried[ended] = np.maximum(self.carried[ended], self.carrying[ended])


@dataclass
class Transfer:
    """A bulk copy into the shared memory of one program, which not all threads have waited for.

    row       the program
    barrier   address of its mbarrier
    at        bytes of shared memory, and their values
    seen      [threads]: who has waited for the phase
    phase     of the mbarrier, which the copy is a part of; None before its bytes have come
    """

    row: int
    barrier: int
    at: np.ndarray
    values: np.ndarray
    seen: np.ndarray
    phase: int | None = None

    def is_part_of_an_ended_phase(self, barrier: Mbarrier) -> bool:
        """Return whether the phase of its mbarrier has ended."""
        return self.phase is not None and self.phase < barrier.phase[self.row]


class Mbarriers:
    """The mbarriers of the programs of a batch, and the copies that they wait for.

    late: the bytes of a copy come when a thread has to wait for them, not when it is issued.
    visited: when a warp of another rank used something of a program last.
    """

    def __init__(self, shared: SharedMemory, threads: int, cluster: int, late: bool) -> None:
        self.shared, self.threads, self.late = shared, threads, late
        self.clocks = Clocks(shared.programs, threads, cluster)
        self.by_address: dict[int, Mbarrier] = {}
        self.transfers: list[Transfer] = []
        self.visited = np.full((shared.programs, cluster, self.clocks.warps), BEFORE_ALL, np.int32)
        shared.follow(self.clocks)

    def select(self, rows: np.ndarray, shared: SharedMemory) -> Mbarriers:
        """Return those of some of the programs, whole clusters, with their shared memory."""
        part = object.__new__(Mbarriers)
        part.__dict__.update(self.__dict__)
        part.shared, part.clocks = shared, self.clocks.select(rows)
        shared.clocks = part.clocks
        part.by_address = {at: each.select(rows) for at, each in self.by_address.items()}
        part.visited = self.visited[rows]
        number = {int(row): i for i, row in enumerate(rows)}
        part.transfers = [
            replace(each, row=number[each.row], seen=each.seen.copy())
            for each in self.transfers
            if each.row in number
        ]
        return part

    def locate(self, rows: np.ndarray, address: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return (program, address in its shared memory) of addresses in that of a cluster."""
        rank, cluster = address >> RANK_BIT, self.clocks.cluster
        target = np.where(rank == 0, rows, rows // cluster * cluster + rank - 1)
        return target, address & ((1 << RANK_BIT) - 1)

    def initialise(
        self, rows: np.ndarray, warps: np.ndarray, address: np.ndarray, count: np.ndarray
    ) -> None:
        """Warps of `rows` initialise mbarriers of their programs; all [n]."""
        if ((count < 1) | (count > MOST_ARRIVALS)).any():
            raise PtxError("an mbarrier that counts no arrivals, or too many")
        if (address % 8).any() or (address + 8 > self.shared.limit).any():
            raise AccessError("an mbarrier that is not at 8 bytes of shared memory")
        for at in np.unique(address):
            mine = rows[address == at]
            each = self.by_address.setdefault(int(at), Mbarrier.none(self.clocks.known[:, 0]))
            if (each.count[mine] > 0).any():
                raise Unsupported("an mbarrier that is initialised twice")
            each.count[mine] = each.pending[mine] = count[address == at]
            each.warp[mine], each.time[mine] = warps[address == at], self.clocks.now

    def fence(self, rows: np.ndarray, warps: np.ndarray) -> None:
        """fence.mbarrier_init of warps of `rows`."""
        for each in self.by_address.values():
            each.fenced[rows[each.warp[rows] == warps]] = True

    def use(
        self,
        rows: np.ndarray,
        warps: np.ndarray,
        targets: np.ndarray,
        at: int,
        needs_fence: bool = False,
    ) -> Mbarrier:
        """Warps of `rows` use the mbarriers of programs `targets` at one address: return them.

        needs_fence: not only from other programs.
        """
        each, clocks = self.by_address.get(at), self.clocks
        if each is None or (each.count[targets] == 0).any():
            raise RaceError("uses an mbarrier that nobody initialised")
        far = targets != rows
        own = ~far & (each.warp[targets] == warps)
        known = clocks.known[rows, warps, ACCESSES, targets % clocks.cluster, each.warp[targets]]
        if not (own | (known > each.time[targets])).all():
            raise RaceError("uses an mbarrier: no barrier behind its initialisation")
        if not each.fenced[targets[far | needs_fence]].all():
            raise RaceError("uses an mbarrier: no fence behind its initialisation")
        self.visited[targets[far], rows[far] % clocks.cluster, warps[far]] = clocks.now
        return each

    def expect(
        self, rows: np.ndarray, warps: np.ndarray, address: np.ndarray, count: np.ndarray
    ) -> None:
        """The phases at hand wait for `count` more bytes of copies."""
        targets, address = self.locate(rows, address)
        for at in np.unique(address):
            mine = address == at
            each = self.use(rows[mine], warps[mine], targets[mine], int(at))
            np.add.at(each.bytes, targets[mine], count[mine])

    def arrive(
        self, rows: np.ndarray, warps: np.ndarray, address: np.ndarray, of_cluster: bool
    ) -> None:
        """Warps of `rows` arrive, a thread for each element.

        of_cluster: with .release.cluster; else other programs learn of products alone.
        """
        targets, address = self.locate(rows, address)
        for at in np.unique(address):
            mine = address == at
            each = self.use(rows[mine], warps[mine], targets[mine], int(at))
            np.subtract.at(each.pending, targets[mine], 1)
            if (each.pending < 0).any():
                raise PtxError("more arrivals than a phase of the mbarrier counts")
            known = self.clocks.release(rows[mine], warps[mine])
            if not of_cluster:
                known[targets[mine] != rows[mine], ACCESSES] = 0
            np.maximum.at(each.carrying, targets[mine], known)
            each.advance()

    def test(
        self,
        rows: np.ndarray,
        threads: np.ndarray,
        address: np.ndarray,
        parity: np.ndarray,
        of_cluster: bool,
    ) -> np.ndarray:
        """Return whether the phases of these parities have ended, [n].

        of_cluster: with .acquire.cluster; else the threads learn of other ranks products alone.
        """
        result, warps, clocks = np.zeros(len(rows), bool), threads // 32, self.clocks
        for at in np.unique(address):
            mine = np.flatnonzero(address == at)
            each = self.use(rows[mine], warps[mine], rows[mine], int(at))
            if self.late:
                waits = set(rows[mine[each.phase[rows[mine]] & 1 == parity[mine]]].tolist())
                for transfer in self.transfers:
                    is_next = transfer.phase is None and transfer.barrier == at
                    if is_next and transfer.row in waits:
                        self.land(transfer)
            mine = mine[each.phase[rows[mine]] & 1 != parity[mine]]
            result[mine] = True
            known = each.carried[rows[mine]]
            if not of_cluster:
                own = rows[mine] % clocks.cluster
                known[:, ACCESSES] *= (np.arange(clocks.cluster) == own[:, None])[..., None]
            clocks.acquire(rows[mine], warps[mine], known)
            for transfer in self.transfers:
                if transfer.barrier == at and transfer.is_part_of_an_ended_phase(each):
                    transfer.seen[threads[mine[rows[mine] == transfer.row]]] = True
        self._finish(lambda transfer: transfer.seen.all())
        return result

    def land(self, transfer: Transfer) -> None:
        """The bytes of a copy come: its mbarrier waits for them no more."""
        each = self.by_address[transfer.barrier]
        self.shared.put_bulk(transfer.row, transfer.at, transfer.values)
        transfer.phase = int(each.phase[transfer.row])
        each.bytes[transfer.row] -= len(transfer.values)
        each.advance()

    def _finish(self, is_visible: Callable[[Transfer], bool]) -> None:
        """All threads of a program see the bytes of the copies for which `is_visible` is true."""
        for transfer in self.transfers:
            if is_visible(transfer):
                self.shared.end_bulk(transfer.row, transfer.at)
        self.transfers = [each for each in self.transfers if not is_visible(each)]

    def barrier(self, of_cluster: bool = False) -> None:
        """All threads of every program, or of every cluster, waited for one another."""
        self.clocks.barrier(self.clocks.cluster if of_cluster else 1)
        self._finish(lambda transfer: transfer.seen.any())

    def end(self) -> None:
        """The programs end: nothing may come after them."""
        self._finish(lambda transfer: transfer.seen.any())
        if self.transfers:
            raise RaceError("a program ends under a pending cp.async.bulk")
        if (self.clocks.known[:, :, ACCESSES].max(axis=1) <= self.visited).any():
            raise RaceError("a program ends before it knows that others are done with it")
