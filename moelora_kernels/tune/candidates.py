"""The tiles to try for an entry of the table: the shipped tile and its neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, product
from typing import Any

from moelora_kernels.kernels import shrink_dx
from moelora_kernels.kernels.common.configs import FEW, SHARED, TileConfig
from moelora_kernels.kernels.common.tuned import ROUTED_TILES, Key

# A product needs 16 rows and columns. float32 rows that are not aligned take half a step.
LEAST, MOST = {2: 16, 4: 32}, 256
WARPS, STAGES = (4, 8), range(1, 6)


def candidates(key: Key, shipped: TileConfig, architecture: str, quick: bool) -> list[TileConfig]:
    """Return the shipped tile and then neighbours that fit into shared memory.

    A neighbour differs in one or two of tokens, step, warps and stages; with `quick` in one.
    """
    kernel, itemsize, _ = key
    values = {
        "tokens": [] if kernel in ROUTED_TILES else _halved_and_doubled(shipped.tokens, 16),
        "step": _halved_and_doubled(shipped.step, LEAST[itemsize]),
        "warps": [warps for warps in WARPS if warps != shipped.warps],
        "stages": [s for s in (shipped.stages - 1, shipped.stages + 1) if s in STAGES],
    }
    tiles = [shipped, *(shipped._replace(**change) for change in _changes(values, quick))]
    limit = SHARED[architecture]
    return [tile for tile in tiles if tile is shipped or shared_bytes(key, tile) <= limit]


def shared_bytes(key: Key, tile: TileConfig) -> int:
    """Return the bytes of shared memory that the loads of the large product take, at least.

    All stages but one are in shared memory; with tensor cores that read it, all of them. A tile
    that takes more than there is does not run, and is refused.
    """
    kernel, itemsize, columns = key
    kernel = kernel.removesuffix(FEW)
    loads = max(1, tile.stages - 1)
    if kernel == "grouped_expand":
        # The rows of u stay, and the rows of B are loaded ahead.
        elements = (tile.tokens + tile.step * loads) * columns
    elif kernel == "shrink_dx" and columns > shrink_dx.STEP:
        # The columns of A stay, and the tiles of dh are loaded ahead.
        elements = (tile.step + tile.tokens * loads) * columns
    elif kernel == "shrink_dx":
        elements = (tile.tokens + tile.step) * columns * loads
    elif kernel.startswith("ffn_inner"):
        # Both B and A, or the rank space of the pairs.
        elements = 2 * tile.step * columns * loads
    elif kernel.endswith("_grad"):
        elements = tile.tokens * (tile.step + columns) * loads
    else:
        elements = tile.step * (tile.tokens + columns) * loads
    return elements * itemsize


def _halved_and_doubled(value: int, least: int) -> list[int]:
    return [v for v in (value // 2, value * 2) if least <= v <= MOST]


def _changes(values: dict[str, list[int]], quick: bool) -> Iterator[dict[str, Any]]:
    for count in (1,) if quick else (1, 2):
        for names in combinations(values, count):
            for chosen in product(*(values[name] for name in names)):
                yield dict(zip(names, chosen, strict=True))
