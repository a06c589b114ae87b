"""From how many tokens on a layer is faster in the grouped form than in the wide one, modelled.

`dispatch.choose_impl` takes the grouped form if R > columns * K and T >= tokens. The number
`columns` is that of a large T (`roofline.crossover`). With fewer tokens the grouped form loses,
because it has about twice as many launches. It loses most for the smallest R above the threshold.
So `tokens` is found for that R:

    tokens = the smallest power of two from which on
             max(device, host) of the grouped form <= ALLOWED * max(device, host) of the wide form

The time of the device is that of `model/budget.py`. The time of the host counts where it is longer:
the device then waits for the launches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from benchmarks.model import budget
from benchmarks.model.budget import Cell
from benchmarks.model.launches import Layer
from benchmarks.model.roofline import LAUNCH

TOKENS = (256, 512, 1024, 2048, 4096)
RANK, TOP_K = 16, 2
# The roofline sets `columns` within a few percent.
ALLOWED = 1.05
# Microseconds of the host for one forward and backward without the launches themselves: replays of
# plans by the native library. Measured by `tests/tools/host_cost.py` on one core of an AMD EPYC:
# medians of eight runs on a quiet machine.
HOST = {"wide": 120.0, "grouped": 124.0}


class Step(NamedTuple):
    """Microseconds of a forward and backward of a layer: of the device, and of the host."""

    device: float
    host: float

    @property
    def us(self) -> float:
        """The time of the slower one."""
        return max(self.device, self.host)


def smallest_mixture(columns: float, tokens: int, grouped: bool) -> Layer:
    """Return a layer with the fewest experts whose R is above the threshold columns * K."""
    experts = math.floor(columns * TOP_K / RANK) + 1
    form = "grouped" if grouped else "wide"
    return Layer(form, tokens, ranks=(RANK,) * experts, top_k=TOP_K, grouped=grouped)


def step(cell: Cell) -> Step:
    """Return the time of a modelled layer, whose name is its form."""
    host = HOST[cell.layer] + LAUNCH["native"] * len(cell.launches)
    return Step(budget.total(cell.launches), host)


def tokens_threshold(wide: Mapping[int, Step], grouped: Mapping[int, Step]) -> int:
    """Return the threshold in tokens, from the times of both forms by T.

    If the grouped form loses at the largest T, that is twice the largest T.
    """
    threshold = 2 * max(wide)
    for tokens in sorted(wide, reverse=True):
        if grouped[tokens].us > ALLOWED * wide[tokens].us:
            break
        threshold = tokens
    return threshold
