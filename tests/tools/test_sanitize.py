"""What `.ci/sanitize` runs under a sanitizer works without one, and the runner names its lack."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from tools import sanitize

RUNNER = Path(__file__).resolve().parents[2] / ".ci" / "sanitize"


def test_the_program_runs(capsys) -> None:
    """A changed signature of a launcher would show on a GPU only, long after."""
    sanitize.main(["one_token", "dropout_per_expert"])
    assert "every kernel ran" in capsys.readouterr().out


@pytest.mark.skipif(
    shutil.which("compute-sanitizer", path=os.defpath) is not None, reason="it is there"
)
def test_the_runner_says_that_the_sanitizer_is_missing(tmp_path) -> None:
    """Nothing checked must not look like nothing found."""
    done = subprocess.run(
        ["bash", RUNNER],
        capture_output=True,
        text=True,
        env={"PATH": os.defpath, "CUDA_HOME": str(tmp_path)},
        timeout=60,
    )
    assert done.returncode == 2
    assert "compute-sanitizer" in done.stderr
