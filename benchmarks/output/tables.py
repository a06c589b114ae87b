"""Tables of result rows, as text for a terminal and as Markdown."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

TITLES = {
    "fwd": "forward",
    "fwd_bwd": "forward + backward",
    "decode_graph": "forward in a CUDA graph",
}


class Table(NamedTuple):
    """A table: its caption, its lines (the first is the header) and remarks below it."""

    caption: str
    lines: list[list[str]]
    remarks: list[str]


def text(table: Table) -> str:
    """Return the table in aligned columns, for a terminal."""
    widths = [
        max(len(line[column]) for line in table.lines) for column in range(len(table.lines[0]))
    ]
    shown = [table.caption]
    for line in table.lines:
        first, *others = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        shown.append("  ".join([f"  {line[0]:<{len(first)}}", *others]))
    return "\n".join(shown + [f"  {remark}" for remark in table.remarks])


def markdown(table: Table) -> str:
    """Return the table in Markdown."""
    header, *body = table.lines
    rule = ["---", *("---:" for _ in header[1:])]
    grid = "\n".join(f"| {' | '.join(line)} |" for line in [header, rule, *body])
    return "\n\n".join([f"**{table.caption}**", grid, *table.remarks])


def title(mode: str) -> str:
    """Return a mode in words."""
    return TITLES.get(mode, mode)


def distinct(rows: list[dict], key: str) -> list:
    """Return the distinct values of a field, in the order of their first appearance."""
    return list(dict.fromkeys(row[key] for row in rows))


def split(rows: list[dict], *keys: str) -> list[list[dict]]:
    """Group the rows by the values of these fields, in the order of their first appearance.

    A field that a row does not have counts as None.
    """
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(tuple(row.get(key) for key in keys), []).append(row)
    return list(groups.values())


def duration(microseconds: float) -> str:
    """Return a time in us, or in ms from 10 ms on."""
    if microseconds < 1e4:
        return f"{microseconds:.0f} us" if microseconds >= 100 else f"{microseconds:.1f} us"
    return f"{microseconds / 1e3:.1f} ms"


def quantity(value: float | None, unit: str) -> str:
    """Return a number with its unit, or an empty string for None."""
    if value is None:
        return ""
    if unit == "us":
        return duration(value)
    if unit.startswith("T") and value < 0.1:
        value, unit = 1e3 * value, f"G{unit[1:]}"
    digits = f"{value:.0f}" if value >= 100 else f"{value:.3g}"
    return f"{value:.3f}" if unit == "ratio" else f"{digits} {unit}"


def provenance(result: dict) -> str:
    """Return the machine, the version of torch and the commit in one line."""
    machine, commit = result["machine"], result["commit"]
    head, dash, dirty = commit.partition("-")
    short = head[:12] + dash + dirty if commit else "unknown"
    return f"{machine['device']}, torch {machine['torch']}, commit {short}"


def ratios(rows: list[dict]) -> dict[tuple[int, str], float]:
    """Divide each median by the median of the frozen layer: (tokens, provider) -> ratio.

    rows: the rows of one case and one mode.
    """
    timed = {(r["tokens"], r["provider"]): r["median_us"] for r in rows if r["median_us"]}
    return {
        (tokens, provider): median / timed[tokens, "frozen"]
        for (tokens, provider), median in timed.items()
        if (tokens, "frozen") in timed
    }


def spread(rows: list[dict]) -> str:
    """Return a sentence on how far the samples of an entry lie apart: (p90 - p10) / median.

    Empty if no row has a time.
    """
    timed = [row for row in rows if row["median_us"]]
    shares = sorted((row["p90_us"] - row["p10_us"]) / row["median_us"] for row in timed)
    if not shares:
        return ""
    middle, largest = shares[len(shares) // 2], shares[-1]
    return (
        f"Spread, from p10 to p90: {100 * middle:.0f} % of the median in the middle entry, "
        f"{100 * largest:.0f} % in the widest."
    )


def mixture(row: dict) -> str:
    """Return the mixture of a row in words."""
    return f"{row['experts']} experts of rank {row['rank']}, top-{row['top_k']}"


# A remark names at most this many cells.
NAMED_CELLS = 3


def not_timed(rows: list[dict], cell: Callable[[dict], str]) -> list[str]:
    """Return a remark for each provider and reason that left a cell without a time.

    rows: the rows of one table;  cell: the name of the cell of a row.
    """
    cells: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row["status"] != "ok":
            key = (row["provider"], row["status"], row["reason"] or "")
            cells.setdefault(key, []).append(cell(row))
    every = len({cell(row) for row in rows})
    remarks = []
    for (provider, status, reason), names in cells.items():
        names = list(dict.fromkeys(names))
        where = ", ".join(names[:NAMED_CELLS])
        if len(names) > NAMED_CELLS:
            where += f" and {len(names) - NAMED_CELLS} more cells"
        where = "in this table" if 1 < len(names) == every else f"at {where}"
        verb = "not measured" if status == "left out" else status
        remarks.append(f"{provider}: {verb} {where} ({reason}).")
    return remarks


def caption(rows: list[dict], without: Sequence[str] = ()) -> str:
    """Return the case, mode, dtype, mixture and routing of the rows of one table.

    without: fields to leave out: "case", "mode", "mixture".
    """
    parts = {"case": rows[0]["case"], "mode": title(rows[0]["mode"]), "dtype": rows[0]["dtype"]}
    if mixed := next((row for row in rows if row.get("experts")), None):
        parts |= {"mixture": mixture(mixed), "routing": f"{mixed['routing']} routing"}
    return ", ".join(part for name, part in parts.items() if name not in without)


def by_tokens(rows: list[dict]) -> Table:
    """Return a table with a line per provider: the time and the ratio to frozen at each T.

    The last columns are the memory at the largest T and, if it was measured, the host's time of a
    call at the smallest T. A provider that was not timed has its status in the place of the time,
    and a remark with the reason.

    rows: the rows of one case, one mixture and one mode.
    """
    tokens = sorted(distinct(rows, "tokens"))
    by_cell = {(row["tokens"], row["provider"]): row for row in rows}
    ratio_to_frozen = ratios(rows)
    lines = [["provider", *(f"T={t}" for t in tokens), f"extra MiB at T={tokens[-1]}"]]
    with_host = any(row.get("host_us") for row in rows)
    if with_host:
        lines[0].append(f"host at T={tokens[0]}")
    for provider in distinct(rows, "provider"):
        line = [provider]
        for t in tokens:
            row = by_cell.get((t, provider))
            if row is None:
                line.append("")
            elif row["median_us"] is None:
                line.append(row["status"])
            else:
                ratio = ratio_to_frozen.get((t, provider))
                shown = "" if ratio is None else f"  {ratio:.2f}x"
                line.append(duration(row["median_us"]) + shown)
        memory = by_cell.get((tokens[-1], provider), {}).get("peak_extra_mib")
        line.append("-" if memory is None else f"{memory:.3g}" if memory < 10 else f"{memory:.0f}")
        if with_host:
            host = by_cell.get((tokens[0], provider), {}).get("host_us")
            line.append(quantity(host, "us") or "-")
        lines.append(line)
    return Table(caption(rows), lines, not_timed(rows, lambda row: f"T={row['tokens']}"))


def by_variant(rows: list[dict]) -> Table:
    """Return a table with a line per variant: the measured value, then the predicted one.

    rows: the rows of one measurement of the suite `machine`.
    """
    lines = [["case", "variant", "measured", "p10", "p90", "predicted", "measured / predicted"]]
    remarks = []
    for row in rows:
        median, predicted = row["median"], row["predicted"]
        values = [quantity(row[field], row["unit"]) for field in ("median", "p10", "p90")]
        if median is None:
            values[0] = row["status"]
        ratio = f"{median / predicted:.2f}" if median and predicted else ""
        name = [row["case"], row["variant"]]
        lines.append([*name, *values, quantity(predicted, row["unit"]), ratio])
        remark = f"{row['status']}: {row['reason']}" if row["reason"] else row["note"]
        if remark:
            remarks.append(f"{row['case']}, {row['variant']}: {remark}")
    return Table(f"{rows[0]['measurement']}, {rows[0]['dtype']}", lines, remarks)


class Varied(NamedTuple):
    """The fields of a row that vary in a table of the suite `grouped`, and the table's title."""

    fields: tuple[str, ...]
    title: str


