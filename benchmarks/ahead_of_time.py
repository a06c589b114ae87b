"""What the compiler makes of every kernel, on a machine without a GPU.

    python benchmarks/ahead_of_time.py                       all architectures, prints the report
    python benchmarks/ahead_of_time.py --out benchmarks/results/ahead-of-time

Runs the launchers on tensors of the meta device at real sizes, records what they would launch, and
compiles each kernel with those very arguments, constants and tiles for each architecture: registers,
spills, shared memory, tensor core instructions and the width of every load and store, from the
machine code. Bytes are counted from the grid and the tiles: `moved` is what the programs of a launch
ask for, re-reads included (most of those meet in L2), `compulsory` is every tensor once.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100")
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


class Layer(NamedTuple):
    """A layer whose launches are compiled: sizes, gate form and dtypes."""

    name: str
    tokens: int = 8192
    in_features: int = 4096
    out_features: tuple[int, ...] = (4096,)
    ranks: tuple[int, ...] = (16,) * 8
    gate: str = "router"
    top_k: int = 2
    dtype: torch.dtype = BF16
    adapters: torch.dtype | None = None
    share_a: bool = False
    dropout: float = 0.0
    per_expert: bool = False
    renormalize: bool = True


# Every entry of the tile tables and every variant of a kernel that a preset leads to.
LAYERS = [
    *(Layer(f"R={8 * r}", ranks=(r,) * 8) for r in (2, 4, 8, 16)),
    *(Layer(f"R={8 * r} fp32", ranks=(r,) * 8, dtype=FP32) for r in (2, 4, 8, 16)),
    *(Layer(f"R={8 * r} T=1024", tokens=1024, ranks=(r,) * 8) for r in (8, 16)),
    Layer("R=128 fp16", dtype=FP16),
    Layer("R=128 fp32 adapters", adapters=FP32),
    Layer("R=128 fp16 under fp32 adapters", dtype=FP16, adapters=FP32),
    Layer("R=256", ranks=(32,) * 8),
    Layer("R=24 of mixed ranks", ranks=(2, 6, 16)),
    Layer("qkv R=64", out_features=(4096, 1024, 1024), ranks=(8,) * 8),
    Layer("softmax before top-k", renormalize=False),
    Layer("all experts", top_k=8),
    Layer("sparse gates", gate="sparse"),
    Layer("dense gates", gate="dense"),
    Layer("task gates", gate="rows"),
    Layer("dropout", dropout=0.05),
    Layer("task gates, dropout per expert", gate="rows", dropout=0.05, per_expert=True),
    Layer("shared A", share_a=True, ranks=(8,) * 3, top_k=3),
]


def record(layer: Layer) -> Iterator[Any]:
    """The launches of one forward and backward of a layer, op by op."""
    from moelora_kernels.kernels import gram, launcher, shrink_dx, shrink_gate, shrink_gate_backward

    def empty(*shape: int, dtype: torch.dtype = layer.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    T, I = layer.tokens, layer.in_features  # noqa: E741
    n, E, R = len(layer.out_features), len(layer.ranks), sum(layer.ranks)
    of = layer.adapters or layer.dtype
    rows_of_a = layer.ranks[0] if layer.share_a else R
    x, seed = empty(T, I), empty(1, dtype=torch.int64)
    lora_a = [empty(rows_of_a, I, dtype=of) for _ in range(n)]
    lora_b = [empty(O, R, dtype=of) for O in layer.out_features]  # noqa: E741
    dy = [empty(T, O) for O in layer.out_features]  # noqa: E741
    router, gates, indices, rows, top_k = [], None, None, None, 0
    if layer.gate == "router":
        router, top_k = [empty(E, I, dtype=of) for _ in range(n)], layer.top_k
    elif layer.gate == "sparse":
        gates, indices = empty(T, n * layer.top_k), empty(T, n * layer.top_k, dtype=torch.int32)
    else:
        gates = empty(8 if layer.gate == "rows" else T, n * E, dtype=FP32)
        rows = empty(T, dtype=torch.int32) if layer.gate == "rows" else None
    ranks, scaling = layer.ranks, (2.0,) * E
    drop = (layer.dropout, layer.per_expert, seed)
    with launcher.recording() as launches:
        h, u, weights, chosen, logits = shrink_gate.launch(
            x, lora_a, gates, indices, rows, router, [], ranks, scaling, layer.share_a, top_k,
            layer.renormalize, 1.0, *drop,
        )  # fmt: skip
        if top_k:
            gates, indices = weights, chosen if top_k < E else None
        dh, u, dgate = shrink_gate_backward.launch(
            dy, lora_b, h, gates, indices, rows, logits, None, ranks, scaling, layer.share_a,
            top_k, layer.renormalize, 1.0,
        )  # fmt: skip
        dlogits = dgate if top_k else None
        shrink_dx.launch(dh, dlogits, lora_a, router, ranks, *drop)
        gram.launch(x, dh, dlogits, dy, u, of, of, ranks, *drop)
    return launches


def arguments_of(launch) -> tuple[dict, dict, dict]:
    """Signature, constants and alignment of a launch, as Triton specialises them when it runs."""
    names = {
        torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
        torch.int32: "i32", torch.int64: "i64",
    }  # fmt: skip
    constants: dict[tuple, Any] = {}
    aligned: dict[tuple, Any] = {}

    def type_of(value: Any, path: tuple, specialize: bool):
        if isinstance(value, tuple):
            return tuple(type_of(each, (*path, i), specialize) for i, each in enumerate(value))
        if isinstance(value, Tensor):
            # Views into a workspace begin at multiples of 64 bytes, everything else at 256.
            aligned[path] = [["tt.divisibility", 16]]
            return "*" + names[value.dtype]
        if value is None or (value == 1 and isinstance(value, int) and specialize):
            constants[path] = value
            return "constexpr"
        if isinstance(value, float):
            return "fp32"
        if value % 16 == 0 and specialize:
            aligned[path] = [["tt.divisibility", 16]]
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    signature = {}
    for index, parameter in enumerate(launch.kernel.params):
        if parameter.name in launch.constants:
            signature[parameter.name] = "constexpr"
            constants[(index,)] = launch.constants[parameter.name]
        else:
            value = launch.arguments[parameter.name]
            signature[parameter.name] = type_of(value, (index,), not parameter.do_not_specialize)
    return signature, constants, aligned


def compile_launch(launch, architecture: str):
    """The compiled kernel of a launch for an architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, aligned = arguments_of(launch)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=aligned)
    options = {
        "num_warps": launch.tile.warps,
        "num_stages": launch.tile.stages,
        "enable_fp_fusion": True,
    }
    target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    return triton.compile(source, target=target, options=options)


