"""Tables and plots from result files.

    python benchmarks/report.py benchmarks/results/<gpu>/*.json            Markdown on stdout
    python benchmarks/report.py --cases 4096x4096 --modes fwd results/linear.json
    python benchmarks/report.py --readme README.md                         rewrites its tables

README's tables are the output of this command, never typed: they stand between the lines

    <!-- table: benchmarks/results/<machine>/linear.json cases=4096x4096 modes=fwd_bwd -->
    <!-- end of table -->

and, of the suite `grouped`, with tables=mixtures,routing,tokens,crossover or some of these.
"""

import argparse
import json
import re
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import crossover
from benchmarks.output import tables

# Colour and line of each provider, the same in every plot. The package and its honest rivals are
# drawn strongest; whoever is missing here gets grey.
STYLES = {
    "frozen": ("#555555", "--"),
    "moelora": ("#d62728", "-"),
    "moelora_wide": ("#ff9896", "-"),
    "moelora_grouped": ("#7b1fa2", "-"),
    "masked": ("#1f77b4", "-"),
    "masked_compiled": ("#17becf", "-"),
    "plain_lora": ("#2ca02c", ":"),
    "loop": ("#9467bd", "-."),
    "loop_shared": ("#e377c2", "-."),
    "stacked": ("#8c564b", "-."),
    "grouped_mm": ("#ff7f0e", "-."),
}

# Ratios beyond this leave the plot: what matters happens between 1x and 2x.
HIGHEST_RATIO = 8.0
COARSE_TICKS = (1, 1.25, 1.5, 2, 3, 4, 6, 8)
FINE_TICKS = (1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.75, 2, 2.5, 3)


# Tables of the suite `grouped` that can be chosen.
OF_GROUPED = (*tables.VARYING, "crossover")


def all_tables(result: dict, chosen: list[str] | None = None) -> list[tables.Table]:
    """The tables of a result file; `chosen` names some of those of the suite `grouped`."""
    found = tables.of_rows(result["rows"], chosen)
    if chosen is None or "crossover" in chosen:
        found += crossover.tables_of(result)
    return found


def markdown(
    result: dict,
    cases: list[str] | None = None,
    modes: list[str] | None = None,
    chosen: list[str] | None = None,
) -> str:
    """The tables of a result file, under a line that says where it was measured and how."""
    rows = [
        row
        for row in result["rows"]
        if (cases is None or row["case"] in cases)
        and (modes is None or row.get("mode", modes[0]) in modes)
    ]
    cold = result["machine"]["cold_mib"] > 0
    caches = result["machine"]["cold_kind"] if cold else "warm-cache samples"
    against = "the factor is against the frozen layer"
    last = [f"Extra memory: {result['machine']['memory_kind']}."]
    if of_machine(rows):
        against = "`predicted` is what a model of the device says, not measured"
        last = ["`host` is warm: calls in a row that nobody waits for."]
    elif rows and rows[0]["suite"] == "grouped":
        last = []
    source = f"Measured on {tables.provenance(result)}: `{result['command']}`."
    source += f" Medians ({caches}); {against}."
    found = all_tables(result | {"rows": rows}, chosen)
    return "\n\n".join([source, *map(tables.markdown, found), *last]) + "\n"


def of_machine(rows: list[dict]) -> bool:
    """Whether these rows are the suite `machine`'s: measurements, not layers."""
    return bool(rows) and "measurement" in rows[0]


def fill_tables(text: str, root: Path) -> str:
    """`text` with every table between its marker lines made anew from the file they name."""
    keys = ("cases", "modes", "tables")

    def fill(match: re.Match) -> str:
        result = json.loads((root / match["file"]).read_text())
        options = [match[key].split(",") if match[key] else None for key in keys]
        return f"{match['open']}\n{markdown(result, *options)}\n{match['close']}"

    options = "".join(rf"(?: {key}=(?P<{key}>\S+))?" for key in keys)
    markers = (
        rf"(?P<open><!-- table: (?P<file>\S+){options} -->\n).*?(?P<close><!-- end of table -->)"
    )
    return re.sub(markers, fill, text, flags=re.DOTALL)