GROUPED_TABLES = {
    "mixtures": Varied(("experts", "rank", "top_k"), "experts, ranks and K"),
    "routing": Varied(("routing",), "distribution of the tokens over the experts"),
    "tokens": Varied(("tokens",), "time per token"),
}
SYMBOLS = {"experts": "E", "rank": "r", "top_k": "K", "routing": "routing", "tokens": "T"}


def columns_per_expert(row: dict) -> float:
    """Return R / K: the columns in rank space for each expert that a token uses."""
    return row["experts"] * row["rank"] / row["top_k"]


def by_mixture(rows: list[dict], name: str) -> Table:
    """Return a table with a line per cell: the time of the frozen layer, then ratios to it.

    In the table `tokens`, every entry also has the time per token.

    rows: the rows of one table of the suite `grouped`, one case and one mode.
    """
    fields, about = GROUPED_TABLES[name]
    ordered = sorted(rows, key=lambda row: row["tokens"]) if name == "tokens" else rows
    cells = split(ordered, "cell")
    providers = distinct(rows, "provider")
    # The row of the frozen layer has no mixture.
    mixtures = [next(row for row in cell if row.get("experts")) for cell in cells]
    # A run may measure several token counts in any table.
    if "tokens" not in fields and len({row["tokens"] for row in mixtures}) > 1:
        fields = (*fields, "tokens")
    with_columns = "rank" in fields
    header = [*(SYMBOLS[field] for field in fields), *(["R/K"] if with_columns else [])]
    lines = [[*header, *providers]]
    for cell, first in zip(cells, mixtures, strict=True):
        line = [str(first[field]) for field in fields]
        line += [f"{columns_per_expert(first):g}"] if with_columns else []
        by_provider = {row["provider"]: row for row in cell}
        frozen = by_provider.get("frozen", {}).get("median_us")
        for provider in providers:
            line.append(entry(by_provider.get(provider), frozen, divided=name == "tokens"))
        lines.append(line)
    case, first = rows[0]["case"], mixtures[0]
    fixed = [title(rows[0]["mode"]), rows[0]["dtype"]]
    fixed += [] if with_columns else [mixture(first)]
    fixed += [] if "routing" in fields else [f"{first['routing']} routing"]
    fixed += [] if "tokens" in fields else [f"T={first['tokens']}"]
    remarks = not_timed(rows, short_cell)
    remarks += slowest_routing(rows) if name == "routing" else []
    if "plain_lora" in providers:
        remarks.insert(0, "plain_lora has rank K r: the columns that one token uses.")
    return Table(f"{case}, {about}, {', '.join(fixed)}", lines, remarks)


