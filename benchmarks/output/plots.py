"""Plots of result files, drawn with matplotlib."""

from pathlib import Path

from benchmarks.output import tables, thresholds

# Colour and line of each provider, the same in every plot. Other providers are drawn in grey.
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
    "loop_shared_down": ("#7f3f6f", "-."),
    "stacked": ("#8c564b", "-."),
    "grouped_mm": ("#ff7f0e", "-."),
}

# Larger ratios are cut off: the differences that matter lie between 1x and 2x.
HIGHEST_RATIO = 8.0
COARSE_TICKS = (1, 1.25, 1.5, 2, 3, 4, 6, 8)
FINE_TICKS = (1, 1.1, 1.2, 1.3, 1.4, 1.5, 1.75, 2, 2.5, 3)


def plot(result: dict, path: Path, case: str | None = None) -> bool:
    """Draw the plot of a suite into `path`; return False if the suite has no plot.

    The suite `grouped` shows where the two formulations cross. The suite `machine` has no plot.
    The other suites show the ratio to the frozen layer against T: a panel per mixture and mode, a
    line per provider. The suite `decode` shows every case, the others the most telling one.
    """
    rows = result["rows"]
    if not rows or tables.is_machine(rows):
        return False
    if rows[0]["suite"] == "grouped":
        return plot_crossover(result, path)
    if case is None and rows[0]["suite"] != "decode":
        case = representative(rows)
    plot_tokens(result, path, [row for row in rows if case in (None, row["case"])])
    return True


def representative(rows: list[dict]) -> str:
    """Return the case to plot: the one with the most token counts, then the largest."""

    def weight(case: str) -> tuple[int, int]:
        case_rows = [row for row in rows if row["case"] == case]
        elements = case_rows[0]["in_features"] * sum(case_rows[0]["out_features"])
        return len(tables.distinct(case_rows, "tokens")), elements

    return max(tables.distinct(rows, "case"), key=weight)


# The fields that may differ between the panels of a plot, and the name of a panel.
PANEL = {
    "case": lambda rows: rows[0]["case"],
    "mode": lambda rows: tables.title(rows[0]["mode"]),
    "mixture": lambda rows: rows[0]["mixture"],
}


def plot_tokens(result: dict, path: Path, shown: list[dict]) -> None:
    """Draw the ratio to the frozen layer against T, for the rows `shown`: a panel per table."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    panels = tables.split(shown, "case", "mixture", "mode")
    names = [field for field in PANEL if len(tables.split(shown, field)) > 1] or ["mode"]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(6.0 * len(panels), 4.6), sharey=True, squeeze=False
    )
    highest = 1.0
    for panel, rows in zip(axes[0], panels, strict=True):
        ratios = tables.ratios(rows)
        for provider in tables.distinct(rows, "provider"):
            points = sorted((t, ratio) for (t, name), ratio in ratios.items() if name == provider)
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
        panel.set_title(", ".join(PANEL[name](rows) for name in names))
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
    caption = tables.caption(panels[0], without=names)
    figure.suptitle(f"{caption}\n{tables.provenance(result)}")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def plot_crossover(result: dict, path: Path) -> bool:
    """Draw wide over grouped against R / K; return False if no cell has both times.

    A panel per mode, a mark per cell. Lines: equal times, the threshold in use, the modelled one.
    """
    modes = [
        pairs
        for rows in tables.split(result["rows"], "case", "mode")
        if (pairs := thresholds.timed_pairs(rows))
    ]
    if not modes:
        return False
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure, axes = plt.subplots(
        1, len(modes), figsize=(6.0 * len(modes), 4.6), sharey=True, squeeze=False
    )
    machine = result["machine"]
    model, used = thresholds.modelled(machine["device"]), thresholds.in_use(machine)
    used_label = f"in use: {used.columns:g} K ({used.source.partition(':')[0]})"
    model_label = f"model, {model.source}: {model.columns:.0f} K"
    # A K has the same colour and an E the same mark in every panel.
    top_ks = sorted({pair.row["top_k"] for pairs in modes for pair in pairs})
    experts = sorted({pair.row["experts"] for pairs in modes for pair in pairs})
    colours = {k: plt.get_cmap("viridis")((i + 0.5) / len(top_ks)) for i, k in enumerate(top_ks)}
    marks = dict(zip(experts, "osD^vPX*" * len(experts), strict=False))
    for panel, pairs in zip(axes[0], modes, strict=True):
        for k in top_ks:
            for e in experts:
                shown = [p for p in pairs if (p.row["top_k"], p.row["experts"]) == (k, e)]
                if shown:
                    panel.plot(
                        [pair.columns for pair in shown],
                        [pair.ratio for pair in shown],
                        marks[e],
                        color=colours[k],
                        label=f"E={e}, K={k}",
                    )
        panel.axhline(1.0, color="#555555", linestyle="--", linewidth=1.2)
        panel.axvline(used.columns, color="#d62728", label=used_label)
        panel.axvline(model.columns, color="#1f77b4", linestyle=":", label=model_label)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log", base=2)
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.set_title(f"{pairs[0].row['case']}, {tables.title(pairs[0].row['mode'])}")
        panel.set_xlabel("R / K: columns in rank space for each expert that a token uses")
        panel.grid(alpha=0.3)
    axes[0][0].set_ylabel("wide / grouped (above 1: grouped is faster)")
    entries = {}
    for panel in axes[0]:
        entries |= dict(zip(*reversed(panel.get_legend_handles_labels()), strict=True))
    figure.legend(entries.values(), entries.keys(), loc="outside right center", frameon=False)
    figure.set_layout_engine("constrained")
    first = modes[0][0].row
    about = f"{first['dtype']}, T={first['tokens']}, {first['routing']} routing"
    figure.suptitle(f"{about}\n{tables.provenance(result)}")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return True
