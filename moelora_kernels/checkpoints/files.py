"""Tensors from files, and what keeps them from being copied."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

Part = Mapping[str, Tensor] | str | os.PathLike
State = Part | Sequence[Part]

# The files of a checkpoint's folder, the first of each row that is there.
FILES = (
    ("adapter_model.safetensors", "adapter_model.bin"),
    ("non_lora_trainables.safetensors", "non_lora_trainables.bin"),
)


def read(state: State) -> Mapping[str, Tensor]:
    """The tensors of a dictionary, a file, a folder, or several of them, by key."""
    if isinstance(state, Mapping):
        return state
    if isinstance(state, Sequence) and not isinstance(state, str):
        tensors: dict[str, Tensor] = {}
        for part in state:
            own = read(part)
            if twice := sorted(tensors.keys() & own.keys()):
                raise ValueError(f"state_dict: {', '.join(twice)}: in more than one part")
            tensors.update(own)
        return tensors
    if not isinstance(state, (str, os.PathLike)):
        raise TypeError(
            f"state_dict: expected tensors by key, a path or a list of those, got {type(state)}"
        )
    path = Path(state)
    if path.is_dir():
        found = [next((path / n for n in row if (path / n).exists()), None) for row in FILES]
        if not any(found):
            raise ValueError(f"{path}: no {', '.join(n for row in FILES for n in row)}")
        return read([file for file in found if file])
    if path.suffix == ".safetensors":
        return load_safetensors(path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:
        # Of whatever type: a broken file is read as instructions to the unpickler.
        raise ValueError(
            f"{path}: not a readable file of tensors, and pickled code is never run "
            f"({type(error).__name__})"
        ) from error
    if not isinstance(tensors, Mapping):
        raise ValueError(f"{path}: expected a dictionary of tensors, got {type(tensors).__name__}")
    return tensors


def load_safetensors(path: str | os.PathLike) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(path)}: not a readable safetensors file ({error})") from error


def why_no_tensor(key: object, given: object) -> str:
    """Why something under a key is no dense tensor under a name; empty where it is."""
    if not isinstance(given, Tensor) or not isinstance(key, str):
        kinds = f"{type(given).__name__} under {type(key).__name__}"
        return f"{key}: expected a tensor under a name, got {kinds}"
    if given.layout != torch.strided or given.is_nested:
        layout = "nested" if given.is_nested else str(given.layout).removeprefix("torch.")
        return f"{key}: expected a dense tensor, got a {layout} one"
    return ""


def why_unfit(key: str, mine: Tensor, given: Tensor) -> list[str]:
    """What keeps `given` from being copied into `mine`; empty where nothing does."""
    problems = []
    if mine.shape != given.shape:
        problems.append(f"shape of {key}: expected {[*mine.shape]}, got {[*given.shape]}")
    # Floats of one byte are codes: the scale that goes with them is not here.
    is_code = given.itemsize == 1 and given.is_floating_point() and given.dtype != mine.dtype
    if mine.is_floating_point() != given.is_floating_point() or is_code:
        problems.append(f"dtype of {key}: expected {mine.dtype}, got {given.dtype}")
    if mine.is_meta or given.is_meta:
        where = "model" if mine.is_meta else "adapter"
        problems.append(f"{key}: the {where}'s tensor is on the meta device, without values")
    return problems


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have the same shape, dtype and bytes."""
    if a is b:
        return True
    if a.shape != b.shape or a.dtype != b.dtype or a.is_meta or b.is_meta:
        return False
    # As bytes: a NaN is equal to itself.
    return torch.equal(*(t.detach().cpu().reshape(-1).view(torch.uint8) for t in (a, b)))
