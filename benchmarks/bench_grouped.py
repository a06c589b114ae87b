"""What does a mixture of LoRA experts cost over the frozen linear under it?

    python benchmarks/bench_grouped.py                    minutes, on the GPU if there is one
    python benchmarks/bench_grouped.py --quick            toy shapes, seconds, a check of the setup
    python benchmarks/bench_grouped.py --suite linear --cases 4096x14336 --tokens 1,4096
    python benchmarks/bench_grouped.py --suite grouped    many mixtures over one linear
    python benchmarks/bench_grouped.py --suite grouped --experts 32 --rank 64 --tables mixtures
    python benchmarks/bench_grouped.py --suite machine    what the device allows, a few minutes

Suites: linear (one layer), group (siblings that read the same x), grouped (mixtures, routings and
token counts over one linear, see benchmarks/cells.py), ffn (whole networks as experts), machine
(rates and costs of the device beside what a model predicts for it, in shapes of its own). `all` is
all of them; a CPU measures machine only when it is asked for by name.

Every provider is compared by name (y, dx, dA, dB, router) to an fp64 reference first; one that is
wrong is reported and not timed; one that is left out says why. Prints a table per case and mode,
writes OUT/<suite>.json after every case and OUT/<suite>.png at the end.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

# The siblings of this file are the package `benchmarks`, also when this file is run as a script
# and moelora_kernels is found here where it is not installed.
sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.measure import environment, harness
from benchmarks.measure.comparison import Bench
from benchmarks.measure.inputs import DTYPES, check_mixture
from benchmarks.output import tables
from benchmarks.output.pages import all_tables
from benchmarks.output.plots import plot
from benchmarks.suites import cells, machine
from benchmarks.suites.shapes import MACHINE, TOKENS, linear_case, select_cases
from moelora_kernels.testing import ROUTINGS

# suite -> what it measures
SUITES = {
    "linear": harness.LINEAR,
    "group": harness.LINEAR,
    "grouped": harness.GROUPED,
    "ffn": harness.FEED_FORWARD,
}

# Measured beside "auto" where the suite asks which of the two is faster.
EXPLICIT = ("moelora_wide", "moelora_grouped")

MODES = ("fwd", "fwd_bwd")

# device -> seconds of samples per cell, fewest rounds. On a CPU the large cells are over budget
# with the fewest rounds already; on a GPU 0.3 s are hundreds of rounds, except for the largest T.
BUDGETS = {"cpu": (3.0, 5), "cuda": (0.3, 10), "quick": (0.02, 3)}

# Load per CPU above which the times are called into question: on a shared two-core machine, at
# 1.8 per CPU, the median of a small layer was ten times its p10.
BUSY = 0.5

# Of every mixture: longer than everything else in a quick run together, and on a CPU ten seconds
# and more where all other providers of a cell take five.
COMPILED = "masked_compiled"

# The mixture where none is asked for.
DEFAULT_MIXTURE = cells.Mixture(experts=8, rank=16, top_k=2)


def names(allowed, what: str):
    """A comma-separated list of names out of `allowed`."""

    def parse(text: str) -> list[str]:
        chosen = text.split(",")
        unknown = [name for name in chosen if name not in allowed]
        if unknown:
            known = ", ".join(allowed)
            raise argparse.ArgumentTypeError(f"unknown {what} {unknown}; expected some of {known}")
        return chosen

    return parse


def token_counts(text: str) -> list[int]:
    """A comma-separated list of positive integers."""
    counts = [int(part) for part in text.split(",")]
    if min(counts) < 1:
        raise argparse.ArgumentTypeError(f"expected positive token counts, got {text}")
    return counts


def size(text: str) -> int:
    """A whole number from 1."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number from 1, got {text}")
    return int(text)


