"""The fine-tuning example at a small size. Tests of it are skipped without its packages."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")
pytest.importorskip("accelerate")

import finetune_multitask as example

SMALL = ["--hidden", "64", "--layers", "2", "--max-length", "64", "--device", "cpu"]


def run(tmp_path: Path, *arguments: str) -> dict:
    """Run the example with small sizes; it writes to tmp_path / "out". Return its metrics."""
    return example.main([*SMALL, "--out", str(tmp_path / "out"), *arguments])
