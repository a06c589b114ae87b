"""Our own adapters on disk: one safetensors file, strict in both directions."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

from safetensors.torch import save_file
from torch import Tensor, nn

from moelora_kernels.checkpoints.description import layout_of
from moelora_kernels.checkpoints.files import load_safetensors, why_no_tensor, why_unfit
from moelora_kernels.nn.layer import LoraLayer, MixtureLayer
from moelora_kernels.nn.merge import merged_with


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A, B and router of every layer by name; a router that layers share, once.

    The tensors are the model's own. Raises ValueError where the model has no layer.
    """
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, layer in model.named_modules():
        if not isinstance(layer, MixtureLayer):
            continue
        prefix = f"{name}." if name else ""
        own = dict(layer.named_parameters(recurse=False))
        if layer.router is not None:
            own.update(
                {f"router.{k}": v for k, v in layer.router.state_dict(keep_vars=True).items()}
            )
        for key, tensor in own.items():
            if id(tensor) not in seen:
                seen.add(id(tensor))
                state[prefix + key] = tensor
    if not state:
        raise ValueError("model: it has no MoeLoraLinear layer and no MoeLoraFFN")
    return state


def load_adapter_state_dict(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy `state` into the adapters of `model`.

    Raises ValueError naming every key that is missing, unexpected, of another shape or kind of
    dtype, no dense tensor, or without values (meta device) on either side; the model is then
    unchanged.
    """
    own = adapter_state_dict(model)
    problems = [f"missing: {key}" for key in own if key not in state]
    problems += [f"unexpected: {key}" for key in state if key not in own]
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and layer.merged:
            problems.append(f"{name or 'model'}: {merged_with(layer)}, unmerge first")
    for key, given in state.items():
        if problem := why_no_tensor(key, given):
            problems.append(problem)
        elif key in own:
            problems += why_unfit(key, own[key], given)
    if problems:
        raise ValueError("adapter does not fit the model:\n  " + "\n  ".join(problems))
    for key, tensor in own.items():
        tensor.data.copy_(state[key])


def save_adapter(model: nn.Module, path: str | os.PathLike) -> None:
    """Write the adapters of `model` to one safetensors file, and their layout into its metadata.

    With the layout `python -m moelora_kernels.export` needs no model; `load_adapter` does without.
    """
    state = {k: v.detach().contiguous().cpu() for k, v in adapter_state_dict(model).items()}
    metadata = {"format": "moelora_kernels", "layout": json.dumps(layout_of(model))}
    save_file(state, path, metadata=metadata)


def load_adapter(model: nn.Module, path: str | os.PathLike) -> None:
    """Read what `save_adapter` wrote into a model of the same layers.

    Strict as `load_adapter_state_dict`; a file that is not safetensors raises ValueError as well.
    """
    load_adapter_state_dict(model, load_safetensors(path))
