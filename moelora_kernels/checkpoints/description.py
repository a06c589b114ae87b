"""The description of a model's layers: names, options and sizes, without the base weights.

`save_adapter` writes it as JSON into the metadata of its file, under the key "layout". With it an
adapter can be exported as a plain LoRA on a machine that cannot hold the model.

    configs   a list of the distinct configs, as `MoeLoraConfig.to_dict` returns them; null for a
              config whose router is a custom module
    layers    a list with one entry for each layer:
        names          all names of the layer in the model without wrappers
        type           "MoeLoraLinear" or "MoeLoraFFN"
        dtype          the dtype of its A and B, such as "float32"
        in_features    I (of gate_proj if the layer is an FFN)
        out_features   O (of gate_proj if the layer is an FFN)
        config         the index of its config in `configs`
        router         the name of the first layer that uses the same router
"""

from __future__ import annotations

from typing import Any

from torch import nn

from moelora_kernels.config import MoeLoraConfig
from moelora_kernels.nn.layer import LoraLayer, MixtureLayer
from moelora_kernels.nn.linear import MoeLoraLinear
from moelora_kernels.nn.merge import REDUCED_BASE
from moelora_kernels.nn.router_warnings import router_warnings
from moelora_kernels.nn.wrappers import named_modules, without_wrapped


class MissingBase(nn.Module):
    """A linear without a weight. Its adapter can be loaded and exported, but not run."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features


def describe(model: nn.Module) -> dict[str, Any]:
    """Return the description of the layers of `model`, in values that JSON can hold."""
    names: dict[MixtureLayer, list[str]] = {}
    for name, layer in named_modules(model, remove_duplicate=False):
        if isinstance(layer, MixtureLayer):
            names.setdefault(layer, []).append(name)
    configs: list[dict[str, Any] | None] = []
    layers: list[dict[str, Any]] = []
    router_owners: dict[int, str] = {}
    for layer, layer_names in names.items():
        has_json = not isinstance(layer.config.router, nn.Module)
        config = layer.config.to_dict() if has_json else None
        if config not in configs:
            configs.append(config)
        linear: Any = layer if isinstance(layer, LoraLayer) else layer.gate_proj
        layers.append(
            {
                "names": layer_names,
                "type": _type(layer).__name__,
                "dtype": str(layer.first_tensor().dtype).removeprefix("torch."),
                "in_features": linear.in_features,
                "out_features": linear.out_features,
                "config": configs.index(config),
                "router": router_owners.setdefault(id(layer.router), layer_names[0]),
            }
        )
    return {"configs": configs, "layers": layers}


def _type(layer: nn.Module) -> type:
    """Return the type of a layer before parametrizations or FSDP2 changed it."""
    return next(kind for kind in type(layer).__mro__ if not kind.__module__.startswith("torch."))


def build(description: dict[str, Any]) -> nn.Module:
    """Return a model that has the described layers under their names, each over a `MissingBase`.

    The adapters have initial values; load the saved values into them.

    Raises:
        ValueError: a layer cannot be a plain LoRA without its base: whole-FFN experts, a custom
            module as router, or init="svd_segments". The message names every such layer. Or the
            layers are adapters of a PeftModel.
    """
    model = nn.Module()
    layers: dict[str, MoeLoraLinear] = {}
    problems = []
    if any(entry["type"] == "MoeLoraExperts" for entry in description["layers"]):
        raise ValueError(
            "save_adapter wrote this file from a PeftModel, and such a file cannot be exported. "
            "Call peft_model.save_pretrained(FOLDER) and export FOLDER"
        )
    for entry in description["layers"]:
        # A file of an earlier version has the names of the model with its wrappers.
        names = [without_wrapped(name, keep_module=True) for name in entry["names"]]
        name, options = names[0], description["configs"][entry["config"]]
        if problem := _export_problem(entry["type"], options):
            problems.append(f"{name}: {problem}")
            continue
        config = MoeLoraConfig.from_dict({**options, "adapter_dtype": entry["dtype"]})
        base = MissingBase(entry["in_features"], entry["out_features"])
        with router_warnings(are_hidden=True):
            layer = layers[name] = MoeLoraLinear.from_linear(base, config)
        router_owner = without_wrapped(entry["router"], keep_module=True)
        layer.router = layers.get(router_owner, layer).router
        for layer_name in names:
            if not layer_name:
                return layer
            _add(model, layer_name, layer)
    if problems:
        raise ValueError("layers that are not plain LoRA:\n  " + "\n  ".join(problems))
    return model


def _export_problem(kind: str, options: dict[str, Any] | None) -> str | None:
    """Return why a layer cannot be a plain LoRA without its base; None if it can."""
    if kind in ("MoeLoraFFN", "MoeLoraAdapter"):
        return f"the experts of a {kind} are not linear"
    if kind != MoeLoraLinear.__name__:
        return f"a {kind} may compute something else than a MoeLoraLinear; export it from its model"
    if options is None:
        return "its router is a custom module, which is not in the file, and its gate depends on x"
    if options.get("init") == "svd_segments":
        return REDUCED_BASE
    return None


def _add(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Add a layer under a dotted name, with an empty module for each part before the last dot."""
    *path, child = name.split(".")
    for part in path:
        if part not in model._modules:
            model.add_module(part, nn.Module())
        model = model.get_submodule(part)
    model.add_module(child, layer)
