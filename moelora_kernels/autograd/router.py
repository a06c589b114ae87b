"""The autograd Function of a linear router alone."""

from __future__ import annotations

import torch

from moelora_kernels import ops
from moelora_kernels.types import RouterTensors


class RouterLogits(torch.autograd.Function):
    """Compute logits = x Wrt + br of one linear router, [T, E] in the compute dtype.

    Saves x in its own dtype, so that no float32 copy of x is kept for backward.
    """

    @staticmethod
    def forward(x, weight, bias):
        return ops.router_logits(x, RouterTensors([weight], [] if bias is None else [bias]))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dlogits):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        dx = dweight = dbias = None
        if needs_x:
            dx = dlogits.to(x.dtype) @ weight.to(x.dtype)
        if needs_weight or needs_bias:
            dweight, dbias = ops.router_grad(dlogits.contiguous(), x, weight.dtype)
        return dx, dweight, dbias if needs_bias else None
