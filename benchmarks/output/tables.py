"""Tables of result rows: for a terminal and in Markdown."""

from collections.abc import Callable
from typing import NamedTuple

TITLES = {"fwd": "forward", "fwd_bwd": "forward + backward"}


class Table(NamedTuple):
    """A header and lines of text, what they show, and what has to be said about them."""

    caption: str
    lines: list[list[str]]
    remarks: list[str]


def text(table: Table) -> str:
    """For a terminal."""
    widths = [
        max(len(line[column]) for line in table.lines) for column in range(len(table.lines[0]))
    ]
    shown = [table.caption]
    for line in table.lines:
        first, *others = (cell.rjust(width) for cell, width in zip(line, widths, strict=True))
        shown.append("  ".join([f"  {line[0]:<{len(first)}}", *others]))
    return "\n".join(shown + [f"  {remark}" for remark in table.remarks])


def markdown(table: Table) -> str:
    header, *body = table.lines
    rule = ["---", *("---:" for _ in header[1:])]
    grid = "\n".join(f"| {' | '.join(line)} |" for line in [header, rule, *body])
    return "\n\n".join([f"**{table.caption}**", grid, *table.remarks])


def title(mode: str) -> str:
    return TITLES.get(mode, mode)


def distinct(rows: list[dict], key: str) -> list:
    """The values of a field in the order of their first appearance."""
    return list(dict.fromkeys(row[key] for row in rows))


def split(rows: list[dict], *keys: str) -> list[list[dict]]:
    """The rows of each value of these fields, in the order of their first appearance."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return list(found.values())


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


def provenance(result: dict) -> str:
    """Machine, versions and commit in one line."""
    machine, commit = result["machine"], result["commit"]
    head, dash, dirty = commit.partition("-")
    short = head[:12] + dash + dirty if commit else "unknown"
    return f"{machine['device']}, torch {machine['torch']}, commit {short}"


def ratios(rows: list[dict]) -> dict[tuple[int, str], float]:
    """(tokens, provider) -> median over the frozen layer's median, of one case and mode."""
    timed = {(r["tokens"], r["provider"]): r["median_us"] for r in rows if r["median_us"]}
    return {
        (tokens, provider): median / timed[tokens, "frozen"]
        for (tokens, provider), median in timed.items()
        if (tokens, "frozen") in timed
    }


def mixture(row: dict) -> str:
    """Experts, rank, top-K in words."""
    return f"{row['experts']} experts of rank {row['rank']}, top-{row['top_k']}"


def not_timed(rows: list[dict], place: Callable[[dict], str]) -> list[str]:
    """One line per reason why a provider was not timed, with the places where."""
    seen: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row["status"] != "ok":
            key = (row["provider"], row["status"], row["reason"] or "")
            seen.setdefault(key, []).append(place(row))
    return [
        f"{provider} {status} at {', '.join(dict.fromkeys(places))}: {reason}"
        for (provider, status, reason), places in seen.items()
    ]


def by_tokens(rows: list[dict]) -> Table:
    """One line per provider: median and ratio to frozen at each T, memory at most T.

    rows: those of one case and one mode. What was not timed says why instead.
    """
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
    caption = f"{rows[0]['case']}, {title(rows[0]['mode'])}, {rows[0]['dtype']}"
    if mixed := next((row for row in rows if row.get("experts")), None):
        caption += f", {mixture(mixed)}, {mixed['routing']} routing"
    return Table(caption, lines, not_timed(rows, lambda row: f"T={row['tokens']}"))


def of_measurement(rows: list[dict]) -> Table:
    """A line per row of one measurement of the suite `machine`: measured, then predicted."""
    lines = [["case", "of", "measured", "p10", "p90", "predicted", "measured / predicted"]]
    for row in rows:
        predicted = row["predicted"]
        measured = [quantity(row[field], row["unit"]) for field in ("median", "p10", "p90")]
        against = f"{row['median'] / predicted:.2f}" if row["median"] and predicted else ""
        if row["median"] is None:
            measured[0] = row["status"]
        given = [row["case"], row["variant"]]
        lines.append([*given, *measured, quantity(predicted, row["unit"]), against])
    told = [f"{r['status']}: {r['reason']}" if r["reason"] else r["note"] for r in rows]
    remarks = [
        f"{row['case']}, {row['variant']}: {each}"
        for row, each in zip(rows, told, strict=True)
        if each
    ]
    return Table(f"{rows[0]['measurement']}, {rows[0]['dtype']}", lines, remarks)


