"""The modelled cost of a layer: the model's parts, and the committed report as a bound."""

from __future__ import annotations

import copy
import json

import pytest

from benchmarks import budget as command
from benchmarks.model import budget
from benchmarks.model.budget import Modelled
from benchmarks.model.gpus import GPUS, blocks_per_multiprocessor
from benchmarks.model.launches import FP32, Layer, record
from benchmarks.model.machine_code import MachineCode
from benchmarks.model.work import work
from moelora_kernels.kernels.common import configs
from support.selection import exhaustive

CODE = MachineCode(
    threads=256, registers=128, shared=0, spills=0, stack=0, instructions=1000, loop=100,
    tensor_core={}, accesses={},
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "gpu", "blocks"),
    (
        # 65536 registers hold 16 warps of 128 registers: two blocks of 8 warps.
        ({}, "H200", 2),
        # One register more, and a warp takes 17 units of 256.
        ({"registers": 129}, "H200", 1),
        ({"registers": 32}, "H200", 8),
        ({"registers": 32, "threads": 128}, "H200", 16),
        ({"registers": 16, "threads": 32}, "H200", 32),
        ({"registers": 16, "threads": 32}, "L40S", 24),
        ({"registers": 32}, "L40S", 6),
        # Every block takes 1 KiB beside its own.
        ({"registers": 32, "shared": 113 << 10}, "H200", 2),
        ({"registers": 32, "shared": 114 << 10}, "H200", 1),
        ({"registers": 32, "shared": 82 << 10}, "A100", 1),
    ),
)
def test_blocks_per_multiprocessor(change, gpu, blocks):
    assert blocks_per_multiprocessor(CODE._replace(**change), GPUS[gpu]) == blocks


@pytest.mark.parametrize(
    ("waves", "longer"), ((0.5, 1.0), (1.0, 1.0), (1.25, 1.3), (2.0, 1.0), (5.0, 1.0), (7.3, 1.0))
)
def test_tail(waves, longer):
    assert budget.tail(waves) == pytest.approx(longer)


def launch_of(kernel: str, layer: Layer):
    with configs.assume("sm_90"):
        launches = record(layer)
    return next(each for each in launches if each.kernel.fn.__name__ == kernel)


@pytest.mark.parametrize(
    ("kernel", "layer", "flops"),
    (
        # 128 columns of A, and 16 for the router of 8 experts.
        ("shrink_gate_kernel", Layer("x"), 2 * 8192 * 4096 * (128 + 16)),
        ("shrink_gate_backward_kernel", Layer("x"), 2 * 8192 * 4096 * 128),
        ("resident_dx_kernel", Layer("x", gate="dense"), 2 * 8192 * 4096 * 128),
        # dlogits are two bfloat16.
        ("resident_dx_kernel", Layer("x"), 2 * 8192 * 4096 * (128 + 2 * 16)),
        ("shrink_dx_kernel", Layer("x", dtype=FP32), 6 * 2 * 8192 * 4096 * (128 + 16)),
        # 64 experts of rank 16: each multiplies its pairs.
        (
            "grouped_expand_kernel",
            Layer("x", ranks=(16,) * 64, grouped=True),
            2 * 8192 * 4096 * 16,
        ),
        ("reduce_partials_kernel", Layer("x"), 0),
    ),
)
def test_operations_of_a_launch(kernel, layer, flops):
    counted = work(launch_of(kernel, layer)).flops
    # A grouped launch has some tiles more than full ones.
    assert flops <= counted <= 1.3 * flops


def test_the_largest_limit_is_the_time():
    launch = launch_of("shrink_gate_kernel", Layer("x"))
    fast = budget.kernel(launch, CODE, GPUS["H200"], "forward")
    assert fast.limit == "L2"
    assert fast.us == pytest.approx(fast.limits["L2"] + budget.START)
    slow = budget.kernel(launch, CODE._replace(loop=10_000), GPUS["H200"], "forward")
    assert slow.limit == "issue"
    assert slow.us > 5 * fast.us


def modelled(**change) -> Modelled:
    limits = {"memory": 20.0, "L2": 25.0, "matrix": 5.0}
    return Modelled("shrink_gate", "forward", limits, 4.0, 128, 1, 0.97)._replace(**change)


@pytest.mark.parametrize(
    ("change", "rules"),
    (
        ({}, []),
        ({"waves": 1.2}, ["waves"]),
        ({"waves": 1.7}, []),
        ({"limits": {"memory": 20.0, "L2": 31.0}}, ["L2"]),
        ({"limits": {"memory": 20.0, "L2": 31.0, "matrix": 40.0}}, []),
        ({"waves": 1.2, "limits": {"memory": 1.0, "L2": 2.0}}, []),
        ({"waves": 1.2, "programs": 0}, []),
    ),
)
def test_broken_rules(change, rules):
    assert command.broken_rules(modelled(**change)) == rules


def test_a_layer_that_costs_more_is_a_problem():
    report = json.loads(command.REPORT.read_text())
    assert command.problems(report, report) == []
    worse = copy.deepcopy(report)
    worse["rows"][0]["ratio"] *= 1.05
    worse["rows"][1]["broken"]["forward new_kernel"] = ["waves"]
    worse["rows"].append({**worse["rows"][2], "layer": "another"})
    texts = command.problems(worse, report)
    assert len(texts) == 3
    assert "is allowed" in texts[0]
    assert "new_kernel breaks waves" in texts[1]
    assert "no bound" in texts[2]
    # Another version of Triton compiles to other registers: what costs more still shows.
    texts = command.problems({**worse, "triton": "3.6.0"}, report)
    assert len(texts) == 2
    assert not any("breaks" in text for text in texts)


def test_the_report_has_every_cell_and_says_modelled():
    report = json.loads(command.REPORT.read_text())
    cells = {(row["gpu"], row["layer"], row["tokens"]) for row in report["rows"]}
    assert cells == {(gpu, layer.name, layer.tokens) for gpu in GPUS for layer in command.layers()}
    assert report["modelled"] is True
    assert "**Modelled, not measured.**" in command.REPORT.with_suffix(".md").read_text()


def test_interpreted_kernels_are_refused(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        command.main([])
    assert "TRITON_INTERPRET" in capsys.readouterr().err


def test_unknown_gpus_are_refused(capsys):
    with pytest.raises(SystemExit):
        command.main(["--gpus", "V100"])
    assert "V100" in capsys.readouterr().err


@pytest.mark.ptx
@exhaustive
def test_no_layer_costs_more_than_its_bound(run_compiling):
    run_compiling("benchmarks/budget.py", "--check")
