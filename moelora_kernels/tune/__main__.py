"""Find the fastest tiles for the layers of a model, on the GPU at hand.

    python -m moelora_kernels.tune --model Qwen/Qwen3-8B
    python -m moelora_kernels.tune --shapes 4096x4096,4096x11008 --experts 8 --rank 16

For every kernel and every shape: the shipped tile and its neighbours are compared with a reference
in float64, run many times to compare their bits, and timed. The tiles are written to a file, which
the package reads in every later process; python -m moelora_kernels.info names it.

A tile serves every layer with this kernel, size of an element and width in rank space. The command
checks it for its number of experts, one sibling, and no dropout per expert. The tiles depend on the
dtype, the number of experts and the rank. A run with another dtype or rank adds to the file.

MOELORA_TILES=path chooses another file; MOELORA_TILES=0 makes the package read none.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
from pathlib import Path
from typing import NamedTuple

import torch

import moelora_kernels
from moelora_kernels import build_id, dispatch
from moelora_kernels.kernels.common import configs, tuned
from moelora_kernels.kernels.common.tuned import Key, TunedFile
from moelora_kernels.ops import registration
from moelora_kernels.tune import sizes
from moelora_kernels.tune.calls import Layer
from moelora_kernels.tune.clocks import CudaClock, HostClock
from moelora_kernels.tune.commit import git_commit
from moelora_kernels.tune.progress import Progress
from moelora_kernels.tune.search import Options, Search, Weighted, search

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Effort(NamedTuple):
    """repeats: runs whose bits are compared. samples: calls that are timed."""

    repeats: int
    samples: int


EFFORT, QUICK = Effort(50, 50), Effort(10, 15)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(
        prog=tuned.COMMAND,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    chosen = parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument(
        "--model", metavar="CONFIG", help="config.json, its folder, or a name on the hub"
    )
    chosen.add_argument("--shapes", metavar="INxOUT,...", help="sizes of the linears")
    parser.add_argument(
        "--tokens", default="8192", metavar="T,...", help="tokens of a batch (default: 8192)"
    )
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16, help="of one expert")
    parser.add_argument("--top-k", type=int, default=2)
    parser.add_argument("--dtype", default="bf16", choices=DTYPES)
    parser.add_argument(
        "--impl",
        default="auto",
        choices=("auto", "wide", "grouped"),
        help='formulation; auto: the one that impl="auto" takes',
    )
    parser.add_argument("--device", default="cuda", help="cuda, cuda:1, ...")
    parser.add_argument("--quick", action="store_true", help="fewer tiles, repeats and samples")
    parser.add_argument("--commit", default=None, metavar="SHA", help="if git does not know it")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Tune, print the tiles and the path of the file.

    Return 1 if a shipped tile is refused; 130 if the search was interrupted: then only the
    entries that are fully timed are tuned.
    """
    parser = make_parser()
    args = parser.parse_args(arguments)
    try:
        device = find_device(args.device)
        path = tuned.file_path(device)
        if path is None:
            expected = "MOELORA_TILES: expected the path of the file to write"
            raise ValueError(f"{expected}, got none: {tuned.no_file()}")
        earlier = tuned.read(path)
        layers = find_layers(args, device)
        require_writable(path)
    except (ImportError, OSError, ValueError, RuntimeError) as error:
        parser.error(str(error))
    effort = QUICK if args.quick else EFFORT
    clock = CudaClock(device, effort.samples) if device.type == "cuda" else HostClock(1)
    progress = functools.partial(Progress, unit="tile")
    options = Options(device, clock, progress, effort.repeats, args.quick)
    result = search(layers, options)
    machine = tuned.describe_machine(device)
    commit = current_commit() if args.commit is None else args.commit
    tiles, refused = tiles_of(result), refused_tiles(result)
    if earlier is not None and tuned.difference(earlier, device) is None:
        # Entries that this run did not tune.
        tiles |= {k: tile for k, tile in earlier.tiles.items() if k not in result.entries}
        refused += [each for each in earlier.refused if tuple(each["entry"]) not in result.entries]
    content = TunedFile(machine, moelora_kernels.__version__, commit, vars(args), tiles, refused)
    tuned.write(path, content)
    print(report(result))
    shipped = [entry[0].problem for entry in result.entries.values()]
    if not (args.quick or result.interrupted or any(shipped)):
        versions = f"torch {machine['torch']}, Triton {machine['triton']}"
        name = f"{machine['device']}, {versions}, {commit or 'commit unknown'}"
        print(f"all {len(shipped)} shipped tiles of these shapes are right: {name}")
    print(f"written: {path}")
    if result.interrupted:
        print("interrupted: only the entries above are tuned")
        return 130
    return int(any(shipped))


