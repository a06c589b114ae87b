"""Why a parameter of a layer has no gradient in a training step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moelora_kernels.config import MoeLoraConfig
from moelora_kernels.config_rules import (
    constant_gate_problem,
    router_remedy,
    untrained_router_problem,
)
from moelora_kernels.nn.ffn import PROJECTIONS
from moelora_kernels.nn.layer import MixtureLayer
from moelora_kernels.nn.wrappers import named_modules

NO_GRAPH = (
    "its output has no graph: it runs under torch.no_grad, or reentrant activation checkpointing "
    "or reversible layers got inputs that need no gradient (use use_reentrant=False, or "
    "model.enable_input_require_grads())"
)
UNUSED = (
    "its output never reached the loss: it is detached or not used; leave the layer out of "
    "target_modules, or train with a loss that uses it"
)
ZERO = (
    "the gradient of its output is zero: the loss does not depend on it; check the labels "
    "and masks of the batch"
)
ZERO_B = "B is zero, as in every new layer: the gradient comes with the next step"
ZERO_GRADIENT = "the gradient is zero"
FROZEN = (
    "it is frozen: requires_grad is False; freeze the model before you add the experts, or call "
    "requires_grad_(True) on each of adapter_parameters(model)"
)

# The rounding of a constant gate gives a router up to 2.3e-7 of the largest gradient of A and B
# (256 features, 16 and 4096 tokens, float32 and bfloat16). Less than this share is rounding.
ROUNDING = 1e-5


@dataclass
class LayerStep:
    """What happened to a layer in one training step."""

    name: str
    layer: MixtureLayer
    calls: int = 0
    reader: str | None = None  # the code that read `layer.weight`
    has_graph: bool | None = None  # whether an output had a graph; None if no output was seen
    is_reached: bool = False  # whether the loss has a gradient for an output
    is_nonzero: bool = False  # whether that gradient has a nonzero value
    base_is_cut: bool = False  # whether the base returned no graph for an x that needs a gradient
    selected: Tensor | None = None  # bool [E], the experts that a token selected

    def call_problem(self) -> str | None:
        """Return why the layer was not called; None if it was called."""
        if self.calls:
            return None
        if not self.layer.is_running:
            return "its adapter is switched off: leave disable_adapter(), or call enable_adapters()"
        if self.reader is not None:
            return (
                f"it was not called: {self.reader} reads its weight, so the experts have no "
                "effect; leave it out of target_modules, or change that code to call it"
            )
        return "it was not called in this step; leave it out of target_modules if no batch calls it"

    def output_problem(self) -> str | None:
        """Return why the loss does not depend on the output; None if it does."""
        if not any(parameter.requires_grad for _, parameter in own_parameters(self.layer)):
            return None
        if self.has_graph is False:
            return NO_GRAPH
        if not self.is_reached:
            return UNUSED + (f"; {self.reader} reads its weight" if self.reader else "")
        return None if self.is_nonzero else ZERO


def has_gradient(layer: MixtureLayer, magnitudes: Mapping[int, float]) -> bool:
    """Return whether A or B of the layer has a nonzero gradient.

    Layers whose `forward` is called directly have one, although no hook saw their output.
    """
    named = own_parameters(layer)
    return any(magnitudes.get(id(parameter), 0.0) for name, parameter in named if "lora_" in name)


def own_parameters(layer: MixtureLayer) -> list[tuple[str, nn.Parameter]]:
    """Return the parameters of a layer and its router, without those of the base, by name."""
    bases = ("base_layer", "act_fn", "router", *PROJECTIONS)
    named = list(layer.named_parameters(recurse=False))
    for name, child in layer.named_children():
        if name not in bases:
            named += child.named_parameters(prefix=name)
    if layer.router is not None:
        named += layer.router.named_parameters(prefix="router")
    return named


def layer_steps(model: nn.Module) -> list[LayerStep]:
    """Return a LayerStep for each mixture layer of `model` that is selected."""
    return [
        LayerStep(name, layer)
        for name, layer in named_modules(model)
        if isinstance(layer, MixtureLayer) and layer.is_selected
    ]


def magnitude(gradient: Tensor | None) -> float:
    """Return the largest absolute value of a gradient; 0 without one."""
    if gradient is None or not gradient.numel():
        return 0.0
    return float(gradient.abs().max())


def gradient_reasons(
    steps: Iterable[LayerStep],
    magnitudes: Mapping[int, float],
    problems: Mapping[str, str],
) -> tuple[dict[str, str], dict[str, str]]:
    """Return why parameters have no gradient, by name: the unexpected and the expected reasons.

    A parameter that several layers share is named once. It has no gradient if no layer gives one.

    Args:
        steps: the layers.
        magnitudes: id of a parameter -> the largest absolute value of its gradient, 0 without one.
        problems: name of a layer -> why it gives no gradient at all.
    """
    names: dict[int, str] = {}
    reasons: dict[int, list[tuple[str, bool] | None]] = {}
    for step in steps:
        parameters = own_parameters(step.layer)
        largest = max(magnitudes.get(id(p), 0.0) for name, p in parameters if "lora_" in name)
        for name, parameter in parameters:
            names.setdefault(id(parameter), f"{step.name}.{name}".lstrip("."))
            size = magnitudes.get(id(parameter), 0.0)
            is_router = name.startswith("router.")
            reason = None
            if not math.isfinite(size):
                reason = "its gradient is not finite", False
            elif size == 0 or (is_router and _is_rounding(size, largest, step.layer.config)):
                reason = _reason(step, name, parameter, problems.get(step.name))
            reasons.setdefault(id(parameter), []).append(reason)
    unexpected: dict[str, str] = {}
    expected: dict[str, str] = {}
    for key, of_layers in reasons.items():
        if None in of_layers:
            continue
        # A shared parameter has an expected reason if one of its layers has one.
        reason, is_expected = max(of_layers, key=lambda pair: pair[1])
        (expected if is_expected else unexpected)[names[key]] = reason
    return unexpected, expected


def _is_rounding(size: float, largest: float, config: MoeLoraConfig) -> bool:
    """Return whether the gradient of a router is only the rounding of a constant gate.

    A score divided by itself is 1 up to rounding. A loss of the logits gives more.

    Args:
        size, largest: the largest absolute values of the gradients of the router, and of A and B.
        config: the options of the layer.
    """
    return size <= ROUNDING * largest and constant_gate_problem(config) is not None


def _reason(
    step: LayerStep, name: str, parameter: nn.Parameter, problem: str | None
) -> tuple[str, bool]:
    """Return why a parameter of one layer has no gradient, and whether that is expected."""
    layer = step.layer
    config = layer.config
    is_router = name.startswith("router.")
    if not parameter.requires_grad:
        frozen = not is_router and ("lora_A" in name or config.freeze == "AB")
        if config.freeze != "none" and frozen:
            return f"it is frozen by freeze={config.freeze!r}", True
        if is_router and isinstance(config.router, nn.Module) and _trains_matrices(layer):
            return "the router that you passed is frozen", True
        return FROZEN, False
    if problem is not None:
        return problem, False
    is_matrix = "lora_" in name and not is_router
    if is_matrix and config.frozen_experts and (reason := _frozen_reason(step)):
        return reason, True
    if is_router:
        if (constant := constant_gate_problem(config)) is not None:
            return _constant_gate(config, constant)
        if all(_is_zero(matrix) for matrix in _matrices(layer, "lora_B")):
            return ZERO_B, True
    elif "lora_A" in name and _is_zero(_trained(layer, name, "lora_A", "lora_B")):
        return ZERO_B, True
    elif "lora_B" in name and _is_zero(_trained(layer, name, "lora_B", "lora_A")):
        return "A is zero, so B has no gradient; call reset_parameters() on the layer", False
    if step.selected is not None and not step.selected.any():
        return "no token selected an expert of the layer", True
    return ZERO_GRADIENT, False


def _constant_gate(config: MoeLoraConfig, problem: str) -> tuple[str, bool]:
    """Return why a router with a constant gate has no gradient, and whether that is expected."""
    if untrained_router_problem(config) is not None:
        return f"the gate does not train it ({problem}). {router_remedy(config)}", False
    if config.balance_rate is not None:
        return f"the gate does not train it ({problem}); balance_rate moves the selection", True
    return (
        f"only its auxiliary loss trains it ({problem}), and this loss does not contain it: add "
        "collect_aux_loss(model) to the loss",
        True,
    )


def _trains_matrices(layer: MixtureLayer) -> bool:
    parameters = own_parameters(layer)
    return any(parameter.requires_grad for name, parameter in parameters if "lora_" in name)


def _matrices(layer: MixtureLayer, kind: str) -> list[Tensor]:
    """Return the tensors of `layer` whose name ends in lora_A or lora_B."""
    if isinstance(getattr(layer, kind, None), Tensor):
        return [getattr(layer, kind)]
    stems = [name.removesuffix("_proj") for name in PROJECTIONS]
    return [getattr(layer, f"{stem}_{kind}") for stem in stems]


def _frozen_reason(step: LayerStep) -> str | None:
    """Return why A and B have no gradient because experts are frozen; None for another reason."""
    config = step.layer.config
    if len(config.frozen_experts) == len(config.ranks()):
        return "all experts of the layer are frozen"
    # Every token uses a shared expert.
    if step.selected is None or config.shared_expert != "none":
        return None
    selected = step.selected.nonzero().flatten().tolist()
    if selected and {*selected} <= {*config.frozen_experts}:
        return "every token of this batch selected frozen experts only"
    return None


def _trained(layer: MixtureLayer, name: str, kind: str, other: str) -> Tensor:
    """Return the part of the `_partner` that belongs to experts which are not frozen."""
    matrix, dim = _partner(layer, name, kind, other), int(other == "lora_B")
    config = layer.config
    if not config.frozen_experts or (config.share == "A" and dim == 0):
        return matrix
    parts = matrix.detach().split(list(config.ranks()), dim=dim)
    return torch.cat([p for e, p in enumerate(parts) if e not in config.frozen_experts], dim=dim)


def _partner(layer: MixtureLayer, name: str, kind: str, other: str) -> Tensor:
    """Return the B of an A, or the A of a B: `lora_B` for "lora_A", `up_lora_B` for "up_lora_A"."""
    # The name of a parametrized tensor is "parametrizations.lora_A.original".
    part = next(part for part in name.split(".") if kind in part)
    stem = part[: part.index(kind)]
    return getattr(layer, stem + other)


def _is_zero(tensor: Tensor) -> bool:
    return not bool(torch.any(tensor.detach()))
