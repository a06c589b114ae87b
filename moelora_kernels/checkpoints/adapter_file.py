"""The adapter file of this package: one safetensors file with the adapters of a model."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from moelora_kernels.checkpoints.description import describe
from moelora_kernels.checkpoints.files import load_safetensors, tensor_problem, unfit_problems
from moelora_kernels.nn.layer import LoraLayer
from moelora_kernels.nn.layer_tensors import LayerTensor, layer_tensors, set_computed
from moelora_kernels.nn.sharding import copy_into, gathered, reshard
from moelora_kernels.nn.wrappers import named_modules, portable_keys


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapter tensors of a model: A, B and router of every layer, by their full names.

    A router that several layers share is listed once, under its first name. The tensors are the
    parameters and buffers themselves, not copies. Two kinds are copies: a tensor that is computed
    (`torch.nn.utils.parametrize`, pruning, weight norm) is listed by its value in evaluation under
    its plain name; a tensor that FSDP2 or tensor parallelism shards is gathered, so every process
    must make this call.

    The names do not depend on wrappers (torch.compile, DDP, FSDP1, activation checkpointing).

    Raises:
        ValueError: the model has no MoeLoraLinear and no MoeLoraFFN; or FSDP1 or ZeRO-3 shards a
            tensor (the message says how to gather it).

    Example:
        >>> from moelora_kernels import MoeLoraLinear, adapter_state_dict
        >>> layer = MoeLoraLinear(16, 32, num_experts=4, rank=2, top_k=2)
        >>> {name: tuple(tensor.shape) for name, tensor in adapter_state_dict(layer).items()}
        {'lora_A': (8, 16), 'lora_B': (32, 8), 'router.weight': (4, 16)}
    """
    return {key: gathered(tensor.value()) for key, tensor in _tensors(model).items()}


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected an nn.Module, got {type(model)}")


def _tensors(model: nn.Module) -> dict[str, LayerTensor]:
    _check_model(model)
    tensors = layer_tensors(model)
    if not tensors:
        raise ValueError(
            "model: expected a model with MoeLoraLinear or MoeLoraFFN layers, got none"
        )
    return tensors


def load_adapter_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy `state` (as `adapter_state_dict` returns it) into the adapters of `model`.

    Each value is converted to the dtype and device of the model's tensor. A key may contain the
    children that wrappers add, such as "_orig_mod" and "module". If FSDP2 shards the model, every
    process calls this with the same values, and takes its part.

    Raises:
        ValueError: a key is missing or unexpected; a value is not a dense tensor, has another
            shape, is an integer while the model has a float (or the reverse), or is on the meta
            device; a layer is merged; a parametrized or pruned tensor cannot have the value; or
            FSDP1 or ZeRO-3 shards a tensor. The message names every key, and the model is
            unchanged.

    Example:
        >>> from moelora_kernels import MoeLoraLinear, adapter_state_dict, load_adapter_state_dict
        >>> source, target = (MoeLoraLinear(16, 32, num_experts=4, rank=2) for _ in range(2))
        >>> load_adapter_state_dict(target, adapter_state_dict(source))
        >>> bool((target.lora_A == source.lora_A).all())
        True
    """
    _check_model(model)
    reshard(model)
    tensors = _tensors(model)
    state = portable_keys(state, tensors)
    problems = [f"missing: {key}" for key in tensors if key not in state]
    problems += [f"unexpected: {key}" for key in state if key not in tensors]
    for name, layer in named_modules(model):
        if isinstance(layer, LoraLayer) and (problem := layer.merged_problem()):
            problems.append(f"{name or 'model'}: {problem}")
    for key, saved in state.items():
        if problem := tensor_problem(key, saved):
            problems.append(problem)
        elif key in tensors:
            problems += unfit_problems(key, tensors[key].value(), saved)
    if not problems:
        problems = set_computed(
            {key: (t, state[key]) for key, t in tensors.items() if t.direct is None}
        )
    if problems:
        raise ValueError("adapter does not fit the model:\n  " + "\n  ".join(problems))
    for key, tensor in tensors.items():
        if tensor.direct is not None:
            copy_into(tensor.direct, gathered(state[key]))


def save_adapter(model: nn.Module, path: str | os.PathLike) -> None:
    """Write the adapters of `model` to one safetensors file.

    The keys are those of `adapter_state_dict`, which also raises. If FSDP2 shards the model, every
    process must call this; all may pass the same path.

    The metadata of the file describe the layers (see `checkpoints.description`), so that
    `python -m moelora_kernels.export` works without the model. `load_adapter` does not read them.

    Raises:
        FileNotFoundError: the folder of `path` does not exist.

    Example:
        >>> import os, tempfile
        >>> from moelora_kernels import MoeLoraLinear, save_adapter
        >>> layer = MoeLoraLinear(16, 32, num_experts=4, rank=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_adapter(layer, os.path.join(folder, "adapter.safetensors"))
        ...     os.listdir(folder)
        ['adapter.safetensors']
    """
    state = adapter_state_dict(model)
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"path: the folder {os.fspath(Path(path).parent)!r} does not exist")
    if empty := [key for key, tensor in state.items() if tensor.is_meta]:
        raise ValueError(f"model: {', '.join(empty)}: on the meta device, without values")
    state = {key: tensor.detach().contiguous().cpu() for key, tensor in state.items()}
    metadata = {"format": "moelora_kernels", "layout": json.dumps(describe(model))}
    # Several processes may write the same path, and others may read it already.
    part = Path(f"{os.fspath(path)}.{uuid.uuid4().hex}.part")
    try:
        save_file(state, part, metadata=metadata)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def load_adapter(model: nn.Module, path: str | os.PathLike) -> None:
    """Load a file of `save_adapter` into a model that has the same layers.

    Raises:
        ValueError: the file is not a safetensors file, or `load_adapter_state_dict` raises.
        FileNotFoundError, IsADirectoryError: there is no file at `path`.

    Example:
        >>> import os, tempfile
        >>> from moelora_kernels import MoeLoraLinear, load_adapter, save_adapter
        >>> trained, fresh = (MoeLoraLinear(16, 32, num_experts=4, rank=2) for _ in range(2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = os.path.join(folder, "adapter.safetensors")
        ...     save_adapter(trained, path)
        ...     load_adapter(fresh, path)
        >>> bool((fresh.lora_A == trained.lora_A).all())
        True
    """
    _check_model(model)
    if Path(path).is_dir():
        raise IsADirectoryError(
            f"path: expected the file that save_adapter wrote, got the folder {os.fspath(path)!r}"
        )
    load_adapter_state_dict(model, load_safetensors(path))
