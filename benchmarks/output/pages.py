"""The tables of a result file in Markdown, and the pages that show them."""

import json
import re
from pathlib import Path
from typing import NamedTuple

from benchmarks.output import tables, thresholds
from benchmarks.output.goals import goal_tables

# Tables of the suite `grouped` that can be selected by name.
GROUPED_TABLES = (*tables.GROUPED_TABLES, "crossover")


class Selection(NamedTuple):
    """The rows and tables of a result file to show; None: all.

    tables: names from GROUPED_TABLES, for the suite `grouped`.
    """

    cases: list[str] | None = None
    modes: list[str] | None = None
    providers: list[str] | None = None
    tables: list[str] | None = None

    def rows(self, rows: list[dict]) -> list[dict]:
        """Return the selected rows."""
        selected = (("case", self.cases), ("mode", self.modes), ("provider", self.providers))
        return [
            row
            for row in rows
            if all(
                values is None or row.get(field, values[0]) in values for field, values in selected
            )
        ]


EVERYTHING = Selection()


def all_tables(result: dict, names: list[str] | None = None) -> list[tables.Table]:
    """Return the tables of a result file; names: those of the suite `grouped` to return."""
    result_tables = tables.make_tables(result["rows"], names)
    if names is None or "crossover" in names:
        result_tables += thresholds.crossover_tables(result)
    return result_tables + (goal_tables(result) if names is None else [])


def markdown(result: dict, selection: Selection = EVERYTHING) -> str:
    """Return the selected tables of a result file, below a line on how they were measured."""
    machine, rows = result["machine"], selection.rows(result["rows"])
    caches = machine["cold_kind"] if machine["cold_mib"] > 0 else "warm-cache samples"
    ratios = "The factors are ratios to the frozen layer."
    # A table shows the null of the file as "-".
    memory_kind = machine["memory_kind"].replace("null in fwd", '"-" in forward')
    last = [f"Extra memory: {memory_kind}."]
    if tables.is_machine(rows):
        ratios = "`predicted` is the prediction of a model; it is not measured."
        last = ["`host` is warm: calls follow one another, and the host does not wait for them."]
    elif rows and rows[0]["suite"] == "grouped":
        last = []
    source = f"Measured on {tables.provenance(result)}: `{result['command']}`."
    source += f" Medians ({caches}). {ratios}"
    if not tables.is_machine(rows):
        source += f" {tables.spread(rows)}"
    if (load := machine.get("load_at_start")) is not None:
        source += f" Load at the start: {load} (1-minute average; {machine['cpus']} CPUs)."
    shown = all_tables(result | {"rows": rows}, selection.tables)
    return "\n\n".join([source, *map(tables.markdown, shown), *last]) + "\n"


OPTIONS = "".join(rf"(?: {name}=(?P<{name}>\S+))?" for name in Selection._fields)
MARKED = re.compile(
    rf"(?P<open><!-- table: (?P<file>\S+){OPTIONS} -->\n).*?(?P<close><!-- end of table -->)",
    re.DOTALL,
)


def fill_tables(text: str, folder: Path) -> str:
    """Return the text of a page with every marked table made anew from its result file.

    folder: the folder of the page; the paths in the marker lines are relative to it.
    """

    def fill(match: re.Match) -> str:
        result = json.loads((folder / match["file"]).read_text())
        names = {field: match[field] for field in Selection._fields}
        selection = {field: text.split(",") if text else None for field, text in names.items()}
        return f"{match['open']}\n{markdown(result, Selection(**selection))}\n{match['close']}"

    return MARKED.sub(fill, text)
