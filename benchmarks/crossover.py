"""Where the wide and the grouped formulation cross: from what R / K on is grouped faster?

    python benchmarks/crossover.py results/grouped.json      tables, and what they say

A threshold c sends a mixture to grouped if R > c K, as `dispatch.choose_impl` does. Every c is
judged by what it costs over always taking the faster of the two, on the cells where both were
timed; the best c lies anywhere between two measured R / K, and both are named.
"""

import argparse
import itertools
import json
import math
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks.model import roofline
from benchmarks.output import tables
from benchmarks.output.tables import Table

# The GPU whose modelled crossover is shown where a device has no assumed rates of its own.
MODELLED = "NVIDIA H200"


class Pair(NamedTuple):
    """A cell in which both formulations were timed, in microseconds."""

    row: dict
    wide: float
    grouped: float

    @property
    def columns(self) -> float:
        return tables.columns_per_expert(self.row)

    @property
    def ratio(self) -> float:
        """Wide over grouped: above 1 where grouped is faster."""
        return self.wide / self.grouped

    def cost(self, columns: float) -> float:
        """What the threshold takes here over the faster of the two."""
        taken = self.grouped if self.columns > columns else self.wide
        return taken / min(self.wide, self.grouped)


class Crossover(NamedTuple):
    """A threshold anywhere from `low` up to `high`; its cost over the faster one of each cell."""

    low: float
    high: float
    mean: float
    worst: float


def pairs_of(rows: list[dict], table: str = "mixtures") -> list[Pair]:
    """The cells of a table in which both formulations were timed, by R / K."""
    found = []
    for cell in tables.split([row for row in rows if table in row.get("tables", ())], "cell"):
        timed = {row["provider"]: row for row in cell if row["median_us"]}
        if "moelora_wide" in timed and "moelora_grouped" in timed:
            row, of_grouped = timed["moelora_wide"], timed["moelora_grouped"]
            found.append(Pair(row, row["median_us"], of_grouped["median_us"]))
    return sorted(found, key=lambda pair: (pair.columns, pair.row["experts"], pair.row["rank"]))


def judge(pairs: list[Pair], columns: float) -> tuple[float, float]:
    """Geometric mean and largest cost of a threshold."""
    costs = [pair.cost(columns) for pair in pairs]
    return math.exp(sum(map(math.log, costs)) / len(costs)), max(costs)


def measured(pairs: list[Pair]) -> Crossover:
    """The cheapest threshold: from 0 if grouped always wins, up to infinity if it never does."""
    edges = [0.0, *sorted({pair.columns for pair in pairs}), math.inf]
    found = [Crossover(low, high, *judge(pairs, low)) for low, high in itertools.pairwise(edges)]
    return min(found, key=lambda each: (each.mean, each.worst))


def modelled(device: str) -> tuple[float, str]:
    """(4/3) FLOP/s over B/s, and the GPU whose assumed rates these are."""
    name = device if device in roofline.ASSUMED else MODELLED
    return roofline.crossover(roofline.ASSUMED[name]), name


def in_use(machine: dict) -> tuple[float, str]:
    """The threshold of the package for the device class of a result, and where it is from."""
    from moelora_kernels import dispatch

    threshold = dispatch.THRESHOLDS[machine["device_class"]]
    return threshold.columns, threshold.source


def bounds(of: Crossover) -> str:
    """The interval in words."""
    if of.low == 0.0:
        return f"grouped is faster from the smallest measured R / K = {of.high:g} on"
    if of.high == math.inf:
        return f"wide is faster up to the largest measured R / K = {of.low:g}"
    return f"grouped is faster from R / K between {of.low:g} and {of.high:g} on"


def say(pairs: list[Pair], machine: dict) -> list[str]:
    """What the pairs of one mode mean for the threshold."""
    best = measured(pairs)
    columns, source = in_use(machine)
    mean, worst = judge(pairs, columns)
    model, of = modelled(machine["device"])
    cost = "over the faster one of each cell: {:.3f}x in the mean, {:.2f}x at worst"
    return [
        f"Measured crossover: {bounds(best)} ({cost.format(best.mean, best.worst)}).",
        f"In use: {columns:g} K for {machine['device_class']} ({source}; "
        f"{cost.format(mean, worst)}). Model of the {of}: {model:.0f} K.",
    ]


