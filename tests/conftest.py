"""Settings of all tests: which tests run, NaN-poisoned allocations, the seed, the interpreter.

And the folder of compiled kernels, for tests that compile in another process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

# Deterministic cuBLAS, which the poisoning below asks for; read when its first handle is made.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# The tests run the shipped tiles, and not those that were tuned on this machine.
os.environ["MOELORA_TILES"] = "0"

if not torch.cuda.is_available():
    # Read when Triton is imported: kernels then run on CPU tensors, in numpy.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser):
    parser.addoption(
        "--exhaustive", action="store_true", help="run the tests marked exhaustive, too"
    )
    parser.addoption(
        "--repeats", type=int, default=50, help="how often a tile must repeat its bits on a GPU"
    )


def pytest_collection_modifyitems(config, items):
    """Deselect the tests marked exhaustive, and skip the tests marked gpu if there is no GPU.

    A test that the command line names by its id (FILE::TEST) runs without --exhaustive.
    """
    if not config.option.exhaustive and not any("::" in argument for argument in config.args):
        deselected = [item for item in items if item.get_closest_marker("exhaustive")]
        items[:] = [item for item in items if not item.get_closest_marker("exhaustive")]
        config.hook.pytest_deselected(items=deselected)
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(no_gpu)


def pytest_collectstart():
    """Values that a module draws when it is imported are the same in every run."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poisoned_allocations():
    """torch.empty returns NaN (or the largest integer), so that memory never written shows."""
    torch.use_deterministic_algorithms(True)
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def seeded():
    """Every test starts from the same random state."""
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def compiled_kernels(request, tmp_path):
    """The folder of compiled kernels: it is kept between runs, and Triton's version is in its keys.

    TRITON_CACHE_DIR, or a folder of pytest's cache, or a new folder if pytest runs without a cache.
    """
    if folder := os.environ.get("TRITON_CACHE_DIR"):
        return folder
    cache = getattr(request.config, "cache", None)
    return str(cache.mkdir("triton") if cache else tmp_path)


@pytest.fixture
def run_compiling(compiled_kernels):
    """Run a script of the repository in another process: in this one Triton may interpret.

    It must exit with 0. Returns what it printed. Without the lines of the source Triton compiles
    the same machine code in less time.
    """

    def run(script: str, *arguments: str, timeout: int = 1800) -> str:
        environment = {name: v for name, v in os.environ.items() if name != "TRITON_INTERPRET"}
        done = subprocess.run(
            [sys.executable, script, *arguments],
            cwd=Path(__file__).resolve().parents[1],
            env={
                **environment,
                "TRITON_CACHE_DIR": compiled_kernels,
                "TRITON_DISABLE_LINE_INFO": "1",
            },
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run
