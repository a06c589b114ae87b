"""Measure the cost of a mixture of LoRA experts, compared with the frozen linear under it.

    python benchmarks/bench_grouped.py                    a table of each suite, in a few minutes
    python benchmarks/bench_grouped.py --full             all cells, tens of minutes
    python benchmarks/bench_grouped.py --quick            toy shapes, seconds: does the setup work?
    python benchmarks/bench_grouped.py --suite linear --cases 4096x14336 --tokens 1,4096
    python benchmarks/bench_grouped.py --suite grouped --experts 32 --rank 64 --tables mixtures

Suites:
    linear     one layer
    group      siblings: linears that read the same x
    grouped    mixtures, routing distributions and token counts over one linear
    decode     linears and siblings with up to 64 tokens, forward without gradients
    ffn        experts that are whole feed-forward networks
    machine    rates and costs of the device, beside the predictions of a model

Every provider is compared with a float64 reference first: y, dx, dA, dB and the router's gradients,
by name. A provider that is wrong is reported and not timed; one that is left out has a reason.
Prints a table per case and mode. Writes OUT/<suite>.json after every case, and a plot at the end.
benchmarks/README.md explains the providers, the tables and the rules.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

# Run as a script, this file finds the package `benchmarks`, and `moelora_kernels` if it is not
# installed, in the root of the repository.
sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.measure import environment
from benchmarks.measure.clocks import CpuClock, CudaClock
from benchmarks.measure.comparison import Bench, DeviceClock
from benchmarks.measure.harness import Options
from benchmarks.measure.inputs import DTYPES, check_mixture
from benchmarks.output import tables
from benchmarks.output.goals import goal_tables
from benchmarks.output.pages import all_tables
from benchmarks.output.plots import plot
from benchmarks.suites import cells, machine
from benchmarks.suites.jobs import SUITES, Job, grouped_jobs, layer_jobs
from benchmarks.suites.shapes import linear_case, select_cases
from benchmarks.suites.sizes import GRAPH, MODES, RUN_SIZES, RunSizes
from moelora_kernels.testing import ROUTINGS
from moelora_kernels.tune.progress import Progress

# Besides impl="auto", the suite `grouped` measures both formulations, to find the faster one.
EXPLICIT = ("moelora_wide", "moelora_grouped")

# Compiling it takes longer than the rest of a quick run, and on a CPU longer than a cell.
COMPILED = "masked_compiled"

# Load per CPU above which the command warns. On a shared machine of two cores, at 1.8 per CPU, the
# median of a small layer was ten times its p10.
BUSY = 0.5


def names(known, kind: str) -> Callable[[str], list[str]]:
    """Return a parser of comma-separated names, all from `known`. `kind` is for the error."""

    def parse(text: str) -> list[str]:
        values = text.split(",")
        if unknown := [value for value in values if value not in known]:
            expected = ", ".join(known)
            raise argparse.ArgumentTypeError(
                f"expected {kind} out of {expected}, got {', '.join(unknown)}"
            )
        return values

    return parse


def token_counts(text: str) -> list[int]:
    """Parse comma-separated positive integers."""
    counts = [int(part) for part in text.split(",")]
    if min(counts) < 1:
        raise argparse.ArgumentTypeError(f"expected positive token counts, got {text}")
    return counts


def size(text: str) -> int:
    """Parse a positive integer."""
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return int(text)


def seconds(text: str) -> float:
    """Parse a finite time of at least 0."""
    if not 0.0 <= float(text) < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a time of at least 0 seconds, got {text}")
    return float(text)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--suite", choices=[*SUITES, "machine", "all"], default="all")
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--full", action="store_true", help="all cells: tens of minutes")
    extent.add_argument("--quick", action="store_true", help="toy shapes, without masked_compiled")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--dtype", choices=list(DTYPES), default="bf16")
    add("--out", type=Path, default=Path("results"), metavar="DIR", help="default: results")
    add("--commit", metavar="SHA", help="the commit to record if git does not know it")
    add("--tokens", type=token_counts, metavar="T,...", help="in the place of the suite's T")
    add("--cases", type=lambda text: text.split(","), metavar="NAME,...|all", help="e.g. 4096x4096")
    providers = list(dict.fromkeys(name for suite in SUITES.values() for name in suite.providers))
    add(
        "--providers",
        type=names(providers, "providers"),
        metavar="NAME,...",
        help=f"frozen always runs; {', '.join(providers)}",
    )
    modes = (*MODES, GRAPH)
    add("--modes", type=names(modes, "modes"), metavar="NAME,...", help=", ".join(modes))
    add(
        "--tables",
        type=names(cells.TABLES, "tables"),
        metavar="NAME,...",
        help=f"of the suite grouped: {', '.join(cells.TABLES)}",
    )
    mixture = "any of these three also replaces the mixtures of the suites grouped and ffn"
    add("--experts", type=size, metavar="E", help=f"default 8; {mixture}")
    add("--rank", type=size, metavar="r", help="rank of one expert, default 16")
    add("--top-k", type=size, metavar="K", help="experts per token, default 2")
    add("--routing", choices=list(ROUTINGS), help="default uniform")
    add("--warm", action="store_true", help="do not make the caches cold")
    add("--budget", type=seconds, metavar="SECONDS", help="seconds of samples in a cell")
    return parser


def device_type(arguments: argparse.Namespace) -> str:
    """Return "cuda" or "cpu"."""
    if arguments.device != "auto":
        return arguments.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def run_sizes(arguments: argparse.Namespace) -> RunSizes:
    """Return the sizes of this device and of --full, --quick or the default."""
    extent = "quick" if arguments.quick else "full" if arguments.full else "default"
    return RUN_SIZES[device_type(arguments), extent]


def mixture_argument(arguments: argparse.Namespace) -> cells.Mixture | None:
    """Return the mixture of --experts, --rank, --top-k; None if none of them is passed."""
    sizes = (arguments.experts, arguments.rank, arguments.top_k)
    if sizes == (None, None, None):
        return None
    pairs = zip(sizes, cells.DEFAULT_MIXTURE, strict=True)
    return cells.Mixture(*(default if value is None else value for value, default in pairs))


def select_providers(arguments: argparse.Namespace, suite: str) -> tuple[list[str], dict[str, str]]:
    """Return the providers of a suite to measure, and those that are left out, with reasons.

    frozen always runs, because every ratio needs it. A provider that --providers does not name is
    in neither of the two.
    """
    known = list(SUITES[suite].providers)
    if arguments.providers:
        return [name for name in known if name in arguments.providers or name == "frozen"], {}
    if suite != "grouped":
        known = [name for name in known if name not in EXPLICIT]
    if arguments.quick:
        return [name for name in known if name != COMPILED], {}
    if suite == "grouped" and device_type(arguments) == "cpu":
        reason = "compiling takes longer than the cell; name it in --providers"
        return [name for name in known if name != COMPILED], {COMPILED: reason}
    return known, {}


def make_options(arguments: argparse.Namespace, suite: str = "linear") -> Options:
    """Return the options of one of SUITES; the arguments replace the sizes of the run."""
    sizes = run_sizes(arguments)
    suite_sizes = getattr(sizes, suite)
    providers, left_out = select_providers(arguments, suite)
    experts, rank, top_k = mixture_argument(arguments) or cells.DEFAULT_MIXTURE
    tokens = [] if suite == "grouped" else suite_sizes.tokens
    return Options(
        device=torch.device(device_type(arguments)),
        dtype=arguments.dtype,
        tokens=arguments.tokens or list(tokens),
        modes=arguments.modes or list(suite_sizes.modes),
        providers=providers,
        experts=experts,
        rank=rank,
        top_k=top_k,
        routing=arguments.routing or "uniform",
        budget_s=sizes.budget_s if arguments.budget is None else arguments.budget,
        min_rounds=sizes.min_rounds,
        left_out=left_out,
    )


def make_bench(arguments: argparse.Namespace, clock) -> Bench:
    """Return the bench of the suite `machine`, whose layer takes the options of `linear`."""
    options = make_options(arguments)
    options.modes = arguments.modes or list(run_sizes(arguments).machine.layer_modes)
    return Bench(options, clock)


def make_jobs(suite: str, arguments: argparse.Namespace, clock) -> list[Job]:
    """Return the jobs of a suite. Nothing is measured yet.

    Raises ValueError if a case does not exist, or if a mixture cannot be routed.
    """
    sizes = run_sizes(arguments)
    options = make_options(arguments, "linear" if suite == "machine" else suite)
    if suite == "machine":
        case = linear_case(*sizes.machine.layer)
        check_mixture(case, options.routing, options.experts, options.top_k)
        return machine.jobs(make_bench(arguments, clock), sizes.machine)
    suite_sizes = getattr(sizes, suite)
    cases = select_cases(suite, arguments.quick, arguments.cases or list(suite_sizes.cases))
    mixture = mixture_argument(arguments)
    if suite != "grouped":
        mixtures = [mixture] if mixture else suite_sizes.mixtures
        return layer_jobs(suite, cases, mixtures, options, clock)
    chosen = cells.grouped_cells(
        suite_sizes,
        arguments.tables,
        mixture,
        arguments.routing,
        arguments.tokens,
    )
    return grouped_jobs(cases, chosen, options, clock)


def selected_suites(arguments: argparse.Namespace) -> list[str]:
    """Return the suites of a run. --cases and --tokens exclude `machine`, which has its own."""
    if arguments.suite != "all":
        return [arguments.suite]
    return list(SUITES) if arguments.cases or arguments.tokens else [*SUITES, "machine"]


def write_json(result: dict, path: Path) -> None:
    path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")


def write_plot(result: dict, path: Path) -> bool:
    """Draw the plot; return False if the suite has none or matplotlib is not installed."""
    try:
        return plot(result, path)
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
        return False


def is_failure(row: dict) -> bool:
    """Return whether the package was wrong or could not run."""
    return row["provider"].startswith("moelora") and row["status"] in ("wrong", "failed")


def run_suite(suite: str, jobs: list[Job], result: dict, folder: Path, progress: Progress) -> int:
    """Measure a suite, print and write its rows; return how many rows are failures.

    The file is written after every job. A run that is cut short leaves its rows so far.
    """
    path, failures = folder / f"{suite}.json", 0
    for job in jobs:
        rows = job.measure(progress)
        result["rows"] += rows
        failures += sum(map(is_failure, rows))
        write_json(result, path)
        # A cell of the suite `grouped` is only one line of its tables.
        if suite != "grouped":
            for table in tables.make_tables(rows):
                progress.say(tables.text(table) + "\n")
    if not result["rows"]:
        return 0
    if suite == "grouped":
        for table in all_tables(result):
            progress.say(tables.text(table) + "\n")
    for table in goal_tables(result):
        progress.say(tables.text(table) + "\n")
    progress.say(f"wrote {path}")
    if write_plot(result, path.with_suffix(".png")):
        progress.say(f"wrote {path.with_suffix('.png')}")
    return failures


def check_arguments(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Exit with a message if the arguments do not work together."""
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"argument --device: torch {torch.__version__} finds no CUDA device")
    if GRAPH in (arguments.modes or ()) and device_type(arguments) == "cpu":
        parser.error(f"argument --modes: {GRAPH} needs a CUDA device")
    if arguments.suite == "machine" and (arguments.cases or arguments.tokens):
        parser.error("arguments --cases, --tokens: the suite machine has its own shapes")
    if arguments.suite in SUITES:
        unknown = sorted({*(arguments.providers or ())} - {*SUITES[arguments.suite].providers})
        if unknown:
            parser.error(f"argument --providers: suite {arguments.suite} has no {unknown}")


