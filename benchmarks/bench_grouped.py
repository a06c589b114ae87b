"""What does a mixture of LoRA experts cost over the frozen linear under it?

    python benchmarks/bench_grouped.py                    minutes, on the GPU if there is one
    python benchmarks/bench_grouped.py --quick            toy shapes, seconds, a check of the setup
    python benchmarks/bench_grouped.py --suite linear --cases 4096x14336 --tokens 1,4096
    python benchmarks/bench_grouped.py --suite machine    what the device allows, a few minutes

Suites: linear (one layer), group (siblings that read the same x), machine (rates and costs of the
device beside what a model predicts for it, in shapes of its own). `all` is linear and group, then
machine where there is a GPU; a CPU measures machine only when it is asked for by name.

Every provider is compared by name (y, dx, dA, dB, router) to an fp64 reference first; one that is
wrong is reported and not timed. Prints a table per case and mode, writes OUT/<suite>.json and .png.
"""

import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path

# The siblings of this file are the package `benchmarks`, also when this file is run as a script
# and moelora_kernels is found here where it is not installed.
sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks import harness, machine, report
from benchmarks.comparison import Bench
from benchmarks.inputs import DTYPES, check_mixture
from benchmarks.providers import PROVIDERS
from benchmarks.shapes import MACHINE, TOKENS, linear_case, select_cases
from moelora_kernels.testing import ROUTINGS

# suite -> the function that measures one of its cases
SUITES = {"linear": harness.run_case, "group": harness.run_case}

MODES = ("fwd", "fwd_bwd")

# device -> seconds of samples per cell, fewest rounds. On a CPU the large cells are over budget
# with the fewest rounds already; on a GPU 0.3 s are hundreds of rounds, except for the largest T.
BUDGETS = {"cpu": (3.0, 5), "cuda": (0.3, 10), "quick": (0.02, 3)}

# Load per CPU above which the times are called into question: on a shared two-core machine, at
# 1.8 per CPU, the median of a small layer was ten times its p10.
BUSY = 0.5

# Compiling takes longer than everything else in a quick run together.
QUICK_PROVIDERS = [name for name in PROVIDERS if name != "masked_compiled"]


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
    parser.add_argument("--providers", type=names(PROVIDERS, "providers"), metavar="NAME,...")
    parser.add_argument("--modes", type=names(MODES, "modes"), default=list(MODES))
    parser.add_argument("--experts", type=size, default=8)
    parser.add_argument("--rank", type=size, default=16, help="of one expert")
    parser.add_argument("--top-k", type=size, default=2)
    parser.add_argument("--routing", choices=list(ROUTINGS), default="uniform")
    parser.add_argument("--warm", action="store_true", help="leave the caches as a call left them")
    parser.add_argument("--budget", type=seconds, help="seconds of samples per case, T and mode")
    return parser


def make_options(arguments: argparse.Namespace) -> harness.Options:
    """Fill in what depends on the device and on --quick; frozen always runs, as the yardstick."""
    kind = arguments.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    size = "quick" if arguments.quick else kind
    budget, min_rounds = BUDGETS[size]
    chosen = arguments.providers or (QUICK_PROVIDERS if arguments.quick else list(PROVIDERS))
    return harness.Options(
        device=torch.device(kind),
        dtype=arguments.dtype,
        tokens=arguments.tokens or list(TOKENS[size]),
        modes=arguments.modes,
        providers=[name for name in PROVIDERS if name in chosen or name == "frozen"],
        experts=arguments.experts,
        rank=arguments.rank,
        top_k=arguments.top_k,
        routing=arguments.routing,
        budget_s=budget if arguments.budget is None else arguments.budget,
        min_rounds=min_rounds,
    )


def chosen_suites(suite: str, device: torch.device) -> list[str]:
    """The suites of a run; on a CPU `all` leaves `machine` out and ends within five minutes."""
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


def write_result(result: dict, suite: str, folder: Path) -> list[Path]:
    """FOLDER/<suite>.json, and the plot if there is one and matplotlib is there."""
    written = [folder / f"{suite}.json"]
    written[0].write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    if suite == "machine":
        return written
    try:
        report.plot(result, folder / f"{suite}.png")
        written.append(folder / f"{suite}.png")
    except ImportError:
        print("no plot: matplotlib is not installed", file=sys.stderr)
    return written


def main(arguments: list[str] | None = None) -> int:
    """Run the suites; 1 if the package was found wrong or could not run, else 0."""
    parser = make_parser()
    parsed = parser.parse_args(arguments)
    if parsed.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"argument --device: torch {torch.__version__} finds no CUDA device")
    if parsed.suite == "machine" and (parsed.cases or parsed.tokens):
        parser.error("arguments --cases, --tokens: --suite machine has shapes of its own")
    options = make_options(parsed)
    size = "quick" if parsed.quick else options.device.type
    suites = chosen_suites(parsed.suite, options.device)
    try:
        cases = {
            suite: select_cases(suite, options.device.type, parsed.quick, parsed.cases)
            for suite in suites
            if suite in SUITES
        }
        mixed = [case for of_suite in cases.values() for case in of_suite]
        if "machine" in suites:
            mixed.append(linear_case(*MACHINE[size].layer))
        for case in mixed:
            check_mixture(case, options.routing, options.experts, options.top_k)
    except ValueError as error:
        parser.error(str(error))

    try:
        parsed.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"argument --out: {error}")

    commit = harness.git_commit() if parsed.commit is None else parsed.commit
    if not commit:
        print("no commit recorded: git cannot tell it, and --commit is not given", file=sys.stderr)
    make_clock = harness.CudaClock if options.device.type == "cuda" else harness.CpuClock
    clock = make_clock(cold=not parsed.warm)
    if (clock.load_at_start or 0) > BUSY * (os.cpu_count() or 1):
        print(
            f"the machine is busy (load {clock.load_at_start}): don't trust the times",
            file=sys.stderr,
        )
    cells = sum(map(len, cases.values())) * len(options.tokens) * len(options.modes)
    bench = Bench(options, clock) if "machine" in suites else None
    if bench is not None:
        cells += sum(map(len, machine.plan(bench, size).values()))
    bar, advance = progress_bar(cells)
    failures = 0
    for suite in suites:
        rows, clock_of_suite = [], clock
        if suite == "machine":
            measured, clock_of_suite = machine.run(bench, size, advance), bench.device_clock
        else:
            run_case = partial(SUITES[suite], options=options, clock=clock, progress=advance)
            measured = map(run_case, cases[suite])
        for of_case in measured:
            for table in report.tables(of_case):
                say(bar, report.text_table(table) + "\n")
            rows += of_case
        if not rows:
            continue
        failures += sum(row["provider"] == "moelora" and row["status"] != "ok" for row in rows)
        result = harness.make_result(rows, commit, options.device, clock_of_suite)
        for path in write_result(result, suite, parsed.out):
            say(bar, f"wrote {path}")
    if bar is not None:
        bar.close()
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
