"""The cells of the suite `grouped`: mixtures, routings and token counts over one frozen linear.

    table       what varies                         where
    mixtures    experts E, rank r, K                uniform routing, one T: where wide and grouped
                                                    cross, R / K from 16 to 4096
    routing     who the tokens go to                one mixture, one T
    tokens      T                                   one mixture, uniform routing

A full product would be thousands of cells. What several tables show is measured once.
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


@dataclass(frozen=True)
class Cell:
    """A mixture, a routing of `testing.ROUTINGS` and T; and the tables that show it."""

    mixture: Mixture
    routing: str
    tokens: int
    tables: tuple[str, ...]

    @property
    def name(self) -> str:
        experts, rank, top_k = self.mixture
        return f"E={experts} r={rank} K={top_k} {self.routing} T={self.tokens}"


@dataclass(frozen=True)
class Sizes:
    """What each table varies, and the rest that it holds fixed.

    mixtures at T = tokens;  routed: the mixture of the table routing, at T = tokens;  scaled: that
    of the table tokens, at each of token_counts.
    """

    mixtures: tuple[Mixture, ...]
    tokens: int
    routed: Mixture
    scaled: Mixture
    token_counts: tuple[int, ...]


def mixtures(*cells: tuple[int, int, int]) -> tuple[Mixture, ...]:
    return tuple(Mixture(*cell) for cell in cells)


SIZES = {
    # On an H200 the model has wide and grouped cross at R / K = 245.
    "cuda": Sizes(
        mixtures(
            # The rank, few experts: R / K from 32 to 512.
            *((8, rank, 2) for rank in (8, 16, 32, 48, 64, 96, 128)),
            *((8, 64, top_k) for top_k in (1, 4)),
            # K, on either side of the model's crossover: R / K from 32 to 256.
            *((16, 16, top_k) for top_k in (1, 2, 4, 8)),
            (16, 128, 8),
            # The rank, many experts: R / K from 256 to 4096.
            *((64, rank, 2) for rank in (8, 16, 32, 64, 128)),
            *((64, 8, top_k) for top_k in (4, 8)),
            *((64, 64, top_k) for top_k in (1, 4, 8)),
            (64, 48, 8),
            # Few tokens for each expert, and weights of the experts far larger than W.
            *((256, 8, top_k) for top_k in (1, 2, 4, 8)),
            (256, 32, 4),
            (256, 128, 8),
        ),
        tokens=8192,
        routed=Mixture(64, 64, 4),
        scaled=Mixture(64, 64, 4),
        token_counts=(1024, 2048, 4096, 8192, 16384, 32768, 65536),
    ),
    # A second and more of wide products on two cores would be spent on the larger of these.
    "cpu": Sizes(
        mixtures(
            (8, 4, 4),
            (8, 8, 4),
            (8, 8, 2),
            (8, 16, 2),
            (8, 32, 2),
            (8, 24, 4),
            (8, 64, 2),
            (16, 8, 8),
            (64, 16, 8),
            (64, 16, 2),
            (64, 64, 4),
            (256, 8, 2),
        ),
        tokens=1024,
        routed=Mixture(64, 16, 2),
        scaled=Mixture(8, 16, 2),
        token_counts=(1024, 2048, 4096),
    ),
    # R / K on both sides of every threshold; a rank of 12 is no multiple of 16 bytes.
    "quick": Sizes(
        mixtures((8, 2, 2), (4, 12, 2), (8, 16, 1)),
        tokens=33,
        routed=Mixture(8, 16, 1),
        scaled=Mixture(8, 16, 1),
        token_counts=(1, 33),
    ),
}


def cells_of(
    sizes: Sizes,
    chosen: list[str],
    mixture: Mixture | None = None,
    routing: str | None = None,
    tokens: list[int] | None = None,
) -> list[Cell]:
    """The cells of the chosen tables, each once.

    mixture, routing, tokens: in place of the plan's, in every table.
    """
    varied = [mixture] if mixture else sizes.mixtures
    fixed = routing or "uniform"
    counts = tokens or [sizes.tokens]
    wanted = {
        "mixtures": [(each, fixed, T) for each in varied for T in counts],
        "routing": [
            (mixture or sizes.routed, each, T)
            for each in ([routing] if routing else ROUTINGS)
            for T in counts
        ],
        "tokens": [(mixture or sizes.scaled, fixed, T) for T in tokens or sizes.token_counts],
    }
    shown: dict[tuple, list[str]] = {}
    for table in TABLES:
        for cell in wanted[table] if table in chosen else ():
            shown.setdefault(cell, []).append(table)
    return [Cell(*cell, tuple(names)) for cell, names in shown.items()]
