"""The adapter file of this package: one safetensors file with the adapters of a model."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

from safetensors.torch import save_file
from torch import Tensor, nn

from moelora_kernels.checkpoints.description import describe
from moelora_kernels.checkpoints.files import load_safetensors, tensor_problem, unfit_problems
from moelora_kernels.nn.layer import LoraLayer, MixtureLayer
from moelora_kernels.nn.merge import merged_with


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """Return the adapter tensors of a model: A, B and router of every layer, by their full names.

    A router that several layers share is listed once, under its first name. The tensors are the
    parameters and buffers themselves, not copies.

    Raises:
        ValueError: the model has no MoeLoraLinear and no MoeLoraFFN.

    Example:
        >>> from moelora_kernels import MoeLoraLinear, adapter_state_dict
        >>> layer = MoeLoraLinear(16, 32, num_experts=4, rank=2, top_k=2)
        >>> {name: tuple(tensor.shape) for name, tensor in adapter_state_dict(layer).items()}
        {'lora_A': (8, 16), 'lora_B': (32, 8), 'router.weight': (4, 16)}
    """
    state: dict[str, Tensor] = {}
    listed: set[int] = set()
    for name, layer in model.named_modules():
        if not isinstance(layer, MixtureLayer):
            continue
        prefix = f"{name}." if name else ""
        tensors = dict(layer.named_parameters(recurse=False))
        if layer.router is not None:
            router_state = layer.router.state_dict(keep_vars=True)
            tensors |= {f"router.{key}": tensor for key, tensor in router_state.items()}
        for key, tensor in tensors.items():
            if id(tensor) not in listed:
                listed.add(id(tensor))
                state[prefix + key] = tensor
    if not state:
        raise ValueError(
            "model: expected a model with MoeLoraLinear or MoeLoraFFN layers, got none"
        )
    return state


def load_adapter_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy `state` (as `adapter_state_dict` returns it) into the adapters of `model`.

    Each value is converted to the dtype and device of the model's tensor.

    Raises:
        ValueError: a key is missing or unexpected; a value is not a dense tensor, has another
            shape, is an integer while the model has a float (or the reverse), or is on the meta
            device; or a layer is merged. The message names every key, and the model is unchanged.

    Example:
        >>> from moelora_kernels import MoeLoraLinear, adapter_state_dict, load_adapter_state_dict
        >>> source, target = (MoeLoraLinear(16, 32, num_experts=4, rank=2) for _ in range(2))
        >>> load_adapter_state_dict(target, adapter_state_dict(source))
        >>> bool((target.lora_A == source.lora_A).all())
        True
    """
    current = adapter_state_dict(model)
    problems = [f"missing: {key}" for key in current if key not in state]
    problems += [f"unexpected: {key}" for key in state if key not in current]
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and layer.merged:
            problems.append(f"{name or 'model'}: {merged_with(layer)}, unmerge first")
    for key, saved in state.items():
        if problem := tensor_problem(key, saved):
            problems.append(problem)
        elif key in current:
            problems += unfit_problems(key, current[key], saved)
    if problems:
        raise ValueError("adapter does not fit the model:\n  " + "\n  ".join(problems))
    for key, tensor in current.items():
        tensor.data.copy_(state[key])


def save_adapter(model: nn.Module, path: str | os.PathLike) -> None:
    """Write the adapters of `model` to one safetensors file.

    The metadata of the file describe the layers (see `checkpoints.description`), so that
    `python -m moelora_kernels.export` works without the model. `load_adapter` does not read them.

    Example:
        >>> import os, tempfile
        >>> from moelora_kernels import MoeLoraLinear, save_adapter
        >>> layer = MoeLoraLinear(16, 32, num_experts=4, rank=2)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_adapter(layer, os.path.join(folder, "adapter.safetensors"))
        ...     os.listdir(folder)
        ['adapter.safetensors']
    """
    state = {k: v.detach().contiguous().cpu() for k, v in adapter_state_dict(model).items()}
    metadata = {"format": "moelora_kernels", "layout": json.dumps(describe(model))}
    save_file(state, path, metadata=metadata)


def load_adapter(model: nn.Module, path: str | os.PathLike) -> None:
    """Load a file of `save_adapter` into a model that has the same layers.

    Raises:
        ValueError: the file is not a safetensors file, or `load_adapter_state_dict` raises.

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
    load_adapter_state_dict(model, load_safetensors(path))
