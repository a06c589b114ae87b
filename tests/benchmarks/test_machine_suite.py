"""The suite `machine` at toy size: predictions are marked, and a wrong call is not timed."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import bench_grouped, report
from benchmarks.measure import clocks, comparison, environment
from benchmarks.measure.comparison import Bench, Call, compare
from benchmarks.model import roofline
from benchmarks.output import plots, tables
from benchmarks.suites import machine
from benchmarks.suites.sizes import RUN_SIZES

ROOT = Path(__file__).resolve().parents[2]
H200 = roofline.ASSUMED["NVIDIA H200"]
MEASUREMENTS = ["copy", "product", "addmm_", "shrink", "weight_grad", "host", "layer"]
ALL = ["linear", "group", "grouped", "decode", "ffn"]
UNITS = {"us", "ratio", "TB/s", "TFLOP/s"}


@pytest.fixture(autouse=True, scope="module")
def short_batches():
    """Two calls instead of hundreds: interpreted kernels take milliseconds."""
    before, comparison.BATCH = comparison.BATCH, 2
    yield
    comparison.BATCH = before


def run_quick(folder: Path, *more: str) -> tuple[int, dict]:
    """Exit code of a --quick run, and its result file."""
    arguments = ["--quick", "--suite", "machine", "--device", "cpu", "--budget", "0.01", "--warm"]
    code = bench_grouped.main([*arguments, "--out", str(folder), *more])
    return code, json.loads((folder / "machine.json").read_text())


def make_bench(*more: str, warm: bool = True) -> Bench:
    arguments = ["--quick", "--suite", "machine", "--device", "cpu", "--budget", "0.01", *more]
    parsed = bench_grouped.make_parser().parse_args(arguments)
    return Bench(bench_grouped.make_options(parsed), clocks.CpuClock(cold=not warm))


def interpreted_bench() -> Bench:
    """Return a bench that runs the GPU's code on CPU tensors, with predictions for an H200."""
    pytest.importorskip("triton")
    from moelora_kernels.kernels.common import launcher

    if not launcher.INTERPRET:
        pytest.skip("Triton compiles for a GPU here")
    bench = make_bench()
    bench.launchers, bench.rates = True, H200
    return bench


def measure_all(bench: Bench) -> list[list[dict]]:
    """Return the rows of every measurement at toy size."""
    jobs = machine.jobs(bench, RUN_SIZES["cpu", "quick"].machine)
    return [job.measure(lambda text: None) for job in jobs]


def check_row(row: dict, fields: set[str]) -> None:
    assert set(row) == fields
    assert row["suite"] == "machine"
    assert row["unit"] in UNITS
    if row["status"] == "ok":
        assert 0 < row["p10"] <= row["median"] <= row["p90"] < math.inf
        assert row["samples"] >= 3
        assert row["reason"] is None
    else:
        assert row["reason"]
        assert row["median"] is row["p10"] is row["p90"] is None
        assert row["samples"] == 0
    assert (row["predicted"] is None) == (row["predicted_by"] is None)
    if row["error"] is not None and row["status"] == "ok":
        assert row["error"] <= row["error_budget"] < 0.1


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("machine")
    code, result = run_quick(folder, "--commit", "abc123")
    return folder, code, result


def test_quick_run_on_a_cpu(quick_run):
    folder, code, result = quick_run
    assert code == 0
    assert [path.name for path in folder.iterdir()] == ["machine.json"]
    assert result["schema"] == 1
    assert result["commit"] == "abc123"
    assert result["machine"]["cold_mib"] == 0
    assert result["machine"]["tuned_tiles"] == "none: not a GPU"
    bench = make_bench()
    fields = set(comparison.empty_row(bench, "copy", "1 MiB", "read + write", "torch"))
    for row in result["rows"]:
        check_row(row, fields)
        assert row["status"] == "ok", row["reason"]
        assert row["predicted"] is None, "a CPU has no predictions"
    assert tables.distinct(result["rows"], "measurement") == MEASUREMENTS
    checked = [row for row in result["rows"] if row["provider"] == "moelora" and row["error"]]
    of = {row["measurement"] for row in checked}
    assert of >= {"shrink", "weight_grad", "layer"}


