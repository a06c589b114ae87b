"""Logits in float32, also under autocast."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moelora_kernels.nn.base_linear import dense_weight, float_weight
from moelora_kernels.numerics import is_autocast


def float32_linear(x: Tensor, linear: nn.Linear) -> Tensor:
    """Return x Wt + b in float32 (float64 for float64 x), also under autocast."""
    if not isinstance(linear.weight, Tensor):
        # torch.ao.quantization.quantize_dynamic replaced the nn.Linear. It computes in float32.
        return linear(x.float())
    if isinstance(linear, nn.Linear) and not linear._forward_pre_hooks:
        return float32_product(x, linear.weight, linear.bias)
    # Hooks, or a wrapper around the linear, compute or gather the weight before each call
    # (pruning, norms, FSDP2; FSDP1).
    x_cast = x.to(linear.weight.dtype)
    if is_autocast(x.device):
        with torch.autocast(x.device.type, enabled=False):
            y = linear(x_cast)
    else:
        y = linear(x_cast)
    return y.to(torch.promote_types(x.dtype, torch.float32))


def float32_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x weight^T + bias in float32 (float64 for float64 x), also under autocast."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    bias = None if bias is None else bias.to(dtype)
    if not is_autocast(x.device):
        return nn.functional.linear(x.to(dtype), weight.to(dtype), bias)
    with torch.autocast(x.device.type, enabled=False):
        return nn.functional.linear(x.to(dtype), weight.to(dtype), bias)


def router_logits(router: nn.Module, x: Tensor, *args: Tensor | None) -> Tensor:
    """Return the logits of a router that reads x. If it is an nn.Linear, they are in float32.

    args: the arguments after x of a TokenTaskRouter: the sample of each token, and the vectors.
    """
    if dense_weight(router) is not None:
        return float32_linear(x, router)
    weight = float_weight(router) if isinstance(router, nn.Linear) else None
    return router(x if weight is None else x.to(weight.dtype), *args)
