"""The tensors of one adapter of a PeftModel: from the model to a file, and back.

The keys of a file do not depend on wrappers inside the model (torch.compile, activation
checkpointing, DDP, FSDP1), and a tensor that is computed (`torch.nn.utils.parametrize`, pruning,
weight norm) has its plain name and its value in evaluation.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping

from torch import Tensor, nn

from moelora_kernels.nn.layer_tensors import LayerTensor, named_tensors, set_computed
from moelora_kernels.nn.sharding import gathered
from moelora_kernels.nn.wrappers import named_modules, portable_keys, portable_name
from moelora_kernels.peft.layer import MoeLoraExperts, MoeLoraTunerLinear

# PEFT writes this prefix into files. The keys of a model without a PeftModel around it lack it.
_FILE_PREFIX = "base_model.model."


def adapter_tensors(
    model: nn.Module, adapter_name: str, keys: Iterable[str]
) -> tuple[list[str], dict[str, LayerTensor]]:
    """Return the names of the tensors of an adapter in the state dict, and the computed tensors.

    keys: the portable keys of the model's state dict. The tensors from which others are computed
        are not among the names.
    """
    tensors: dict[str, dict[str, LayerTensor]] = {}
    for name, layer in named_modules(model):
        if isinstance(layer, MoeLoraTunerLinear):
            for key in layer.adapter_layer_names:
                if adapter_name in layer._modules[key]:
                    prefix = f"{name}.{key}.{adapter_name}.".lstrip(".")
                    part = layer._modules[key][adapter_name]
                    tensors[prefix] = dict(named_tensors(part, prefix))
    computed = {
        prefix: {key: t for key, t in of_part.items() if t.direct is None}
        for prefix, of_part in tensors.items()
    }
    names = []
    for key in keys:
        ends = [i + 1 for i, letter in enumerate(key) if letter == "."]
        prefix = next((key[:end] for end in ends if key[:end] in tensors), None)
        # Under FSDP1 a module does not list its tensors, but the state dict has them.
        if prefix is not None and (key in tensors[prefix] or not computed[prefix]):
            names.append(key)
    return names, {key: t for of_part in computed.values() for key, t in of_part.items()}


def state_to_save(
    model: nn.Module, adapter_name: str, state: Mapping[str, Tensor], bias: str
) -> dict[str, Tensor]:
    """Return the tensors of an adapter, and the biases that it trains, by their portable names.

    A tensor that FSDP2 shards is gathered, so every process must make this call.

    Args:
        model: a model with adapters.
        adapter_name: the adapter.
        state: the state dict of the model. A tensor that is not in it is left out, unless it is
            computed.
        bias: as in `MoeLoraPeftConfig`.
    """
    portable = {portable_name(model, key): tensor for key, tensor in state.items()}
    names, computed = adapter_tensors(model, adapter_name, portable)
    result = {key: gathered(portable[key]) for key in names}
    result |= {key: gathered(tensor.value()) for key, tensor in computed.items()}
    if bias == "all":
        result |= {key: t for key, t in portable.items() if f".{key}".endswith(".bias")}
    elif bias == "moelora_only":
        biases = [
            f"{name}.base_layer.bias".lstrip(".")
            for name, layer in named_modules(model)
            if isinstance(layer, MoeLoraTunerLinear)
        ]
        result |= {key: portable[key] for key in biases if key in portable}
    return result


def state_to_load(
    model: nn.Module,
    adapter_name: str,
    state: Mapping[str, Tensor],
    file_key: Callable[[str], str],
) -> dict[str, Tensor]:
    """Return the tensors of a file by their keys in `model.state_dict()`.

    Computed tensors get their values here.

    Args:
        model: a model with adapters.
        adapter_name: the adapter to load.
        state: the tensors of the file. Keys of other modules, such as `modules_to_save`, pass.
        file_key: maps a portable name in `model` to the key in the file.

    Raises:
        ValueError: the adapter is merged; a key of `state` names a tensor that the adapter does not
            have; or a computed tensor cannot have its value. The model is then unchanged.

    Warns if `state` lacks tensors of the adapter. These keep their values.
    """
    for name, layer in named_modules(model):
        is_loaded = isinstance(layer, MoeLoraExperts) and layer.name == adapter_name
        if is_loaded and (problem := layer.merged_problem()):
            raise ValueError(f"{name}: {problem}")
    present = model.state_dict()
    model_keys = {portable_name(model, key): key for key in present}
    direct, computed = adapter_tensors(model, adapter_name, model_keys)
    names = {file_key(key): key for key in [*direct, *computed]}
    bare = {key: key.removeprefix(_FILE_PREFIX) for key in state}
    state = {bare[k] if k not in names and bare[k] in names else k: t for k, t in state.items()}
    state = portable_keys(state, names)
    if unexpected := [k for k in state if ".moelora_" in f".{k}" and k not in names]:
        raise ValueError(
            f"adapter {adapter_name!r}: the file has tensors that the adapter does not have: "
            f"{', '.join(unexpected)}"
        )
    if missing := [key for key in names if key not in state]:
        warnings.warn(
            f"adapter {adapter_name!r}: the file has no values for {', '.join(missing)}; these "
            "tensors keep their values",
            stacklevel=4,
        )
    loaded = {names.get(key, key): tensor for key, tensor in state.items()}
    values = {key: (t, loaded.pop(key)) for key, t in computed.items() if key in loaded}
    if problems := set_computed(values):
        raise ValueError(f"adapter {adapter_name!r}: it does not fit:\n  " + "\n  ".join(problems))
    result = {model_keys.get(portable_name(model, k), k): t for k, t in loaded.items()}
    # The tensors from which others are computed have their values already.
    owners = tuple(key.removesuffix(tensor.name) for key, (tensor, _) in values.items())
    for name, key in model_keys.items():
        if name.startswith(owners) and name not in direct:
            result[key] = present[key]
    return result
