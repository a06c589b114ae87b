"""The keys of the original layouts of MOELoRA-peft and MING-MOE, for one model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from moelora_kernels.nn.ffn import MoeLoraFFN
from moelora_kernels.nn.layer import MixtureLayer
from moelora_kernels.nn.layer_tensors import layer_tensors, tensor_value
from moelora_kernels.nn.linear import MoeLoraLinear
from moelora_kernels.nn.routers import TaskRouter
from moelora_kernels.nn.sharding import check_dense
from moelora_kernels.nn.wrappers import named_modules, unwrap
from moelora_kernels.reference import blocks


class Layout(NamedTuple):
    """The keys of an original layout for one model, without PREFIX and without adapter name."""

    # Key -> the tensor of the model that it stores: a parameter, or a view of one expert's block.
    targets: dict[str, Tensor]
    # Alias -> key. The original stores the same tensor under both names.
    aliases: dict[str, str]
    # Keys that the original writes and never reads.
    unread: set[str]
    # Keys that are exported without PREFIX.
    top: set[str]


def moelora_peft_layout(model: nn.Module) -> Layout:
    """Return the keys of MOELoRA-peft for `model`.

    Raises ValueError if the layout cannot store a layer.
    """
    targets: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    unread: set[str] = set()
    shared_router: TaskRouter | None = None
    shared_gate: dict[str, Tensor] = {}
    for prefix, layer in _layers(model, "MOELoRA-peft"):
        if _is_plain_lora(layer):
            targets |= _plain_lora(prefix, layer)
            continue
        _check_layer(prefix, layer, "MOELoRA-peft")
        router = None if layer.router is None else unwrap(layer.router)
        if not isinstance(router, TaskRouter) or layer.config.shared_expert != "none":
            raise ValueError(
                f"{prefix[:-1]}: the layout of MOELoRA-peft needs router='task' and "
                "shared_expert='none'"
            )
        for e, *pair in _experts(layer):
            for letter, block in zip("AB", pair, strict=True):
                stem = f"{prefix}lora_{letter}.lora{letter}.{e}"
                targets[f"{stem}.mlp.weight"] = block
                aliases[f"{stem}.weight"] = f"{stem}.mlp.weight"
        gate = {
            "lora_task_embedding.weight": _weight(router.embedding),
            "lora_gate.GateL.weight": _weight(router.gate),
        }
        if not layer.config.shares_gate():
            targets |= {prefix + key: tensor for key, tensor in gate.items()}
            continue
        if shared_router not in (None, router):
            raise ValueError(
                f"{prefix[:-1]}: the layout of MOELoRA-peft has one shared gate, but this layer "
                "shares a different gate; use the same router, or task_gate='per_layer'"
            )
        shared_router, shared_gate = router, gate
        unread |= {prefix + key for key in gate}
    top = set(shared_gate)
    return Layout(targets | shared_gate, aliases, unread - top, top)


def ming_layout(model: nn.Module) -> Layout:
    """Return the keys of MING-MOE for `model`. Raises ValueError as `moelora_peft_layout`."""
    targets: dict[str, Tensor] = {}
    for prefix, layer in _layers(model, "MING"):
        if _is_plain_lora(layer):
            targets |= _plain_lora(prefix, layer)
            continue
        _check_layer(prefix, layer, "MING")
        router = None if layer.router is None else unwrap(layer.router)
        config = layer.config
        if not isinstance(router, nn.Linear) or router.bias is None:
            raise ValueError(
                f"{prefix[:-1]}: the layout of MING needs a linear router with router_bias=True"
            )
        if config.shared_expert == "complement":
            raise ValueError(
                f"{prefix[:-1]}: the layout of MING needs shared_expert 'none' or 'always', got "
                "'complement'"
            )
        for e, a, b in _experts(layer):
            stem, tail = (
                (f"{prefix}experts.{e}", f"_{e}")
                if e < config.num_experts
                else (f"{prefix}share_experts", "")
            )
            targets[f"{stem}.lora_A{tail}.weight"] = a
            targets[f"{stem}.lora_B{tail}.weight"] = b
        targets[f"{prefix}switch.weight"] = _weight(router)
        targets[f"{prefix}switch.bias"] = tensor_value(router, "bias").detach()
    return Layout(targets, {}, set(), set())


def _layers(model: nn.Module, layout: str) -> Iterator[tuple[str, MoeLoraLinear]]:
    """Yield the key prefix ("model.0.") and the layer, for every MoeLoraLinear of `model`.

    Raises ValueError if there is none, if the layout cannot store a layer, or if a tensor is
    sharded.
    """
    check_dense({key: tensor.direct for key, tensor in layer_tensors(model).items()})
    empty = True
    for name, layer in named_modules(model):
        if isinstance(layer, MoeLoraFFN):
            raise ValueError(f"{name}: the layout of {layout} cannot store whole-FFN experts")
        if isinstance(layer, MoeLoraLinear):
            empty = False
            yield f"{name}." if name else "", layer
        elif isinstance(layer, MixtureLayer):
            kind = "an adapter of a PeftModel" if layer.is_peft_adapter else type(layer).__name__
            raise ValueError(
                f"{name}: the layout of {layout} stores MoeLoraLinear layers, got {kind}"
            )
    if empty:
        raise ValueError("model: expected MoeLoraLinear layers, got none")


def _weight(module: nn.Module) -> Tensor:
    return tensor_value(unwrap(module), "weight").detach()


def _check_layer(prefix: str, layer: MoeLoraLinear, layout: str) -> None:
    """Raise ValueError if the experts of a layer cannot be stored in an original layout."""
    config = layer.config
    if config.share == "A" or len(set(config.ranks()[: config.num_experts])) > 1:
        raise ValueError(
            f"{prefix[:-1]}: the layout of {layout} needs share='none' and equal ranks"
        )
    if config.init == "svd_segments":
        raise ValueError(f"{prefix[:-1]}: the layout of {layout} cannot store init='svd_segments'")


def _experts(layer: MoeLoraLinear) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Yield e, A [r, I] and B [O, r] of every expert; the shared expert comes last.

    A and B are views of the parameters.
    """
    a, b = (tensor_value(layer, name).detach() for name in ("lora_A", "lora_B"))
    for e, block in enumerate(blocks(layer.config.ranks())):
        yield e, a[block], b[:, block]


def _is_plain_lora(layer: MoeLoraLinear) -> bool:
    """Return whether a layer has one expert and no gate."""
    return layer.router is None and layer.config.num_experts == 1 and len(layer.mixture.ranks) == 1


def _plain_lora(prefix: str, layer: MoeLoraLinear) -> dict[str, Tensor]:
    """Return PEFT's keys of a plain LoRA and the parameters that they store."""
    return {
        f"{prefix}lora_{letter}.weight": tensor_value(layer, f"lora_{letter}").detach()
        for letter in "AB"
    }
