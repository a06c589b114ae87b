"""Print the CPU time of layer calls and launchers without a GPU: the launch itself does nothing.

    PYTHONPATH=tests:. python tests/tools/host_cost.py

The times depend on the machine. Each is the lower decile of the CPU time of this thread, in
microseconds, beside the number of Python calls. Layers run at one token: on the ops of the CPU, and
on the kernels without plans, with plans, and with the plans in the native library. Kernels run up
to the point at which Triton or the library calls cuLaunchKernel.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from typing import Any

# Read when Triton is imported; the kernels of the tests are then made anew by `fake_driver`.
os.environ.setdefault("TRITON_INTERPRET", "1")

import torch

from moelora_kernels import native
from support.fake_driver import called_code, fake_driver
from support.host_cost import LAYERS, launcher_call, layer_calls
from support.kernels_on_cpu import kernels_on_cpu
from support.op_checks import GROUPED_OPS, WIDE_OPS

REPEATS, CALLS = 100, 20
LAYERS_ON_KERNELS = ("wide", "grouped", "siblings")
# A C function that returns 0 and ignores its arguments, in the place of cuLaunchKernel.
NO_LAUNCH = ctypes.cast(ctypes.CDLL(None).fegetround, ctypes.c_void_p).value or 0
# How the kernels are launched -> the options of `kernels_on_cpu`.
KINDS: dict[str, dict[str, Any]] = {
    "kernels": dict(plans=False),
    "plans": {},
    "native plans": dict(launch=NO_LAUNCH),
}


def microseconds(call: Callable[[], object]) -> float:
    """Return the lower decile of the CPU time of one call."""
    times = []
    for _ in range(REPEATS):
        started = time.thread_time_ns()
        for _ in range(CALLS):
            call()
        times.append((time.thread_time_ns() - started) / CALLS / 1e3)
    return sorted(times)[REPEATS // 10]


def line(name: str, call: Callable[[], object]) -> None:
    call()
    print(f"{name:36s} {microseconds(call):8.1f} us {len(called_code(call)):5d} calls", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    for name in LAYERS:
        for mode, call in layer_calls(name).items():
            line(f"{name}, {mode}", call)
    for name in LAYERS_ON_KERNELS:
        for kind, options in KINDS.items():
            if "launch" in options and native.plan_library() is None:
                continue
            with kernels_on_cpu(**options), fake_driver("sm_90"):
                calls = layer_calls(name)
                # The second call with plans records.
                for call in [*calls.values()] * 2:
                    call()
                for mode, call in calls.items():
                    line(f"{name}, {mode}, {kind}", call)
    for op in [op for op in {**WIDE_OPS, **GROUPED_OPS} if op != "route"]:
        with fake_driver("sm_90"):
            line(f"{op}, launcher", launcher_call(op))


if __name__ == "__main__":
    main()
