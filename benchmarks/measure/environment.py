"""Describe a run: commit, command, machine."""

import os
import platform
import sys
from pathlib import Path

import torch

from moelora_kernels.kernels.common import tuned
from moelora_kernels.tune.commit import git_commit as commit_of

ROOT = Path(__file__).resolve().parents[2]
MEASURED_CODE = ("moelora_kernels", "csrc", "setup.py", "benchmarks/*.py")

MEMORY_KIND = {
    "cuda": "peak allocated by one call, less what was allocated before it",
    "cpu": "storages saved for backward, without x and parameters (null in fwd: nothing is saved)",
}


def git_commit() -> str:
    """Return HEAD, with -dirty if the measured code differs from it; '' without git."""
    return commit_of(ROOT, MEASURED_CODE)


def native_library() -> str | None:
    """Return "loaded" if the native CPU library runs the ops, else the reason; None: no package."""
    try:
        from moelora_kernels import native
    except ImportError:
        return None
    return "loaded" if native.available() else native.reason()


def describe_machine(device: torch.device, clock) -> dict:
    """Return the device, the versions, the threads and the state of the caches."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    from moelora_kernels import dispatch

    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "device_class": dispatch.device_class(device.type),
        "torch": torch.__version__,
        "triton": triton_version,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "native": native_library(),
        "tuned_tiles": tuned.describe(device) if device.type == "cuda" else "none: not a GPU",
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "load_at_start": clock.load_at_start,
        "cold_mib": clock.cold_bytes / 2**20,
        "cold_kind": clock.cold_kind,
        "memory_kind": MEMORY_KIND[device.type],
    }


def cpu_name() -> str:
    """Return the model name of the processor as the system reports it."""
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def make_result(rows: list[dict], commit: str, device: torch.device, clock) -> dict:
    """Return the contents of a result file."""
    command = " ".join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]])
    machine = describe_machine(device, clock)
    return {"schema": 1, "commit": commit, "command": command, "machine": machine, "rows": rows}
