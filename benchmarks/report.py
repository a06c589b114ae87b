"""Tables and plots from result files.

    python benchmarks/report.py benchmarks/results/<gpu>/*.json            Markdown on stdout
    python benchmarks/report.py --cases 4096x4096 --modes fwd results/linear.json
    python benchmarks/report.py --readme README.md                         rewrites its tables

README's tables are the output of this command, never typed: they stand between the lines

    <!-- table: benchmarks/results/<machine>/linear.json cases=4096x4096 modes=fwd_bwd -->
    <!-- end of table -->
"""

import argparse
import json
import re
import sys
from pathlib import Path

# Colour and line of each provider, the same in every plot. The package and its honest rivals are
# drawn strongest; whoever is missing here gets grey.
STYLES = {
    "frozen": ("#555555", "--"),
    "moelora": ("#d62728", "-"),
    "masked": ("#1f77b4", "-"),
    "masked_compiled": ("#17becf", "-"),
    "plain_lora": ("#2ca02c", ":"),
    "loop": ("#9467bd", "-."),
    "stacked": ("#8c564b", "-."),
    "grouped_mm": ("#ff7f0e", "-."),
}

# Ratios beyond this leave the plot: what matters happens between 1x and 2x.
HIGHEST_RATIO = 8.0
COARSE_TICKS = (1, 1.25, 1.5, 2, 3, 4, 6, 8)
FINE_TICKS = (1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.75, 2, 2.5, 3)

TITLES = {"fwd": "forward", "fwd_bwd": "forward + backward"}


def title(mode: str) -> str:
    return TITLES.get(mode, mode)


def distinct(rows: list[dict], key: str) -> list:
    """The values of a field in the order of their first appearance."""
    return list(dict.fromkeys(row[key] for row in rows))


def duration(microseconds: float) -> str:
    if microseconds < 1e4:
        return f"{microseconds:.0f} us" if microseconds >= 100 else f"{microseconds:.1f} us"
    return f"{microseconds / 1e3:.1f} ms"


def quantity(value: float | None, unit: str) -> str:
    """A number with its unit; empty for none."""
    if value is None:
        return ""
    if unit == "us":
        return duration(value)
    if unit.startswith("T") and value < 0.1:
        value, unit = 1e3 * value, f"G{unit[1:]}"
    digits = f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    return f"{value:.3f}" if unit == "ratio" else f"{digits} {unit}"


def of_machine(rows: list[dict]) -> bool:
    """Whether these rows are the suite `machine`'s: measurements, not layers."""
    return bool(rows) and "measurement" in rows[0]


def measured_grid(rows: list[dict]) -> list[list[str]]:
    """A header and a line per row of one measurement: what was measured, then what predicted."""
    lines = [["case", "of", "measured", "p10", "p90", "predicted", "measured / predicted"]]
    for row in rows:
        predicted = row["predicted"]
        measured = [quantity(row[field], row["unit"]) for field in ("median", "p10", "p90")]
        against = f"{row['median'] / predicted:.2f}" if row["median"] and predicted else ""
        if row["median"] is None:
            measured[0] = row["status"]
        given = [row["case"], row["variant"]]
        lines.append([*given, *measured, quantity(predicted, row["unit"]), against])
    return lines


def measured_remarks(rows: list[dict]) -> list[str]:
    """Why something was not timed, and the notes."""
    told = [f"{r['status']}: {r['reason']}" if r["reason"] else r["note"] for r in rows]
    return [
        f"{row['case']}, {row['variant']}: {text}"
        for row, text in zip(rows, told, strict=True)
        if text
    ]


def ratios(rows: list[dict]) -> dict[tuple[int, str], float]:
    """(tokens, provider) -> median over the frozen layer's median, of one case and mode."""
    timed = {(r["tokens"], r["provider"]): r["median_us"] for r in rows if r["median_us"]}
    return {
        (tokens, provider): median / timed[tokens, "frozen"]
        for (tokens, provider), median in timed.items()
        if (tokens, "frozen") in timed
    }


