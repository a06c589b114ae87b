"""A checkout loads the native library that was built from its own csrc/, wherever it lies."""

from __future__ import annotations

import importlib.machinery
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import moelora_kernels
from moelora_kernels import native
from support.backends import needs_library

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the build id is checked on Linux")
LIBRARY = f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the sources, without a library."""
    ignore = shutil.ignore_patterns("_C.*", "__pycache__")
    package = Path(moelora_kernels.__file__).parent
    shutil.copytree(package, tmp_path / "checkout" / "moelora_kernels", ignore=ignore)
    shutil.copytree(Path(__file__).parents[2] / "csrc", tmp_path / "checkout" / "csrc")
    return tmp_path / "checkout"


@pytest.fixture
def site_packages(tmp_path: Path) -> Path:
    """A folder on sys.path with an installed package."""
    (tmp_path / "site-packages" / "moelora_kernels").mkdir(parents=True)
    return tmp_path / "site-packages"


def report(checkout: Path, site_packages: Path) -> tuple[dict, str]:
    """Return what `info` prints in the checkout's root, and its warnings."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(site_packages)}
    result = subprocess.run(
        [sys.executable, "-m", "moelora_kernels.info", "--json"],
        env=environment, cwd=checkout, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout), result.stderr


@needs_library
def test_the_installed_library_runs_from_the_root(checkout: Path, site_packages: Path) -> None:
    installed = Path(shutil.copy(native.path(), site_packages / "moelora_kernels"))
    # An older library beside the sources must not hide the installed one.
    (checkout / "moelora_kernels" / LIBRARY).write_bytes(b"older")
    values, warnings = report(checkout, site_packages)
    assert values["package"] == str(checkout / "moelora_kernels")
    assert values["native"]["available"]
    assert values["native"]["file"] == str(installed)
    assert "RuntimeWarning" not in warnings


@needs_library
def test_a_library_of_other_sources_is_named_and_not_loaded(
    checkout: Path, site_packages: Path
) -> None:
    installed = Path(shutil.copy(native.path(), site_packages / "moelora_kernels"))
    with (checkout / "csrc" / "bindings.cpp").open("a") as file:
        file.write("// changed after the build\n")
    values, warnings = report(checkout, site_packages)
    assert not values["native"]["available"]
    assert values["native"]["file"] == ""
    # Other stale libraries on sys.path, such as one in the environment, are named after this one.
    expected = f"not loaded: built from other sources than {checkout / 'csrc'}: {installed}"
    assert expected in values["native"]["reason"]
    assert expected in warnings
    assert warnings.count("RuntimeWarning") == 1
