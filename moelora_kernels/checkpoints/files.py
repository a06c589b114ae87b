"""Read tensors from files, and check that they can be copied into a model."""

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

# The files of an adapter folder. In each row, the first file that exists is read.
FILES = (
    ("adapter_model.safetensors", "adapter_model.bin"),
    ("non_lora_trainables.safetensors", "non_lora_trainables.bin"),
)


def read(state: State) -> Mapping[str, Tensor]:
    """Return tensors by key, from a dictionary, a file, a folder, or a list of these.

    Raises:
        TypeError: `state` is none of these.
        ValueError: a file cannot be read or holds anything but tensors, a folder has no adapter
            file, or a key is in more than one part.
        OSError: a file cannot be opened.
    """
    if isinstance(state, Mapping):
        return state
    if isinstance(state, Sequence) and not isinstance(state, str):
        tensors: dict[str, Tensor] = {}
        for part in state:
            part_tensors = read(part)
            if repeated := sorted(tensors.keys() & part_tensors.keys()):
                raise ValueError(f"state_dict: {', '.join(repeated)}: in more than one part")
            tensors.update(part_tensors)
        return tensors
    if not isinstance(state, (str, os.PathLike)):
        raise TypeError(
            f"state_dict: expected tensors by key, a path or a list of these, got {type(state)}"
        )
    path = Path(state)
    if path.is_dir():
        existing = [next((path / n for n in row if (path / n).exists()), None) for row in FILES]
        if not any(existing):
            names = ", ".join(n for row in FILES for n in row)
            raise ValueError(f"{path}: expected a folder with one of: {names}")
        return read([file for file in existing if file])
    if path.suffix == ".safetensors":
        return load_safetensors(path)
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, PermissionError):
        raise
    except Exception as error:
        # A broken file can raise any type of error, because the unpickler executes its content.
        raise ValueError(
            f"{path}: not a readable file of tensors, and pickled code is never run "
            f"({type(error).__name__})"
        ) from error
    if not isinstance(tensors, Mapping):
        raise ValueError(f"{path}: expected a dictionary of tensors, got {type(tensors).__name__}")
    return tensors


def load_safetensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file. Raise ValueError if it cannot be read as one."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{os.fspath(path)}: not a readable safetensors file ({error})") from error


def tensor_problem(key: object, value: object) -> str | None:
    """Return why an entry of a state dict is not a string and a dense tensor; None if it is."""
    if not isinstance(value, Tensor) or not isinstance(key, str):
        kinds = f"{type(value).__name__} under {type(key).__name__}"
        return f"{key}: expected a tensor under a string, got {kinds}"
    if value.layout != torch.strided or value.is_nested:
        layout = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        return f"{key}: expected a dense tensor, got a {layout} one"
    return None


def unfit_problems(key: str, current: Tensor, saved: Tensor) -> list[str]:
    """Return why `saved` cannot be copied into the model's tensor `current`; [] if it can."""
    problems = []
    if current.shape != saved.shape:
        problems.append(f"shape of {key}: expected {[*current.shape]}, got {[*saved.shape]}")
    # A float of one byte is a quantised value. Its scale is not in the checkpoint.
    is_code = saved.itemsize == 1 and saved.is_floating_point() and saved.dtype != current.dtype
    if current.is_floating_point() != saved.is_floating_point() or is_code:
        problems.append(f"dtype of {key}: expected {current.dtype}, got {saved.dtype}")
    if current.is_meta or saved.is_meta:
        where = "model" if current.is_meta else "adapter"
        problems.append(f"{key}: the {where}'s tensor is on the meta device, without values")
    return problems


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have the same shape, dtype and bytes."""
    if a is b:
        return True
    if a.shape != b.shape or a.dtype != b.dtype or a.is_meta or b.is_meta:
        return False
    # Bytes are compared, so that a NaN is equal to itself.
    return torch.equal(*(t.detach().cpu().reshape(-1).view(torch.uint8) for t in (a, b)))
