"""cp.async.bulk.tensor: copies of boxes of a matrix by tensor maps, also to all of a cluster.

A tensor map is opaque to PTX. `tensor_map` returns one of its own, for a parameter of 128 bytes.
"""

from __future__ import annotations

import re
import struct
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from ptx.build import Builder, Run, implements
from ptx.clusters import threads_of, values_of
from ptx.errors import AccessError, PtxError, Unsupported
from ptx.mbarriers import Transfer
from ptx.program import PARAMETERS, Instruction
from ptx.shared_memory import CHUNK

MAP_BYTES = 128
_FORMAT = "<8sQqqqiii"
_MAGIC = b"2d map\0\0"
# Bytes of a row of a box that is swizzled, and of the pattern of 8 rows.
SWIZZLED_ROW, PATTERN = 128, 1024
MOST_ROWS = 256


class TensorMap(NamedTuple):
    """A matrix in global memory, and the boxes that a copy moves.

    address: of element (0, 0). rows, columns: of the matrix. pitch: bytes from row to row.
    box_rows, box_columns: of a box; what lies outside of the matrix becomes zeros.
    size: bytes of an element. Pieces of 16 bytes of a row of the box change places (swizzle 128B).
    """

    address: int
    rows: int
    columns: int
    pitch: int
    box_rows: int
    box_columns: int
    size: int


def tensor_map(*fields: int) -> bytes:
    """Return a parameter with the fields of a `TensorMap`. Raise PtxError if CUDA forbids it."""
    each = TensorMap(*fields)
    if each.address % 16 or each.pitch % 16 or each.columns * each.size > each.pitch:
        raise PtxError("a tensor map of rows that are not at multiples of 16 bytes, or overlap")
    if each.box_columns * each.size != SWIZZLED_ROW or not 0 < each.box_rows <= MOST_ROWS:
        raise Unsupported(f"boxes of {each.box_rows} x {each.box_columns}")
    return struct.pack(_FORMAT, _MAGIC, *each).ljust(MAP_BYTES, b"\0")


@lru_cache(maxsize=64)
def parse_map(data: bytes) -> TensorMap:
    """Return the tensor map of a parameter."""
    magic, *fields = struct.unpack_from(_FORMAT, data)
    if magic != _MAGIC:
        raise PtxError("the address of a tensor map points to something else")
    return TensorMap(*fields)


@lru_cache(maxsize=1024)
def box_bytes(first: int, rows: int) -> np.ndarray:
    """Return the bytes of shared memory, [rows, 128], of a box whose first byte is given."""
    at = first + np.arange(rows)[:, None] * SWIZZLED_ROW + np.arange(SWIZZLED_ROW)
    return at ^ ((at >> 7 & 7) << 4)


def read_box(memory, each: TensorMap, column: int, row: int, program: int) -> np.ndarray:
    """Return the bytes of a box, [box rows, 128]; zeros outside of the matrix."""
    pieces = np.arange(SWIZZLED_ROW // CHUNK)
    columns = column + pieces * CHUNK // each.size
    rows = row + np.arange(each.box_rows)
    inside = ((rows >= 0) & (rows < each.rows))[:, None] & (columns >= 0)
    inside = inside & (columns + CHUNK // each.size <= each.columns)
    cut = (columns < each.columns) & (columns + CHUNK // each.size > each.columns)
    if (cut | (column * each.size % CHUNK != 0)).any():
        raise Unsupported("a box that begins or ends inside of a piece of 16 bytes")
    address = each.address + rows[:, None] * each.pitch + columns * each.size
    data = np.zeros((each.box_rows, SWIZZLED_ROW), np.uint8)
    values = memory.load(address[inside], CHUNK, np.full(inside.sum(), program))
    data.reshape(*inside.shape, CHUNK)[inside] = values.view(np.uint8).reshape(-1, CHUNK)
    return data


@implements(
    "cp.async.bulk.tensor.2d.shared::cluster.global{,.tile}.mbarrier::complete_tx::bytes"
    "{,.multicast::cluster}"
)
def copy(build: Builder, ins: Instruction) -> Run:
    """Copy a box to shared memory, and take its bytes from those that an mbarrier waits for.

    multicast: to the same address of every rank of a mask, whose own mbarriers are told.
    """
    to, source, barrier, *mask = ins.operands
    match = re.fullmatch(r"\[\s*([%\w]+)\s*,\s*\{(.*)\}\s*\]", source)
    if not match or len(mask) != ("multicast::cluster" in ins.parts):
        raise Unsupported(f"operands {ins.operands}")
    tensor = build.source(match.group(1), 8)
    column, row = (build.source(text.strip(), 4) for text in match.group(2).split(","))
    (to_base, to_offset), (at_base, at_offset) = build.address(to), build.address(barrier)
    ranks = build.source(mask[0], 2) if mask else None
    guard = build.predicate(ins)

    def run(batch) -> None:
        _, rows, threads = threads_of(batch, guard)

        def of(register: int) -> np.ndarray:
            return values_of(batch, register, rows, threads)

        targets, to_bytes = batch.mbarriers.locate(rows, of(to_base) + to_offset)
        others, barriers = batch.mbarriers.locate(rows, of(at_base) + at_offset)
        if (targets != others).any():
            raise Unsupported("an mbarrier of another program than the bytes")
        of_ranks = of(ranks) if mask else np.zeros(len(rows), np.int64)
        columns, first_rows = of(column).astype(np.int32), of(row).astype(np.int32)
        for i, at in enumerate(of(tensor) - PARAMETERS):
            if at < 0 or at % 64 or at + MAP_BYTES > len(batch.parameters):
                raise AccessError("the address of a tensor map is not that of a parameter")
            each = parse_map(batch.parameters[at : at + MAP_BYTES].tobytes())
            program = int(batch.programs[rows[i], 0])
            box = read_box(batch.memory, each, int(columns[i]), int(first_rows[i]), program)
            issuer = int(rows[i]), int(threads[i]) // 32
            for target in receivers(batch, int(targets[i]), int(of_ranks[i]) if mask else None):
                issue(batch, issuer, target, int(barriers[i]), int(to_bytes[i]), box)
        batch.blocked.clear()

    return run


def receivers(batch, program: int, mask: int | None) -> list[int]:
    """Return the programs that a copy writes to: one, or the ranks of a mask of its cluster."""
    if mask is None:
        return [program]
    cluster = batch.mbarriers.clocks.cluster
    if mask == 0 or mask >> cluster:
        raise PtxError(f"a mask of ranks {mask:#x} in a cluster of {cluster}")
    return [program // cluster * cluster + rank for rank in range(cluster) if mask >> rank & 1]


def issue(
    batch, issuer: tuple[int, int], target: int, barrier: int, to: int, box: np.ndarray
) -> None:
    """A warp, (program, warp), issues the copy of a box to byte `to` of a program."""
    mbarriers, (row, warp) = batch.mbarriers, issuer
    if to % PATTERN:
        raise AccessError(f"a swizzled box at byte {to}, which is not a multiple of {PATTERN}")
    mbarriers.use(*(np.array([n]) for n in (row, warp, target)), barrier, needs_fence=True)
    at = box_bytes(to, len(box)).reshape(-1)
    batch.shared.begin_bulk(target, at, issuer)
    seen = np.zeros(batch.threads, bool)
    transfer = Transfer(target, barrier, at, box.reshape(-1), seen)
    mbarriers.transfers.append(transfer)
    if not mbarriers.late:
        mbarriers.land(transfer)
