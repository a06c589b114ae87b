"""The frozen module under a layer: what of it can be read, and where its adapters live."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moelora_kernels.config import MoeLoraConfig
from moelora_kernels.functional import is_autocast


def is_plain_linear(module: nn.Module | None) -> bool:
    """Whether a module is its weight and bias and nothing else: no hooks, no forward of its own."""
    return (
        type(module) is nn.Linear
        and "forward" not in module.__dict__
        and not (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
        )
    )


def missing_size(module: nn.Module) -> str | None:
    """Which of in_features and out_features a module lacks to be the base of a layer."""
    for name in ("in_features", "out_features"):
        if not isinstance(getattr(module, name, None), int):
            return name
    return None


def adapter_place(base: nn.Module, config: MoeLoraConfig) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of A, B and router on top of `base`."""
    tensors = [*base.parameters(), *base.buffers()]
    device = tensors[0].device if tensors else torch.get_default_device()
    if config.adapter_dtype is not None:
        return device, getattr(torch, config.adapter_dtype)
    weight = float_weight(base)
    return device, torch.float32 if weight is None else weight.dtype


def float_weight(base: nn.Module) -> Tensor | None:
    """The base's weight where its dtype is one to compute in; None for quantised bases."""
    weight = getattr(base, "weight", None)
    is_float = isinstance(weight, Tensor) and weight.is_floating_point() and weight.itemsize > 1
    return weight if is_float else None


def dense_weight(base: nn.Module) -> Tensor | None:
    """The weight of a plain nn.Linear that holds a plain tensor; None for every other base."""
    if not is_plain_linear(base):
        return None
    weight = base.weight
    return weight if type(weight) in (nn.Parameter, Tensor) else None


def check_called(base: nn.Module, x: Tensor) -> None:
    """Raise where a plain base would refuse x, by name instead of as an operand of a product."""
    weight = dense_weight(base)
    if weight is None:
        return
    if weight.device != x.device:
        raise ValueError(f"x: expected the base's device {weight.device}, got {x.device}")
    if weight.dtype != x.dtype and not is_autocast(x.device):
        raise TypeError(f"x: expected the base's dtype {weight.dtype}, got {x.dtype}")


def linear_with(linear: nn.Linear, weight: Tensor) -> nn.Linear:
    """A frozen nn.Linear with another weight and the bias of `linear`."""
    other = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    other.weight = nn.Parameter(weight, requires_grad=False)
    other.bias = linear.bias
    return other.train(linear.training)
