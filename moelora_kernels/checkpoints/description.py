"""What an adapter file says of its layers: options, sizes and names, without the base under them.

`save_adapter` writes it into the metadata of its file as JSON, under "layout":

    configs   the different configs of the layers, as `MoeLoraConfig.to_dict` has them; null where
              the router is a module of one's own
    layers    for each layer its names in the model, type, dtype of the adapter, in_features and
              out_features, the place of its config in configs, and the layer whose router it uses

so that an adapter can be turned into a plain LoRA where the model itself does not fit.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from moelora_kernels.config import MoeLoraConfig
from moelora_kernels.nn.layer import LoraLayer, MixtureLayer
from moelora_kernels.nn.linear import MoeLoraLinear
from moelora_kernels.nn.merge import REDUCED_BASE


class MissingBase(nn.Module):
    """The sizes of a linear whose weight is elsewhere: adapters over it can be read, not run."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features


def layout_of(model: nn.Module) -> dict[str, Any]:
    """The layout of the layers of `model`, as plain values that JSON can hold."""
    names: dict[nn.Module, list[str]] = {}
    for name, layer in model.named_modules(remove_duplicate=False):
        if isinstance(layer, MixtureLayer):
            names.setdefault(layer, []).append(name)
    configs: list[dict[str, Any] | None] = []
    layers, owners = [], {}
    for layer, own_names in names.items():
        is_written = not isinstance(layer.config.router, nn.Module)
        config = layer.config.to_dict() if is_written else None
        if config not in configs:
            configs.append(config)
        first = layer if isinstance(layer, LoraLayer) else layer.gate_proj
        dtype = next(layer.parameters(recurse=False)).dtype
        layers.append(
            {
                "names": own_names,
                "type": type(layer).__name__,
                "dtype": str(dtype).removeprefix("torch."),
                "in_features": first.in_features,
                "out_features": first.out_features,
                "config": configs.index(config),
                "router": owners.setdefault(id(layer.router), own_names[0]),
            }
        )
    return {"configs": configs, "layers": layers}


def model_of(layout: dict[str, Any]) -> nn.Module:
    """Modules of the names in `layout` with layers over a `MissingBase`, for an adapter's values.

    Raises ValueError for layers that are no LoRA without their base or at all, each by name with
    the reason: whole-FFN experts, routers that are modules of one's own, init="svd_segments".
    """
    model = nn.Module()
    layers: dict[str, MoeLoraLinear] = {}
    problems = []
    for entry in layout["layers"]:
        name, options = entry["names"][0], layout["configs"][entry["config"]]
        if reason := _why_not_alone(entry["type"], options):
            problems.append(f"{name}: {reason}")
            continue
        config = MoeLoraConfig.from_dict({**options, "adapter_dtype": entry["dtype"]})
        base = MissingBase(entry["in_features"], entry["out_features"])
        layer = layers[name] = MoeLoraLinear.from_linear(base, config)
        layer.router = layers.get(entry["router"], layer).router
        for own in entry["names"]:
            if not own:
                return layer
            _add(model, own, layer)
    if problems:
        raise ValueError("layers that are no LoRA:\n  " + "\n  ".join(problems))
    return model


def _why_not_alone(kind: str, options: dict[str, Any] | None) -> str:
    if kind != MoeLoraLinear.__name__:
        return f"a {kind} is not a sum of linear experts"
    if options is None:
        return "its router is a module that the file does not hold, and its gate depends on x"
    if options.get("init") == "svd_segments":
        return REDUCED_BASE
    return ""


def _add(model: nn.Module, name: str, layer: nn.Module) -> None:
    """Put a layer at a dotted name, with plain modules on the way there."""
    *path, child = name.split(".")
    for part in path:
        if part not in model._modules:
            model.add_module(part, nn.Module())
        model = model._modules[part]
    model.add_module(child, layer)
