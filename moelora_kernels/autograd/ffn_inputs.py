"""The inputs of the autograd Functions of whole-FFN experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from moelora_kernels.types import FfnMixture, Routing

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


def activation_name(activation: Activation) -> str | None:
    """Return the name of an activation in FFN_ACTIVATIONS; None if it is another one.

    A subclass, and a module with hooks or a patched forward, is another activation.
    """
    if not isinstance(activation, nn.Module):
        return _FUNCTIONS.get(activation)
    hooks = activation._forward_hooks or activation._forward_pre_hooks
    if hooks or activation._backward_hooks or activation._backward_pre_hooks:
        return None
    if "forward" in activation.__dict__:
        return None
    if type(activation) is nn.GELU:
        return "gelu_tanh" if activation.approximate == "tanh" else "gelu"
    return _MODULES.get(type(activation))


_MODULES: dict[type, str] = {nn.SiLU: "silu", nn.ReLU: "relu"}
_FUNCTIONS: dict[Callable, str] = {
    functional.silu: "silu",
    functional.gelu: "gelu",
    functional.relu: "relu",
    torch.relu: "relu",
}
