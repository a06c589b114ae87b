"""The frozen module under a layer: what of it can be read, and where its adapters live."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from moelora_kernels.config import MoeLoraConfig
from moelora_kernels.numerics import is_autocast


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


def state_without_graph(module: nn.Module, name: str) -> dict:
    """The state of a copy or pickle, where the tensor `name` has its values and not its graph."""
    held = module.__dict__[name]
    leaf = held is None or held.grad_fn is None
    return module.__dict__ | ({} if leaf else {name: held.detach()})


def adapter_device_dtype(
    base: nn.Module, config: MoeLoraConfig
) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of A, B and router on top of `base`.

    config.adapter_dtype, else the dtype of the base's weight, else (quantised bases) float32.
    """
    tensors = [*base.parameters(), *base.buffers()]
    device = tensors[0].device if tensors else torch.get_default_device()
    if device.type == "meta":
        device = _execution_device(base) or device
    if config.adapter_dtype is not None:
        return device, getattr(torch, config.adapter_dtype)
    weight = float_weight(base)
    return device, torch.float32 if weight is None else weight.dtype


def _execution_device(base: nn.Module) -> torch.device | None:
    """Where accelerate's hooks run a base whose weight they keep elsewhere; None without them."""
    hook = getattr(base, "_hf_hook", None)
    for part in getattr(hook, "hooks", [hook]):
        device = getattr(part, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return None


def float_weight(base: nn.Module) -> Tensor | None:
    """The base's weight where its dtype is one to compute in; None for quantised bases.

    Codes may be packed into floats (4 bits of bitsandbytes in bf16 storage): they are fewer than
    the elements of the weight. ZeRO-3 leaves a weight with none outside of its forward.
    """
    weight = getattr(base, "weight", None)
    is_float = isinstance(weight, Tensor) and weight.is_floating_point() and weight.itemsize > 1
    if is_float and not missing_size(base):
        is_float = weight.numel() in (0, base.in_features * base.out_features)
    return weight if is_float else None


def dense_weight(base: nn.Module) -> Tensor | None:
    """The weight of a plain nn.Linear that holds a plain tensor; None for every other base."""
    if not is_plain_linear(base):
        return None
    weight = base.weight
    return weight if type(weight) in (nn.Parameter, Tensor) else None


def check_input(
    x: Tensor, features: int, gates: Tensor | None, router: str | nn.Module | None
) -> None:
    """Raise where x is no float tensor [..., features], or gates come to a layer with a router."""
    if x.dim() < 1 or x.shape[-1] != features:
        raise ValueError(f"x: expected [..., {features}], got {[*x.shape]}")
    if not x.is_floating_point():
        raise TypeError(f"x: expected a float dtype, got {x.dtype}")
    if gates is not None and router != "external":
        raise ValueError(f"gates: only router='external' takes gates, got {router!r}")


def check_adapters(adapter: Tensor, x: Tensor) -> None:
    """Raise where A lies elsewhere than x: of one on the meta device y would be noise."""
    if adapter.device != x.device:
        raise ValueError(f"x: expected the adapters' device {adapter.device}, got {x.device}")


def call_base(base: nn.Module, x: Tensor, out_features: int) -> Tensor:
    """The base's output for x [..., I] as [T, O], in its own dtype; it is to be left as it is.

    Warns where x needs a gradient that the base does not give.

    Raises:
        ValueError: x lies on another device than a plain base, or the output is not [..., O].
        TypeError: a plain base has another dtype than x, or the output is no float tensor.
    """
    check_called(base, x)
    y = base(x)
    if not isinstance(y, Tensor) or not y.is_floating_point():
        given = y.dtype if isinstance(y, Tensor) else type(y)
        raise TypeError(f"base: expected {type(base)} to return a float tensor, got {given}")
    expected = [*x.shape[:-1], out_features]
    if [*y.shape] != expected:
        raise ValueError(f"base: expected {type(base)} to return {expected}, got {[*y.shape]}")
    if x.requires_grad and not y.requires_grad and torch.is_grad_enabled():
        _warn_without_gradient(base)
    return y.reshape(-1, out_features)


def _warn_without_gradient(base: nn.Module) -> None:
    if torch.compiler.is_compiling():
        return
    warnings.warn(
        f"base: {type(base)} returned an output without a gradient for an x that needs one: dx "
        "holds the experts' part alone, so the layers below train on a wrong gradient (a kernel "
        "for inference, or a base that was packed for it in evaluation)",
        stacklevel=2,
    )


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
