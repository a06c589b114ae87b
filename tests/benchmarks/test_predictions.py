"""The modelled times beside those of a result file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
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
def test_command(tmp_path, compiled_kernels):
    """In another process: in this one Triton may interpret."""
    (tmp_path / "linear.json").write_text(json.dumps(on_an_h200()))
    environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "benchmarks/predictions.py", tmp_path / "linear.json", "--jobs", "1"],
        cwd=ROOT,
        env={**environment, "TRITON_CACHE_DIR": compiled_kernels},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("| 2048x2048")]
    assert len(lines) == 6
    assert "| 2048x2048 | 128 | frozen | " in lines[0]
    assert all(float(line.split("|")[5]) > 0 for line in lines)
