"""`python -m moelora_kernels.info [--json]`: print which implementations run here, and why.

Prints the folder of the package, versions, devices, the file of the native library or the reason
why none is loaded, the implementation of each op on each device, and the formulation that
impl="auto" takes for the sizes in the arguments.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch

import moelora_kernels
from moelora_kernels import dispatch, native, ops
from moelora_kernels.kernels.common import configs, tuned
from moelora_kernels.ops import registration

PACKAGES = ("triton", "numpy", "safetensors", "transformers", "peft")


def version(package: str) -> str | None:
    """Return the installed version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def implementations() -> dict[str, dict[str, str]]:
    """Return op -> device -> the implementation that runs.

    It is "native" (C++ or CUDA C++), "triton", "reference" (plain PyTorch) or "composite" (calls
    the other ops and ATen's matrix products).
    """
    cpu_ops, cuda_ops = (set(native.build_info().get(name, ())) for name in ("ops", "cuda_ops"))
    names = sorted([*ops.__all__, "topk_gate_backward"])
    table = {}
    for name in names:
        whole_layer = name.removesuffix("_backward") in ("wide", "grouped", "decode")
        default = "composite" if whole_layer else "reference"
        on_gpu = "triton" if name in registration.KERNELS else default
        table[name] = {
            "cpu": "native" if name in cpu_ops else default,
            "cuda": "native" if name in cuda_ops else on_gpu,
        }
    return table


def tiles() -> dict[str, str]:
    """Return architecture -> how many entries of its tile table passed which tests."""
    result = {}
    for name, table in configs.TILE_CONFIGS.items():
        qualified = sum(bool(tile.qualified) for tile in table.values())
        on_cpu = "all executed on a CPU" if name in configs.EXECUTED else "compiled only"
        result[name] = f"{qualified} of {len(table)} qualified on hardware, {on_cpu}"
    return result


def tuned_tiles() -> dict[str, str] | str:
    """Return device -> which tiles of `python -m moelora_kernels.tune` it takes, and why."""
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    if os.environ.get("TRITON_INTERPRET") == "1":
        devices = [torch.device("cpu")]
    return {str(d): tuned.describe(d) for d in devices} or "none: torch finds no GPU"


def _kernels_found(gpus: list[str]) -> str:
    return "available" if gpus else "available, but torch finds no GPU to run them"


def collect(sizes: dict[str, Any], device: str) -> dict[str, Any]:
    """Return everything that `main` prints, in values that JSON can hold.

    sizes: tokens, in_features, out_features, num_experts, rank and top_k of a layer. The report
    says which formulation impl="auto" takes for this layer on `device`, and why.
    """
    choice = dispatch.explain_choice(device, **sizes)
    failed_replays, last_failure = native.replay_failures()
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "moelora_kernels": moelora_kernels.__version__,
        "package": str(Path(moelora_kernels.__file__).parent),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        **{package: version(package) for package in PACKAGES},
        "devices": {
            "cpu": {
                "capability": torch.backends.cpu.get_cpu_capability(),
                "threads": torch.get_num_threads(),
            },
            "cuda": cuda,
        },
        "native": {
            "available": native.available(),
            "file": native.path(),
            "reason": native.reason(),
            **native.build_info(),
            "failed replays": failed_replays,
            "last failed replay": last_failure,
        },
        "triton kernels": registration.kernels_problem() or _kernels_found(cuda),
        "tiles": tiles(),
        "tuned tiles": tuned_tiles(),
        "implementations": implementations(),
        "formulations": dict.fromkeys(dispatch.IMPLS, "available"),
        "auto": {"device": device, **sizes, "impl": choice.impl, "reason": choice.reason},
    }


def _lines(values: dict[str, Any], indent: int = 0) -> list[str]:
    lines = []
    for name, value in values.items():
        if isinstance(value, dict) and value:
            lines += [f"{'':{indent}}{name}:", *_lines(value, indent + 2)]
        else:
            if isinstance(value, (list, tuple)):
                value = ", ".join(map(str, value))
            text = "none" if value is None or value in ("", {}) else value
            lines.append(f"{'':{indent}}{name}: {text}")
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(prog="python -m moelora_kernels.info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--in-features", type=int, default=4096)
    parser.add_argument("--out-features", type=int, default=4096)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--top-k", type=int, default=2, help="0: all experts")
    args = parser.parse_args(arguments)
    for name in ("tokens", "in_features", "out_features", "experts", "rank"):
        smallest = 0 if name == "tokens" else 1
        if getattr(args, name) < smallest:
            parser.error(f"{name}: expected at least {smallest}, got {getattr(args, name)}")
    if not 0 <= args.top_k <= args.experts:
        parser.error(f"top_k: expected 0 to {args.experts} experts, got {args.top_k}")
    sizes = {
        "tokens": args.tokens,
        "in_features": args.in_features,
        "out_features": args.out_features,
        "num_experts": args.experts,
        "rank": args.rank,
        "top_k": args.top_k or None,
    }
    report = collect(sizes, args.device)
    print(json.dumps(report, indent=2) if args.json else "\n".join(_lines(report)))


if __name__ == "__main__":
    main()
