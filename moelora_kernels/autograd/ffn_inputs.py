"""The inputs of the autograd Functions of whole-FFN experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from moelora_kernels.autograd.frozen import without_frozen
from moelora_kernels.types import FfnMixture, FfnTensors, Routing

Activation = Callable[[Tensor], Tensor]


class FfnInputs(NamedTuple):
    """The inputs of `FfnExperts.forward` and `FusedFfnExperts.forward`."""

    mixture: FfnMixture
    # A name of FFN_ACTIVATIONS in `FusedFfnExperts`.
    activation: Activation | str
    dropout: tuple[float, bool]  # p and per_expert, of x and of the activation
    x: Tensor  # [T, I]
    gate_out: Tensor  # [T, F]
    up_out: Tensor  # [T, F]
    weights: Tensor  # [T, K]
    order: Tensor
    offsets: Tensor
    tiles: Tensor
    chunks: Tensor
    seed_x: Tensor | None
    seed_a: Tensor | None
    gate_a: Tensor
    gate_b: Tensor
    up_a: Tensor
    up_b: Tensor
    down_a: Tensor
    down_b: Tensor

    @property
    def routing(self) -> Routing:
        return Routing(self.order, self.offsets, self.tiles, self.chunks)


def tensors_without_frozen(tensors: FfnTensors, mixture: FfnMixture) -> FfnTensors:
    """Return the A and B of the three linears, with gradients of zero for frozen experts."""
    pairs = zip(tensors[::2], tensors[1::2], strict=True)
    results = [without_frozen(a, b, mixture.ranks, mixture.frozen) for a, b in pairs]
    return FfnTensors(*[matrix for pair in results for matrix in pair])


# Modules that compute an activation of FFN_ACTIVATIONS, by the module and the name of their class:
# transformers is not imported.
_MODULES = {
    ("torch.nn.modules.activation", "SiLU"): "silu",
    ("torch.nn.modules.activation", "ReLU"): "relu",
    ("transformers.activations", "SiLUActivation"): "silu",
    ("transformers.activations", "GELUActivation"): "gelu",
    ("transformers.activations", "NewGELUActivation"): "gelu_tanh",
    ("transformers.activations", "GELUTanh"): "gelu_tanh",
    ("transformers.activations", "PytorchGELUTanh"): "gelu_tanh",
}
_FUNCTIONS = (
    (functional.silu, "silu"),
    (functional.gelu, "gelu"),
    (functional.relu, "relu"),
    (torch.relu, "relu"),
)


def activation_name(activation: Activation) -> str | None:
    """Return the name of an activation in FFN_ACTIVATIONS; None if it is another one.

    A subclass, and a module with hooks or a patched forward, is another activation.
    """
    if not isinstance(activation, nn.Module):
        for function, name in _FUNCTIONS:
            if activation is function:
                return name
        return None
    hooks = activation._forward_hooks or activation._forward_pre_hooks
    if hooks or activation._backward_hooks or activation._backward_pre_hooks:
        return None
    if "forward" in activation.__dict__:
        return None
    kind = type(activation)
    if kind is nn.GELU:
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    return _MODULES.get((kind.__module__, kind.__qualname__))
