"""The sizes of a recorded launch: its arguments and constants, and the tiles of its routing."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from moelora_kernels.kernels.common.launcher import Launch


def size_of(value) -> int:
    """Return the bytes of an element; of a tuple, of its first tensor; of None, 0."""
    if isinstance(value, tuple):
        value = value[0]
    return 0 if value is None else value.dtype.itemsize


class Sizes:
    """Arguments and constants of a launch as attributes."""

    def __init__(self, launch: Launch) -> None:
        self.__dict__ = {**launch.constants, **launch.arguments}
        self.size = lambda name: size_of(self.__dict__.get(name))
        self.programs = launch.programs


class Tile(NamedTuple):
    """Sorted positions of one expert: a tile, or the range of a partial sum."""

    expert: int
    first: int
    end: int
    positions: int


def tiles_of(s: Sizes, tiles: Tensor) -> list[Tile]:
    """Return the tiles that hold positions. Routing arrays have data in every recorded launch."""
    rows = tiles.tolist()
    ends = [first for _, first in rows[1:]] + [s.P]
    return [
        Tile(expert, first, end, end - first)
        for (expert, first), end in zip(rows, ends, strict=True)
        if first < end
    ]


def rank_of(s: Sizes, expert: int) -> int:
    return s.RANK or int(s.ranks_ptr[expert % s.E, 1])


def tile_map(s: Sizes, tiles: Tensor) -> int:
    """Bytes of `load_tile` of all programs. The last tile's end is P, which is not loaded."""
    programs_per_tile = s.programs // len(tiles)
    return programs_per_tile * (12 * len(tiles) - 4)
