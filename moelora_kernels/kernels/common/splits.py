"""Into how many parts a launcher splits the loops of its programs."""

from __future__ import annotations

import math
from functools import lru_cache

import torch

from moelora_kernels.kernels.common import configs
from moelora_kernels.kernels.common.configs import TileConfig

# The cost of a split, in steps of the loop: the start and end of a program, the second launch, and
# to store and load a partial sum. PARTIALS_AT_ONCE: partial sums that the second launch loads
# before it waits. Chosen by the model of `benchmarks/budget.py`; nothing was measured.
PROGRAM_STEPS, LAUNCH_STEPS, PARTIAL_STEPS, PARTIALS_AT_ONCE = 2, 10, 2, 4
# A part has at least so many steps, and a sum at most so many parts if the programs fill the GPU.
LEAST_STEPS, MOST_SPLITS = 4, 16


def num_splits(
    device: torch.device,
    tile_config: TileConfig,
    programs: int,
    steps: int,
    stores_partials: bool = False,
) -> int:
    """Return into how many parts to split the loops of `programs` programs, of `steps` steps each.

    stores_partials: there is a second launch, which adds partial sums, also without a split.
    """
    _, multiprocessors = configs.processors(device)
    return _cheapest_split(multiprocessors, tile_config.blocks, programs, steps, stores_partials)


@lru_cache(maxsize=4096)
def _cheapest_split(
    multiprocessors: int,
    blocks: tuple[int, int],
    programs: int,
    steps: int,
    stores_partials: bool,
) -> int:
    """Return the split that costs the fewest steps; the smallest one if several do.

    Programs run in waves of `multiprocessors` times blocks. A wave that is not full takes as long
    as a full one, unless it is the only one.
    """

    def cost(split: int) -> float:
        has_partials = stores_partials or split > 1
        at_once = blocks[has_partials]
        load = programs * split / multiprocessors
        # A multiprocessor runs its programs in rounds of `at_once`.
        runs = at_once * math.ceil(load / at_once) if load > at_once else max(1.0, load)
        total = runs * (math.ceil(steps / split) + PROGRAM_STEPS)
        if has_partials:
            total += LAUNCH_STEPS + load * PARTIAL_STEPS + split / PARTIALS_AT_ONCE
        return total

    most = min(steps // LEAST_STEPS, max(MOST_SPLITS, multiprocessors // max(1, programs)))
    return min(range(1, max(1, most) + 1), key=cost)
