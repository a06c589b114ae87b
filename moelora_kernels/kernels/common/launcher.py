"""Launch a kernel on the device of its tensors, or record the launch; sizes for launchers."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn.functional import pad

from moelora_kernels.kernels.common import tuned
from moelora_kernels.kernels.common.configs import TileConfig

# Whether Triton interprets kernels on the CPU instead of compiling them.
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
# Triton compiles a kernel for pointers that are multiples of this number of bytes, and for numbers
# that are multiples of it.
ALIGNMENT = 16


class Launch(NamedTuple):
    """A recorded launch, with everything to compile its kernel and to count the bytes it moves."""

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    constants: dict[str, Any]
    tile_config: TileConfig


class _Thread(threading.local):
    # Records the steps of an op of this thread, see `plans.recorder`.
    recorder: Any = None


_records: list[Launch] | None = None
_thread = _Thread()
_capture_lock = threading.Lock()


@contextmanager
def recording() -> Iterator[list[Launch]]:
    """Record the launches in the context. With tensors of the meta device no kernel runs."""
    global _records
    outer, _records = _records, []
    try:
        yield _records
    finally:
        _records = outer


def run(
    kernel,
    programs: int,
    tile_config: TileConfig,
    arguments: dict[str, Any],
    constants: dict[str, Any],
) -> None:
    """Launch `programs` programs on grid.x, on the current stream of the tensors' device.

    arguments: tensors, tuples of tensors, numbers or None. constants: values that are compiled in.
    Raise RuntimeError, with the tile, if the GPU lacks the resources that the kernel needs.
    """
    if _records is not None:
        _records.append(Launch(kernel, programs, arguments, constants, tile_config))
    first = next(a for a in _flat(arguments.values()) if isinstance(a, Tensor))
    if first.is_meta or programs == 0:
        return
    guard = nullcontext()
    if first.is_cuda:
        elsewhere = first.device.index != torch.cuda.current_device()
        if elsewhere or torch.cuda.is_current_stream_capturing():
            guard = _guard(first.device)
    try:
        with guard:
            compiled = kernel[(programs,)](**arguments, **constants, **options(tile_config))
    except triton.OutOfResources as error:
        tiles = tuned.describe(first.device)
        raise RuntimeError(f"{error}\n{tile_config}; tuned tiles: {tiles}") from error
    if _thread.recorder is not None:
        _thread.recorder.launch(compiled, kernel, programs, arguments | constants)


_run = run


def is_plain() -> bool:
    """Return whether a launch only launches: nothing records it, observes it or replaces it."""
    runtime = triton.knobs.runtime
    # In older versions of Triton a hook is a function or None.
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    observed = getattr(enter, "calls", enter) or getattr(leave, "calls", leave)
    return _records is None and run is _run and not observed


@contextmanager
def passing_launches_to(recorder: Any) -> Iterator[None]:
    """Pass the launches of this thread to `recorder.launch`, after they ran."""
    _thread.recorder = recorder
    try:
        yield
    finally:
        _thread.recorder = None


def options(tile_config: TileConfig) -> dict[str, Any]:
    """Return the compiler options. Fused multiply-adds are on, whatever Triton's default is."""
    return {
        "num_warps": tile_config.warps,
        "num_stages": tile_config.stages,
        "maxnreg": tile_config.registers,
        "enable_fp_fusion": True,
    }


@contextmanager
def _guard(device: torch.device) -> Iterator[None]:
    """Launch on `device`, and refuse to compile a kernel while a CUDA graph is captured there."""
    with torch.cuda.device(device):
        if not torch.cuda.is_current_stream_capturing():
            yield
            return
        runtime = triton.knobs.runtime
        # The hook belongs to all threads, so only one of them may change it and set it back.
        with _capture_lock:
            hook = runtime.jit_cache_hook
            # Triton calls this hook before it compiles a kernel.
            runtime.jit_cache_hook = lambda **_: require_no_capture("kernels", device)
            try:
                yield
            finally:
                runtime.jit_cache_hook = hook


def require_no_capture(name: str, device: torch.device) -> None:
    """Raise RuntimeError while a CUDA graph is being captured on `device`."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{name} must exist before a CUDA graph is captured: "
            "run the same shapes once before, or moelora_kernels.warmup(model, tokens)"
        )


def _flat(values) -> Iterator:
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _flat(value)
        else:
            yield value


def block(size: int, least: int = 16) -> int:
    """Return the power of two that holds `size` columns; products need 16 at least."""
    return max(least, 1 << (size - 1).bit_length())


def ceil_div(a: int, b: int) -> int:
    """Return a / b rounded up."""
    return -(-a // b)


def padded_width(width: int) -> int:
    """Return the width of a matrix that `rows_dense` returns: a multiple of ALIGNMENT."""
    return width + -width % ALIGNMENT


def rows_dense(matrix: Tensor) -> Tensor:
    """Return the matrix [N, padded_width], copied unless its rows are contiguous and aligned.

    Triton loads 16 bytes at a time only if the pointer is a multiple of 16 bytes, and if the row
    pitch and the width, which is in the masks, are multiples of 16 elements. A copy costs one pass
    over the matrix. Columns that it adds are 0.
    """
    width, pitch = matrix.shape[1], matrix.stride(0)
    if width % ALIGNMENT:
        return padded(matrix, matrix.shape[0], padded_width(width))
    if matrix.stride(1) != 1 or pitch % ALIGNMENT or matrix.data_ptr() % ALIGNMENT:
        return matrix.clone(memory_format=torch.contiguous_format)
    return matrix


def padded(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """Return the matrix [rows, columns], contiguous and aligned. Elements that it adds are 0."""
    if matrix.shape != (rows, columns):
        return pad(matrix, (0, columns - matrix.shape[1], 0, rows - matrix.shape[0]))
    if matrix.is_contiguous() and matrix.data_ptr() % ALIGNMENT == 0:
        return matrix
    return matrix.clone(memory_format=torch.contiguous_format)


def aligned_columns(matrix: Tensor) -> int:
    """Return the columns of a matrix whose rows are padded to a multiple of 16 bytes.

    For a matrix whose number of columns is compiled in, like B: Triton then sees the alignment.
    """
    columns = matrix.shape[1]
    return columns if columns * matrix.itemsize % ALIGNMENT == 0 else padded_width(columns)


def all_padded(matrices: Sequence[Tensor], rows: int, columns: int) -> tuple[Tensor, ...] | None:
    """Return `padded(matrix)` of all matrices, for a kernel; None if there are none."""
    return tuple([padded(matrix, rows, columns) for matrix in matrices]) or None


def cropped(result: Tensor, rows: int, columns: int) -> Tensor:
    """Return the first rows and columns of what a kernel stored, contiguous."""
    if result.shape == (rows, columns):
        return result
    return result[:rows, :columns].contiguous()


def aligned(tensor: Tensor) -> Tensor:
    """Return the tensor, copied unless it is contiguous and its pointer is aligned."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


def aligned_or_none(tensor: Tensor | None) -> Tensor | None:
    """Return `aligned(tensor)`; None for None."""
    return None if tensor is None else aligned(tensor)


def all_aligned(tensors: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
    """Return `aligned(tensor)` of all tensors, for a kernel; None if there are none."""
    return tuple([aligned(t) for t in tensors]) or None