def main(arguments: list[str] | None = None) -> int:
    """Run the suites; return 1 if the package was wrong or could not run, else 0."""
    parser = make_parser()
    parsed = parser.parse_args(arguments)
    check_arguments(parser, parsed)
    device = torch.device(device_type(parsed))
    clock = (CudaClock if device.type == "cuda" else CpuClock)(cold=not parsed.warm)
    try:
        jobs = {suite: make_jobs(suite, parsed, clock) for suite in selected_suites(parsed)}
    except ValueError as error:
        parser.error(str(error))
    try:
        parsed.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: {error}")

    commit = environment.git_commit() if parsed.commit is None else parsed.commit
    if not commit:
        print("no commit is recorded: git does not know it, pass --commit", file=sys.stderr)
    if (clock.load_at_start or 0) > BUSY * (os.cpu_count() or 1):
        warning = f"the machine is busy (load {clock.load_at_start}): do not trust the times"
        print(warning, file=sys.stderr)
    progress = Progress(sum(job.cells for suite_jobs in jobs.values() for job in suite_jobs))
    failures = 0
    for suite, suite_jobs in jobs.items():
        suite_clock = DeviceClock(clock, device) if suite == "machine" else clock
        result = environment.make_result([], commit, device, suite_clock)
        failures += run_suite(suite, suite_jobs, result, parsed.out, progress)
    progress.close()
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
