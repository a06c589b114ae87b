"""From how many tokens on impl="auto" takes the grouped form: the rule, and the report."""

from __future__ import annotations

import json

import pytest

from benchmarks import forms as command
from benchmarks.model import budget, forms
from benchmarks.model.budget import Cell, Modelled
from benchmarks.model.forms import Step
from benchmarks.model.gpus import GPUS
from moelora_kernels.dispatch import THRESHOLDS


def steps(times: dict[int, float], host: float = 0.0) -> dict[int, Step]:
    return {tokens: Step(device, host) for tokens, device in times.items()}


WIDE = {512: 100.0, 1024: 200.0, 2048: 400.0}


@pytest.mark.parametrize(
    ("grouped", "host", "tokens"),
    (
        ({512: 120.0, 1024: 180.0, 2048: 300.0}, (0.0, 0.0), 1024),
        # Up to 5 % slower.
        ({512: 105.0, 1024: 210.0, 2048: 420.0}, (0.0, 0.0), 512),
        ({512: 106.0, 1024: 210.0, 2048: 420.0}, (0.0, 0.0), 1024),
        # A loss at more tokens excludes fewer tokens.
        ({512: 90.0, 1024: 211.0, 2048: 300.0}, (0.0, 0.0), 2048),
        ({512: 90.0, 1024: 180.0, 2048: 500.0}, (0.0, 0.0), 4096),
        # Both wait for the host.
        ({512: 80.0, 1024: 180.0, 2048: 300.0}, (140.0, 160.0), 1024),
        ({512: 80.0, 1024: 120.0, 2048: 300.0}, (140.0, 220.0), 2048),
        ({512: 80.0, 1024: 120.0, 2048: 300.0}, (190.0, 195.0), 512),
    ),
)
def test_rule(grouped: dict, host: tuple, tokens: int) -> None:
    of_wide, of_grouped = host
    assert forms.tokens_threshold(steps(WIDE, of_wide), steps(grouped, of_grouped)) == tokens


@pytest.mark.parametrize("name", [name for name in THRESHOLDS if name.startswith("sm_")])
def test_the_mixture_is_the_smallest_above_the_threshold(name: str) -> None:
    columns = THRESHOLDS[name].columns
    layer = forms.smallest_mixture(columns, 1024, grouped=True)
    R = sum(layer.ranks)
    assert R - forms.RANK <= columns * layer.top_k < R
    assert layer.grouped


def test_the_host_launches_every_kernel() -> None:
    launch = Modelled("shrink_gate", "forward", {"memory": 20.0}, 4.0)
    cell = Cell("H200", "grouped", 1024, [launch] * 10, [launch], [launch])
    assert forms.step(cell) == Step(240.0, forms.HOST["grouped"] + 25.0)


def test_dispatch_takes_the_thresholds_of_the_report() -> None:
    report = json.loads(command.REPORT.read_text())
    assert report["modelled"] is True
    assert [row["gpu"] for row in report["rows"]] == [*command.MODELLED]
    for row in report["rows"]:
        threshold = THRESHOLDS[row["architecture"]]
        assert GPUS[row["gpu"]].architecture == row["architecture"]
        assert (threshold.columns, threshold.tokens) == (row["columns"], row["tokens"])
        by_form = {
            form: {
                step["T"]: Step(step[f"{form} device"], step[f"{form} host"])
                for step in row["steps"]
            }
            for form in command.FORMS
        }
        assert forms.tokens_threshold(by_form["wide"], by_form["grouped"]) == row["tokens"]


def test_text_of_a_row() -> None:
    row = json.loads(command.REPORT.read_text())["rows"][0]
    lines = command.text(row).splitlines()
    assert f"grouped from T = {row['tokens']} on" in lines[0]
    assert len(lines) == 1 + len(row["steps"])


def test_refusals(monkeypatch, capsys) -> None:
    with pytest.raises(SystemExit):
        command.main(["--gpus", "V100"])
    assert "V100" in capsys.readouterr().err
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(SystemExit):
        command.main([])
    assert "TRITON_INTERPRET" in capsys.readouterr().err


def test_each_form_has_the_launches_that_are_not_of_triton() -> None:
    """`route` is a launch of the grouped form, and the product of u and B of the wide one."""
    names = {
        form: [
            launch.name
            for launch in budget.other_launches(
                forms.smallest_mixture(245, 1024, form == "grouped"), GPUS["H200"]
            )
        ]
        for form in command.FORMS
    }
    assert names["grouped"] == ["route", "y += x Wt", "dx += dy W"]
    assert names["wide"] == ["u Bt", "y += x Wt", "dx += dy W"]
