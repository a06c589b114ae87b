"""The suite `decode`, the host's time of a call, and the goals of the package."""

import json

import pytest
import torch

from benchmarks import bench_grouped
from benchmarks.baselines.linear import PROVIDERS
from benchmarks.measure import harness
from benchmarks.measure.clocks import ColdWeights
from benchmarks.measure.inputs import draw_inputs, make_layer
from benchmarks.output import plots, tables
from benchmarks.output.goals import GOALS, goal_tables
from benchmarks.suites import shapes, sizes
from benchmarks.suites.jobs import SUITES

CPU = torch.device("cpu")
SMALL = shapes.QUICK_CASES["decode"][0]


def test_a_loop_has_no_graph():
    layer, suite = make_layer(SMALL, 8, 16, 2, torch.float32, CPU), SUITES["decode"]
    assert "host waits" in suite.problem("loop", layer, 1, sizes.GRAPH)
    for name in suite.providers:
        assert not suite.problem(name, layer, 1, "fwd")
        assert name == "loop" or not suite.problem(name, layer, 1, sizes.GRAPH)


def test_the_package_decodes_in_every_cell_of_a_cpu():
    """Unless impl="auto" decodes, the suite measures another form of the package."""
    options = bench_grouped.make_parser().parse_args(["--device", "cpu", "--full"])
    decode = bench_grouped.run_sizes(options).decode
    assert decode.modes == ("fwd",)
    layer = make_layer(SMALL, 8, 16, 2, torch.bfloat16, CPU)
    build, _ = SUITES["decode"].providers["moelora"]
    for tokens in decode.tokens:
        assert build(layer).eval().implementation(torch.zeros(tokens, 72)) == "decode"


def test_host_times_are_means_of_calls_that_follow_one_another():
    layer = make_layer(SMALL, 8, 16, 2, torch.float32, CPU)
    x, dys = draw_inputs(layer, 3, "uniform")
    weights, calls = ColdWeights(layer, cold_bytes=0), []

    class Counted(harness.Timed):
        def call(self):
            calls.append(self)
            super().call()

    timed = {
        name: Counted(PROVIDERS[name][0](layer), weights, x, dys, "fwd")
        for name in ("frozen", "masked")
    }
    samples = harness.host_times(timed, CPU, rounds=2, calls=3)
    assert calls == [timed[name] for name in ("frozen", "masked") * 2 for _ in range(3)]
    assert all(len(values) == 2 and min(values) > 0 for values in samples.values())


def row(provider: str, median: float, **fields) -> dict:
    """Return a row of a result file."""
    base = harness.empty_row(SMALL, 1, "fwd", provider, bench_options())
    return base | {"median_us": median, "p10_us": median, "p90_us": median} | fields


def bench_options() -> harness.Options:
    parsed = bench_grouped.make_parser().parse_args(["--device", "cpu"])
    return bench_grouped.make_options(parsed, "decode")


def test_a_table_shows_the_time_of_the_host():
    rows = [row("frozen", 20.0, host_us=8.5), row("moelora", 30.0, host_us=14.0)]
    rows += [row("loop", None, status="left out", reason="no graph")]
    (table,) = tables.make_tables(rows)
    assert [line[-1] for line in table.lines] == ["host at T=1", "8.5 us", "14.0 us", "-"]
    (table,) = tables.make_tables([each | {"host_us": None} for each in rows])
    assert table.lines[0][-1] == "extra MiB at T=1"


def goal_lines(device: str, *rows: dict) -> list[list[str]]:
    """Return the lines of the table of goals below its header, without the name of the cell."""
    result = {"machine": {"device": device}, "rows": list(rows)}
    return [line[4:] for table in goal_tables(result) for line in table.lines[1:]]


def test_goals_are_compared_with_what_was_measured():
    cell = {"case": "4096x4096", "mixture": "E=8 r=16 K=2"}
    rows = [
        row("frozen", 100.0, **cell),
        row("moelora", 112.0, **cell),
        row("masked", 113.0, **cell),
        row("plain_lora", 105.0, **cell),
        row("loop", 111.0, **cell),
    ]
    # The loop is no rival of this goal, and a plain LoRA of none.
    assert goal_lines("AMD EPYC", *rows) == [["1.12x", "1.12x", "yes"]]
    slower = [
        each | {"median_us": 114.0} if each["provider"] == "moelora" else each for each in rows
    ]
    assert goal_lines("AMD EPYC", *slower) == [["1.12x", "1.14x: missed", "no: masked"]]
    # Other cells have other goals, or none.
    assert not goal_lines("NVIDIA H200", *rows)
    assert not goal_lines("AMD EPYC", *(each | {"tokens": 3} for each in rows))
    assert not goal_lines("AMD EPYC", *(each | {"suite": "linear"} for each in rows))
    assert not goal_lines("AMD EPYC", *(each | {"experts": 9} for each in rows))
    assert not goal_lines("AMD EPYC", *rows[1:])
    graph = [each | {"mode": sizes.GRAPH} for each in rows]
    assert goal_lines("NVIDIA H200", *graph) == [["1.10x", "1.12x: missed", "-"]]


def test_every_goal_has_a_cell_of_the_full_run():
    for device, name in (("cpu", "cpu"), ("cuda", "gpu")):
        full = sizes.RUN_SIZES[device, "full"]
        for goal in GOALS[name]:
            suite = full.ffn if goal.case.startswith("ffn") else full.decode
            assert goal.case in suite.cases
            assert goal.tokens in suite.tokens
            assert goal.mode in suite.modes
            assert goal.mixture in suite.mixtures


def test_a_plot_has_a_panel_for_each_table(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(plots, "plot_tokens", lambda result, path, rows: seen.append(rows))
    rows = [row(p, 1.0, case=case) for case in ("a", "b") for p in ("frozen", "moelora")]
    assert plots.plot({"rows": rows}, tmp_path / "decode.png")
    assert seen == [rows]
    linear = [each | {"suite": "linear"} for each in rows]
    assert plots.plot({"rows": linear}, tmp_path / "linear.png")
    assert seen[1] == linear[:2]


@pytest.mark.gpu
def test_graphs_are_checked_and_timed(tmp_path):
    """Every provider is right in a graph, too; the loop is left out; the host's time is there."""
    arguments = ["--suite", "decode", "--quick", "--device", "cuda", "--tokens", "5"]
    assert bench_grouped.main([*arguments, "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "decode.json").read_text())["rows"]
    assert {each["mode"] for each in rows} == {"fwd", sizes.GRAPH}
    for each in rows:
        if each["mode"] == sizes.GRAPH and each["provider"] == "loop":
            assert each["status"] == "left out"
        else:
            assert each["status"] == "ok", each["reason"]
            assert each["host_us"] > 0
