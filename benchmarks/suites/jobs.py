"""The jobs of a run: each measures one case, cell or measurement and returns its rows."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from benchmarks.baselines import ffn
from benchmarks.baselines.linear import (
    DECODE_PROVIDERS,
    GROUPED_PROVIDERS,
    HOST_WAITS,
    PROVIDERS,
    skip_reason,
)
from benchmarks.measure.check_ffn import FeedForwardChecker
from benchmarks.measure.harness import Options, Progress, Suite, run_case
from benchmarks.measure.inputs import check_mixture
from benchmarks.suites.cells import Cell, Mixture
from benchmarks.suites.shapes import Case

# The suites that measure layers. The suite `machine` is in machine.py.
SUITES = {
    "linear": Suite(PROVIDERS, skip_reason=skip_reason),
    "group": Suite(PROVIDERS, skip_reason=skip_reason),
    "grouped": Suite(GROUPED_PROVIDERS, skip_reason=skip_reason),
    "decode": Suite(DECODE_PROVIDERS, without_graph=HOST_WAITS, times_host=True),
    "ffn": Suite(ffn.PROVIDERS, ffn.make_feed_forward, FeedForwardChecker, times_host=True),
}


class Job(NamedTuple):
    """A part of a suite. `measure(progress)` returns its rows and reports each of its `cells`."""

    cells: int
    measure: Callable[[Progress], list[dict]]


def layer_jobs(
    suite: str, cases: list[Case], mixtures: Sequence[Mixture], options: Options, clock
) -> list[Job]:
    """Return a job for each case and mixture of the suites that measure layers, but `grouped`.

    Raises ValueError if a mixture cannot be routed on a case.
    """
    for case in cases:
        for mixture in mixtures:
            check_mixture(case, options.routing, mixture.experts, mixture.top_k)
    cells = len(options.tokens) * len(options.modes)

    def measure(case: Case, mixture: Mixture, progress: Progress) -> list[dict]:
        mixed = replace(options, **mixture._asdict())
        rows = run_case(case, mixed, clock, progress, SUITES[suite])
        return [row | {"mixture": str(mixture)} for row in rows]

    return [Job(cells, partial(measure, case, mixture)) for case in cases for mixture in mixtures]


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
    cell_options = replace(
        options, **cell.mixture._asdict(), routing=cell.routing, tokens=[cell.tokens]
    )

    def report(text: str) -> None:
        progress(f"{text} {cell.mixture} {cell.routing}")

    rows = run_case(case, cell_options, clock, report, SUITES["grouped"])
    return [row | {"cell": cell.name, "tables": list(cell.tables)} for row in rows]
