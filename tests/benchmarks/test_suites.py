"""The benchmark at toy size: nothing wrong is timed, everything it writes can be read."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bench_grouped, report
from benchmarks.baselines.linear import PROVIDERS, Masked, Siblings
from benchmarks.measure import clocks, environment, harness
from benchmarks.measure.check import Checker
from benchmarks.measure.inputs import draw_inputs, make_layer
from benchmarks.output import tables
from benchmarks.output.progress import Progress
from benchmarks.suites import shapes, sizes
from benchmarks.suites.cells import grouped_cells
from moelora_kernels.testing import ROUTINGS

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
    "peak_extra_mib": (*NUMBER, type(None)),
    "error": (*NUMBER, type(None)),
    "error_budget": (*NUMBER, type(None)),
    "worst": (str, type(None)),
    "used_by": list,
}
MIXTURE_FIELDS = {"experts": int, "rank": int, "top_k": int, "routing": str}
CELL_FIELDS = {"cell": str, "tables": list}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that wait for one another at every toy product, on a busy machine, take minutes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def check_row(row: dict) -> None:
    """A row has every field of the schema, of the right type, and numbers that hang together."""
    fields = FIELDS if row["provider"] == "frozen" else FIELDS | MIXTURE_FIELDS
    fields = fields | CELL_FIELDS if row["suite"] == "grouped" else fields
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
    code, results = run_quick(folder, "--suite", "all", "--commit", "abc123")
    return folder, code, results


def test_quick_run_of_every_suite(quick_run):
    folder, code, results = quick_run
    assert set(results) == set(bench_grouped.SUITES)
    for suite, result in results.items():
        assert result["schema"] == 1
        assert result["commit"] == "abc123"
        assert "bench_grouped.py" in result["command"] or "pytest" in result["command"]
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


def test_the_default_is_a_part_of_the_full_run():
    for device in ("cpu", "cuda"):
        default, full = (sizes.RUN_SIZES[device, extent] for extent in ("default", "full"))
        for suite in ("linear", "group", "ffn"):
            part, whole = getattr(default, suite), getattr(full, suite)
            for field in ("cases", "tokens", "modes"):
                assert set(getattr(part, field)) <= set(getattr(whole, field)), (suite, field)
        grouped = grouped_cells(default.grouped)
        assert {cell.name for cell in grouped} <= {c.name for c in grouped_cells(full.grouped)}
        for field in ("copy", "product", "addmm", "shrink", "weight_grad", "layer_tokens"):
            part, whole = getattr(default.machine, field), getattr(full.machine, field)
            assert part
            assert set(part) <= set(whole), field


def test_the_default_on_a_cpu_takes_minutes():
    """A cell compiles the rival (up to 20 s), checks the providers and samples them for 3 s."""
    parsed = bench_grouped.make_parser().parse_args(["--device", "cpu"])
    assert bench_grouped.selected_suites(parsed) == [*bench_grouped.SUITES, "machine"]
    cells = {
        suite: sum(job.cells for job in bench_grouped.make_jobs(suite, parsed, clocks.CpuClock()))
        for suite in bench_grouped.selected_suites(parsed)
    }
    assert cells == {"linear": 4, "group": 1, "grouped": 3, "ffn": 1, "machine": 7}
    assert sizes.CPU_DEFAULT.budget_s * sum(cells.values()) < 60


def test_progress_without_a_terminal(capsys):
    bar = Progress(3)
    bar("first")
    bar.say("a table")
    bar("second")
    shown = capsys.readouterr()
    assert shown.out == "a table\n"
    assert re.fullmatch(r"\[1/3\] first, \d+:\d\d left\n\[2/3\] second, .* left\n", shown.err)
    bar.close()


def test_pages_are_checked_and_rewritten(quick_run, tmp_path, capsys):
    _, _, results = quick_run
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "linear.json").write_text(json.dumps(results["linear"]))
    open_line = "<!-- table: results/linear.json modes=fwd providers=frozen,moelora -->"
    page, other = tmp_path / "README.md", tmp_path / "other.md"
    for path in (page, other):
        path.write_text(f"before\n{open_line}\n<!-- end of table -->\nafter\n")
    pages = ["--pages", str(page), str(other)]
    assert report.main(["--check", *pages]) == 1
    assert page.read_text().count("|") == 0
    assert capsys.readouterr().out.count("out of date") == 2
    assert report.main(pages) == 0
    assert report.main(["--check", *pages]) == 0
    for path in (page, other):
        text = path.read_text()
        assert "| moelora |" in text
        assert "| masked |" not in text
        assert "forward + backward" not in text
        assert text.endswith("after\n")


def test_the_pages_of_the_repository_are_up_to_date():
    assert report.main(["--check"]) == 0


def test_a_remark_does_not_list_every_cell():
    row = {"provider": "stacked", "status": "left out", "reason": "needs 9 GiB"}
    timed = {"provider": "frozen", "status": "ok"}
    left_out = [row | {"cell": f"T={T}"} for T in range(8)]
    cells = [timed | {"cell": f"T={T}"} for T in range(8)]
    remarks = lambda rows: tables.not_timed(rows, lambda row: row["cell"])  # noqa: E731
    assert remarks(cells + left_out) == ["stacked: not measured in this table (needs 9 GiB)."]
    (remark,) = remarks(cells + left_out[:5])
    assert remark == "stacked: not measured at T=0, T=1, T=2 and 2 more cells (needs 9 GiB)."
    assert remarks(cells[:1] + left_out[:1]) == ["stacked: not measured at T=0 (needs 9 GiB)."]
    assert remarks(cells) == []


class ForgetsLastExpert(Masked):
    def forward(self, x):
        with torch.no_grad():
            self.lora_A[-self.rank :] = 0
        return super().forward(x)

    def __init__(self, adapter, layer):
        super().__init__(adapter, layer)
        self.lora_A = torch.nn.Parameter(adapter.lora_A.clone())


class ScalesOneGradient(Masked):
    """Everything right but dB, which is 5 % too large."""

    def __init__(self, adapter, layer):
        super().__init__(adapter, layer)
        self.lora_B.register_hook(lambda gradient: gradient * 1.05)


class DetachesTheRouter(Masked):
    """Trains the experts, forgets the router: its gradient is None, dx lacks its path."""

    def route(self, x):
        weights, chosen = super().route(x)
        return weights.detach(), chosen


class ReturnsNan(Masked):
    """One entry of y in one row."""

    def forward(self, x):
        y = super().forward(x)
        return y.index_fill(0, torch.tensor([len(x) - 1]), torch.nan)


class DropsLastColumn(Masked):
    """As a kernel does that forgets the last tile of O; with 104 columns an error of 10 %."""

    def forward(self, x):
        y = super().forward(x)
        return torch.cat([y[:, :-1], torch.zeros_like(y[:, -1:])], dim=1)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32))
@pytest.mark.parametrize(
    ("broken", "mode", "worst"),
    (
        (ForgetsLastExpert, "fwd", "y"),
        (ScalesOneGradient, "fwd_bwd", "dB"),
        (DetachesTheRouter, "fwd_bwd", "drouter"),
        (ReturnsNan, "fwd", "y"),
        (DropsLastColumn, "fwd", "y"),
    ),
)
def test_wrong_provider_is_named(broken, mode, worst, dtype):
    layer = make_layer(QUICK_QKV, 8, 16, 2, dtype, CPU)
    x, dys = draw_inputs(layer, 33, "uniform")
    name, error, budget = Checker(layer, x, dys).verdict(Siblings(broken, layer), "mixture", mode)
    assert error > budget
    assert f".{worst}" in name


def test_right_providers_are_within_budget_where_rows_are_sampled():
    # 300 tokens: more than the 128 that are compared on a CPU, so dy is zero in some rows.
    layer = make_layer(QUICK_QKV, 8, 16, 2, torch.bfloat16, CPU)
    x, dys = draw_inputs(layer, 300, "skewed")
    checker = Checker(layer, x, dys)
    assert len(checker.rows) == 128
    assert checker.rows[0] == 0
    assert checker.rows[-1] == 299
    for provider in ("frozen", "plain_lora", "loop", "stacked", "grouped_mm", "moelora_grouped"):
        build, formula = PROVIDERS[provider]
        name, error, budget = checker.verdict(build(layer), formula, "fwd_bwd")
        assert error <= budget, (provider, name)


def test_masked_is_held_to_an_absolute_bound(monkeypatch):
    layer = make_layer(QUICK_LINEAR, 8, 16, 2, torch.float32, CPU)
    x, dys = draw_inputs(layer, 9, "uniform")
    wrong = lambda layer: Siblings(ForgetsLastExpert, layer)  # noqa: E731
    monkeypatch.setitem(PROVIDERS, "masked", (wrong, "mixture"))
    with pytest.raises(ArithmeticError, match="masked provider is wrong"):
        Checker(layer, x, dys)


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


def test_compiled_rival_runs_or_says_why(tmp_path):
    # The only compile of this file: twenty seconds of the C++ compiler on a slow machine.
    chosen = ("--suite", "linear", "--providers", "masked_compiled", "--modes", "fwd_bwd")
    _, results = run_quick(tmp_path, *chosen)
    (row,) = (r for r in results["linear"]["rows"] if r["provider"] == "masked_compiled")
    check_row(row)
    assert row["status"] == "ok" or "ompil" in row["reason"]


@pytest.mark.parametrize("routing", list(ROUTINGS))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_no_routing_near_ties_after_rounding(routing, dtype):
    layer = make_layer(QUICK_QKV, 8, 16, 2, dtype, CPU)
    x, dys = draw_inputs(layer, 50, routing)
    assert x.dtype == dtype
    assert [dy.shape for dy in dys] == [(50, out) for out in QUICK_QKV.out_features]
    for adapter in layer.adapters:
        logits = x.double() @ adapter.router_weight.double().T + adapter.router_bias.double()
        ordered = logits.sort(dim=1, descending=True).values
        assert (ordered[:, 1] - ordered[:, 2]).min() > 0.4
        if routing == "one":
            assert (logits[:, 0] > 0.75).all()
        if routing == "empty":
            assert (logits[:, -1] < 0.75).all()


def test_inputs_are_the_same_every_time():
    layers = [make_layer(QUICK_LINEAR, 8, 16, 2, torch.bfloat16, CPU) for _ in range(2)]
    (x, dys), (again, dys_again) = (draw_inputs(layer, 7, "zipf") for layer in layers)
    assert torch.equal(x, again)
    assert torch.equal(dys[0], dys_again[0])


def test_case_names_and_their_users():
    linear = {case.name: case for case in shapes.CASES["linear"]}
    group = {case.name: case for case in shapes.CASES["group"]}
    assert len(linear) == len(shapes.CASES["linear"]) == 15
    assert list(group) == [
        "qkv-2048",
        "qkv-4096x1024",
        "qkv-4096",
        "qkv-5120",
        "gate_up-2048x5504",
        "gate_up-4096x11008",
        "gate_up-4096x14336",
        "gate_up-5120x13696",
    ]
    assert "ChatGLM-6B.dense" in linear["4096x4096"].used_by
    assert "Llama-2-7B.q_proj,o_proj" in linear["4096x4096"].used_by
    assert linear["4096x1024"].used_by == ("Llama-3-8B.k_proj,v_proj",)
    assert group["qkv-4096x1024"].out_features == (4096, 1024, 1024)
    assert [name for name, _ in group["qkv-4096"].siblings] == ["q_proj", "k_proj", "v_proj"]
    assert group["gate_up-4096x11008"].used_by == ("Qwen1.5-7B.mlp", "Llama-2-7B.mlp")
    for (_, extent), run in sizes.RUN_SIZES.items():
        if extent != "quick":
            assert set(run.linear.cases) <= set(linear)
            assert set(run.group.cases) <= set(group)


def test_cases_are_chosen_by_name():
    chosen = shapes.select_cases("linear", False, ["4096x4096", "qkv-4096"])
    assert [case.name for case in chosen] == ["4096x4096"]
    assert len(shapes.select_cases("group", False, ["all"])) == len(shapes.CASES["group"])
    with pytest.raises(ValueError, match=r"got \['4096x4095'\]"):
        shapes.select_cases("linear", False, ["4096x4095"])


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
    argument = arguments[0].removeprefix("--")
    assert argument in capsys.readouterr().err.replace("top_k", "top-k")


def test_frozen_always_runs():
    parsed = bench_grouped.make_parser().parse_args(["--providers", "moelora", "--quick"])
    for suite in bench_grouped.SUITES:
        assert bench_grouped.make_options(parsed, suite).providers == ["frozen", "moelora"]


def test_commit_without_git_is_empty(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert environment.git_commit() == ""


def test_saved_bytes_counts_what_backward_keeps():
    layer = make_layer(QUICK_LINEAR, 8, 16, 2, torch.float32, CPU)
    x = torch.randn(40, 72, requires_grad=True)
    kept = {
        name: harness.saved_bytes(PROVIDERS[name][0](layer), x)
        for name in PROVIDERS
        if name in ("frozen", "plain_lora", "masked")
    }
    assert kept["frozen"] == 0
    # h * scale [T, R] in fp32 is what the expand needs
    assert kept["plain_lora"] == 40 * 128 * 4
    # The mixture needs h [T, R] and the gate too, whoever computes it.
    assert kept["masked"] > kept["plain_lora"]


def test_quantile_interpolates():
    assert harness.quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert math.isclose(harness.quantile([0.0, 10.0], 0.1), 1.0)
    assert harness.quantile([4.0], 0.9) == 4.0


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


@pytest.mark.parametrize("provider", ("frozen", "moelora", "masked"))
def test_time_of_a_toy_layer(benchmark, provider):
    """For `pytest --benchmark-only`: forward + backward, so that a slowdown of the host shows."""
    layer = make_layer(QUICK_LINEAR, 8, 16, 2, torch.float32, CPU)
    x, dys = draw_inputs(layer, 33, "uniform")
    weights = clocks.ColdWeights(layer, cold_bytes=0)
    timed = harness.Timed(PROVIDERS[provider][0](layer), weights, x, dys, "fwd_bwd")
    benchmark.pedantic(timed.call, setup=timed.reset, rounds=10, warmup_rounds=2)


def test_cold_weights_turn_through_equal_copies():
    layer = make_layer(shapes.linear_case(40, 24), 4, 2, 2, torch.float32, CPU)
    size = layer.adapters[0].weight.nbytes
    weights = clocks.ColdWeights(layer, cold_bytes=3 * size - 1)
    provider = PROVIDERS["masked"][0](layer)
    parameters = weights.frozen_parameters(provider)
    assert len(parameters) == 1
    x, _ = draw_inputs(layer, 5, "uniform")
    expected, places = provider(x)[0], set()
    for _ in range(6):
        weights.rotate(parameters)
        places.add(parameters[0][0].data_ptr())
        assert torch.equal(provider(x)[0], expected)
    assert len(places) == 3
