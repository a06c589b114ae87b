"""The example that generates: it streams, measures, reads an adapter, and refuses wrong options."""

import pytest

from support.example import run as fine_tune
from support.selection import exhaustive

import generate as example  # isort: skip

SMALL = ["--hidden", "64", "--layers", "1", "--tokens", "3", "--repeats", "1", "--device", "cpu"]


@pytest.mark.parametrize(
    ("options", "columns"),
    (
        pytest.param(["--loop"], 7, id="ming"),
        pytest.param(["--preset", "moelora", "--static"], 4, id="moelora"),
        pytest.param(
            ["--preset", "mola", "--loop", "--dtype", "bf16"], 7, id="mola", marks=exhaustive
        ),
        pytest.param(["--preset", "lora", "--loop"], 7, id="lora", marks=exhaustive),
        pytest.param(["--preset", "hydralora"], 4, id="hydralora", marks=exhaustive),
    ),
)
def test_streams_and_measures(options, columns, capsys):
    rows = example.main([*SMALL, "--batch", "1,2", "--prompt", "Is 3 odd?", *options])
    printed = capsys.readouterr().out
    assert printed.startswith("Is 3 odd? ")
    header, *lines = printed.splitlines()[-3:]
    assert "retention" in header
    assert [row["batch"] for row in rows] == [1, 2]
    assert [int(line.split()[0]) for line in lines] == [1, 2]
    for row in rows:
        assert len(row) == columns
        assert all(value > 0 for value in row.values())


def test_options_of_the_mixture():
    args = example.parse_arguments([*SMALL, "--experts", "4", "--rank", "3", "--top-k", "1"])
    models, _ = example.make_models(args)
    layer = models["experts"].model.layers[0].mlp.up_proj
    assert layer.lora_A.shape == (12, 64)
    assert layer.config.top_k == 1
    weight = models["base"].model.layers[0].mlp.up_proj.weight
    assert layer.base_layer.weight.data_ptr() == weight.data_ptr(), "the base is copied"


def test_a_wrong_loop_is_not_measured(monkeypatch):
    right = example.ExpertLoop.expert
    monkeypatch.setattr(example.ExpertLoop, "expert", lambda self, x, e: 50 * right(self, x, 0))
    with pytest.raises(AssertionError, match="the loop over the experts gives other logits"):
        example.main([*SMALL, "--loop"])


def test_the_ratio_is_the_median_over_the_repetitions():
    samples = {"experts": [50.0, 80.0, 30.0], "base": [100.0, 100.0, 40.0]}
    row = example.table_row(8, samples)
    assert row == {"batch": 8, "experts tok/s": 50.0, "base tok/s": 100.0, "retention": 0.75}
    assert example.format_row(row).split() == ["8", "50", "100", "75.0%"]


def test_an_adapter_of_the_other_example(tmp_path, capsys):
    short = ["--preset", "ming", "--steps", "2", "--pretrain-steps", "0"]
    fine_tune(tmp_path, *short)
    folder = str(tmp_path / "out")
    (row,) = example.main([*SMALL, "--adapter", folder, "--batch", "2", "--prompt", "copy ab"])
    assert "copy ab " in capsys.readouterr().out
    assert row["batch"] == 2
    with pytest.raises(SystemExit):
        example.main([*SMALL, "--adapter", folder, "--rank", "4"])
    assert "--adapter: has a base and a mixture" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    (
        (["--batch", "1,0"], "--batch: must be at least 1, got 0"),
        (["--hidden", "33"], "--hidden: must be a multiple of 32"),
    ),
)
def test_wrong_numbers_are_refused(options, said, capsys):
    with pytest.raises(SystemExit):
        example.main([*SMALL, *options])
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    (
        (["--preset", "moelora", "--loop"], "--loop: expected experts that a linear router"),
        (["--experts", "2", "--top-k", "3"], "top_k"),
        (["--adapter", "nosuch"], "nosuch"),
    ),
)
def test_what_does_not_fit_is_said(options, said):
    with pytest.raises(SystemExit, match=said):
        example.main([*SMALL, *options])