def short_cell(row: dict) -> str:
    """Return the name of a cell without the routing, if that is the uniform one."""
    return row["cell"].replace(" uniform", "")


def slowest_routing(rows: list[dict]) -> list[str]:
    """Return a remark for each form of the package: its slowest routing over the uniform one."""
    remarks = []
    package = [row for row in rows if row["provider"].startswith("moelora") and row["median_us"]]
    for group in split(package, "provider", "tokens"):
        medians = {row["routing"]: row["median_us"] for row in group}
        if "uniform" in medians and len(medians) > 1:
            slowest = max(medians, key=medians.get)
            ratio = f"{medians[slowest] / medians['uniform']:.2f}x of uniform"
            remarks.append(f"{group[0]['provider']} is slowest with {slowest}: {ratio}.")
    return remarks


def per_token(row: dict) -> str:
    """Return the time per token."""
    nanoseconds = 1e3 * row["median_us"] / row["tokens"]
    return f"{nanoseconds:.1f} ns" if nanoseconds < 1e3 else duration(nanoseconds / 1e3)


def entry(row: dict | None, frozen: float | None, divided: bool) -> str:
    """Return the entry of a provider in a table of the suite `grouped`.

    frozen shows its time. Any other provider shows its ratio to frozen; `moelora` also shows the
    formulation that impl="auto" chose. A provider without a time shows its status.

    frozen: the median of the frozen layer in us;  divided: also show the time per token.
    """
    if row is None:
        return ""
    if row["median_us"] is None:
        return row["status"]
    time = per_token(row) if divided else ""
    if row["provider"] == "frozen" or frozen is None:
        return time or duration(row["median_us"])
    formulation = row["impl"] if row["provider"] == "moelora" else ""
    parts = [time, f"{row['median_us'] / frozen:.2f}x", formulation]
    return " ".join(part for part in parts if part)


def is_machine(rows: list[dict]) -> bool:
    """Return whether these are rows of the suite `machine`: measurements, not layers."""
    return bool(rows) and "measurement" in rows[0]


def make_tables(rows: list[dict], names: list[str] | None = None) -> list[Table]:
    """Return every table of the rows of one suite.

    names: the tables of the suite `grouped` to return; None: all.
    """
    if not rows:
        return []
    if is_machine(rows):
        return [by_variant(group) for group in split(rows, "measurement")]
    if rows[0]["suite"] != "grouped":
        return [by_tokens(group) for group in split(rows, "case", "mixture", "mode")]
    tables = []
    for name in GROUPED_TABLES if names is None else [n for n in GROUPED_TABLES if n in names]:
        shown = [row for row in rows if name in row["tables"]]
        tables += [by_mixture(group, name) for group in split(shown, "case", "mode")]
    return tables
