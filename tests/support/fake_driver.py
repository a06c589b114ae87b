"""A stand-in for the CUDA driver: kernels are bound like on a GPU, but neither compiled nor run.

    with fake_driver("sm_90") as driver:
        shrink_gate.launch(...)                     # tensors on the CPU; their values are not read
    driver.launched                                 # names of the kernels, in order
    driver.compiled                                 # names of the kernels that Triton compiled

Triton's own code runs up to cuLaunchKernel: it binds the arguments, computes the key of the
compiled kernel, and looks it up.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any
from unittest import mock

import triton
import triton.compiler
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import moelora_kernels.kernels
from moelora_kernels.kernels.common import configs, launcher


class FakeKernel:
    """Stands in for triton.compiler.CompiledKernel. `run` is where Triton calls cuLaunchKernel."""

    function = packed_metadata = None

    def __init__(self, name: str, launched: list[str]) -> None:
        self.name, self.launched = name, launched

    def launch_metadata(self, grid, stream, *arguments) -> None:
        return None

    def run(self, *arguments: Any) -> None:
        self.launched.append(self.name)


class FakeDriver:
    """Stands in for the driver of Triton, with one device."""

    def __init__(self, architecture: str) -> None:
        self.target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
        self.launched: list[str] = []
        self.compiled: list[str] = []

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def compile(self, source, target=None, options=None, **_: Any) -> FakeKernel:
        self.compiled.append(source.name)
        return FakeKernel(source.name, self.launched)


def _kernels() -> Iterator[tuple[Any, str, JITFunction]]:
    """Yield module, name and an unused compiled form of every kernel of the package."""
    package = moelora_kernels.kernels
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        module = importlib.import_module(info.name)
        for name, value in vars(module).items():
            if name.endswith("_kernel") and hasattr(value, "fn"):
                # Triton's interpreter keeps the options of @triton.jit in `kwargs`.
                options = getattr(value, "kwargs", None) or vars(value)
                unspecialized = options.get("do_not_specialize")
                yield module, name, JITFunction(value.fn, do_not_specialize=unspecialized)


@contextmanager
def fake_driver(architecture: str) -> Iterator[FakeDriver]:
    """Launch kernels in the context on a FakeDriver of one architecture, with empty caches."""
    driver = FakeDriver(architecture)
    active = triton.runtime.driver
    patches = [
        mock.patch.object(active, "_active", driver),
        mock.patch.object(triton.compiler, "compile", driver.compile),
        mock.patch.object(launcher, "INTERPRET", False),
        *(mock.patch.object(module, name, kernel) for module, name, kernel in _kernels()),
    ]
    with configs.assume(architecture):
        for patch in patches:
            patch.start()
        try:
            yield driver
        finally:
            for patch in reversed(patches):
                patch.stop()


def called_code(function: Callable[[], Any]) -> list[CodeType]:
    """Return the code of every Python function that is called while `function()` runs."""
    codes: list[CodeType] = []
    previous = sys.getprofile()
    sys.setprofile(lambda frame, event, _: event == "call" and codes.append(frame.f_code))
    try:
        function()
    finally:
        sys.setprofile(previous)
    return codes