def machine_code(cubin: bytes) -> tuple[str, str]:
    """Resource usage and SASS, as the cuobjdump of Triton's wheel prints them."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return tuple(
            subprocess.run(
                [tool, flag, file.name], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("-res-usage", "-sass")
        )


TENSOR_CORE = re.compile(r"\b(HGMMA|HMMA|UTCHMMA|UTCQMMA|QGMMA)\b")
MEMORY = re.compile(r"\b(LDGSTS|LDG|STG)\.E([.\w]*)")


def width(suffix: str) -> int:
    """Bytes of one access: LDG.E.128 has 16, LDG.E 4, LDG.E.U16 2."""
    for name, size in (("128", 16), ("64", 8), ("U16", 2), ("S16", 2), ("U8", 1), ("S8", 1)):
        if name in suffix.split("."):
            return size
    return 4


def inspect(launch, architecture: str) -> dict[str, Any]:
    """Registers, spills, shared memory and instructions of a launch's kernel."""
    compiled = compile_launch(launch, architecture)
    usage, sass = machine_code(compiled.asm["cubin"])
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage))
    accesses = Counter((kind, width(suffix)) for kind, suffix in MEMORY.findall(sass))
    return {
        "registers": int(found["REG"]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "stack": int(found["STACK"]),
        "shared": compiled.metadata.shared,
        "tensor_core": dict(Counter(TENSOR_CORE.findall(sass))),
        "accesses": {f"{kind}.{size}": n for (kind, size), n in sorted(accesses.items())},
    }