def test_cold_samples_say_so():
    bench = make_bench(warm=False)
    assert bench.device_clock.cold_bytes == bench.device_clock.buffer.nbytes > 0
    result = environment.make_result([], "", bench.device, bench.device_clock)
    assert result["machine"]["cold_kind"] == "caches overwritten before every call"


def test_a_gpu_waits_until_the_host_has_queued_a_sample(monkeypatch):
    order = []
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append("wait"))
    inner = clocks.CpuClock(cold=False)
    inner.sample = lambda call: order.append("sample")
    comparison.DeviceClock(inner, torch.device("cuda")).sample(lambda: None)
    assert order == ["wait", "sample"]


@pytest.fixture(scope="module")
def interpreted_run():
    bench = interpreted_bench()
    return bench, measure_all(bench)


def test_the_path_of_a_gpu_interpreted(interpreted_run):
    bench, measured = interpreted_run
    fields = set(comparison.empty_row(bench, "copy", "1 MiB", "read + write", "torch"))
    rows = [row for of_measurement in measured for row in of_measurement]
    for row in rows:
        check_row(row, fields)
        assert row["status"] == "ok", row["reason"]
    variants = {row["variant"] for row in rows}
    assert {f"split={split}" for split in machine.SPLITS[1:]} <= variants
    assert "split=1 (rule)" in variants
    assert "shrink_gate (triton), router / mm" in variants
    assert "beta=1 / beta=0" in variants
    for name in ("topk_gate", "shrink_gate"):
        assert f"{name}, bare JIT launch" in variants
    assert any(variant.startswith("shrink_gate, launcher (triton)") for variant in variants)
    by_variant = {row["variant"]: row for row in rows if row["measurement"] == "host"}
    assert by_variant["topk_gate, bare JIT launch"]["predicted"] == 11.5
    assert by_variant["ATen mm"]["predicted"] is None


@pytest.mark.gpu
def test_quick_run_on_a_gpu(tmp_path):
    # In a process of its own: cuBLAS refuses the deterministic mode that the tests run in.
    command = [sys.executable, "benchmarks/bench_grouped.py", "--quick", "--suite", "machine"]
    chosen = ["--device", "cuda", "--out", str(tmp_path)]
    done = subprocess.run([*command, *chosen], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "machine.json").read_text())["rows"]
    for row in rows:
        check_row(row, set(rows[0]))
    assert tables.distinct(rows, "measurement") == MEASUREMENTS
    assert {row["variant"] for row in rows if row["status"] != "ok"} <= {"native GPU op"}


def test_tables_show_predictions_apart(interpreted_run):
    _, measured = interpreted_run
    text = "\n\n".join(
        tables.text(table) for rows in measured for table in tables.make_tables(rows)
    )
    header = next(line for line in text.splitlines() if "measured / predicted" in line)
    assert header.split()[:7] == [
        "case",
        "variant",
        "measured",
        "p10",
        "p90",
        "predicted",
        "measured",
    ]
    copied = next(line for line in text.splitlines() if "read + write" in line)
    assert "4.3 TB/s" in copied
    assert "if the read of y is not hidden" in text


def test_markdown_and_plot(quick_run, tmp_path):
    folder, _, result = quick_run
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "machine.json").write_text((folder / "machine.json").read_text())
    readme = tmp_path / "README.md"
    readme.write_text(
        "before\n<!-- table: results/machine.json -->\n<!-- end of table -->\nafter\n"
    )
    report.main(["--pages", str(readme)])
    text = readme.read_text()
    assert text.count("| case | variant | measured |") == len(MEASUREMENTS)
    assert "not measured" in text
    assert "abc123" in text
    assert "frozen layer" not in text.split("**copy")[0]
    readme.write_text(
        "<!-- table: results/machine.json cases=1 modes=fwd -->\n<!-- end of table -->"
    )
    report.main(["--pages", str(readme)])
    plots.plot(result, tmp_path / "machine.png")
    assert not (tmp_path / "machine.png").exists()


