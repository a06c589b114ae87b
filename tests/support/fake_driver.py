"""A stand-in for the CUDA driver: kernels are bound like on a GPU, but neither compiled nor run.

    with fake_driver("sm_90") as driver:
        shrink_gate.launch(...)                     # tensors on the CPU; their values are not read
    driver.launched                                 # names of the kernels, in order
    driver.compiled                                 # names of the kernels that Triton compiled

Triton's own code runs up to cuLaunchKernel: it binds the arguments, computes the key of the
compiled kernel, and looks it up.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import itertools
import pkgutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import CodeType, SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
import triton.compiler
from torch.utils._python_dispatch import _disable_current_modes
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import moelora_kernels.kernels
from moelora_kernels.kernels.common import configs, launcher


class FakeKernel:
    """Stands in for triton.compiler.CompiledKernel. `run` is where Triton calls cuLaunchKernel."""

    packed_metadata = None

    def __init__(self, source: Any, options: dict[str, Any], driver: FakeDriver) -> None:
        self.name, self.src, self.driver = source.name, source, driver
        # Stands in for the function of the driver.
        self.function = 1000 + len(driver.kernels)
        driver.kernels[self.function] = self
        self.metadata = SimpleNamespace(num_warps=options["num_warps"], shared=self.function)
        # The arguments of the first launch, in the order of the kernel, without tensors.
        self.arguments: tuple[Any, ...] = ()

    def launch_metadata(self, grid, stream, *arguments) -> None:
        return None

    def run(self, programs: int, y: int, z: int, stream: int, *arguments: Any) -> None:
        # Before the arguments of the kernel: function, metadata, and the metadata and two hooks
        # of a profiler.
        self.launch(programs, arguments[5:])

    def launch(self, programs: int, arguments: tuple[Any, ...]) -> None:
        self.driver.launched.append(self.name)
        self.arguments = self.arguments or _without_tensors(arguments)
        if self.driver.interpret:
            self.driver.run_interpreted(self.src, programs, arguments)

    def launch_packed(self, grid: tuple[int, ...], block: tuple[int, ...], parameters: Any) -> None:
        """Launch with the arguments of cuLaunchKernel; `parameters` points to each parameter."""
        assert (grid[1:], block) == ((1, 1), (32 * self.metadata.num_warps, 1, 1))
        numbers = itertools.count()

        def unpacked(argument: Any, type_: Any) -> Any:
            if isinstance(type_, tuple):
                return tuple(unpacked(a, t) for a, t in zip(argument, type_, strict=True))
            if type_ == "constexpr":
                return argument
            c_type = ctypes.c_uint64 if type_.startswith("*") else _C_TYPES[type_]
            return c_type.from_address(parameters[next(numbers)]).value

        types = self.src.signature.values()
        self.launch(
            grid[0], tuple(unpacked(a, t) for a, t in zip(self.arguments, types, strict=True))
        )
        # Two pointers to scratch memory come last.
        for _ in range(2):
            assert ctypes.c_uint64.from_address(parameters[next(numbers)]).value == 0


def _without_tensors(arguments: Sequence[Any]) -> tuple[Any, ...]:
    """Return the arguments of a kernel with None in the place of every tensor."""
    return tuple(
        _without_tensors(a)
        if isinstance(a, (tuple, list))
        else None
        if isinstance(a, torch.Tensor)
        else a
        for a in arguments
    )


# The type of a number in a signature of Triton -> its type in C.
_C_TYPES = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
# cuLaunchKernel: function, grid, block, shared memory, stream, parameters, extra.
_LAUNCH = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    *[ctypes.c_uint] * 7,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_void_p,
)


# The element type of a pointer in a signature of Triton -> dtype.
_DTYPES = {
    "*bf16": torch.bfloat16,
    "*fp16": torch.float16,
    "*fp32": torch.float32,
    "*fp64": torch.float64,
    "*i32": torch.int32,
    "*i64": torch.int64,
}


def _at_address(value: Any, type_: Any) -> Any:
    """Return the argument of a kernel with a tensor in the place of every address."""
    if isinstance(value, (tuple, list)):
        return tuple(_at_address(v, t) for v, t in zip(value, type_, strict=True))
    if not isinstance(value, int) or type_ not in _DTYPES:
        return value
    # The interpreter reads the address and the dtype, and no size.
    memory = (ctypes.c_byte * 16).from_address(value)
    return torch.frombuffer(memory, dtype=_DTYPES[type_])


class FakeDriver:
    """Stands in for the driver of Triton, with one device."""

    def __init__(self, architecture: str, interpret: bool) -> None:
        self.interpret = interpret
        # Name of a kernel -> the kernel that Triton interprets.
        self.interpreted = {k.fn.__name__: k for _, _, k in _package_kernels()}
        self.target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
        self.kernels: dict[int, FakeKernel] = {}
        # Stands in for cuLaunchKernel: a C function that calls Python, and its address.
        self._launch_kernel = _LAUNCH(self._launch_packed)
        self.address = ctypes.cast(self._launch_kernel, ctypes.c_void_p).value or 0
        self.errors: list[BaseException] = []
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
        return FakeKernel(source, options, self)

    def _launch_packed(self, function: int, *arguments: Any) -> int:
        grid, block, (shared, _, parameters, _) = arguments[:3], arguments[3:6], arguments[6:]
        try:
            assert shared == function
            self.kernels[function].launch_packed(grid, block, parameters)
        except BaseException as error:
            # An exception does not pass through C.
            self.errors.append(error)
            return 1
        return 0

    def run_interpreted(self, source: Any, programs: int, arguments: Sequence[Any]) -> None:
        """Interpret a launch. arguments: in the order of the kernel, tensors or addresses."""
        types = source.signature.values()
        values = [_at_address(v, t) for v, t in zip(arguments, types, strict=True)]
        # The interpreter calls torch, and a launch on a GPU does not.
        with _disable_current_modes():
            self.interpreted[source.fn.fn.__name__][(programs,)](*values)


def _package_kernels() -> Iterator[tuple[Any, str, Any]]:
    """Yield module, name and kernel, for every kernel of the package."""
    package = moelora_kernels.kernels
    for info in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        module = importlib.import_module(info.name)
        for name, value in vars(module).items():
            if name.endswith("_kernel") and hasattr(value, "fn"):
                yield module, name, value


def _kernels() -> Iterator[tuple[Any, str, JITFunction]]:
    """Yield module, name and an unused compiled form of every kernel of the package."""
    for module, name, value in _package_kernels():
        # Triton's interpreter keeps the options of @triton.jit in `kwargs`.
        options = getattr(value, "kwargs", None) or vars(value)
        unspecialized = options.get("do_not_specialize")
        yield module, name, JITFunction(value.fn, do_not_specialize=unspecialized)


@contextmanager
def fake_driver(architecture: str, interpret: bool = False) -> Iterator[FakeDriver]:
    """Launch kernels in the context on a FakeDriver of one architecture, with empty caches.

    interpret: a launch runs in Triton's interpreter; else it does nothing.
    """
    driver = FakeDriver(architecture, interpret)
    active = triton.runtime.driver
    patches = [
        mock.patch.object(active, "_active", driver),
        mock.patch.object(triton.compiler, "compile", driver.compile),
        mock.patch.object(launcher, "INTERPRET", interpret),
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
    """Return the code of every Python function that is called while `function()` runs.

    The garbage collector waits: it would call finalizers of other objects, and the callbacks that
    libraries (hypothesis) add to it.
    """
    codes: list[CodeType] = []
    previous, collects = sys.getprofile(), gc.isenabled()
    gc.disable()
    sys.setprofile(lambda frame, event, _: event == "call" and codes.append(frame.f_code))
    try:
        function()
    finally:
        sys.setprofile(previous)
        if collects:
            gc.enable()
    return codes
