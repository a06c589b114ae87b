"""Cases, and the cells that a run measures by default, with --full and with --quick."""

import pytest

from benchmarks import bench_grouped
from benchmarks.measure import clocks
from benchmarks.suites import shapes, sizes
from benchmarks.suites.cells import grouped_cells


def test_the_default_is_a_part_of_the_full_run():
    for device in ("cpu", "cuda"):
        default, full = (sizes.RUN_SIZES[device, extent] for extent in ("default", "full"))
        for suite in ("linear", "group", "decode", "ffn"):
            part, whole = getattr(default, suite), getattr(full, suite)
            for field in ("cases", "tokens", "modes", "mixtures"):
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
    assert cells == {"linear": 4, "group": 1, "grouped": 3, "decode": 2, "ffn": 1, "machine": 7}
    assert sizes.CPU_DEFAULT.budget_s * sum(cells.values()) < 60


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
            assert set(run.decode.cases) <= {*linear, *group}


def test_cases_are_chosen_by_name():
    chosen = shapes.select_cases("linear", False, ["4096x4096", "qkv-4096"])
    assert [case.name for case in chosen] == ["4096x4096"]
    assert len(shapes.select_cases("group", False, ["all"])) == len(shapes.CASES["group"])
    with pytest.raises(ValueError, match=r"got \['4096x4095'\]"):
        shapes.select_cases("linear", False, ["4096x4095"])
