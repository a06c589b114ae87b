"""Model from how many tokens on the grouped formulation is faster than the wide one.

    python benchmarks/forms.py                                          print the times by T
    python benchmarks/forms.py --out benchmarks/results/ahead-of-time   and write forms.json

Every time is modelled: no kernel runs on a GPU. `model/forms.py` has the rule. The thresholds in
tokens of `moelora_kernels/dispatch.py` are those of the committed forms.json. Those in R / K come
from `model/roofline.py`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))

from benchmarks import budget
from benchmarks.measure import environment
from benchmarks.model import forms
from benchmarks.model.gpus import GPUS
from moelora_kernels.dispatch import THRESHOLDS

REPORT = Path(__file__).resolve().parent / "results" / "ahead-of-time" / "forms.json"
# One GPU of each architecture.
MODELLED = ("A100", "L40S", "H200", "B200")
FORMS = ("wide", "grouped")


def model(name: str, jobs: int) -> dict:
    """Return the modelled times of both formulations on a GPU by T, and the threshold in tokens."""
    architecture = GPUS[name].architecture
    columns = THRESHOLDS[architecture].columns
    layers = {
        (form, T): forms.smallest_mixture(columns, T, form == "grouped")
        for form in FORMS
        for T in forms.TOKENS
    }
    codes = budget.compile_all([(name, layer) for layer in layers.values()], jobs)
    steps = {
        form: {T: forms.step(budget.cell(name, layers[form, T], codes)) for T in forms.TOKENS}
        for form in FORMS
    }
    return {
        "gpu": name,
        "architecture": architecture,
        "columns": columns,
        "experts": len(layers["wide", forms.TOKENS[0]].ranks),
        "tokens": forms.tokens_threshold(steps["wide"], steps["grouped"]),
        "steps": [
            {
                "T": T,
                **{
                    f"{form} {part}": round(us, 1)
                    for form in FORMS
                    for part, us in steps[form][T]._asdict().items()
                },
            }
            for T in forms.TOKENS
        ],
    }


def text(row: dict) -> str:
    """Return the modelled times of a GPU as lines."""
    lines = [
        f"{row['gpu']} ({row['architecture']}), {row['experts']} experts of rank {forms.RANK}, "
        f"top-{forms.TOP_K}: grouped from T = {row['tokens']} on"
    ]
    for step in row["steps"]:
        times = (
            f"{form} {step[f'{form} device']:.0f} us (host {step[f'{form} host']:.0f})"
            for form in FORMS
        )
        lines.append(f"  T = {step['T']}: {', '.join(times)}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Model both formulations on a GPU of each architecture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="write forms.json")
    args = budget.parse_compiling(parser, MODELLED, arguments)
    print("Modelled, not measured:")
    rows = []
    for name in args.gpus:
        rows.append(model(name, args.jobs))
        print(text(rows[-1]), flush=True)
    if args.out:
        versions = {name: importlib.metadata.version(name) for name in ("torch", "triton")}
        report = {"schema": 1, "modelled": True, "commit": environment.git_commit(), **versions}
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / REPORT.name).write_text(json.dumps({**report, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
