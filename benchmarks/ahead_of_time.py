"""Compile every Triton kernel for every GPU architecture, on a machine without a GPU.

    python benchmarks/ahead_of_time.py                       exit 1 if a kernel must not ship
    python benchmarks/ahead_of_time.py --out benchmarks/results/ahead-of-time
    python benchmarks/ahead_of_time.py --choice              only layers that take every tile once

The command runs the launchers on tensors of the meta device, with sizes of real models, and records
their launches. It compiles each kernel with the arguments, constants and tiles of its launch, for
each architecture. The machine code shows registers, spills, shared memory, tensor core instructions
and the width of every load and store. `model/traffic.py` counts the bytes that the programs of a
launch load and store. Nothing is timed.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))

import torch

from benchmarks.measure import environment
from benchmarks.model import traffic
from benchmarks.model.launches import LAYERS, Layer, record
from benchmarks.model.machine_code import key_of, machine_code
from benchmarks.model.sizes import Sizes
from moelora_kernels.kernels.common import configs
from moelora_kernels.kernels.common.launcher import Launch

ARCHITECTURES = tuple(configs.TILE_CONFIGS)


def inspect(launch: Launch, architecture: str) -> dict[str, Any]:
    """Return registers, spills, shared memory, instructions and bytes of a launch."""
    code = machine_code(launch, architecture)
    read, written = traffic.moved(launch)
    return {
        "kernel": launch.kernel.fn.__name__,
        "programs": launch.programs,
        "tile": list(launch.tile_config[:4]),
        "qualified": launch.tile_config.qualified,
        "registers": code.registers,
        "spills": code.spills,
        "stack": code.stack,
        "shared": code.shared,
        "tensor_core": code.tensor_core,
        "accesses": code.accesses,
        "overwrites": list(code.overwrites),
        "read": read,
        "written": written,
        "compulsory": traffic.compulsory(launch),
    }


# Kernel -> the constant with the rows of a tile in its large product. A wgmma has 64 rows.
WGMMA_ROWS = {
    "shrink_gate_kernel": "BLOCK_T",
    "shrink_gate_backward_kernel": "BLOCK_T",
    "shrink_dx_kernel": "BLOCK_T",
    "resident_dx_kernel": "BLOCK_T",
    "weight_grad_kernel": "BLOCK_W",
    "router_logits_kernel": "BLOCK_T",
    "router_grad_kernel": "BLOCK_W",
    "grouped_shrink_kernel": "BLOCK_P",
    "grouped_shrink_backward_kernel": "BLOCK_P",
    "grouped_expand_kernel": "BLOCK_P",
    "grouped_weight_grad_kernel": "BLOCK_W",
    "ffn_inner_kernel": "BLOCK_P",
    "ffn_inner_backward_kernel": "BLOCK_P",
    "ffn_inner_weight_grad_kernel": "BLOCK_P",
}


def operands(launch: Launch) -> list[tuple[int, int, int]]:
    """Return (elements of a tile, elements of a row in memory, bytes of an element) per load."""
    s = Sizes(launch)
    name = launch.kernel.fn.__name__
    if name == "shrink_gate_kernel":
        loads = [
            (s.BLOCK_T * s.BLOCK_I, s.I, s.size("x_ptr")),
            (s.BLOCK_R * s.BLOCK_I, s.I, s.size("a_ptrs")),
        ]
        router = (s.BLOCK_E * s.BLOCK_I, s.I, s.size("router_ptrs"))
        return [*loads, router] if s.ROUTER_E else loads
    if name == "shrink_gate_backward_kernel":
        wide = [(s.BLOCK_T * s.BLOCK_O, O, s.size("dy_ptrs")) for O in s.out_features]  # noqa: E741
        return [*wide, (s.BLOCK_O * s.BLOCK_R, s.B_COLUMNS, s.size("b_ptrs"))]
    if name in ("shrink_dx_kernel", "resident_dx_kernel"):
        loads = [
            (s.BLOCK_T * s.BLOCK_R, s.A_ROWS, s.size("dh_ptr")),
            (s.BLOCK_R * s.BLOCK_I, s.I, s.size("a_ptrs")),
        ]
        router = [
            (s.BLOCK_T * s.BLOCK_E, s.E, 4),
            (s.BLOCK_E * s.BLOCK_I, s.I, s.size("router_ptrs")),
        ]
        return loads if s.router_ptrs is None else loads + router
    if name == "weight_grad_kernel":
        loads = [
            (s.BLOCK_T * s.BLOCK_W, s.I, s.size("x_ptr")),
            (s.BLOCK_T * s.BLOCK_A, s.H, s.size("dh_ptr")),
            (s.BLOCK_T * s.BLOCK_B, s.R, s.size("u_ptr")),
        ]
        return [*loads, (s.BLOCK_T * s.BLOCK_L, s.L, 4)] if s.L else loads
    return _operands_of_grouped(name, s)


def _operands_of_grouped(name: str, s: Sizes) -> list[tuple[int, int, int]]:
    """Return the same for the grouped kernels, whose experts begin within the rows of B."""
    if name == "router_logits_kernel":
        return [
            (s.BLOCK_T * s.BLOCK_I, s.I, s.size("x_ptr")),
            (s.BLOCK_E * s.BLOCK_I, s.I, s.size("router_ptrs")),
        ]
    if name == "router_grad_kernel":
        return [(s.BLOCK_T * s.BLOCK_W, s.I, s.size("x_ptr")), (s.BLOCK_T * s.BLOCK_L, s.L, 4)]
    if name == "grouped_shrink_kernel":
        return [
            (s.BLOCK_P * s.BLOCK_I, s.I, s.size("x_ptr")),
            (s.BLOCK_R * s.BLOCK_I, s.I, s.size("a_ptrs")),
        ]
    if name == "grouped_shrink_backward_kernel":
        wide = [(s.BLOCK_P * s.BLOCK_O, O, s.size("dy_ptrs")) for O in s.out_features]  # noqa: E741
        return [*wide, (s.BLOCK_O * s.BLOCK_R, s.RANK_DIVISOR, s.size("b_ptrs"))]
    if name == "grouped_expand_kernel":
        row = s.RANK_DIVISOR if s.stride_r == 1 else s.O
        loads = [
            (s.BLOCK_P * s.BLOCK_R, s.MAX_RANK, s.size("u_ptr")),
            (s.BLOCK_O * s.BLOCK_R, row, s.size("matrix_ptr")),
        ]
        if s.start_ptr is not None:
            loads.append((s.BLOCK_P * s.BLOCK_O, s.O, s.size("start_ptr")))
        if s.L:
            rows = 1 if s.SPARSE_DLOGITS else s.BLOCK_L
            loads.append((s.BLOCK_O * rows, s.O, s.size("router_ptr")))
        return loads
    if name == "grouped_weight_grad_kernel":
        widths = (*s.in_features, *s.out_features)
        wide = [(s.BLOCK_P * s.BLOCK_W, W, s.size("x_ptrs")) for W in widths]
        # `order` is loaded too: 4 bytes for each row of wide.
        order = (s.BLOCK_P, 1, 4)
        return [*wide, (s.BLOCK_P * s.BLOCK_R, s.MAX_RANK, s.size("dh_ptr")), order]
    if name.startswith("ffn_inner") and name != "ffn_inner_rank_kernel":
        size = s.size("gate_out_ptr")
        return [
            (s.BLOCK_P * s.BLOCK_F, s.F, size),
            (s.BLOCK_F * s.BLOCK_R, s.B_COLUMNS, s.size("gate_b_ptr")),
            (s.BLOCK_F * s.BLOCK_R, s.F, s.size("down_a_ptr")),
            # Rank space begins at a column of any expert. The table of pairs is loaded too.
            (s.BLOCK_P * s.BLOCK_R, s.RANK_DIVISOR, size),
            (s.BLOCK_P, 1, 4),
        ]
    return []


def natural_widths(launch: Launch) -> set[int]:
    """Return the widest loads that are possible for the operands of a launch, in bytes.

    A load of 16 bytes is impossible if rows begin at any multiple of 8 bytes, or if a tile has
    fewer than 16 bytes for each thread.
    """
    threads = 32 * launch.tile_config.warps
    widths = {
        min(16, math.gcd(16, row * size), max(size, elements * size // threads))
        for elements, row, size in operands(launch)
    }
    wide = launch.arguments.get("x_ptr", launch.arguments.get("gate_out_ptr"))
    wide = launch.arguments.get("x_ptrs", (wide,))[0]
    if launch.kernel.fn.__name__.endswith("grad_kernel") and wide.dtype == torch.float32:
        # TF32 tensor cores need both operands contiguous along the tokens, so the small operand is
        # transposed element by element when it is copied into shared memory.
        widths.add(4)
    return widths


def complaints(
    row: dict[str, Any], launch: Launch, architecture: str, oversized: bool = False
) -> list[str]:
    """Return the reasons why a compiled launch must not ship; empty if it may.

    oversized: the layer has more experts than the tiles support without spills, so it may spill.
    """
    reasons = []
    if (row["spills"] or row["stack"]) and not oversized:
        reasons.append(f"{row['spills']} spilling instructions, {row['stack']} bytes of stack")
    limit = configs.SHARED[architecture]
    if row["shared"] > limit:
        reasons.append(f"{row['shared']} bytes of shared memory of {limit}")
    rows = launch.constants.get(WGMMA_ROWS.get(row["kernel"]), 0)
    if architecture == "sm_90" and rows >= 64 and not row["tensor_core"].get("HGMMA"):
        reasons.append(f"no wgmma for a tile of {rows} rows")
    if rows and not row["tensor_core"]:
        # On sm_100, a kernel that needs too much tensor memory compiles to nothing.
        reasons.append("no product on tensor cores")
    reasons += [f"{text} before the product has read it" for text in row["overwrites"][:1]]
    allowed = natural_widths(launch)
    for access in row["accesses"]:
        kind, size = access.split(".")
        # Only loads of operands are asynchronous copies. The other loads are gates and tables of a
        # few bytes per token or expert.
        if kind == "LDGSTS" and int(size) not in allowed:
            reasons.append(f"loads of {size} bytes where operands allow {sorted(allowed)}")
    return reasons


def entries_taken(layer: Layer, architecture: str) -> set[tuple[str, int, int]]:
    """Return the keys of the table of tiles whose entries the launches of a layer take."""
    with configs.assume(architecture):
        tiles = {id(launch.tile_config) for launch in record(layer)}
    return {key for key, tile in configs.TILE_CONFIGS[architecture].items() if id(tile) in tiles}


def choose_layers(architecture: str) -> list[Layer]:
    """Return few layers that together take every entry of the table of tiles."""
    taken = {layer.name: entries_taken(layer, architecture) for layer in LAYERS}
    missing = set(configs.TILE_CONFIGS[architecture])
    chosen = []
    while missing:
        layer = max(LAYERS, key=lambda each: len(taken[each.name] & missing))
        chosen.append(layer)
        missing -= taken[layer.name]
    return chosen


def unique_launches(layers: list[Layer], architecture: str) -> list[tuple[str, int, str]]:
    """Return (layer, index of the launch in it, architecture) of every distinct launch."""
    keys, launches = set(), []
    with configs.assume(architecture):
        for layer in layers:
            for number, launch in enumerate(record(layer)):
                if key_of(launch) not in keys:
                    keys.add(key_of(launch))
                    launches.append((layer.name, number, architecture))
    return launches


def compile_one(work: tuple[str, int, str]) -> dict[str, Any]:
    """Compile one of `unique_launches`; return its row, with the reasons why it must not ship."""
    name, number, architecture = work
    layer = next(each for each in LAYERS if each.name == name)
    with configs.assume(architecture):
        launch = record(layer)[number]
        row = inspect(launch, architecture)
    wrong = complaints(row, launch, architecture, layer.oversized)
    return {"layer": name, "architecture": architecture, **row, "wrong": wrong}


def markdown(rows: list[dict[str, Any]], versions: dict[str, str]) -> str:
    """Return a page with a table per architecture."""
    installed = ", ".join(f"{name} {version}" for name, version in versions.items())
    lines = [
        "# Kernels compiled ahead of time",
        "",
        f"Made by `python benchmarks/ahead_of_time.py --out benchmarks/results/ahead-of-time` with "
        f"{installed}; nothing here was timed.",
        "Tile: tokens, step, warps, stages. Moved: MiB that all programs ask for, re-reads "
        "included; compulsory: every tensor once. What several layers share is listed once.",
    ]
    for architecture in dict.fromkeys(row["architecture"] for row in rows):
        lines += [
            "",
            f"## {architecture}",
            "",
            "| layer | kernel | tile | programs | registers | spills | shared KiB | tensor core "
            "| loads and stores | moved MiB | compulsory MiB |",
            "| --- | --- | --- | ---: | ---: | ---: | ---: | --- | --- | ---: | ---: |",
        ]
        for row in rows:
            if row["architecture"] != architecture:
                continue
            cores, accesses = (
                " ".join(f"{name}:{n}" for name, n in row[field].items())
                for field in ("tensor_core", "accesses")
            )
            lines.append(
                f"| {row['layer']} | {row['kernel'].removesuffix('_kernel')} "
                f"| {' '.join(map(str, row['tile']))} | {row['programs']} | {row['registers']} "
                f"| {row['spills']} | {row['shared'] / 1024:.0f} | {cores} | {accesses} "
                f"| {(row['read'] + row['written']) / 2**20:.1f} "
                f"| {row['compulsory'] / 2**20:.1f} |"
            )
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Compile everything; return 1 if a kernel must not ship."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="write kernels.json and kernels.md")
    parser.add_argument("--architectures", type=lambda text: text.split(","), default=ARCHITECTURES)
    parser.add_argument("--choice", action="store_true", help="few layers that take every tile")
    parser.add_argument("--layers", help="compile only layers whose name contains this")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    args = parser.parse_args(arguments)
    unknown = set(args.architectures) - set(ARCHITECTURES)
    if unknown:
        parser.error(f"--architectures: expected some of {ARCHITECTURES}, got {sorted(unknown)}")
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 leaves nothing to compile")
    work = []
    for architecture in args.architectures:
        layers = choose_layers(architecture) if args.choice else LAYERS
        layers = [layer for layer in layers if (args.layers or "") in layer.name]
        work += unique_launches(layers, architecture)
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        rows = list(pool.map(compile_one, work, chunksize=4))
    wrong = [row for row in rows if row["wrong"]]
    for row in wrong:
        place = f"{row['architecture']} {row['layer']}: {row['kernel']} {tuple(row['tile'])}"
        print(f"{place}: {'; '.join(row['wrong'])}")
    print(f"{len(rows)} launches compiled, {len(wrong)} of them bad")
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        versions = {name: importlib.metadata.version(name) for name in ("torch", "triton")}
        result = {"schema": 1, "commit": environment.git_commit(), **versions, "rows": rows}
        (args.out / "kernels.json").write_text(json.dumps(result, indent=1) + "\n")
        (args.out / "kernels.md").write_text(markdown(rows, versions))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