def representative(rows: list[dict]) -> str:
    """The case of the plot: the one with the most token counts, then the largest."""

    def weight(case: str) -> tuple[int, int]:
        of_case = [row for row in rows if row["case"] == case]
        elements = of_case[0]["in_features"] * sum(of_case[0]["out_features"])
        return len(tables.distinct(of_case, "tokens")), elements

    return max(tables.distinct(rows, "case"), key=weight)


def plot(result: dict, path: Path, case: str | None = None) -> bool:
    """The plot of a suite at `path`; False where there is none.

    grouped: where the formulations cross (`crossover.plot`);  machine: none;  others: ratio to the
    frozen layer against tokens, a panel per mode, a line per provider.
    """
    rows = result["rows"]
    if not rows or of_machine(rows):
        return False
    if rows[0]["suite"] == "grouped":
        return crossover.plot(result, path)
    plot_tokens(result, path, case or representative(rows))
    return True


def plot_tokens(result: dict, path: Path, case: str) -> None:
    """Ratio to the frozen layer against tokens, of one case."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    of_modes = tables.split([row for row in result["rows"] if row["case"] == case], "mode")
    figure, axes = plt.subplots(
        1, len(of_modes), figsize=(6.0 * len(of_modes), 4.6), sharey=True, squeeze=False
    )
    highest = 1.0
    for panel, rows in zip(axes[0], of_modes, strict=True):
        against = tables.ratios(rows)
        for provider in tables.distinct(rows, "provider"):
            points = sorted((t, ratio) for (t, name), ratio in against.items() if name == provider)
            if not points:
                continue
            highest = max(highest, *(ratio for _, ratio in points))
            colour, line = STYLES.get(provider, ("#999999", "-"))
            panel.plot(
                *zip(*points, strict=True),
                label=provider,
                color=colour,
                linestyle=line,
                marker=None if provider == "frozen" else "o",
                markersize=4,
                linewidth=2.4 if provider == "moelora" else 1.4,
                zorder=3 if provider == "moelora" else 2,
            )
        tokens = sorted(tables.distinct(rows, "tokens"))
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_locator(FixedLocator(tokens))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
        panel.tick_params(axis="x", labelrotation=45 if len(tokens) > 6 else 0)
        panel.set_yscale("log")
        panel.set_title(tables.title(rows[0]["mode"]))
        panel.set_xlabel("tokens")
        panel.grid(alpha=0.3)
    top = min(1.15 * highest, HIGHEST_RATIO)
    coarse = top > 3
    axes[0][0].set_ylim(0.97 / (1.1 if coarse else 1.0), top)
    axes[0][0].yaxis.set_major_locator(FixedLocator(COARSE_TICKS if coarse else FINE_TICKS))
    axes[0][0].yaxis.set_minor_locator(NullLocator())
    axes[0][0].yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    axes[0][0].set_ylabel("time over the frozen layer")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    figure.set_layout_engine("constrained")
    caption = tables.by_tokens(of_modes[0]).caption
    caption = caption.replace(f"{tables.title(of_modes[0][0]['mode'])}, ", "")
    figure.suptitle(f"{caption}\n{tables.provenance(result)}")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Print the Markdown tables of the files; with --plots, draw DIR/<suite>.png anew as well."""
    parser = argparse.ArgumentParser(description="Markdown tables from benchmark results.")
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--readme", type=Path, help="rewrite the tables of this file")
    parser.add_argument("--cases", type=lambda text: text.split(","))
    parser.add_argument("--modes", type=lambda text: text.split(","))
    parser.add_argument("--tables", type=lambda text: text.split(","), help=", ".join(OF_GROUPED))
    parser.add_argument("--plots", action="store_true", help="write FILE.png beside each FILE.json")
    options = parser.parse_args(arguments)
    if unknown := sorted({*(options.tables or ())} - {*OF_GROUPED}):
        parser.error(f"argument --tables: unknown {unknown}; expected some of {OF_GROUPED}")
    if options.readme:
        path = options.readme
        filled = fill_tables(path.read_text(encoding="utf-8"), path.resolve().parent)
        path.write_text(filled, encoding="utf-8")
    for file in options.files:
        result = json.loads(file.read_text())
        sys.stdout.write(markdown(result, options.cases, options.modes, options.tables) + "\n")
        if options.plots:
            plot(result, file.with_suffix(".png"))


if __name__ == "__main__":
    main()
