"""The modelled times beside those of a result file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import predictions
from support.selection import exhaustive

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "benchmarks" / "results" / "amd-epyc-2-cores" / "linear.json"


@pytest.mark.parametrize(
    ("device", "name"),
    (("NVIDIA H200", "H200"), ("NVIDIA H100 80GB HBM3", "H100"), ("NVIDIA L40S", "L40S")),
)
def test_gpu_of(device, name):
    assert predictions.gpu_of(device) == name


def test_a_machine_that_the_model_does_not_have(capsys):
    with pytest.raises(SystemExit):
        predictions.main([str(FILE)])
    assert "AMD EPYC" in capsys.readouterr().err


def on_an_h200() -> dict:
    """The results of a CPU as if they were of a GPU, two cells of them."""
    result = json.loads(FILE.read_text())
    result["machine"]["device"] = "NVIDIA H200"
    sizes = [("2048x2048", 128), ("2048x2048", 1024)]
    result["rows"] = [row for row in result["rows"] if (row["case"], row["tokens"]) in sizes]
    return result


def test_only_cells_with_all_providers_are_compared():
    result = on_an_h200()
    cells = predictions.rows_of(result)
    assert [*cells] == [("2048x2048", 128), ("2048x2048", 1024)]
    assert predictions.layer_of(cells["2048x2048", 128]["moelora"]).ranks == (16,) * 8
    for row in result["rows"]:
        if row["tokens"] == 128 and row["provider"] == "masked_compiled":
            row["status"] = "failed"
    assert [*predictions.rows_of(result)] == [("2048x2048", 1024)]


@exhaustive
def test_command(tmp_path, run_compiling):
    file = tmp_path / "linear.json"
    file.write_text(json.dumps(on_an_h200()))
    printed = run_compiling("benchmarks/predictions.py", str(file), "--jobs", "1", timeout=600)
    lines = [line for line in printed.splitlines() if line.startswith("| 2048x2048")]
    assert len(lines) == 6
    assert "| 2048x2048 | 128 | frozen | " in lines[0]
    assert all(float(line.split("|")[5]) > 0 for line in lines)
