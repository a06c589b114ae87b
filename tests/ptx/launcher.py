"""Run the package's launchers on a CPU, with the PTX that Triton compiles for an architecture.

with executed("sm_90", copies="late") as executor:
    shrink_gate.launch(...)                      # tensors on the CPU
"""

from __future__ import annotations

import inspect
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moelora_kernels.kernels.common import configs, launcher
from ptx.compiler import Compiled, compiled, describe
from ptx.errors import Unsupported
from ptx.execution import Kernel
from ptx.global_memory import GlobalMemory
from ptx.program import parse


@lru_cache(maxsize=24)
def kernel_of(ptx: str, shared: int) -> Kernel:
    """Return the kernel of a PTX module, ready to run."""
    program = parse(ptx)
    if program.threads is None:
        raise Unsupported(f"{program.name}: a kernel whose threads the PTX does not say")
    return Kernel(program, program.threads, shared)


@dataclass
class Executor:
    """Stands in for `launcher.run`, and counts.

    late       copies and products happen at their wait, not when they are issued
    cut        sums of tensor cores are cut, not rounded
    change     a function (name of the kernel, PTX) -> PTX, to plant faults
    """

    architecture: str
    late: bool = False
    cut: bool = False
    change: Callable[[str, str], str] | None = None
    launches: int = 0
    programs: int = 0
    # Instructions, by program.
    instructions: int = 0
    seconds: float = 0.0
    # PTX of every kernel that ran, by name.
    kernels: dict[str, Compiled] = field(default_factory=dict)

    def run(
        self,
        kernel,
        programs: int,
        tile_config: configs.TileConfig,
        arguments: dict[str, Any],
        constants: dict[str, Any],
    ) -> None:
        """Compile the kernel, and run it on CPU tensors, like `launcher.run`."""
        if launcher._records is not None:
            launch = launcher.Launch(kernel, programs, arguments, constants, tile_config)
            launcher._records.append(launch)
        if programs == 0:
            return
        function = kernel.fn
        result = compiled(
            (function.__module__, function.__name__),
            tuple((name, describe(value)) for name, value in arguments.items()),
            tuple(constants.items()),
            tuple(tile_config[:4]),
            self.architecture,
        )
        self.kernels[function.__name__] = result
        ptx = self.change(function.__name__, result.ptx) if self.change else result.ptx
        ready = kernel_of(ptx, result.shared)
        started, before = time.perf_counter(), ready.executed
        names = [name for name in inspect.signature(function).parameters if name not in constants]
        storages, values = _flatten(function, arguments, names, result)
        memory = GlobalMemory([(_bytes(each), each.data_ptr() % 16) for each in storages])
        parameters = [
            _bits(value, storages, memory) if isinstance(value, Tensor) else _bits_of(value)
            for value in values
        ]
        # Triton appends pointers to scratch memory that these kernels do not use.
        parameters += [0] * (len(ready.program.parameters) - len(parameters))
        ready.launch(programs, parameters, memory, self.late, self.cut)
        for number, storage in enumerate(storages):
            if memory.stored[number]:
                _bytes(storage)[:] = memory.contents(number)
        self.launches += 1
        self.programs += programs
        self.instructions += ready.executed - before
        self.seconds += time.perf_counter() - started


def _flatten(function, arguments: dict, names: list[str], result: Compiled) -> tuple[list, list]:
    """Return the storages of the tensors, and the arguments that are parameters of the PTX."""
    values: list[Any] = []

    def add(value: Any, path: tuple[int, ...]) -> None:
        if path in result.constants:
            return
        if isinstance(value, (tuple, list)):
            for i, each in enumerate(value):
                add(each, (*path, i))
        else:
            values.append(value)

    order = list(inspect.signature(function).parameters)
    for name in names:
        add(arguments[name], (order.index(name),))
    storages: list[torch.UntypedStorage] = []
    for value in values:
        if isinstance(value, Tensor) and all(
            value.untyped_storage().data_ptr() != s.data_ptr() for s in storages
        ):
            storages.append(value.untyped_storage())
    return storages, values


def _bytes(storage: torch.UntypedStorage) -> np.ndarray:
    return torch.empty(0, dtype=torch.uint8).set_(storage).numpy()


def _bits(tensor: Tensor, storages: list, memory: GlobalMemory) -> int:
    """Return the address of a tensor."""
    pointer = tensor.untyped_storage().data_ptr()
    number = next(i for i, s in enumerate(storages) if s.data_ptr() == pointer)
    return memory.address(number) + tensor.storage_offset() * tensor.element_size()


def _bits_of(value: float | int) -> int:
    """Return a number as raw bits: float32, or an integer in two's complement."""
    if isinstance(value, float):
        return struct.unpack("<I", struct.pack("<f", value))[0]
    return int(value) & (2**64 - 1)


@contextmanager
def executed(
    architecture: str,
    copies: str = "early",
    sums: str = "exact",
    change: Callable[[str, str], str] | None = None,
) -> Iterator[Executor]:
    """Run launches in the context as compiled for an architecture.

    copies: "early": cp.async and wgmma happen when they are issued; "late": at their wait.
    sums: "exact": products of tensor cores are summed exactly and rounded; "cut": as in hardware.
    """
    executor = Executor(architecture, copies == "late", sums == "cut", change)
    saved = launcher.run, launcher.INTERPRET
    launcher.run, launcher.INTERPRET = executor.run, False
    try:
        with configs.assume(architecture):
            yield executor
    finally:
        launcher.run, launcher.INTERPRET = saved
