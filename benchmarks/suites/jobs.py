"""The jobs of a run: each measures one case, cell or measurement and returns its rows."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from benchmarks.baselines import ffn
from benchmarks.baselines.linear import GROUPED_PROVIDERS, PROVIDERS, skip_reason
from benchmarks.measure.check_ffn import FeedForwardChecker
from benchmarks.measure.harness import Options, Progress, Suite, run_case
from benchmarks.measure.inputs import check_mixture
from benchmarks.suites.cells import Cell
from benchmarks.suites.shapes import Case

# The suites that measure layers. The suite `machine` is in machine.py.
SUITES = {
    "linear": Suite(PROVIDERS, skip_reason=skip_reason),
    "group": Suite(PROVIDERS, skip_reason=skip_reason),
    "grouped": Suite(GROUPED_PROVIDERS, skip_reason=skip_reason),
    "ffn": Suite(ffn.PROVIDERS, ffn.make_feed_forward, FeedForwardChecker),
}


class Job(NamedTuple):
    """A part of a suite. `measure(progress)` returns its rows and reports each of its `cells`."""

    cells: int
    measure: Callable[[Progress], list[dict]]


def layer_jobs(suite: str, cases: list[Case], options: Options, clock) -> list[Job]:
    """Return a job for each case of the suites `linear`, `group` and `ffn`.

    Raises ValueError if the mixture of the options cannot be routed on a case.
    """
    for case in cases:
        check_mixture(case, options.routing, options.experts, options.top_k)
    cells = len(options.tokens) * len(options.modes)

    def measure(case: Case, progress: Progress) -> list[dict]:
        return run_case(case, options, clock, progress, SUITES[suite])

    return [Job(cells, partial(measure, case)) for case in cases]


def grouped_jobs(cases: list[Case], cells: list[Cell], options: Options, clock) -> list[Job]:
    """Return a job for each case and cell of the suite `grouped`.

    Raises ValueError if the mixture of a cell cannot be routed on a case.
    """
    for case in cases:
        for cell in cells:
            check_mixture(case, cell.routing, cell.mixture.experts, cell.mixture.top_k)

    def measure(case: Case, cell: Cell, progress: Progress) -> list[dict]:
        return run_mixture(case, cell, options, clock, progress)

    return [
        Job(len(options.modes), partial(measure, case, cell)) for case in cases for cell in cells
    ]


def run_mixture(case: Case, cell: Cell, options: Options, clock, progress: Progress) -> list[dict]:
    """Measure a cell of the suite `grouped`; its rows also name the cell and its tables."""
    experts, rank, top_k = cell.mixture
    cell_options = replace(
        options, experts=experts, rank=rank, top_k=top_k, routing=cell.routing, tokens=[cell.tokens]
    )

    def report(text: str) -> None:
        progress(f"{text} E={experts} r={rank} K={top_k} {cell.routing}")

    rows = run_case(case, cell_options, clock, report, SUITES["grouped"])
    return [row | {"cell": cell.name, "tables": list(cell.tables)} for row in rows]
