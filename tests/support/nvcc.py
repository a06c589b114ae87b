"""Compile headers of csrc/cuda with nvcc, without torch."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from support.backends import REQUIRED

CUDA = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None and not REQUIRED, reason="needs nvcc")


def compile_source(text: str, *flags: str, headers: Mapping[str, str | None]) -> tuple[bytes, str]:
    """Compile a source with nvcc. Return the output and the messages, or raise CalledProcessError.

    headers: name of a header of csrc/cuda -> its text; None: as it is.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(folder, "source.cu"), Path(folder, "output")
        source.write_text(text)
        for name, changed in headers.items():
            Path(folder, name).write_text(changed or (CUDA / name).read_text())
        command = [NVCC or "nvcc", "-std=c++20", "-O3", *flags, str(source), "-o", str(output)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise subprocess.CalledProcessError(done.returncode, command, done.stdout, done.stderr)
        return output.read_bytes(), done.stderr
