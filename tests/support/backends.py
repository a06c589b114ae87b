"""The implementations of an op, and the parameters of a test that runs on several of them.

native    the registered op on CPU tensors: the C++ library
triton    the launcher of the Triton kernel: on a GPU if there is one, else interpreted
ptx-sm_90 the launcher of the Triton kernel: its PTX for sm_90, executed on the CPU (`tests/ptx`);
          so for ptx-sm_80
gpu       the launcher on a GPU, at the sizes of real layers; `route`, which has no Triton
kernel, is the registered op
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from unittest import mock

import pytest
import torch

from moelora_kernels import native, ops
from moelora_kernels.kernels.common import configs
from moelora_kernels.testing import clear_routing
from moelora_kernels.tune.calls import op_launcher
from support.cases import Case
from support.inputs import Inputs
from support.selection import exhaustive

REQUIRED = os.environ.get("MOELORA_REQUIRE_NATIVE") == "1"
needs_library = pytest.mark.skipif(
    not native.available() and not REQUIRED, reason=f"native library: {native.reason()}"
)
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
HALF = {name: DTYPES[name] for name in ("bf16", "fp16")}
KERNEL_DTYPES = {name: DTYPES[name] for name in ("fp32", "bf16", "fp16")}
# Triton's interpreter takes CPU tensors, also on a machine with a GPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KERNEL_DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"

# Ops whose launcher cuts the long dimension of a sum into `split` parts.
SPLIT = (
    "shrink_gate", "shrink_gate_backward", "weight_grad", "ffn_inner", "ffn_inner_backward",
)  # fmt: skip


def in_parts(launch: Callable, split: int) -> Callable:
    """Return a launcher whose products are cut into `split` parts along their inner dimension."""
    return lambda *arguments: launch(*arguments, split=split)


def with_few_rows(launch: Callable, few_rows: int) -> Callable:
    """Return a launcher with other tiles: fewer than `few_rows` rows are few. 0: never."""

    def run(*arguments, **options):
        with mock.patch.object(configs, "FEW_ROWS", few_rows):
            return launch(*arguments, **options)

    return run


def on_ptx(launch: Callable, architecture: str, sums: str = "exact") -> Callable:
    """Return a launcher that executes PTX on a CPU.

    In every second call, copies and products happen as late as they may, else as early as they may.
    sums: see `ptx.launcher.executed`.
    """
    copies = itertools.cycle(("early", "late"))

    def run(*arguments, **options):
        from ptx.launcher import executed

        with executed(architecture, copies=next(copies), sums=sums):
            return launch(*arguments, **options)

    return run


@dataclass(frozen=True)
class Backend:
    name: str
    device: str
    marks: tuple[pytest.MarkDecorator, ...]
    # The architecture whose PTX is executed, or None.
    ptx: str | None = None

    @property
    def marks_of_edges(self) -> tuple[pytest.MarkDecorator, ...]:
        """The marks of a test that executes PTX with --exhaustive only."""
        return (*self.marks, exhaustive) if self.ptx else self.marks

    def implementation(
        self, op: str, sums: str = "exact", few_rows: int | None = None, **options
    ) -> Callable:
        """Return the function that computes an op.

        options: keyword arguments of its launcher. sums: "cut": as tensor cores do, in PTX alone.
        few_rows: see `with_few_rows`; without it PTX has the tiles of many rows.
        """
        if self is NATIVE or op == "route":
            return getattr(ops, op)
        launch: Callable = functools.partial(op_launcher(op), **options)
        if self.ptx and few_rows is None:
            few_rows = 0
        if few_rows is not None:
            launch = with_few_rows(launch, few_rows)
        return on_ptx(launch, self.ptx, sums) if self.ptx else launch

    def implementations(self, op: str) -> list[Callable]:
        """Return all functions that compute an op: Triton's with its products whole and cut."""
        if (self is TRITON or self.ptx) and op in SPLIT:
            return [self.implementation(op, split=split) for split in (1, 3)]
        return [self.implementation(op)]

    def inputs(self, case: Case, dtype: torch.dtype) -> Inputs:
        """Return the tensors of a case on the device of this backend.

        The values are drawn on the CPU if the kernels may be interpreted, so that they are the
        same on every machine.
        """
        if self is GPU:
            return with_clear_routing(Inputs(case, dtype, device=self.device))
        return Inputs(case, dtype).to(self.device)


NATIVE = Backend("native", "cpu", (needs_library,))
TRITON = Backend("triton", KERNEL_DEVICE, (needs_triton,))
GPU = Backend("gpu", "cuda", (pytest.mark.gpu, needs_triton))
PTX = tuple(
    Backend(f"ptx-{architecture}", "cpu", (needs_triton, pytest.mark.ptx), architecture)
    for architecture in ("sm_80", "sm_90")
)
SM_90 = PTX[1]


def each_backend(*backends: Backend) -> pytest.MarkDecorator:
    """Return the parameter `backend` of a test. PTX is executed with --exhaustive only."""
    return pytest.mark.parametrize(
        "backend",
        [
            pytest.param(backend, id=backend.name, marks=backend.marks_of_edges)
            for backend in backends
        ],
    )


each_cpu_backend = each_backend(NATIVE, TRITON)
# For masks, addresses and choices: they do not depend on the products of an architecture.
each_cpu_backend_and_sm_90 = each_backend(NATIVE, TRITON, SM_90)


def parameters(
    backend: Backend,
    values: Mapping,
    dtypes: Mapping[str, torch.dtype],
    runs_by_default: Callable[[str, str], bool] = lambda name, dtype: True,
) -> list:
    """Return the parameters (backend, value, dtype) of a test, with ids value-backend-dtype.

    values: name -> case, or another parameter of the test.
    dtypes: name -> dtype.
    runs_by_default: of both names; the other parameters are marked exhaustive.
    """
    return [
        pytest.param(
            backend,
            value,
            dtype,
            id=f"{name}-{backend.name}-{dtype_name}",
            marks=(*backend.marks, *(() if runs_by_default(name, dtype_name) else (exhaustive,))),
        )
        for dtype_name, dtype in dtypes.items()
        for name, value in values.items()
    ]


def ptx_parameters(
    cases: Mapping[str, Case],
    names: Mapping[str, Iterable[str]],
    only: Mapping[str, str],
    runs_by_default: Callable[[str, str], bool],
) -> list:
    """Return the parameters (backend, case, dtype) of a test, for PTX of both architectures.

    names: dtype -> the cases that run in it.
    only: "case-dtype" -> the architecture, if it runs on one.
    """
    return [
        parameter
        for backend in PTX
        for dtype in names
        for parameter in parameters(
            backend,
            {
                name: cases[name]
                for name in names[dtype]
                if only.get(f"{name}-{dtype}", backend.ptx) == backend.ptx
            },
            {dtype: DTYPES[dtype]},
            runs_by_default,
        )
    ]


def with_clear_routing(inputs: Inputs) -> Inputs:
    """Replace the tokens whose routing depends on the last bits of float32 logits."""
    inputs.x = clear_routing(inputs.x, inputs.router, inputs.case.K)
    return inputs


def require_gpu_memory(needed: int) -> None:
    """Skip the test if the GPU has less than `needed` bytes of free memory."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free memory, found {free >> 30}")