def seconds(text: str) -> float:
    """A finite time."""
    if not 0.0 <= float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"expected seconds from 0, got {text}")
    return float(text)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--suite", choices=[*SUITES, "machine", "all"], default="all")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--quick", action="store_true", help="toy shapes, masked_compiled left out")
    parser.add_argument("--out", type=Path, default=Path("results"), metavar="DIR")
    parser.add_argument("--commit", metavar="SHA", help="recorded where git cannot be asked")
    parser.add_argument("--tokens", type=token_counts, metavar="T,...")
    parser.add_argument("--cases", type=lambda text: text.split(","), metavar="NAME,...|all")
    known = list(dict.fromkeys(name for of in SUITES.values() for name in of.providers))
    parser.add_argument("--providers", type=names(known, "providers"), metavar="NAME,...")
    parser.add_argument("--modes", type=names(MODES, "modes"), default=list(MODES))
    parser.add_argument(
        "--tables",
        type=names(cells.TABLES, "tables"),
        default=list(cells.TABLES),
        metavar="NAME,...",
        help=f"of the suite grouped: {', '.join(cells.TABLES)}",
    )
    mixture = "without any of these three, suite grouped measures mixtures of its own"
    parser.add_argument("--experts", type=size, help=f"default 8; {mixture}")
    parser.add_argument("--rank", type=size, help="of one expert, default 16")
    parser.add_argument("--top-k", type=size, help="default 2")
    parser.add_argument("--routing", choices=list(ROUTINGS), help="default uniform")
    parser.add_argument("--warm", action="store_true", help="leave the caches as a call left them")
    parser.add_argument("--budget", type=seconds, help="seconds of samples per case, T and mode")
    return parser


def given_mixture(arguments: argparse.Namespace) -> cells.Mixture | None:
    """The mixture asked for, completed; None where nothing was said about it."""
    given = (arguments.experts, arguments.rank, arguments.top_k)
    if given == (None, None, None):
        return None
    pairs = zip(given, DEFAULT_MIXTURE, strict=True)
    return cells.Mixture(*(default if value is None else value for value, default in pairs))


def chosen_providers(arguments: argparse.Namespace, suite: str, kind: str) -> tuple[list, dict]:
    """The providers of a suite that run, and those that are left out of every cell, with reasons.

    frozen always runs, as the yardstick. Those not asked for are in neither.
    """
    known = list(SUITES[suite].providers)
    if arguments.providers:
        return [name for name in known if name in arguments.providers or name == "frozen"], {}
    if suite != "grouped":
        known = [name for name in known if name not in EXPLICIT]
    if arguments.quick:
        return [name for name in known if name != COMPILED], {}
    if suite == "grouped" and kind == "cpu":
        reason = "compiling takes longer than the cell; name it in --providers"
        return [name for name in known if name != COMPILED], {COMPILED: reason}
    return known, {}


def make_options(arguments: argparse.Namespace, suite: str = "linear") -> harness.Options:
    """Fill in what depends on the suite, the device and --quick."""
    kind = arguments.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    size = "quick" if arguments.quick else kind
    budget, min_rounds = BUDGETS[size]
    providers, left_out = chosen_providers(arguments, suite, kind)
    experts, rank, top_k = given_mixture(arguments) or DEFAULT_MIXTURE
    return harness.Options(
        device=torch.device(kind),
        dtype=arguments.dtype,
        tokens=arguments.tokens or list(TOKENS[size]),
        modes=arguments.modes,
        providers=providers,
        experts=experts,
        rank=rank,
        top_k=top_k,
        routing=arguments.routing or "uniform",
        budget_s=budget if arguments.budget is None else arguments.budget,
        min_rounds=min_rounds,
        left_out=left_out,
    )


def chosen_suites(suite: str, device: torch.device) -> list[str]:
    """The suites of a run; on a CPU `all` leaves `machine` out."""
    if suite != "all":
        return [suite]
    return [*SUITES, "machine"] if device.type == "cuda" else list(SUITES)