@pytest.mark.parametrize(
    ("predicted", "published"),
    (
        # One pass over [8192, 4096] in bf16, and W read once at decode.
        (roofline.one_pass(H200, 8192, 4096), 15.6),
        (roofline.one_pass(H200, 4096, 4096), 7.8),
        (roofline.one_pass(H200, 4096, 14336), 27.3),
        # The frozen layer forward and backward.
        (roofline.layer(H200, 8192, 2048, 2048, 64, "fwd_bwd", None), 174),
        (roofline.layer(H200, 8192, 4096, 4096, 64, "fwd_bwd", None), 696),
        (roofline.layer(H200, 8192, 4096, 14336, 64, "fwd_bwd", None), 2436),
        (roofline.launch(H200, "triton"), 11.5),
        (roofline.launch(H200, "native"), 2.5),
    ),
)
def test_predictions_in_microseconds(predicted, published):
    assert predicted == pytest.approx(published, rel=0.005)


@pytest.mark.parametrize(("passes", "published"), ((1, 1.1346), (2, 1.1794)))
def test_predicted_layer_over_frozen(passes, published):
    # Published were the passes over [T, d] alone: tensors of rank space vanish for one column.
    sizes = (8192, 4096, 4096)
    frozen = roofline.layer(H200, *sizes, 1, "fwd_bwd", None)
    assert roofline.layer(H200, *sizes, 1, "fwd_bwd", passes) / frozen == pytest.approx(
        published, abs=2e-4
    )
    # Bound by arithmetic: 1 + 3 R / d, whatever the passes.
    assert roofline.layer(H200, *sizes, 256, "fwd_bwd", 1) / frozen == pytest.approx(1.1875)


def test_devices_without_assumed_rates_have_no_predictions():
    assert roofline.assumed_rates("NVIDIA H200", "bf16") == H200
    for name, dtype in (("NVIDIA GH200 480GB", "bf16"), ("", "bf16"), ("NVIDIA H200", "fp32")):
        unknown = roofline.assumed_rates(name, dtype)
        assert unknown is roofline.UNKNOWN
        assert math.isnan(roofline.layer(unknown, 8, 8, 8, 8, "fwd_bwd", 1))
        assert math.isnan(roofline.launch(unknown, "triton"))


def spoil(outputs):
    h, u, *rest = outputs
    u = u.clone()
    u[-1] = 0
    return (h, u, *rest)


def spoil_last_column(outputs):
    dA, *rest = outputs
    dA = dA.clone()
    dA[:, -1] = 0
    return (dA, *rest)


@pytest.mark.parametrize(
    ("name", "wrong", "worst"),
    (("shrink_gate", spoil, "u"), ("weight_grad", spoil_last_column, "dA")),
)
def test_what_is_wrong_is_not_timed(name, wrong, worst, tmp_path, monkeypatch, capsys):
    right = Bench.operation

    def operation(bench, asked):
        function, impl = right(bench, asked)
        if asked != name:
            return function, impl
        return (lambda *arguments: wrong(function(*arguments))), impl

    monkeypatch.setattr(Bench, "operation", operation)
    code, result = run_quick(tmp_path)
    assert code == 1
    found = [row for row in result["rows"] if row["status"] == "wrong"]
    measurement = name.removesuffix("_gate")
    assert {row["measurement"] for row in found} == {measurement}
    for row in found:
        assert row["worst"] == worst
        assert row["error"] > row["error_budget"]
        assert row["median"] is None
        assert row["samples"] == 0
    ratios = [r for r in result["rows"] if r["measurement"] == measurement and r["unit"] == "ratio"]
    assert not ratios
    assert f"wrong: {worst} is off by" in capsys.readouterr().out