def require_writable(path: Path) -> None:
    """Make the folder of a file.

    Raises:
        OSError: the folder cannot be made, or no file can be written in it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise PermissionError(f"{path.parent}: expected a folder in which files can be written")


def find_device(name: str) -> torch.device:
    """Return the device with this name.

    Raises:
        ValueError: it is not a device, or not one that can run the kernels.
        RuntimeError: the GPU is too old.
    """
    if not __debug__:
        raise ValueError("python: expected to run without -O, because the checks are assertions")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device: expected a device like cuda:0, got {name!r}") from error
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device.type == "cpu" and interpreted:
        return device
    if problem := registration.kernels_problem():
        raise ValueError(f"device: {problem}")
    if device.type != "cuda" or interpreted:
        raise ValueError(f"device: expected a GPU, got {name!r}")
    if not torch.cuda.is_available():
        raise ValueError("device: torch finds no GPU")
    index = torch.cuda.current_device() if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ValueError(f"device: expected fewer than {torch.cuda.device_count()}, got {index}")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    # Raises RuntimeError if the GPU is too old.
    configs.processors(device)
    return device


def find_layers(args: argparse.Namespace, device: torch.device) -> list[Weighted]:
    """Return the layers to tune for.

    Raises:
        ValueError: an argument is impossible; its name is in the message.
        ImportError: `--model` is used, and transformers is not installed.
    """
    for name in ("experts", "rank", "top_k"):
        if getattr(args, name) < 1:
            raise ValueError(f"{name}: expected at least 1, got {getattr(args, name)}")
    if args.top_k > args.experts:
        raise ValueError(f"top_k: expected at most {args.experts} experts, got {args.top_k}")
    if args.dtype == "fp32" and args.rank % 4:
        raise ValueError(f"rank: expected a multiple of 4 with --dtype fp32, got {args.rank}")
    if args.impl == "grouped" and args.top_k == args.experts:
        raise ValueError(
            f"impl: grouped needs top_k below {args.experts} experts, got {args.top_k}"
        )
    try:
        tokens = [int(part) for part in args.tokens.split(",")]
    except ValueError:
        tokens = []
    if not tokens or min(tokens) < 1:
        raise ValueError(f"tokens: expected numbers from 1, like 1024,8192, got {args.tokens!r}")
    shapes = sizes.model_shapes(args.model) if args.model else sizes.parse_shapes(args.shapes)
    layers = []
    for T in tokens:
        for in_features, out_features, number in shapes:
            form = args.impl
            if form == "auto":
                form = dispatch.explain_choice(
                    device.type, tokens=T, in_features=in_features, out_features=out_features,
                    num_experts=args.experts, rank=args.rank, top_k=args.top_k,
                ).impl  # fmt: skip
            dtype = DTYPES[args.dtype]
            layer = Layer(
                form, T, in_features, out_features, args.experts, args.rank, args.top_k, dtype
            )
            layers.append(Weighted(layer, number))
    return layers


def tiles_of(result: Search) -> dict[Key, tuned.TileConfig]:
    """Return the tiles that differ from the shipped ones."""
    chosen = {key: result.chosen(key) for key in result.entries}
    return {
        key: each.tile
        for key, each in chosen.items()
        if each is not None and each is not result.entries[key][0]
    }


def refused_tiles(result: Search) -> list[dict]:
    """Return the tiles that are refused, with the reasons, for the file."""
    return [
        {"entry": list(key), "tile": list(each.tile[:4]), "problem": each.problem}
        for key, each in result.refused()
    ]


def report(result: Search) -> str:
    """Return the lines that the command prints: a tile is tokens, step, warps, stages."""
    lines = ["kernel, bytes of an element, columns: tile, microseconds (the shipped tile's)"]
    for key, entry in result.entries.items():
        name, shipped, chosen = _name(key), entry[0], result.chosen(key)
        if chosen is None:
            lines.append(f"{name}: every tile is refused")
            continue
        kept = ", as shipped" if chosen is shipped else f", shipped {_tile(shipped)}"
        shipped_time = "refused" if shipped.problem else f"{shipped.microseconds:.1f}"
        lines.append(f"{name}: {_tile(chosen)}{kept}, {chosen.microseconds:.1f} ({shipped_time})")
    lines += [
        f"refused: {_name(key)}: {_tile(each)}: {each.problem}" for key, each in result.refused()
    ]
    return "\n".join(lines)


def _name(key: Key) -> str:
    return " ".join(map(str, key))


def _tile(candidate) -> str:
    return " ".join(map(str, candidate.tile[:4]))


def current_commit() -> str:
    """Return the commit of the checkout of the package; "" if the package is installed."""
    if not build_id.CSRC.is_dir():
        return ""
    return git_commit(build_id.CSRC.parent, ("moelora_kernels", "csrc"))


if __name__ == "__main__":
    sys.exit(main())