def progress_bar(total: int):
    """A bar of `total` cells on stderr; without tqdm, a line per cell."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None, lambda text: print(text, file=sys.stderr)
    bar = tqdm(total=total, unit="cell", file=sys.stderr, dynamic_ncols=True)

    def advance(text: str) -> None:
        bar.set_description(text)
        bar.update()

    return bar, advance


def say(bar, text: str) -> None:
    """A line on stdout that does not tear the bar."""
    if bar is None:
        print(text)
    else:
        bar.write(text, file=sys.stdout)


def write_json(result: dict, path: Path) -> None:
    path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")


def write_plot(result: dict, path: Path) -> bool:
    """Whether there is a plot now: not every suite has one, and it takes matplotlib."""
    try:
        return plot(result, path)
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
        return False


# One entry measures one case or cell and gives its rows.
Work = list[Callable[[], list[dict]]]


def plan(
    suite: str, arguments: argparse.Namespace, clock, advance: Callable[[str], None]
) -> tuple[int, Work]:
    """How many (T, mode) a suite of SUITES measures, and the work, checked before any of it runs.

    Raises ValueError for cases, mixtures or routings that there are not.
    """
    options = make_options(arguments, suite)
    kind = options.device.type
    cases = select_cases(suite, kind, arguments.quick, arguments.cases)
    if suite != "grouped":
        for case in cases:
            check_mixture(case, options.routing, options.experts, options.top_k)
        run = partial(harness.run_case, subject=SUITES[suite])
        work = [partial(run, case, options, clock, advance) for case in cases]
        return len(work) * len(options.tokens) * len(options.modes), work
    found = cells.cells_of(
        cells.SIZES["quick" if arguments.quick else kind],
        arguments.tables,
        given_mixture(arguments),
        arguments.routing,
        arguments.tokens,
    )
    for case in cases:
        for cell in found:
            check_mixture(case, cell.routing, cell.mixture.experts, cell.mixture.top_k)
    work = [
        partial(harness.run_mixture, case, cell, options, clock, advance)
        for case in cases
        for cell in found
    ]
    return len(work) * len(options.modes), work


def is_failure(row: dict) -> bool:
    """Whether the package was found wrong or could not run."""
    return row["provider"].startswith("moelora") and row["status"] in ("wrong", "failed")


def main(arguments: list[str] | None = None) -> int:
    """Run the suites; 1 if the package was found wrong or could not run, else 0."""
    parser = make_parser()
    parsed = parser.parse_args(arguments)
    if parsed.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"argument --device: torch {torch.__version__} finds no CUDA device")
    if parsed.suite == "machine" and (parsed.cases or parsed.tokens):
        parser.error("arguments --cases, --tokens: --suite machine has shapes of its own")
    if parsed.suite in SUITES:
        unknown = sorted({*(parsed.providers or ())} - {*SUITES[parsed.suite].providers})
        if unknown:
            parser.error(f"argument --providers: suite {parsed.suite} has no {unknown}")
    options = make_options(parsed)
    size = "quick" if parsed.quick else options.device.type
    suites = chosen_suites(parsed.suite, options.device)
    make_clock = harness.CudaClock if options.device.type == "cuda" else harness.CpuClock
    clock = make_clock(cold=not parsed.warm)
    # The bar is made when its length is known; the work tells it of every cell.
    progress: list[Callable[[str], None]] = []
    advance = lambda text: progress[0](text)  # noqa: E731
    try:
        planned = {
            suite: plan(suite, parsed, clock, advance) for suite in suites if suite in SUITES
        }
        if "machine" in suites:
            case = linear_case(*MACHINE[size].layer)
            check_mixture(case, options.routing, options.experts, options.top_k)
    except ValueError as error:
        parser.error(str(error))

    try:
        parsed.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: {error}")

    commit = environment.git_commit() if parsed.commit is None else parsed.commit
    if not commit:
        print("no commit recorded: git cannot tell it, and --commit is not given", file=sys.stderr)
    if (clock.load_at_start or 0) > BUSY * (os.cpu_count() or 1):
        print(
            f"the machine is busy (load {clock.load_at_start}): don't trust the times",
            file=sys.stderr,
        )
    total = sum(count for count, _ in planned.values())
    bench = Bench(options, clock) if "machine" in suites else None
    if bench is not None:
        total += sum(map(len, machine.plan(bench, size).values()))
    bar, of_bar = progress_bar(total)
    progress.append(of_bar)
    failures = 0
    for suite in suites:
        if suite == "machine":
            measured, clock_of_suite = machine.run(bench, size, advance), bench.device_clock
        else:
            measured, clock_of_suite = (job() for job in planned[suite][1]), clock
        found = environment.make_result([], commit, options.device, clock_of_suite)
        failures += run_suite(suite, measured, found, parsed.out, partial(say, bar))
    if bar is not None:
        bar.close()
    return 1 if failures else 0


def run_suite(
    suite: str,
    measured: Iterator[list[dict]],
    result: dict,
    folder: Path,
    tell: Callable[[str], None],
) -> int:
    """Measure, print and write a suite; how many rows say that the package failed.

    The file is written anew after every case, so that a run cut short has what it measured.
    """
    path, failures = folder / f"{suite}.json", 0
    for of_case in measured:
        result["rows"] += of_case
        failures += sum(map(is_failure, of_case))
        write_json(result, path)
        # A cell of the suite `grouped` is one line of its tables.
        if suite != "grouped":
            for table in tables.of_rows(of_case):
                tell(tables.text(table) + "\n")
    if not result["rows"]:
        return 0
    if suite == "grouped":
        for table in all_tables(result):
            tell(tables.text(table) + "\n")
    tell(f"wrote {path}")
    if write_plot(result, path.with_suffix(".png")):
        tell(f"wrote {path.with_suffix('.png')}")
    return failures


if __name__ == "__main__":
    sys.exit(main())
