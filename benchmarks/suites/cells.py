"""The cells of the suite `grouped`: mixtures, routings and token counts over one frozen linear.

    table       varies                              fixed
    mixtures    experts E, rank r, K                uniform routing, one T: R / K from 16 to 4096,
                                                    on both sides of the crossover
    routing     distribution of the tokens          one mixture, one T
    tokens      T                                   one mixture, uniform routing

All combinations would be thousands of cells. A cell that several tables show is measured once.
"""

from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.output.tables import GROUPED_TABLES
from moelora_kernels.testing import ROUTINGS

TABLES = tuple(GROUPED_TABLES)


class Mixture(NamedTuple):
    """E experts of rank r, K of them per token."""

    experts: int
    rank: int
    top_k: int

    def __str__(self) -> str:
        return f"E={self.experts} r={self.rank} K={self.top_k}"


DEFAULT_MIXTURE = Mixture(experts=8, rank=16, top_k=2)


def mixtures(*sizes: tuple[int, int, int]) -> tuple[Mixture, ...]:
    """Return mixtures from (E, r, K)."""
    return tuple(Mixture(*size) for size in sizes)


class Cell(NamedTuple):
    """A mixture, a routing distribution of `testing.ROUTINGS`, T, and the tables that show it."""

    mixture: Mixture
    routing: str
    tokens: int
    tables: tuple[str, ...]

    @property
    def name(self) -> str:
        """The name that result files record."""
        return f"{self.mixture} {self.routing} T={self.tokens}"


@dataclass(frozen=True)
class GroupedSizes:
    """The sizes of the suite `grouped`: those that a table varies and those that it fixes.

    cases: the linears;  mixtures: those of the table mixtures, at T = tokens;
    routed: the mixture of the table routing, at T = tokens;
    scaled: the mixture of the table tokens, at each of token_counts;
    tables, modes: those that are measured.
    """

    cases: tuple[str, ...]
    mixtures: tuple[Mixture, ...]
    tokens: int
    routed: Mixture
    scaled: Mixture
    token_counts: tuple[int, ...]
    tables: tuple[str, ...] = TABLES
    modes: tuple[str, ...] = ("fwd", "fwd_bwd")


def grouped_cells(
    sizes: GroupedSizes,
    tables: list[str] | None = None,
    mixture: Mixture | None = None,
    routing: str | None = None,
    tokens: list[int] | None = None,
) -> list[Cell]:
    """Return the cells of the tables, each once.

    tables, mixture, routing, tokens: replace those of `sizes`, in every table.
    """
    varied = [mixture] if mixture else sizes.mixtures
    fixed = routing or "uniform"
    counts = tokens or [sizes.tokens]
    combinations = {
        "mixtures": [(m, fixed, T) for m in varied for T in counts],
        "routing": [
            (mixture or sizes.routed, name, T)
            for name in ([routing] if routing else ROUTINGS)
            for T in counts
        ],
        "tokens": [(mixture or sizes.scaled, fixed, T) for T in tokens or sizes.token_counts],
    }
    shown: dict[tuple, list[str]] = {}
    for table in TABLES:
        for combination in combinations[table] if table in (tables or sizes.tables) else ():
            shown.setdefault(combination, []).append(table)
    return [Cell(*combination, tuple(names)) for combination, names in shown.items()]
