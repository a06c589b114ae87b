"""The suites at toy size: a wrong provider is not timed, and result files have their schema."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bench_grouped, report
from benchmarks.baselines.linear import PROVIDERS, Siblings
from benchmarks.measure import environment
from benchmarks.output import tables
from benchmarks.suites import shapes, sizes
from support.wrong_providers import (
    ForgetsLastExpert,
)

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
QUICK_LINEAR = shapes.QUICK_CASES["linear"][0]
QUICK_QKV = shapes.QUICK_CASES["group"][0]

NUMBER = (int, float)
FIELDS = {
    "suite": str,
    "case": str,
    "tokens": int,
    "in_features": int,
    "out_features": list,
    "dtype": str,
    "mode": str,
    "provider": str,
    "impl": (str, type(None)),
    "status": str,
    "reason": (str, type(None)),
    "median_us": (*NUMBER, type(None)),
    "p10_us": (*NUMBER, type(None)),
    "p90_us": (*NUMBER, type(None)),
    "samples": int,
    "host_us": (*NUMBER, type(None)),
    "peak_extra_mib": (*NUMBER, type(None)),
    "error": (*NUMBER, type(None)),
    "error_budget": (*NUMBER, type(None)),
    "worst": (str, type(None)),
    "used_by": list,
}
MIXTURE_FIELDS = {"experts": int, "rank": int, "top_k": int, "routing": str}
CELL_FIELDS = {"cell": str, "tables": list}
LAYER_FIELDS = {"mixture": str}


def check_row(row: dict) -> None:
    """Check that a row has all fields of the schema, of the right type, with consistent numbers."""
    fields = FIELDS if row["provider"] == "frozen" else FIELDS | MIXTURE_FIELDS
    fields = fields | (CELL_FIELDS if row["suite"] == "grouped" else LAYER_FIELDS)
    assert set(row) == set(fields)
    for name, kind in fields.items():
        assert isinstance(row[name], kind), name
    assert row["mode"] in sizes.MODES
    assert row["suite"] in bench_grouped.SUITES
    if row["status"] == "ok":
        assert 0 < row["p10_us"] <= row["median_us"] <= row["p90_us"]
        assert row["error"] <= row["error_budget"] < 0.1
        assert row["samples"] >= 3
        assert (row["peak_extra_mib"] is None) == (row["mode"] == "fwd")
        assert row["host_us"] is None, "on a CPU the whole time is the host's"
    else:
        assert row["status"] in ("wrong", "failed", "left out")
        assert row["reason"]
        assert row["median_us"] is None
        assert row["samples"] == 0


def run_quick(folder: Path, *more: str) -> tuple[int, dict[str, dict]]:
    """Exit code of a --quick run and its result files by suite."""
    arguments = ["--quick", "--device", "cpu", "--tokens", "5", "--budget", "0.01"]
    code = bench_grouped.main([*arguments, "--out", str(folder), *more])
    return code, {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quick")
    with pytest.MonkeyPatch.context() as patch:
        # The result files record this line; a worker of pytest-xdist has another one.
        patch.setattr(sys, "argv", [bench_grouped.__file__, "--quick"])
        code, results = run_quick(folder, "--suite", "all", "--commit", "abc123")
    return folder, code, results


def test_quick_run_of_every_suite(quick_run):
    folder, code, results = quick_run
    assert set(results) == set(bench_grouped.SUITES)
    for suite, result in results.items():
        assert result["schema"] == 1
        assert result["commit"] == "abc123"
        assert result["command"] == "python benchmarks/bench_grouped.py --quick"
        needed = {"device", "torch", "triton", "cuda", "python", "threads", "memory_kind"}
        assert needed <= set(result["machine"])
        for row in result["rows"]:
            check_row(row)
            assert row["suite"] == suite
        parsed = bench_grouped.make_parser().parse_args(["--quick", "--tokens", "5"])
        cells = sum(job.cells for job in bench_grouped.make_jobs(suite, parsed, None))
        providers = bench_grouped.make_options(parsed, suite).providers
        assert len(result["rows"]) == cells * len(providers)
        assert (folder / f"{suite}.png").read_bytes().startswith(b"\x89PNG")
    unsound = [
        (row["case"], row["mode"], row["provider"], row["reason"])
        for result in results.values()
        for row in result["rows"]
        if row["status"] not in ("ok", "left out")
    ]
    assert not unsound
    assert code == 0


def test_markdown_has_every_table(quick_run, capsys):
    folder, _, results = quick_run
    report.main([str(folder / "group.json")])
    text = capsys.readouterr().out
    assert "abc123" in text
    count = len(tables.split(results["group"]["rows"], "case", "mode"))
    assert text.count("| provider |") == count == 4
    assert text.count("| moelora |") == count
    report.main([str(folder / "linear.json"), "--modes", "fwd", "--plots"])
    text = capsys.readouterr().out
    assert "forward + backward" not in text
    assert "72x104, forward" in text
    report.main([str(folder / "ffn.json")])
    text = capsys.readouterr().out
    for mixture in ("8 experts of rank 16, top-2", "4 experts of rank 3, top-3"):
        for mode in ("forward", "forward + backward"):
            assert text.count(f"**ffn-72x104, {mode}, bf16, {mixture}, uniform routing**") == 1


def refuse(layer):
    raise RuntimeError("no compiler here\nsecond line")


def test_wrong_and_failing_providers_do_not_stop_the_run(tmp_path, monkeypatch, capsys):
    wrong = lambda layer: Siblings(ForgetsLastExpert, layer)  # noqa: E731
    monkeypatch.setitem(PROVIDERS, "forgetful", (wrong, "mixture"))
    monkeypatch.setitem(PROVIDERS, "refusing", (refuse, "mixture"))
    chosen = ("--suite", "linear", "--providers", "forgetful,refusing,masked")
    _, results = run_quick(tmp_path, *chosen)
    rows = {(row["provider"], row["mode"]): row for row in results["linear"]["rows"]}
    for mode in sizes.MODES:
        for provider in ("frozen", "masked", "forgetful", "refusing"):
            check_row(rows[provider, mode])
        assert rows["forgetful", mode]["status"] == "wrong"
        assert rows["forgetful", mode]["error"] > rows["forgetful", mode]["error_budget"]
        assert rows["refusing", mode]["status"] == "failed"
        assert rows["refusing", mode]["reason"] == "RuntimeError: no compiler here"
        assert rows["masked", mode]["status"] == "ok"
    table = capsys.readouterr().out
    assert "forgetful: wrong at T=5" in table
    assert "refusing: failed at T=5 (RuntimeError: no compiler here)." in table
    assert (tmp_path / "linear.png").exists()


def test_masked_compiled_runs_or_says_why(tmp_path):
    # The only compile of this file: twenty seconds of the C++ compiler on a slow machine.
    chosen = ("--suite", "linear", "--providers", "masked_compiled", "--modes", "fwd_bwd")
    _, results = run_quick(tmp_path, *chosen)
    (row,) = (r for r in results["linear"]["rows"] if r["provider"] == "masked_compiled")
    check_row(row)
    assert row["status"] == "ok" or "ompil" in row["reason"]


@pytest.mark.parametrize(
    "arguments",
    (
        ["--cases", "nonsense"],
        ["--providers", "nobody"],
        ["--modes", "sideways"],
        ["--tokens", "0"],
        ["--top-k", "9"],
        ["--top-k", "8", "--routing", "empty"],
        ["--experts", "72"],
        ["--experts", "0"],
        ["--rank", "0"],
        ["--budget", "nan"],
        ["--device", "cpu", "--modes", "decode_graph"],
        ["--out", "/dev/null/results"],
        pytest.param(
            ["--device", "cuda"],
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
    ),
)
def test_bad_arguments_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench_grouped.main(["--quick", *arguments])
    assert stopped.value.code == 2
    argument = arguments[-2].removeprefix("--")
    assert argument in capsys.readouterr().err.replace("top_k", "top-k")


def test_frozen_always_runs():
    parsed = bench_grouped.make_parser().parse_args(["--providers", "moelora", "--quick"])
    for suite in bench_grouped.SUITES:
        assert bench_grouped.make_options(parsed, suite).providers == ["frozen", "moelora"]


def test_commit_without_git_is_empty(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment.git_commit() == ""


def test_runs_as_a_script_from_the_root(tmp_path):
    arguments = ["--quick", "--suite", "linear", "--device", "cpu", "--tokens", "2"]
    command = [sys.executable, "benchmarks/bench_grouped.py", *arguments]
    chosen = ["--providers", "masked", "--modes", "fwd", "--warm", "--out", str(tmp_path)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *chosen], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert "72x104, forward, bf16, 8 experts of rank 16, top-2, uniform routing" in done.stdout
    result = json.loads((tmp_path / "linear.json").read_text())
    assert result["command"].startswith("python benchmarks/bench_grouped.py --quick")
    assert result["machine"]["cold_mib"] == 0
    assert "warm-cache" in report.markdown(result)