def test_nan_is_wrong():
    bench = make_bench()
    found = {"h": torch.full((2, 2), torch.nan)}
    plain = {"h": torch.ones(2, 2)}
    name, error, budget = comparison.compare_outputs(found, plain, plain, torch.float32)
    assert (name, error) == ("h", math.inf)
    call = Call("broken", lambda: None, verdict=lambda: (name, error, budget))
    (row,) = compare(bench, "shrink", "2x2", [call], bench.device_time)
    assert row["status"] == "wrong"
    assert row["error"] is None
    assert "missing or not finite" in row["reason"]


def refuse():
    raise RuntimeError("no memory\nsecond line")


def test_what_fails_or_is_absent_does_not_stop_the_others(monkeypatch):
    bench = make_bench()
    calls = [
        Call("refusing", refuse),
        Call("absent", None, 2.5, note="not written"),
        Call("there", lambda: None, 4.0),
    ]
    rows = {r["variant"]: r for r in compare(bench, "host", "T=1", calls, bench.host_time)}
    assert rows["refusing"]["reason"] == "RuntimeError: no memory"
    assert rows["absent"]["status"] == "absent"
    assert rows["absent"]["reason"] == "not written"
    assert (rows["absent"]["predicted"], rows["absent"]["median"]) == (2.5, None)
    assert (rows["there"]["status"], rows["there"]["predicted"]) == ("ok", 4.0)

    monkeypatch.setattr(machine, "draw_layer", lambda *sizes: refuse())
    measured = {rows[0]["measurement"]: rows for rows in measure_all(bench)}
    assert list(measured) == MEASUREMENTS
    (row,) = measured["shrink"]
    assert (row["case"], row["status"], row["provider"]) == ("33x72x32", "failed", "moelora")
    assert measured["copy"][0]["status"] == "ok"


def test_rates_and_ratios_come_from_the_samples():
    bench = make_bench()
    calls = [
        Call("a", lambda: None, 8.0),
        Call("b", lambda: None, 4.0),
        Call("rate", lambda: None, 4.3, unit="TB/s", amount=2e6),
    ]
    samples = {"a": [2.0, 4.0, 9.0], "b": [1.0, 4.0, 3.0], "rate": [1.0, 2.0, 4.0]}
    rows = compare(bench, "copy", "x", calls, lambda timed: samples, [("a", "b", "why")])
    rate, ratio = rows[2], rows[3]
    assert (rate["median"], rate["unit"]) == (1.0, "TB/s")
    assert rate["p10"] < rate["median"] < rate["p90"]
    assert (ratio["variant"], ratio["median"], ratio["predicted"]) == ("a / b", 2.0, 2.0)
    assert (ratio["unit"], ratio["note"]) == ("ratio", "why")


def test_all_ends_with_machine():
    parse = bench_grouped.make_parser().parse_args
    assert bench_grouped.selected_suites(parse([])) == [*ALL, "machine"]
    assert bench_grouped.selected_suites(parse(["--suite", "machine"])) == ["machine"]
    # The suite has its own shapes.
    assert bench_grouped.selected_suites(parse(["--tokens", "4"])) == ALL
    assert bench_grouped.selected_suites(parse(["--cases", "4096x4096"])) == ALL


@pytest.mark.parametrize("argument", (["--cases", "72x104"], ["--tokens", "4"]))
def test_machine_has_shapes_of_its_own(argument, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench_grouped.main(["--quick", "--suite", "machine", *argument])
    assert stopped.value.code == 2
    assert "has its own shapes" in capsys.readouterr().err


@pytest.mark.parametrize("extent", list(RUN_SIZES))
def test_every_run_has_a_comparison_of_each_measurement(extent):
    sizes = RUN_SIZES[extent].machine
    comparisons = machine.comparisons(make_bench(), sizes)
    assert list(comparisons) == MEASUREMENTS
    assert all(comparisons.values())
    for _, _, R in sizes.shrink:
        assert R % machine.EXPERTS == 0
