"""Compile the kernel of a launch to PTX in a process in which Triton does not interpret.

`compiled(...)` returns the PTX. The folder `ptx` of Triton's cache (TRITON_CACHE_DIR) keeps it.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Pointer(NamedTuple):
    """A tensor in the arguments of a launch, for the compiler."""

    dtype: torch.dtype
    # Whether its address is a multiple of 16.
    aligned: bool


class Compiled(NamedTuple):
    """What a launch needs of its compiled kernel."""

    ptx: str
    # Bytes of shared memory.
    shared: int
    # Positions of the arguments that were compiled in: (index, index in a tuple, ...).
    constants: frozenset[tuple[int, ...]]


def describe(value: Any) -> Any:
    """Return a value that is equal for all arguments for which Triton compiles the same kernel."""
    if isinstance(value, (tuple, list)):
        return tuple(describe(each) for each in value)
    if isinstance(value, Tensor):
        return Pointer(value.dtype, value.data_ptr() % 16 == 0)
    if isinstance(value, float):
        return 1.0
    if value is None or isinstance(value, bool) or value == 1:
        return value
    small = 16 if value % 16 == 0 else 3
    return small if -(2**31) <= value < 2**31 else small + 2**32


@cache
def compiled(
    kernel: tuple[str, str],
    arguments: tuple[tuple[str, Any], ...],
    constants: tuple[tuple[str, Any], ...],
    tile_config: tuple[int, int, int, int],
    architecture: str,
) -> Compiled:
    """Return the compiled kernel of a launch.

    kernel: (module, name). arguments: values of `describe`. constants: values that are compiled in.
    """
    work = kernel, dict(arguments), dict(constants), tile_config, architecture
    return _process().submit(_compile, *work).result()


@cache
def _process() -> ProcessPoolExecutor:
    """Return a process without TRITON_INTERPRET, which Triton reads when it is imported."""
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _end_with_ptx)
    interpret = os.environ.pop("TRITON_INTERPRET", None)
    try:
        pool.submit(os.getpid).result()
    finally:
        if interpret is not None:
            os.environ["TRITON_INTERPRET"] = interpret
    return pool


def _end_with_ptx() -> None:
    """Make Triton's compiler leave out ptxas and the lines of the source.

    Its cache does not tell such a kernel from a whole one, so the cache is another folder.
    """
    from triton import knobs

    def change_stages(backend=None, stages=None, *_: Any) -> tuple[str, str]:
        """Triton calls this for a part of its key, too: without arguments."""
        if stages is not None:
            stages["cubin"] = lambda ptx, metadata: b""
        return "ptx", "ptx"

    knobs.runtime.add_stages_inspection_hook = change_stages
    knobs.compilation.disable_line_info = True
    knobs.cache.dir = os.path.join(knobs.cache.dir, "ptx")


def _tensors(value: Any) -> Any:
    """Return the argument that a description stands for."""
    if isinstance(value, Pointer):
        return torch.zeros(65, dtype=value.dtype)[0 if value.aligned else 1 :]
    return tuple(map(_tensors, value)) if isinstance(value, tuple) else value


def _compile(
    kernel: tuple[str, str],
    arguments: dict[str, Any],
    constants: dict[str, Any],
    tile_config: tuple[int, int, int, int],
    architecture: str,
) -> Compiled:
    from benchmarks.model import machine_code
    from moelora_kernels.kernels.common.configs import TileConfig
    from moelora_kernels.kernels.common.launcher import Launch

    module, name = kernel
    launch = Launch(
        getattr(importlib.import_module(module), name),
        1,
        {key: _tensors(value) for key, value in arguments.items()},
        constants,
        TileConfig(*tile_config),
    )
    result = machine_code.compile_launch(launch, architecture)
    _, compiled_in, _ = machine_code.arguments_of(launch)
    return Compiled(result.asm["ptx"], result.metadata.shared, frozenset(compiled_in))
