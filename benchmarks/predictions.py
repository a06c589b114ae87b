"""Print the modelled time of layers beside the measured time of a result file.

    python benchmarks/predictions.py results/linear.json results/group.json

The model is `model/budget.py`, and the machine of the files has to be one of its GPUs. Rows of
forward + backward in bf16 with a router are compared: the package, plain PyTorch under
torch.compile, and the frozen linears. A model that is off by more than a fifth is wrong somewhere:
the table shows for which layer.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import budget as command
from benchmarks.model import budget
from benchmarks.model.gpus import GPUS
from benchmarks.model.launches import Layer

# Providers of the result files whose time the model has.
PROVIDERS = ("frozen", "moelora", "masked_compiled")


def gpu_of(device: str) -> str:
    """Return the name of the model's GPU for the name that the driver reports.

    Raise ValueError if the model has no such GPU.
    """
    for name in GPUS:
        if name in device:
            return name
    raise ValueError(f"device: the model has {', '.join(GPUS)}, got {device!r}")


def layer_of(row: dict) -> Layer:
    """Return the layer of a row of a result file."""
    return Layer(
        row["case"],
        tokens=row["tokens"],
        in_features=row["in_features"],
        out_features=tuple(row["out_features"]),
        ranks=(row["rank"],) * row["experts"],
        top_k=row["top_k"],
        grouped=row["impl"] == "grouped",
    )


def rows_of(result: dict) -> dict[tuple[str, int], dict[str, dict]]:
    """Return (case, T) -> provider -> row, for cells in which all PROVIDERS were measured."""
    cells: dict[tuple[str, int], dict[str, dict]] = {}
    for row in result["rows"]:
        is_modelled = row["suite"] in ("linear", "group") and row["dtype"] == "bf16"
        is_modelled = is_modelled and row["mode"] == "fwd_bwd" and row["status"] == "ok"
        if is_modelled and row["provider"] in PROVIDERS:
            cells.setdefault((row["case"], row["tokens"]), {})[row["provider"]] = row
    return {cell: rows for cell, rows in cells.items() if len(rows) == len(PROVIDERS)}


def table(result: dict, jobs: int) -> list[str]:
    """Return the lines of the table of one result file."""
    name, measured = gpu_of(result["machine"]["device"]), rows_of(result)
    layers = [layer_of(rows["moelora"]) for rows in measured.values()]
    codes = command.compile_all([(name, layer) for layer in layers], jobs)
    lines = [
        "| case | T | provider | measured us | modelled us | measured ratio | modelled ratio |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for rows, layer in zip(measured.values(), layers, strict=True):
        cell = command.cell(name, layer, codes)
        modelled = {
            "frozen": budget.total(cell.frozen),
            "moelora": budget.total(cell.launches),
            "masked_compiled": budget.total(cell.rival),
        }
        for provider in PROVIDERS:
            us, frozen_us = rows[provider]["median_us"], rows["frozen"]["median_us"]
            lines.append(
                f"| {layer.name} | {layer.tokens} | {provider} | {us:.0f} "
                f"| {modelled[provider]:.0f} | {us / frozen_us:.2f} "
                f"| {modelled[provider] / modelled['frozen']:.2f} |"
            )
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Print a table for each file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, help="results of bench_grouped.py")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the tables to a page, too")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args(arguments)
    lines = ["# Measured, and modelled before", ""]
    for file in args.files:
        result = json.loads(file.read_text())
        try:
            lines += [f"{file.name}, commit {result['commit']}:", "", *table(result, args.jobs), ""]
        except ValueError as error:
            parser.error(f"{file}: {error}")
    print("\n".join(lines))
    if args.out:
        args.out.write_text("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