# What varies in each table of the suite `grouped`, as fields of a row; and the question it answers.
VARYING = {
    "mixtures": (("experts", "rank", "top_k"), "experts, ranks and K"),
    "routing": (("routing",), "who the tokens go to"),
    "tokens": (("tokens",), "time per token"),
}
SYMBOLS = {"experts": "E", "rank": "r", "top_k": "K", "routing": "routing", "tokens": "T"}


def columns_per_expert(row: dict) -> float:
    """R / K: columns of rank space for each expert a token uses."""
    return row["experts"] * row["rank"] / row["top_k"]


def of_mixtures(rows: list[dict], name: str) -> Table:
    """One line per cell: the frozen layer's time and the ratio of every other provider to it.

    rows: those of one table, case and mode. In the table `tokens` all are times per token.
    """
    varying, about = VARYING[name]
    by_tokens = sorted(rows, key=lambda row: row["tokens"]) if name == "tokens" else rows
    cells = split(by_tokens, "cell")
    providers = distinct(rows, "provider")
    mixed = [next(row for row in cell if row.get("experts")) for cell in cells]
    # A run may have asked for several token counts in any table.
    if "tokens" not in varying and len({row["tokens"] for row in mixed}) > 1:
        varying = (*varying, "tokens")
    with_columns = "rank" in varying
    header = [*(SYMBOLS[field] for field in varying), *(["R/K"] if with_columns else [])]
    lines = [[*header, *providers]]
    for of_cell, first in zip(cells, mixed, strict=True):
        line = [str(first[field]) for field in varying]
        line += [f"{columns_per_expert(first):g}"] if with_columns else []
        found = {row["provider"]: row for row in of_cell}
        frozen = found.get("frozen", {}).get("median_us")
        for provider in providers:
            line.append(entry(found.get(provider), frozen, divided=name == "tokens"))
        lines.append(line)
    case, first = rows[0]["case"], mixed[0]
    fixed = [title(rows[0]["mode"]), rows[0]["dtype"]]
    fixed += [] if with_columns else [mixture(first)]
    fixed += [] if "routing" in varying else [f"{first['routing']} routing"]
    fixed += [] if "tokens" in varying else [f"T={first['tokens']}"]
    remarks = not_timed(rows, lambda row: row["cell"])
    remarks += uneven(rows) if name == "routing" else []
    if "plain_lora" in providers:
        remarks.insert(0, "plain_lora has rank K r: the columns that one token uses.")
    return Table(f"{case}, {about}, {', '.join(fixed)}", lines, remarks)


def uneven(rows: list[dict]) -> list[str]:
    """What the slowest routing costs the package over the uniform one."""
    told = []
    ours = [row for row in rows if row["provider"].startswith("moelora") and row["median_us"]]
    for of_provider in split(ours, "provider", "tokens"):
        timed = {row["routing"]: row["median_us"] for row in of_provider}
        if "uniform" in timed and len(timed) > 1:
            slowest = max(timed, key=timed.get)
            against = f"{timed[slowest] / timed['uniform']:.2f}x of uniform"
            told.append(f"{of_provider[0]['provider']} is slowest with {slowest}: {against}.")
    return told


def per_token(row: dict) -> str:
    """Time per token."""
    nanoseconds = 1e3 * row["median_us"] / row["tokens"]
    return f"{nanoseconds:.1f} ns" if nanoseconds < 1e3 else duration(nanoseconds / 1e3)


def entry(row: dict | None, frozen: float | None, divided: bool) -> str:
    """The frozen layer's time, another's ratio to it and what "auto" took; or why there is none."""
    if row is None:
        return ""
    if row["median_us"] is None:
        return row["status"]
    time = per_token(row) if divided else ""
    if row["provider"] == "frozen" or frozen is None:
        return time or duration(row["median_us"])
    chosen = row["impl"] if row["provider"] == "moelora" else ""
    shown = [time, f"{row['median_us'] / frozen:.2f}x", chosen]
    return " ".join(part for part in shown if part)


def of_rows(rows: list[dict], names: list[str] | None = None) -> list[Table]:
    """Every table of the rows of one suite; `names` chooses among those of the suite `grouped`."""
    if not rows:
        return []
    if "measurement" in rows[0]:
        return [of_measurement(each) for each in split(rows, "measurement")]
    if rows[0]["suite"] != "grouped":
        return [by_tokens(each) for each in split(rows, "case", "mode")]
    found = []
    for name in VARYING if names is None else [name for name in VARYING if name in names]:
        chosen = [row for row in rows if name in row["tables"]]
        found += [of_mixtures(each, name) for each in split(chosen, "case", "mode")]
    return found