def say_tokens(rows: list[dict], machine: dict) -> list[str]:
    """From how many tokens on grouped is faster, where R / K is above the threshold in use."""
    columns, _ = in_use(machine)
    pairs = [pair for pair in pairs_of(rows, "tokens") if pair.columns > columns]
    pairs.sort(key=lambda pair: pair.row["tokens"])
    if not pairs:
        return []
    slower = [pair.row["tokens"] for pair in pairs if pair.ratio < 1]
    faster = [pair.row["tokens"] for pair in pairs if pair.row["tokens"] > max(slower, default=0)]
    when = f"from T = {faster[0]} on" if faster else f"nowhere up to T = {max(slower)}"
    row = pairs[0].row
    mixture = f"E={row['experts']} r={row['rank']} K={row['top_k']}"
    return [f"In tokens, at {mixture}: grouped is faster {when} (of those measured)."]


def tables_of(result: dict) -> list[Table]:
    """Wide beside grouped by R / K, a table per case and mode; none where both were never timed."""
    found = []
    rows_of_suite = [row for row in result["rows"] if row["suite"] == "grouped"]
    for rows in tables.split(rows_of_suite, "case", "mode"):
        pairs = pairs_of(rows)
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
        remarks = say(pairs, machine) + say_tokens(rows, machine)
        found.append(Table(f"{caption}, {first['routing']} routing", lines, remarks))
    return found


def plot(result: dict, path: Path) -> bool:
    """Wide over grouped against R / K, a panel per mode, a mark per cell; False without any pair.

    Lines: 1, where both take the same time; the threshold in use; the modelled one.
    """
    of_modes = [
        pairs for rows in tables.split(result["rows"], "case", "mode") if (pairs := pairs_of(rows))
    ]
    if not of_modes:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure, axes = plt.subplots(
        1, len(of_modes), figsize=(6.0 * len(of_modes), 4.6), sharey=True, squeeze=False
    )
    machine = result["machine"]
    model, of = modelled(machine["device"])
    columns, source = in_use(machine)
    short = source.partition(":")[0]
    # Looked up by value, so that a K and an E look the same in every panel.
    top_ks = sorted({pair.row["top_k"] for pairs in of_modes for pair in pairs})
    experts = sorted({pair.row["experts"] for pairs in of_modes for pair in pairs})
    colours = {k: plt.get_cmap("viridis")((i + 0.5) / len(top_ks)) for i, k in enumerate(top_ks)}
    marks = dict(zip(experts, "osD^vPX*" * len(experts), strict=False))
    for panel, pairs in zip(axes[0], of_modes, strict=True):
        for k in top_ks:
            for e in experts:
                chosen = [p for p in pairs if (p.row["top_k"], p.row["experts"]) == (k, e)]
                if chosen:
                    panel.plot(
                        [pair.columns for pair in chosen],
                        [pair.ratio for pair in chosen],
                        marks[e],
                        color=colours[k],
                        label=f"E={e}, K={k}",
                    )
        panel.axhline(1.0, color="#555555", linestyle="--", linewidth=1.2)
        panel.axvline(columns, color="#d62728", label=f"in use: {columns:g} K ({short})")
        panel.axvline(model, color="#1f77b4", linestyle=":", label=f"model, {of}: {model:.0f} K")
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.set_title(f"{pairs[0].row['case']}, {tables.title(pairs[0].row['mode'])}")
        panel.set_xlabel("R / K: columns of rank space per expert that a token uses")
        panel.grid(alpha=0.3)
    axes[0][0].set_ylabel("wide / grouped (above 1: grouped is faster)")
    entries = {}
    for panel in axes[0]:
        entries |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    figure.legend(entries.values(), entries.keys(), loc="outside right center", frameon=False)
    figure.set_layout_engine("constrained")
    first = of_modes[0][0].row
    about = f"{first['dtype']}, T={first['tokens']}, {first['routing']} routing"
    figure.suptitle(f"{about}\n{tables.provenance(result)}")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True


def main(arguments: list[str] | None = None) -> None:
    """Print the crossover of result files of the suite `grouped`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path)
    for file in parser.parse_args(arguments).files:
        result = json.loads(file.read_text())
        print(f"{file}: {tables.provenance(result)}")
        found = tables_of(result)
        for table in found:
            print(tables.text(table))
        if not found:
            print("no cell has times of both moelora_wide and moelora_grouped")


if __name__ == "__main__":
    main()
