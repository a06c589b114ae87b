"""The file of tuned tiles: `python -m moelora_kernels.tune` writes it, and the launchers read it.

    MOELORA_TILES=path    the file; 0: no file

Without MOELORA_TILES, each GPU has a file with its name in the user's cache folder. The launchers
ignore a file of another GPU, of other versions or of other kernels.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moelora_kernels.kernels.common.configs import TILE_CONFIGS, TileConfig
from moelora_kernels.types import TILE

COMMAND = "python -m moelora_kernels.tune"
# Kernel, bytes of an element, columns of the rank tile: the keys of `TILE_CONFIGS`.
Key = tuple[str, int, int]
# Kernels whose `tokens` are the positions of a tile of `Routing`, at least TILE.
ROUTED_TILES = ("grouped_shrink", "grouped_shrink_backward", "grouped_expand")
_PACKAGE = Path(__file__).resolve().parents[2]


class TunedFile(NamedTuple):
    """The content of a file.

    machine: the result of `describe_machine` when the tiles were tuned. version, commit: of the
    package; the commit is "" if it is unknown. options: of the command. refused: the tiles that
    failed, with the reasons.
    """

    machine: dict[str, str]
    version: str
    commit: str
    options: dict[str, Any]
    tiles: dict[Key, TileConfig]
    refused: list[dict[str, Any]]


def file_path(device: torch.device) -> Path | None:
    """Return the file for a device, which may not exist; or None, and `no_file` says why."""
    chosen = os.environ.get("MOELORA_TILES")
    if chosen is not None:
        return None if chosen in ("", "0") else Path(chosen)
    try:
        cache_folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:
        # There is no home folder.
        return None
    name = re.sub(r"\W+", "-", device_name(device))
    return cache_folder / "moelora_kernels" / "tiles" / f"{name}.json"


def no_file() -> str:
    """Return why `file_path` returns None."""
    if "MOELORA_TILES" in os.environ:
        return "MOELORA_TILES is 0"
    return "there is no home folder, and MOELORA_TILES is not set"


def device_name(device: torch.device) -> str:
    """Return the name of a GPU; "cpu" for a CPU, on which Triton interprets the kernels."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def describe_machine(device: torch.device) -> dict[str, str]:
    """Return the name of the device, the versions of torch and Triton, and a hash of the kernels.

    The hash of their sources also differs between versions of the package that differ in a kernel,
    in a shipped tile, or in a constant that a kernel imports.
    """
    try:
        import triton
    except ImportError:
        triton = None
    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "triton": "none" if triton is None else triton.__version__,
        "kernels": _hash_of_kernels(),
    }


@cache
def _hash_of_kernels() -> str:
    digest = hashlib.sha256()
    imported = [_PACKAGE / "numerics.py", _PACKAGE / "types.py"]
    for path in [*sorted((_PACKAGE / "kernels").rglob("*.py")), *imported]:
        content = path.read_bytes()
        digest.update(f"{path.relative_to(_PACKAGE).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:16]


def read(path: Path) -> TunedFile | None:
    """Return the content of a file; None if it does not exist.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not one that `write` wrote.
    """
    try:
        content = json.loads(path.read_text())
        tiles = {_key(entry): _tile(entry) for entry in content["tiles"]}
        machine = {str(name): str(value) for name, value in content["machine"].items()}
        return TunedFile(**{**content, "machine": machine, "tiles": tiles})
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path}: expected a file of tiles from `{COMMAND}`, got {type(error).__name__} "
            f"({error}); delete the file, or set MOELORA_TILES=0"
        ) from error


def _key(entry: dict[str, Any]) -> Key:
    return entry["kernel"], entry["bytes"], entry["columns"]


def _tile(entry: dict[str, Any]) -> TileConfig:
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in entry["tile"].items()
    }
    tile = TileConfig(**fields)
    for name in ("tokens", "step", "warps"):
        value = fields[name]
        if not isinstance(value, int) or value < 1 or value & (value - 1):
            raise ValueError(f"{name}: expected a power of two, got {value!r}")
    return tile


def write(path: Path, content: TunedFile) -> None:
    """Write a file, in the place of an older one at once."""
    entries = [
        {
            **dict(zip(("kernel", "bytes", "columns"), key, strict=True)),
            "tile": {name: v for name, v in tile._asdict().items() if name != "qualified"},
        }
        for key, tile in sorted(content.tiles.items())
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}")
    unfinished.write_text(json.dumps({**content._asdict(), "tiles": entries}, indent=1) + "\n")
    os.replace(unfinished, path)


def difference(content: TunedFile, device: torch.device) -> str | None:
    """Return why the tiles of a file do not fit a device and this package; None if they do."""
    for name, value in describe_machine(device).items():
        expected = content.machine.get(name)
        if value != expected:
            return f"{name} is {value!r} here, and was {expected!r} when the tiles were tuned"
    unknown = content.tiles.keys() - TILE_CONFIGS["sm_90"].keys()
    if unknown:
        return f"there is no kernel for {min(unknown)}"
    for key, tile in content.tiles.items():
        if key[0] in ROUTED_TILES and tile.tokens < TILE:
            return f"the tile of {key} has {tile.tokens} tokens, and needs at least {TILE}"
    return None


def tiles(device: torch.device) -> dict[Key, TileConfig]:
    """Return the tuned tiles for a device; {} without a file, or with a warning if it is ignored.

    Raises:
        ValueError: the file is broken, or it is the one of MOELORA_TILES and cannot be read.
    """
    path, is_chosen = file_path(device), "MOELORA_TILES" in os.environ
    if path is None:
        return {}
    try:
        content = read(path)
    except OSError as error:
        problem = f"cannot be read: {error.strerror or error}"
        if is_chosen:
            raise ValueError(f"MOELORA_TILES: {path} {problem}") from error
        warnings.warn(f"{path}: ignored, because it {problem}", stacklevel=2)
        return {}
    if content is None:
        if is_chosen:
            warnings.warn(f"MOELORA_TILES: {_missing(path)}", stacklevel=2)
        return {}
    if reason := difference(content, device):
        warnings.warn(f"{path}: ignored, because {reason}; `{COMMAND}` renews it", stacklevel=2)
        return {}
    return content.tiles


def describe(device: torch.device) -> str:
    """Return which tuned tiles the launchers take on a device, in words."""
    path = file_path(device)
    if path is None:
        return f"none: {no_file()}"
    try:
        content = read(path)
    except OSError as error:
        status = "broken" if "MOELORA_TILES" in os.environ else "none"
        return f"{status}: {path} cannot be read: {error.strerror or error}"
    except ValueError as error:
        return f"broken: {error}"
    if content is None:
        return f"none: {_missing(path)}"
    if reason := difference(content, device):
        return f"ignored: {path}, because {reason}"
    commit = content.commit or "unknown"
    return f"{len(content.tiles)} from {path}, version {content.version}, commit {commit}"


def _missing(path: Path) -> str:
    return f"{path} does not exist; `{COMMAND}` writes it"