def grid(rows: list[dict]) -> list[list[str]]:
    """A header and one line per provider: median and ratio to frozen at each T, memory at most T.

    rows: those of one case and one mode. What was not timed says why instead.
    """
    if of_machine(rows):
        return measured_grid(rows)
    tokens = sorted(distinct(rows, "tokens"))
    found = {(row["tokens"], row["provider"]): row for row in rows}
    against = ratios(rows)
    lines = [["provider", *(f"T={t}" for t in tokens), f"extra MiB at T={tokens[-1]}"]]
    for provider in distinct(rows, "provider"):
        line = [provider]
        for t in tokens:
            row = found.get((t, provider))
            if row is None:
                line.append("")
            elif row["median_us"] is None:
                line.append(row["status"])
            else:
                ratio = against.get((t, provider))
                shown = "" if ratio is None else f"  {ratio:.2f}x"
                line.append(duration(row["median_us"]) + shown)
        memory = found.get((tokens[-1], provider), {}).get("peak_extra_mib")
        lines.append(
            [*line, "-" if memory is None else f"{memory:.3g}" if memory < 10 else f"{memory:.0f}"]
        )
    return lines


def remarks(rows: list[dict]) -> list[str]:
    """One line per reason why something was not timed, the same reason once."""
    if of_machine(rows):
        return measured_remarks(rows)
    seen: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row["status"] != "ok":
            key = (row["provider"], row["status"], row["reason"] or "")
            seen.setdefault(key, []).append(f"{row['tokens']}")
    return [
        f"{provider} {status} at T={','.join(tokens)}: {reason}"
        for (provider, status, reason), tokens in seen.items()
    ]


def caption(rows: list[dict]) -> str:
    """Case, mode and the mixture, or the measurement, as the title of a table."""
    if of_machine(rows):
        return f"{rows[0]['measurement']}, {rows[0]['dtype']}"
    mixed = next((row for row in rows if row.get("experts")), None)
    text = f"{rows[0]['case']}, {title(rows[0]['mode'])}, {rows[0]['dtype']}"
    if mixed is None:
        return text
    mixture = f"{mixed['experts']} experts of rank {mixed['rank']}, top-{mixed['top_k']}"
    return f"{text}, {mixture}, {mixed['routing']} routing"


def text_table(rows: list[dict]) -> str:
    """The grid for a terminal, with its caption and remarks."""
    lines = grid(rows)
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    shown = [caption(rows)]
    for line in lines:
        first, *others = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        shown.append("  ".join([f"  {line[0]:<{len(first)}}", *others]))
    return "\n".join(shown + [f"  {remark}" for remark in remarks(rows)])


def markdown_table(rows: list[dict]) -> str:
    """The grid in Markdown, with its caption and remarks."""
    header, *body = grid(rows)
    rule = ["---", *("---:" for _ in header[1:])]
    table = "\n".join(f"| {' | '.join(line)} |" for line in [header, rule, *body])
    return "\n\n".join([f"**{caption(rows)}**", table, *remarks(rows)])


def by_case_and_mode(rows: list[dict]) -> list[list[dict]]:
    """The rows of each table, in the order they were measured."""
    tables: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        tables.setdefault((row["case"], row["mode"]), []).append(row)
    return list(tables.values())


def tables(rows: list[dict]) -> list[list[dict]]:
    """The rows of each table: by measurement in the suite `machine`, else by case and mode."""
    if not of_machine(rows):
        return by_case_and_mode(rows)
    measurements = distinct(rows, "measurement")
    return [[row for row in rows if row["measurement"] == each] for each in measurements]


def provenance(result: dict) -> str:
    """Machine, versions and commit in one line."""
    machine, commit = result["machine"], result["commit"]
    head, dash, dirty = commit.partition("-")
    short = head[:12] + dash + dirty if commit else "unknown"
    return f"{machine['device']}, torch {machine['torch']}, commit {short}"


