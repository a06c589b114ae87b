"""Model the time of whole layers on GPUs from the machine code of their kernels, without a GPU.

    python benchmarks/budget.py                                   print the table of all layers
    python benchmarks/budget.py --gpus H200 --launches            and every launch
    python benchmarks/budget.py --out benchmarks/results/ahead-of-time
    python benchmarks/budget.py --check                           compare with the committed report

Every figure is modelled: no kernel runs. `model/budget.py` explains the model. A layer is compared
with its frozen linears and with six lines of PyTorch under torch.compile, in the same model;
whole-FFN experts with a loop over the experts, see `model/budget_ffn.py`.

The committed report is a bound. --check fails if a layer costs more than it, or if a launch breaks
a rule that the report does not list:

    waves    a launch takes between 1 and 1.6 waves of programs: the second wave is mostly empty
    L2       the programs ask L2 for so many bytes that it takes 1.5 times the device memory's time
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import multiprocessing
import os
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType

sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks.measure import environment
from benchmarks.model import budget, budget_ffn
from benchmarks.model.budget import Cell, Modelled
from benchmarks.model.gpus import GPUS
from benchmarks.model.launches import Layer, record, record_directions
from benchmarks.model.machine_code import MachineCode, key_of, machine_code
from benchmarks.output import limits
from moelora_kernels.kernels.common import configs

REPORT = Path(__file__).resolve().parent / "results" / "ahead-of-time" / "budget.json"
TOKENS = (128, 1024, 8192, 65536)
# 8 experts of rank 16, top-2, over 4096 -> 4096 unless the name says more.
LAYERS = (
    Layer("router"),
    Layer("router, CUDA C++ shrink", clusters=True),
    Layer("given gates", gate="dense"),
    Layer("q/k/v, R=64", out_features=(4096, 4096, 4096), ranks=(8,) * 8),
    Layer("gate/up", out_features=(11008, 11008)),
    Layer("grouped, 64 experts", ranks=(16,) * 64, grouped=True),
)
# Layers with tokens of their own; modelled on an H200 alone.
FFN = Layer("whole-FFN experts, F=14336", out_features=(14336,), whole_ffn=True)
DECODE = Layer("decode", decodes=True)
ON_H200 = {FFN: (1024, 8192), DECODE: (1, 16)}
# A layer may exceed its bound by this part. OTHER_SLACK: with another version of Triton than that
# of the report. In this model Triton 3.6 makes layers up to 4.0 % slower than Triton 3.9: grouped,
# at 128 tokens.
SLACK, OTHER_SLACK = 0.005, 0.05
# A launch shorter than this breaks no rule.
SHORT_US = 10.0


def broken_rules(launch: Modelled) -> list[str]:
    """Return the names of the rules that a launch breaks."""
    if launch.us < SHORT_US or not launch.programs:
        return []
    rules = ["waves"] if 1.0 < launch.waves < 1.6 else []
    if launch.limits["L2"] > 1.5 * launch.limits["memory"] and launch.limit == "L2":
        rules.append("L2")
    return rules


def layers(tokens: tuple[int, ...] = TOKENS) -> list[Layer]:
    """Return every layer of LAYERS at every T."""
    return [layer._replace(tokens=T) for layer in LAYERS for T in tokens]


def layers_on(name: str) -> list[Layer]:
    """Return the layers of the report on a GPU. The CUDA C++ shrink is for sm_90 alone."""
    has_clusters = GPUS[name].architecture == "sm_90"
    modelled = [layer for layer in layers() if has_clusters or not layer.clusters]
    if name == limits.GPU:
        modelled += [layer._replace(tokens=T) for layer, Ts in ON_H200.items() for T in Ts]
    return modelled


def cells_of(names: Iterable[str]) -> list[tuple[str, Layer]]:
    """Return the cells of the report on these GPUs."""
    return [(name, layer) for name in names for layer in layers_on(name)]


def compile_one(work: tuple[Layer, int, str]) -> MachineCode:
    """Compile launch number i of a layer for an architecture."""
    layer, number, architecture = work
    with configs.assume(architecture):
        return machine_code(record(layer)[number], architecture)


def compile_all(
    cells: Iterable[tuple[str, Layer]], jobs: int
) -> dict[tuple[str, str], MachineCode]:
    """Return (architecture, key of the launch) -> machine code, each compiled once.

    cells: a GPU and a layer.
    """
    work: dict[tuple[str, str], tuple[Layer, int, str]] = {}
    for architecture, layer in dict.fromkeys(
        (GPUS[name].architecture, each) for name, each in cells
    ):
        with configs.assume(architecture):
            for number, launch in enumerate(record(layer)):
                work.setdefault((architecture, key_of(launch)), (layer, number, architecture))
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        return dict(zip(work, pool.map(compile_one, work.values(), chunksize=4), strict=True))


def cell(name: str, layer: Layer, codes: dict[tuple[str, str], MachineCode]) -> Cell:
    """Return the modelled launches of a layer on a GPU."""
    gpu, launches = GPUS[name], []
    with configs.assume(gpu.architecture):
        for direction, recorded in zip(
            ("forward", "backward"), record_directions(layer), strict=True
        ):
            for launch in recorded:
                code = codes[gpu.architecture, key_of(launch)]
                launches.append(budget.kernel(launch, code, gpu, direction))
    if layer.clusters:
        launches = budget.with_cluster_shrink(launches, layer, gpu)
    model = model_of(layer)
    launches += model.other_launches(layer, gpu)
    columns = launches, model.frozen(layer, gpu), model.compiled_rival(layer, gpu)
    if layer.decodes:
        columns = tuple([row for row in rows if row.direction == "forward"] for rows in columns)
    return Cell(name, layer.name, layer.tokens, *columns)


def model_of(layer: Layer) -> ModuleType:
    """Return the module that models the frozen layer, the rival and the launches of ATen."""
    return budget_ffn if layer.whole_ffn else budget


def as_json(cells: list[Cell], versions: dict[str, str]) -> dict:
    """Return the report as JSON: the bound of every cell, and the rules that launches break."""
    rows = []
    for each in cells:
        broken = {
            f"{launch.direction} {launch.name}": rules
            for launch in each.launches
            if (rules := broken_rules(launch))
        }
        times = {
            direction: round(
                sum(launch.us for launch in each.launches if launch.direction == direction), 1
            )
            for direction in ("forward", "backward")
        }
        rows.append(
            {
                "gpu": each.gpu,
                "layer": each.layer,
                "tokens": each.tokens,
                **times,
                "frozen": round(budget.total(each.frozen), 1),
                "ratio": round(each.ratio, 3),
                "rival": round(each.rival_ratio, 3),
                "broken": broken,
            }
        )
    return {
        "schema": 1,
        "modelled": True,
        "commit": environment.git_commit(),
        **versions,
        "rows": rows,
    }


def launch_table(each: Cell) -> list[str]:
    """Return the lines of the table with every launch of a layer."""
    lines = [
        f"### {each.gpu}, {each.layer}, T={each.tokens}: modelled {each.ratio:.2f} x frozen",
        "",
        "| launch | direction | programs | blocks per multiprocessor | waves | largest limit "
        "| memory | L2 | matrix | issue | latency | us |",
        "| --- | --- | ---: | ---: | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for launch in sorted(each.launches, key=lambda row: row.direction, reverse=True):
        sizes = ["", "", ""]
        if launch.programs:
            sizes = [str(launch.programs), str(launch.blocks), f"{launch.waves:.2f}"]
        limits = (
            f"{launch.limits[name]:.1f}" if name in launch.limits else ""
            for name in ("memory", "L2", "matrix", "issue", "latency")
        )
        cells = [launch.name, launch.direction, *sizes, launch.limit, *limits, f"{launch.us:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, ""]


def summary_table(cells: list[Cell]) -> list[str]:
    """Return the lines of the table of ratios, by GPU and layer and by T."""
    tokens = sorted({each.tokens for each in cells})
    lines = [
        "| GPU | layer | " + " | ".join(f"T={T}" for T in tokens) + " |",
        "| --- | --- |" + " ---: |" * len(tokens),
    ]
    for gpu, layer in dict.fromkeys((each.gpu, each.layer) for each in cells):
        row = {each.tokens: each for each in cells if (each.gpu, each.layer) == (gpu, layer)}
        texts = (
            f"{row[T].ratio:.2f} ({row[T].rival_ratio:.2f})" if T in row else "" for T in tokens
        )
        lines.append(f"| {gpu} | {layer} | " + " | ".join(texts) + " |")
    return [*lines, ""]


def markdown(cells: list[Cell], versions: dict[str, str]) -> str:
    """Return the report as a page: the ratios of all cells, and the launches at T = 8192."""
    installed = ", ".join(f"{name} {version}" for name, version in versions.items())
    broken = [
        f"| {each.gpu} | {each.layer} | {each.tokens} | {launch.direction} {launch.name} "
        f"| {', '.join(rules)} |"
        for each in cells
        for launch in each.launches
        if (rules := broken_rules(launch))
    ]
    detailed = [
        line
        for each in cells
        if each.gpu == limits.GPU and each.tokens in (1, 16, 1024, 8192)
        for line in launch_table(each)
    ]
    return "\n".join(
        [
            "# The modelled cost of a layer on a GPU",
            "",
            "**Modelled, not measured.** Made by `python benchmarks/budget.py --out "
            f"benchmarks/results/ahead-of-time` with {installed}. No kernel ran.",
            "`benchmarks/model/budget.py` explains the model, and says what it assumes. The host's "
            "time is not in it.",
            "",
            "Forward + backward in bf16, 4096 inputs and outputs, 8 experts of rank 16, top-2, "
            "unless the name says more. Time over the time of the frozen linears; in brackets the "
            "same of six lines of PyTorch under `torch.compile`. CUDA C++ shrink: the native "
            "library is built with CUDA for sm_90a, and the launcher takes `cluster_shrink` at "
            "some T. Whole-FFN experts: beside the frozen network and, in brackets, beside a loop "
            "over the experts that runs the frozen products once. Decode: forward without "
            "gradients.",
            "",
            *summary_table(cells),
            "## Launches that break a rule",
            "",
            "`waves`: between 1 and 1.6 waves. `L2`: L2 takes 1.5 times as long as memory, and is "
            "the largest limit.",
            "",
            "| GPU | layer | T | launch | rules |",
            "| --- | --- | ---: | --- | --- |",
            *broken,
            "",
            *limits.section(cells),
            "## Launches on an H200",
            "",
            "Times in microseconds.",
            "",
            *detailed,
        ]
    )


def problems(report: dict, bounds: dict) -> list[str]:
    """Return where a report exceeds another one: layers that cost more, rules that break anew.

    Rules are compared only with the version of Triton that `bounds` was made with: another one
    compiles a kernel to a few registers more or less, and so to other waves.
    """

    def key(row: dict) -> tuple:
        return row["gpu"], row["layer"], row["tokens"]

    slack = SLACK if report["triton"] == bounds["triton"] else OTHER_SLACK
    known, texts = {key(row): row for row in bounds["rows"]}, []
    for row in report["rows"]:
        name = "{} {} T={}".format(*key(row))
        bound = known.get(key(row))
        if bound is None:
            texts.append(f"{name}: the report has no bound")
            continue
        if row["ratio"] > bound["ratio"] * (1.0 + slack):
            texts.append(f"{name}: {row['ratio']} x frozen, at most {bound['ratio']} is allowed")
        if report["triton"] != bounds["triton"]:
            continue
        for launch, rules in row["broken"].items():
            if new := sorted({*rules} - {*bound["broken"].get(launch, ())}):
                texts.append(f"{name}: {launch} breaks {', '.join(new)}")
    return texts


def parse_compiling(
    parser: argparse.ArgumentParser, gpus: Iterable[str], arguments: list[str] | None
) -> argparse.Namespace:
    """Return the arguments of a command that compiles kernels, with --gpus and --jobs.

    gpus: the default of --gpus.
    """
    parser.add_argument("--gpus", type=lambda text: text.split(","), default=list(gpus))
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args(arguments)
    if unknown := sorted({*args.gpus} - {*GPUS}):
        parser.error(f"--gpus: expected some of {', '.join(GPUS)}, got {', '.join(unknown)}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 leaves nothing to compile")
    return args


def main(arguments: list[str] | None = None) -> int:
    """Model all layers; with --check, return 1 if the committed report is exceeded."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--launches", action="store_true", help="print every launch")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write budget.json and budget.md")
    parser.add_argument("--check", action="store_true", help="compare with the committed report")
    args = parse_compiling(parser, GPUS, arguments)
    codes = compile_all(cells_of(args.gpus), args.jobs)
    cells = [cell(name, layer, codes) for name, layer in cells_of(args.gpus)]
    versions = {name: importlib.metadata.version(name) for name in ("torch", "triton")}
    report = as_json(cells, versions)
    print(f"{len(codes)} kernels compiled. Modelled, not measured:")
    print("\n".join(summary_table(cells)))
    if args.launches:
        print("\n".join(line for each in cells for line in launch_table(each)))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "budget.json").write_text(json.dumps(report, indent=1) + "\n")
        (args.out / "budget.md").write_text(markdown(cells, versions))
    exceeded = []
    if args.check:
        bounds = json.loads(REPORT.read_text())
        exceeded = problems(report, bounds)
        if report["triton"] != bounds["triton"]:
            print(f"The rules are not compared: the report is of Triton {bounds['triton']}.")
    for text in exceeded:
        print(text)
    return 1 if exceeded else 0


if __name__ == "__main__":
    sys.exit(main())
