"""The native library as a file: there, missing, broken, ignored, at every vector width."""

from __future__ import annotations

import importlib.machinery
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import moelora_kernels
from moelora_kernels import native
from support.backends import REQUIRED, needs_library
from support.selection import exhaustive


def test_library_is_there_where_it_is_required() -> None:
    if REQUIRED:
        assert native.available(), native.reason()
    if native.available():
        assert native.reason() == ""
        assert native.build_info()["abi_target"] == "2.10"
        assert bool(native.build_info()["cuda"]) == bool(native.build_info()["cuda_ops"])
    else:
        assert native.reason()
        assert native.build_info() == {}


@needs_library
@pytest.mark.skipif(shutil.which("nm") is None, reason="nm lists what the library links")
def test_one_function_outside_of_the_stable_abi_is_linked() -> None:
    """Without it the library does not load. Plans look up theirs by name."""
    listed = ["nm", "--dynamic", "--undefined-only", native.path()]
    names = subprocess.run(listed, capture_output=True, text=True, check=True).stdout
    assert set(re.findall(r"\baoti_torch_(?:cpu|cuda)_\w+", names)) == {"aoti_torch_cpu_addmm_out"}


def run(
    code: list[str], folder: Path | None = None, **environment: str
) -> subprocess.CompletedProcess:
    # OMP_NUM_THREADS: the child must not fight the parent's threads for the cores.
    given = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, *code], env=given, cwd=folder, capture_output=True, text=True, timeout=600
    )


@exhaustive
@needs_library
@pytest.mark.parametrize("level", ("portable", "avx2"))
def test_every_vector_width(level: str, request) -> None:
    if level not in native.build_info()["simd"]:
        pytest.skip(f"this library has no {level} code")
    folder = Path(__file__).resolve().parents[1] / "ops"
    names = (
        "wide_ops",
        "grouped_ops",
        "grouped_edges",
        "ffn_inner",
        "decode",
        "topk_gate",
        "dropout",
    )
    files = [str(folder / f"test_{name}.py") for name in names]
    chosen = ["--exhaustive"] if request.config.option.exhaustive else []
    result = run(
        ["-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *chosen, "-k", "native", *files],
        MOELORA_SIMD=level,
        PYTEST_ADDOPTS="",
    )
    assert result.returncode == 0, result.stdout[-3000:]


REPORT = """
import torch, moelora_kernels
from moelora_kernels import native, reference
logits = torch.randn(3, 4)
weights, indices = torch.ops.moelora.topk_gate(logits, 2, True, 1.0)
torch.testing.assert_close(weights, reference.topk_gate(logits, 2, True, 1.0)[0])
print(native.available(), "|", native.reason(), "|", native.build_info())
"""


def test_the_library_can_be_ignored() -> None:
    result = run(["-W", "error", "-c", REPORT], MOELORA_NATIVE="0")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "False | ignored: MOELORA_NATIVE=0 | {}"


def test_a_missing_library_is_silent(tmp_path: Path) -> None:
    _copy_package(tmp_path)
    result = run(["-W", "error", "-c", REPORT], tmp_path)
    assert result.returncode == 0, result.stderr
    assert "False | not built" in result.stdout


def test_a_broken_library_warns_once_and_falls_back(tmp_path: Path) -> None:
    package = _copy_package(tmp_path)
    suffix = importlib.machinery.EXTENSION_SUFFIXES[0]
    (package / f"_C{suffix}").write_bytes(b"not a library")
    result = run(["-c", REPORT], tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("False | built, but it does not load:")
    assert result.stderr.count("RuntimeWarning") == 1


def _copy_package(target: Path) -> Path:
    source = Path(moelora_kernels.__file__).parent
    ignore = shutil.ignore_patterns("_C.*", "__pycache__")
    return Path(shutil.copytree(source, target / "moelora_kernels", ignore=ignore))