def markdown(result: dict, cases: list[str] | None = None, modes: list[str] | None = None) -> str:
    """Every table of a result file, under a line that says where it was measured and how."""
    rows = [
        row
        for row in result["rows"]
        if (cases is None or row["case"] in cases)
        and (modes is None or row.get("mode", modes[0]) in modes)
    ]
    cold = result["machine"]["cold_mib"] > 0
    caches = result["machine"]["cold_kind"] if cold else "warm-cache samples"
    against = "the factor is against the frozen layer"
    last = f"Extra memory: {result['machine']['memory_kind']}."
    if of_machine(rows):
        against = "`predicted` is what a model of the device says, not measured"
        last = "`host` is warm: calls in a row that nobody waits for."
    source = (
        f"Measured on {provenance(result)}: `{result['command']}`. Medians ({caches}); {against}."
    )
    return "\n\n".join([source, *map(markdown_table, tables(rows)), last]) + "\n"


def fill_tables(text: str, root: Path) -> str:
    """`text` with every table between its marker lines made anew from the file they name."""

    def fill(match: re.Match) -> str:
        chosen = {key: match[key].split(",") if match[key] else None for key in ("cases", "modes")}
        result = json.loads((root / match["file"]).read_text())
        return f"{match['open']}\n{markdown(result, **chosen)}\n{match['close']}"

    markers = (
        r"(?P<open><!-- table: (?P<file>\S+)"
        r"(?: cases=(?P<cases>\S+))?(?: modes=(?P<modes>\S+))? -->\n)"
        r".*?(?P<close><!-- end of table -->)"
    )
    return re.sub(markers, fill, text, flags=re.DOTALL)


def representative(rows: list[dict]) -> str:
    """The case of the plot: the one with the most token counts, then the largest."""

    def weight(case: str) -> tuple[int, int]:
        of_case = [row for row in rows if row["case"] == case]
        elements = of_case[0]["in_features"] * sum(of_case[0]["out_features"])
        return len(distinct(of_case, "tokens")), elements

    return max(distinct(rows, "case"), key=weight)


def plot(result: dict, path: Path, case: str | None = None) -> None:
    """Ratio to the frozen layer against tokens: a panel per mode, a line per provider.

    The suite `machine` has no plot: nothing is written.
    """
    if of_machine(result["rows"]):
        return
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    case = case or representative(result["rows"])
    tables = by_case_and_mode([row for row in result["rows"] if row["case"] == case])
    figure, axes = plt.subplots(
        1, len(tables), figsize=(6.0 * len(tables), 4.6), sharey=True, squeeze=False
    )
    highest = 1.0
    for panel, rows in zip(axes[0], tables, strict=True):
        against = ratios(rows)
        for provider in distinct(rows, "provider"):
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
        tokens = sorted(distinct(rows, "tokens"))
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_locator(FixedLocator(tokens))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
        panel.tick_params(axis="x", labelrotation=45 if len(tokens) > 6 else 0)
        panel.set_yscale("log")
        panel.set_title(title(rows[0]["mode"]))
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
    figure.suptitle(f"{caption(tables[0])}\n{provenance(result)}".replace(title("fwd") + ", ", ""))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Print the Markdown tables of the files; with --plots, draw DIR/<suite>.png anew as well."""
    parser = argparse.ArgumentParser(description="Markdown tables from benchmark results.")
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--readme", type=Path, help="rewrite the tables of this file")
    parser.add_argument("--cases", type=lambda text: text.split(","))
    parser.add_argument("--modes", type=lambda text: text.split(","))
    parser.add_argument("--plots", action="store_true", help="write FILE.png beside each FILE.json")
    options = parser.parse_args(arguments)
    if options.readme:
        path = options.readme
        filled = fill_tables(path.read_text(encoding="utf-8"), path.resolve().parent)
        path.write_text(filled, encoding="utf-8")
    for file in options.files:
        result = json.loads(file.read_text())
        sys.stdout.write(markdown(result, options.cases, options.modes) + "\n")
        if options.plots:
            plot(result, file.with_suffix(".png"))


if __name__ == "__main__":
    main()
