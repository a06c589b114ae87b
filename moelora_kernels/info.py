"""`python -m moelora_kernels.info [--json]`: what is installed, what runs, and why.

Prints versions, devices, the native library or the reason it is missing, which implementation
serves each op on each device, and which formulation impl="auto" takes for the sizes that are given.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from typing import Any

import torch

import moelora_kernels
from moelora_kernels import dispatch, native, ops
from moelora_kernels.kernels.common import configs
from moelora_kernels.ops import registration

PACKAGES = ("triton", "numpy", "safetensors", "transformers", "peft")


def version(package: str) -> str | None:
    """The installed version of a package, None where it is missing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def implementations() -> dict[str, dict[str, str]]:
    """Op -> device -> what serves it.

    "native" (C++ or CUDA), "triton", "reference" (plain PyTorch), or "composite": made of the other
    ops and of ATen's products.
    """
    built, cuda_built = (set(native.build_info().get(name, ())) for name in ("ops", "cuda_ops"))
    names = sorted([*ops.__all__, "topk_gate_backward"])
    found = {}
    for name in names:
        whole_layer = name.removesuffix("_backward") in ("wide", "grouped")
        default = "composite" if whole_layer else "reference"
        on_gpu = "triton" if name in registration.KERNELS else default
        found[name] = {
            "cpu": "native" if name in built else default,
            "cuda": "native" if name in cuda_built else on_gpu,
        }
    return found


def tiles() -> dict[str, str]:
    """Architecture -> how many entries of its tile table have been qualified on hardware."""
    return {
        name: f"{sum(bool(tile.qualified) for tile in table.values())} of {len(table)} qualified"
        for name, table in configs.TILE_CONFIGS.items()
    }


def collect(sizes: dict[str, Any], device: str) -> dict[str, Any]:
    """Everything `main` prints, as plain values."""
    choice = dispatch.explain_choice(device, **sizes)
    cuda = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "moelora_kernels": moelora_kernels.__version__,
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
            "reason": native.reason(),
            **native.build_info(),
        },
        "triton kernels": registration.why_no_kernels() or "available",
        "tiles": tiles(),
        "implementations": implementations(),
        "formulations": {name: reason or "available" for name, reason in dispatch.IMPLS.items()},
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
    given = parser.parse_args(arguments)
    for name in ("tokens", "in_features", "out_features", "experts", "rank"):
        if getattr(given, name) < (name != "tokens"):
            parser.error(f"{name}: expected a size, got {getattr(given, name)}")
    if not 0 <= given.top_k <= given.experts:
        parser.error(f"top_k: expected 0 to {given.experts} experts, got {given.top_k}")
    sizes = {
        "tokens": given.tokens,
        "in_features": given.in_features,
        "out_features": given.out_features,
        "num_experts": given.experts,
        "rank": given.rank,
        "top_k": given.top_k or None,
    }
    report = collect(sizes, given.device)
    print(json.dumps(report, indent=2) if given.json else "\n".join(_lines(report)))


if __name__ == "__main__":
    main()
