"""Why a parameter of a layer has no gradient in a training step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moelora_kernels.config import MoeLoraConfig
from moelora_kernels.nn.ffn import PROJECTIONS
from moelora_kernels.nn.layer import MixtureLayer

NO_GRAPH = (
    "its output has no graph: it runs under torch.no_grad, or reentrant activation checkpointing "
    "got inputs that need no gradient (use use_reentrant=False)"
)
UNUSED = "its output never reached the loss: it is detached or not used"
ZERO = "the gradient of its output is zero: the loss does not depend on it"


@dataclass
class LayerStep:
    """What happened to a layer in one training step."""

    name: str
    layer: MixtureLayer
    calls: int = 0
    reader: str | None = None  # the code that read `layer.weight`
    has_graph: bool = False  # whether an output had a graph
    is_reached: bool = False  # whether the loss has a gradient for an output
    is_nonzero: bool = False  # whether that gradient has a nonzero value
    base_is_cut: bool = False  # whether the base returned no graph for an x that needs a gradient
    selected: Tensor | None = None  # bool [E], the experts that a token selected

    def call_problem(self) -> str | None:
        """Return why the layer was not called; None if it was called."""
        if self.calls:
            return None
        if not self.layer.is_running:
            return "its adapter is switched off"
        if self.reader is not None:
            return f"it was not called: {self.reader} reads its weight, so the experts are left out"
        return "it was not called in this forward"

    def output_problem(self) -> str | None:
        """Return why the loss does not depend on the output; None if it does."""
        if not any(parameter.requires_grad for _, parameter in own_parameters(self.layer)):
            return None
        if not self.has_graph:
            return NO_GRAPH
        if not self.is_reached:
            return UNUSED + (f"; {self.reader} reads its weight" if self.reader else "")
        return None if self.is_nonzero else ZERO


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


def gradient_reasons(
    steps: Iterable[LayerStep],
    gradients: Mapping[int, Tensor | bool | None],
    problems: Mapping[str, str],
) -> tuple[dict[str, str], dict[str, str]]:
    """Return why parameters have no gradient, by name: the unexpected and the expected reasons.

    A parameter that several layers share is named once. It has no gradient if no layer gives one.

    Args:
        steps: the layers.
        gradients: id of a parameter -> its gradient; or whether it is nonzero; None without one.
        problems: name of a layer -> why it gives no gradient at all.
    """
    names: dict[int, str] = {}
    reasons: dict[int, list[tuple[str, bool]]] = {}
    for step in steps:
        for name, parameter in own_parameters(step.layer):
            names.setdefault(id(parameter), f"{step.name}.{name}".lstrip("."))
            gradient = gradients.get(id(parameter))
            if isinstance(gradient, Tensor):
                if not gradient.isfinite().all():
                    reasons[id(parameter)] = [("its gradient is not finite", False)]
                gradient = bool(gradient.any())
            if not gradient:
                reason = _reason(step, name, parameter, problems.get(step.name))
                reasons.setdefault(id(parameter), []).append(reason)
    unexpected: dict[str, str] = {}
    expected: dict[str, str] = {}
    for key, given in reasons.items():
        # A shared parameter has an expected reason if one of its layers has one.
        reason, is_expected = max(given, key=lambda pair: pair[1])
        (expected if is_expected else unexpected)[names[key]] = reason
    return unexpected, expected


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
        return "it is frozen: requires_grad is False", False
    if problem is not None:
        return problem, False
    if is_router:
        if (constant := constant_gate(config)) is not None:
            return constant, False
        if all(_is_zero(matrix) for matrix in _matrices(layer, "lora_B")):
            return "B is zero, as in every new layer: the gradient comes with the next step", True
    elif "lora_A" in name and _is_zero(_partner(layer, name, "lora_A", "lora_B")):
        return "B is zero, as in every new layer: the gradient comes with the next step", True
    elif "lora_B" in name and _is_zero(_partner(layer, name, "lora_B", "lora_A")):
        return "A is zero", False
    if step.selected is not None and not step.selected.any():
        return "no token selected an expert of the layer", True
    return "the gradient is zero", False


def constant_gate(config: MoeLoraConfig) -> str | None:
    """Return why the gate does not depend on the logits, except in the selection; None if it does.

    The router then has no gradient from the loss.
    """
    if config.shared_expert == "complement":
        return None
    if config.normalize == "one":
        return 'every selected weight is 1 (normalize="one"), so the router gets no gradient'
    one = config.top_k == 1 and config.select in ("topk", "sampling")
    if config.normalize in ("sum", "softmax") and (one or config.num_experts == 1):
        count = "top-1" if one else "one expert"
        return (
            f"the weight of {count} is renormalised to 1 (normalize={config.normalize!r}), so the "
            'router gets no gradient; use normalize="none" or an auxiliary loss'
        )
    return None


def _matrices(layer: MixtureLayer, kind: str) -> list[Tensor]:
    """Return the tensors of `layer` whose name ends in lora_A or lora_B."""
    if isinstance(getattr(layer, kind, None), Tensor):
        return [getattr(layer, kind)]
    stems = [name.removesuffix("_proj") for name in PROJECTIONS]
    return [getattr(layer, f"{stem}_{kind}") for stem in stems]


def _partner(layer: MixtureLayer, name: str, kind: str, other: str) -> Tensor:
    """Return the B of an A, or the A of a B: `lora_B` for "lora_A", `up_lora_B` for "up_lora_A"."""
    # The name of a parametrized tensor is "parametrizations.lora_A.original".
    part = next(part for part in name.split(".") if kind in part)
    stem = part[: part.index(kind)]
    return getattr(layer, stem + other)


def _is_zero(tensor: Tensor) -> bool:
    return not bool(torch.any(tensor.detach()))
