"""The suites grouped and ffn: cells, providers, reasons to leave one out, the crossover."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bench_grouped, crossover, report
from benchmarks.baselines import ffn
from benchmarks.baselines.linear import GROUPED_PROVIDERS, skip_reason
from benchmarks.measure import inputs
from benchmarks.measure.check import Checker
from benchmarks.measure.check_ffn import FeedForwardChecker
from benchmarks.measure.inputs import draw_inputs, make_layer
from benchmarks.output import plots, tables, thresholds
from benchmarks.suites import jobs, shapes
from benchmarks.suites.cells import TABLES, Mixture, grouped_cells
from benchmarks.suites.sizes import RUN_SIZES
from moelora_kernels import dispatch
from moelora_kernels.testing import ROUTINGS

ROOT = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
LINEAR = shapes.QUICK_CASES["grouped"][0]
NETWORK = shapes.QUICK_CASES["ffn"][0]


def run_quick(folder: Path, *more: str) -> tuple[int, dict]:
    """Exit code of a --quick run of the suite `grouped`, and its result file."""
    arguments = ["--quick", "--suite", "grouped", "--device", "cpu", "--budget", "0.01", "--warm"]
    code = bench_grouped.main([*arguments, "--out", str(folder), *more])
    return code, json.loads((folder / "grouped.json").read_text())


def test_cells_that_the_targets_are_set_for():
    on_gpu = grouped_cells(RUN_SIZES["cuda", "full"].grouped, list(TABLES))
    acceptance = next(c for c in on_gpu if c.name == "E=64 r=64 K=4 uniform T=8192")
    assert acceptance.tables == TABLES
    assert "4096x4096" in RUN_SIZES["cuda", "full"].grouped.cases
    on_cpu = {cell.name for cell in grouped_cells(RUN_SIZES["cpu", "full"].grouped, list(TABLES))}
    assert {"E=8 r=16 K=2 uniform T=2048", "E=64 r=16 K=2 uniform T=1024"} <= on_cpu
    assert "2048x2048" in RUN_SIZES["cpu", "full"].grouped.cases


@pytest.mark.parametrize("device", ("cuda", "cpu"))
def test_mixtures_are_finite_and_lie_on_both_sides_of_the_threshold(device):
    sizes = RUN_SIZES[device, "full"].grouped
    cells = grouped_cells(sizes)
    assert len(cells) == len({cell.name for cell in cells}) < 50
    assert {cell.routing for cell in cells} == set(ROUTINGS)
    assert min(sizes.token_counts) >= 1024
    columns = [m.experts * m.rank / m.top_k for m in sizes.mixtures]
    (case,) = shapes.select_cases("grouped", False, list(sizes.cases))
    for cell in cells:
        inputs.check_mixture(case, cell.routing, cell.mixture.experts, cell.mixture.top_k)
    for name, threshold in dispatch.THRESHOLDS.items():
        if (name == "cpu") == (device == "cpu"):
            assert min(columns) < threshold.columns / 2
            assert max(columns) > threshold.columns * 2
    if device == "cuda":
        assert {m.experts for m in sizes.mixtures} == {8, 16, 64, 256}
        assert {m.top_k for m in sizes.mixtures} == {1, 2, 4, 8}
        assert {m.rank for m in sizes.mixtures} >= {8, 16, 32, 64, 128}


def test_arguments_replace_the_sizes():
    mixture = Mixture(6, 3, 2)
    cells = grouped_cells(
        RUN_SIZES["cpu", "full"].grouped, ["mixtures", "tokens"], mixture, "zipf", [7, 9]
    )
    assert [(cell.mixture, cell.routing, cell.tokens) for cell in cells] == [
        (mixture, "zipf", 7),
        (mixture, "zipf", 9),
    ]
    assert all(cell.tables == ("mixtures", "tokens") for cell in cells)
    parsed = bench_grouped.make_parser().parse_args(["--rank", "64"])
    assert bench_grouped.mixture_argument(parsed) == Mixture(8, 64, 2)
    assert bench_grouped.mixture_argument(bench_grouped.make_parser().parse_args([])) is None


def test_inputs_that_route_otherwise_are_refused():
    layer = make_layer(LINEAR, 8, 4, 2, torch.bfloat16, CPU)
    x, _ = draw_inputs(layer, 20, "uniform")
    drawn = (x.float() @ layer.adapters[0].router_weight.float().T).topk(2, dim=1).indices
    with pytest.raises(ArithmeticError, match="tokens choose other experts"):
        inputs.check_routing(layer, x, [(drawn + 1) % 8])


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_providers_are_right_with_experts_without_tokens(dtype):
    layer = make_layer(LINEAR, 8, 16, 1, dtype, CPU)
    x, dys = draw_inputs(layer, 40, "one")
    checker = Checker(layer, x, dys)
    for provider in ("moelora_wide", "moelora_grouped", "plain_lora", "loop", "grouped_mm"):
        build, formula = GROUPED_PROVIDERS[provider]
        name, error, budget = checker.verdict(build(layer), formula, "fwd_bwd")
        assert error <= budget, (provider, name)


def test_plain_lora_has_the_columns_of_one_token():
    layer = make_layer(LINEAR, 8, 4, 2, torch.float32, CPU)
    build, formula = GROUPED_PROVIDERS["plain_lora"]
    assert formula == "active"
    shapes_of = sorted([*parameter.shape] for parameter in build(layer).parameters())
    assert [8, 72] in shapes_of  # A [K r, I]
    assert [104, 8] in shapes_of


def test_what_is_left_out_says_why(monkeypatch):
    def why(name: str, experts: int, rank: int, top_k: int, dtype=torch.bfloat16) -> str:
        layer = make_layer(LINEAR, experts, rank, top_k, dtype, CPU)
        return skip_reason(name, layer, tokens=64)

    assert why("masked", 8, 18, 2) == ""
    assert "R = 152 columns, above 144" in why("masked", 8, 19, 2)
    assert "R = 152" in why("moelora_wide", 8, 19, 2)
    assert why("moelora", 8, 19, 2) == ""
    assert why("moelora_grouped", 8, 4, 8) == "every token uses every expert"
    assert "not a multiple of 16 bytes" in why("grouped_mm", 8, 4, 2)
    assert why("grouped_mm", 8, 4, 2, torch.float32) == ""
    assert why("stacked", 8, 4, 2) == ""
    monkeypatch.setattr("benchmarks.baselines.linear.memory_of", lambda device: 2**18)
    assert "GiB, more than half of" in why("stacked", 8, 4, 2)


def test_compiling_on_a_cpu_is_left_out_of_mixtures_unless_named():
    parsed = bench_grouped.make_parser().parse_args(["--device", "cpu"])
    options = bench_grouped.make_options(parsed, "grouped")
    assert "masked_compiled" not in options.providers
    assert "compiling takes longer" in options.left_out["masked_compiled"]
    assert not bench_grouped.make_options(parsed, "linear").left_out
    parsed = bench_grouped.make_parser().parse_args(["--providers", "masked_compiled"])
    options = bench_grouped.make_options(parsed, "grouped")
    assert (options.providers, options.left_out) == (["frozen", "masked_compiled"], {})


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("grouped")
    chosen = "frozen,moelora,moelora_wide,moelora_grouped,masked,plain_lora,grouped_mm"
    code, result = run_quick(folder, "--providers", chosen, "--commit", "abc123")
    return folder, code, result


def test_quick_run_of_every_table(quick_run):
    folder, code, result = quick_run
    assert code == 0
    assert {name for row in result["rows"] for name in row["tables"]} == set(TABLES)
    assert result["machine"]["device_class"] == "cpu"
    for row in result["rows"]:
        assert row["status"] == "ok" or row["provider"] == "grouped_mm", row["reason"]
        assert ("routing" in row) == (row["provider"] != "frozen")
        if row["provider"].startswith("moelora_"):
            assert row["impl"] == row["provider"].removeprefix("moelora_")
    left_out = [row for row in result["rows"] if row["status"] == "left out"]
    assert {row["provider"] for row in left_out} == {"grouped_mm"}
    assert (folder / "grouped.png").read_bytes().startswith(b"\x89PNG")


def test_markdown_of_the_tables_asked_for(quick_run, tmp_path, capsys):
    folder, _, _ = quick_run
    report.main([str(folder / "grouped.json"), "--modes", "fwd"])
    text = capsys.readouterr().out
    assert "| E | r | K | R/K | frozen | moelora |" in text
    assert "| routing | frozen |" in text
    assert "| T | frozen |" in text
    assert "grouped_mm: not measured at E=8 r=2 K=2 T=33 (rows of rank 2" in text
    assert "plain_lora has rank K r" in text
    assert "of uniform." in text
    assert "wide / grouped" in text
    readme = tmp_path / "README.md"
    (tmp_path / "grouped.json").write_text((folder / "grouped.json").read_text())
    readme.write_text(
        "<!-- table: grouped.json modes=fwd tables=tokens,crossover -->\n<!-- end of table -->\n"
    )
    report.main(["--pages", str(readme)])
    text = readme.read_text()
    assert "| routing |" not in text
    assert text.count("| T | frozen |") == text.count("wide / grouped |") == 1
    with pytest.raises(SystemExit):
        report.main([str(folder / "grouped.json"), "--tables", "nonsense"])
    crossover.main([str(folder / "grouped.json")])
    assert "Measured crossover: " in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("suite", ("grouped", "ffn"))
def test_quick_run_on_a_gpu(tmp_path, suite):
    # In a process of its own: cuBLAS refuses the deterministic mode that the tests run in.
    command = [sys.executable, "benchmarks/bench_grouped.py", "--quick", "--suite", suite]
    chosen = ["--device", "cuda", "--out", str(tmp_path)]
    done = subprocess.run([*command, *chosen], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / f"{suite}.json").read_text())["rows"]
    assert {row["provider"] for row in rows if row["status"] == "wrong"} == set()


def test_a_run_cut_short_leaves_what_it_measured(tmp_path, monkeypatch):
    real, calls = jobs.run_mixture, []

    def run_mixture(*arguments):
        calls.append(arguments)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(jobs, "run_mixture", run_mixture)
    with pytest.raises(KeyboardInterrupt):
        run_quick(tmp_path, "--providers", "masked", "--tables", "routing", "--modes", "fwd")
    rows = json.loads((tmp_path / "grouped.json").read_text())["rows"]
    assert [row["provider"] for row in rows] == ["frozen", "masked"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    (
        (
            ["--suite", "grouped", "--tables", "nonsense"],
            "expected tables out of mixtures, routing, tokens, got nonsense",
        ),
        (["--suite", "grouped", "--experts", "72"], "72 logits"),
        (["--suite", "grouped", "--top-k", "8", "--routing", "empty"], "top_k"),
        (["--suite", "ffn", "--providers", "masked"], "suite ffn has no ['masked']"),
        (["--suite", "linear", "--providers", "loop_shared"], "suite linear has no"),
        (["--suite", "grouped", "--cases", "ffn-1x1"], "got ['ffn-1x1']"),
        (["--suite", "everything"], "invalid choice"),
    ),
)
def test_bad_arguments_are_refused(arguments, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench_grouped.main(["--quick", *arguments])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def pairs_at(*points: tuple[float, float]) -> list[thresholds.Pair]:
    """Pairs at R / K with a ratio wide / grouped."""
    row = {"experts": 1, "top_k": 1, "tokens": 1024}
    return [thresholds.Pair(row | {"rank": columns}, ratio, 1.0) for columns, ratio in points]


def test_the_cheapest_threshold_is_found():
    clear = pairs_at((64, 0.5), (128, 0.8), (256, 1.1), (512, 2.0))
    assert thresholds.cheapest(clear) == (128, 256, (1.0, 1.0))
    # Cells that contradict one another: one is lost either way, the cheaper one is given up.
    mixed = pairs_at((64, 0.5), (128, 1.1), (256, 0.5), (512, 2.0))
    best = thresholds.cheapest(mixed)
    assert (best.low, best.high) == (256, 512)
    assert best.cost.worst == pytest.approx(1.1)
    assert best.cost.mean == pytest.approx(1.1**0.25)
    assert thresholds.cost_of(clear, 300) == (pytest.approx(1.1**0.25), pytest.approx(1.1))
    always, never = pairs_at((64, 2.0), (128, 3.0)), pairs_at((64, 0.2), (128, 0.3))
    assert thresholds.cheapest(always)[:2] == (0.0, 64)
    assert thresholds.cheapest(never)[:2] == (128, math.inf)
    assert "from the smallest measured R / K = 64 on" in thresholds.describe(
        thresholds.cheapest(always)
    )
    assert "largest measured R / K = 128" in thresholds.describe(thresholds.cheapest(never))


def test_the_model_is_that_of_the_thresholds():
    for device, name in (
        ("NVIDIA H200", "sm_90"),
        ("NVIDIA A100-SXM4-80GB", "sm_80"),
        ("NVIDIA GeForce RTX 5090", "sm_120"),
    ):
        columns, of = thresholds.modelled(device)
        assert of == device
        assert columns == pytest.approx(dispatch.THRESHOLDS[name].columns, abs=1)
    assert thresholds.modelled("some CPU")[1] == "NVIDIA H200"


def test_tokens_from_which_grouped_is_faster(quick_run):
    _, _, result = quick_run
    rows = [row for row in result["rows"] if row["mode"] == "fwd" and "tokens" in row["tables"]]
    rows = [row | {"median_us": 1.0} for row in rows]
    faster = {1: 0.5, 33: 3.0}
    for row in rows:
        if row["provider"] == "moelora_wide":
            row["median_us"] = faster[row["tokens"]]
    (said,) = thresholds.token_remarks(rows, result["machine"])
    assert "from T = 33 on" in said
    slower = [row | {"median_us": 1.0 + row["provider"].endswith("grouped")} for row in rows]
    assert "nowhere up to T = 33" in thresholds.token_remarks(slower, result["machine"])[0]
    assert not plots.plot_crossover(result | {"rows": rows[:1]}, Path("never.png"))


def network(dtype: torch.dtype) -> tuple[ffn.FeedForward, FeedForwardChecker]:
    layer = ffn.make_feed_forward(NETWORK, 8, 16, 2, dtype, CPU)
    x, dys = draw_inputs(layer, 33, "skewed")
    return layer, FeedForwardChecker(layer, x, dys)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_networks_are_right(dtype):
    layer, checker = network(dtype)
    gradients = {f"{name}.{of}" for name in ffn.PROJECTIONS for of in ("dA", "dB")}
    assert set(checker.budgets) == {"y", "dx", "drouter_weight", *gradients}
    for provider in ("frozen", "plain_lora", "loop_shared"):
        build, formula = ffn.PROVIDERS[provider]
        name, error, budget = checker.verdict(build(layer), formula, "fwd_bwd")
        assert error <= budget, (provider, name)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
def test_the_whole_ffn_experts_of_the_package_are_right(dtype):
    layer, checker = network(dtype)
    build, formula = ffn.PROVIDERS["moelora"]
    name, error, budget = checker.verdict(build(layer), formula, "fwd_bwd")
    assert error <= budget, name


class ScalesTheOutput(ffn.Loop):
    """y is 5 % too large, like with gates that sum to more than 1."""

    def forward(self, x):
        (y,) = super().forward(x)
        return (y * 1.05,)


class ScalesOneGradient(ffn.Loop):
    """Everything right but dA of up, which is 5 % too large."""

    def __init__(self, layer):
        super().__init__(layer)
        for parameter in self.up_proj.A:
            parameter.register_hook(lambda gradient: gradient * 1.05)


@pytest.mark.parametrize(
    ("broken", "mode", "worst"),
    ((ScalesTheOutput, "fwd", "y"), (ScalesOneGradient, "fwd_bwd", "up_proj.dA")),
)
def test_a_wrong_network_is_named(broken, mode, worst):
    layer, checker = network(torch.float32)
    name, error, budget = checker.verdict(broken(layer), "mixture", mode)
    assert error > budget
    assert name == worst


def test_frozen_products_of_the_loops():
    # Units of one linear on all tokens: 3 K with experts one by one, 2 + K with gate and up shared,
    # 3 if down is shared too.
    layer, _ = network(torch.float32)
    x, _ = draw_inputs(layer, 10, "uniform")
    for provider, units in (("loop", 6), ("loop_shared", 4), ("loop_shared_down", 3)):
        module, rows = ffn.PROVIDERS[provider][0](layer), []

        def count(_, given, rows=rows):
            rows.append(len(given[0]))

        for name in ffn.PROJECTIONS:
            getattr(module, name).base.register_forward_pre_hook(count)
        module(x)
        assert sum(rows) == units * len(x)


def test_cases_of_networks():
    cases = {case.name: case for case in shapes.CASES["ffn"]}
    assert "Llama-2-7B.mlp" in cases["ffn-4096x11008"].used_by
    for (_, extent), run in RUN_SIZES.items():
        if extent != "quick":
            assert set(run.ffn.cases) <= set(cases)
    assert cases["ffn-4096x14336"].out_features == (4096,)
    names = [case.name for case in shapes.CASES["grouped"]]
    assert names == [case.name for case in shapes.CASES["linear"]]
    assert dataclasses.replace(LINEAR, suite="linear") == shapes.QUICK_CASES["linear"][0]


def test_per_token_times():
    assert tables.per_token({"median_us": 700.0, "tokens": 8192}) == "85.4 ns"
    assert tables.per_token({"median_us": 5000.0, "tokens": 100}) == "50.0 us"
