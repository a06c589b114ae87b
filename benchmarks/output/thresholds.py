"""The threshold in R / K between the wide and the grouped formulation, from a result file.

A threshold c chooses grouped for a mixture if R > c K, as `dispatch.choose_impl` does. The cost of
a threshold is the time of its choices over the time of the faster formulation of each cell. Only
cells in which both were timed count.
"""

import itertools
import math
from typing import NamedTuple

from benchmarks.model import roofline
from benchmarks.output import tables
from benchmarks.output.tables import Table

# The GPU whose modelled threshold is shown for devices without assumed rates.
DEFAULT_MODEL = "NVIDIA H200"


class Pair(NamedTuple):
    """A cell in which both formulations were timed: its row, and the two medians in us."""

    row: dict
    wide: float
    grouped: float

    @property
    def columns(self) -> float:
        """R / K."""
        return tables.columns_per_expert(self.row)

    @property
    def ratio(self) -> float:
        """Wide over grouped: above 1 if grouped is faster."""
        return self.wide / self.grouped

    def cost(self, threshold: float) -> float:
        """Return the time of the threshold's choice over the time of the faster formulation."""
        time = self.grouped if self.columns > threshold else self.wide
        return time / min(self.wide, self.grouped)


class Cost(NamedTuple):
    """The cost of a threshold over all cells: the geometric mean and the largest."""

    mean: float
    worst: float

    def __str__(self) -> str:
        return (
            f"over the faster formulation of each cell: {self.mean:.3f}x in the mean, "
            f"{self.worst:.2f}x at worst"
        )


class Interval(NamedTuple):
    """Thresholds from `low` up to `high` make the same choices in all cells, at the same cost."""

    low: float
    high: float
    cost: Cost


class Threshold(NamedTuple):
    """A threshold in R / K, and where it comes from."""

    columns: float
    source: str


def timed_pairs(rows: list[dict], table: str = "mixtures") -> list[Pair]:
    """Return the cells of a table in which both formulations were timed, ordered by R / K."""
    pairs = []
    for cell in tables.split([row for row in rows if table in row.get("tables", ())], "cell"):
        timed = {row["provider"]: row for row in cell if row["median_us"]}
        if "moelora_wide" in timed and "moelora_grouped" in timed:
            wide, grouped = timed["moelora_wide"], timed["moelora_grouped"]
            pairs.append(Pair(wide, wide["median_us"], grouped["median_us"]))
    return sorted(pairs, key=lambda pair: (pair.columns, pair.row["experts"], pair.row["rank"]))


def cost_of(pairs: list[Pair], threshold: float) -> Cost:
    """Return the cost of a threshold."""
    costs = [pair.cost(threshold) for pair in pairs]
    return Cost(math.exp(sum(map(math.log, costs)) / len(costs)), max(costs))


def cheapest(pairs: list[Pair]) -> Interval:
    """Return the cheapest thresholds: low = 0 if grouped always wins, high = inf if it never does.

    Every R / K between two measured ones makes the same choices.
    """
    edges = [0.0, *sorted({pair.columns for pair in pairs}), math.inf]
    intervals = [
        Interval(low, high, cost_of(pairs, low)) for low, high in itertools.pairwise(edges)
    ]
    return min(intervals, key=lambda interval: interval.cost)


def modelled(device: str) -> Threshold:
    """Return the threshold of the roofline: (4/3) FLOP/s over B/s at the assumed rates.

    device: its name; a device without assumed rates gets the threshold of DEFAULT_MODEL.
    """
    name = device if device in roofline.ASSUMED else DEFAULT_MODEL
    return Threshold(roofline.crossover(roofline.ASSUMED[name]), name)


def in_use(machine: dict) -> Threshold:
    """Return the threshold that the package uses for the device class of a result."""
    from moelora_kernels import dispatch

    threshold = dispatch.THRESHOLDS[machine["device_class"]]
    return Threshold(threshold.columns, threshold.source)


def describe(interval: Interval) -> str:
    """Return an interval of thresholds in words."""
    if interval.low == 0.0:
        return f"grouped is faster from the smallest measured R / K = {interval.high:g} on"
    if interval.high == math.inf:
        return f"wide is faster up to the largest measured R / K = {interval.low:g}"
    return f"grouped is faster from R / K between {interval.low:g} and {interval.high:g} on"


def threshold_remarks(pairs: list[Pair], machine: dict) -> list[str]:
    """Compare the cheapest threshold, the one in use and the modelled one, for one mode."""
    best, used, model = cheapest(pairs), in_use(machine), modelled(machine["device"])
    return [
        f"Measured crossover: {describe(best)} ({best.cost}).",
        f"In use: {used.columns:g} K for {machine['device_class']} ({used.source}; "
        f"{cost_of(pairs, used.columns)}). Model of the {model.source}: {model.columns:.0f} K.",
    ]


def token_remarks(rows: list[dict], machine: dict) -> list[str]:
    """Say from how many tokens on grouped is faster, if R / K is above the threshold in use."""
    threshold = in_use(machine).columns
    pairs = [pair for pair in timed_pairs(rows, "tokens") if pair.columns > threshold]
    pairs.sort(key=lambda pair: pair.row["tokens"])
    if not pairs:
        return []
    slower = [pair.row["tokens"] for pair in pairs if pair.ratio < 1]
    faster = [pair.row["tokens"] for pair in pairs if pair.row["tokens"] > max(slower, default=0)]
    where = f"from T = {faster[0]} on" if faster else f"nowhere up to T = {max(slower)}"
    row = pairs[0].row
    mixture = f"E={row['experts']} r={row['rank']} K={row['top_k']}"
    return [f"In tokens, at {mixture}: grouped is faster {where} (of the measured T)."]


def crossover_tables(result: dict) -> list[Table]:
    """Return a table per case and mode with wide beside grouped, ordered by R / K.

    A case and mode in which no cell has both times has no table.
    """
    crossovers = []
    grouped_rows = [row for row in result["rows"] if row["suite"] == "grouped"]
    for rows in tables.split(grouped_rows, "case", "mode"):
        pairs = timed_pairs(rows)
        if not pairs:
            continue
        lines = [["E", "r", "K", "R/K", "T", "wide", "grouped", "wide / grouped"]]
        for pair in pairs:
            sizes = [str(pair.row[field]) for field in ("experts", "rank", "top_k")]
            times = [tables.duration(pair.wide), tables.duration(pair.grouped)]
            tokens = str(pair.row["tokens"])
            lines.append([*sizes, f"{pair.columns:g}", tokens, *times, f"{pair.ratio:.2f}"])
        first, machine = pairs[0].row, result["machine"]
        caption = f"{first['case']}, crossover, {tables.title(first['mode'])}, {first['dtype']}"
        remarks = threshold_remarks(pairs, machine) + token_remarks(rows, machine)
        crossovers.append(Table(f"{caption}, {first['routing']} routing", lines, remarks))
    return crossovers
