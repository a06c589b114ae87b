"""Softmax, top-k, renormalise: from router logits to routing weights, with its backward."""

from __future__ import annotations

import torch
from torch import Tensor

from moelora_kernels import reference
from moelora_kernels.ops.registration import register, register_kernels


def _fake_forward(
    logits: Tensor, top_k: int, renormalize: bool, temperature: float
) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], top_k)
    return (
        logits.new_empty(shape, dtype=reference.compute_dtype(logits)),
        logits.new_empty(shape, dtype=torch.int32),
    )


def _fake_backward(
    dweights: Tensor,
    weights: Tensor,
    indices: Tensor,
    logits: Tensor,
    renormalize: bool,
    temperature: float,
) -> Tensor:
    return torch.empty(logits.shape, dtype=reference.compute_dtype(logits), device=logits.device)


_forward = register(
    "topk_gate",
    "(Tensor logits, int top_k, bool renormalize, float temperature) -> (Tensor, Tensor)",
    reference.topk_gate,
    _fake_forward,
)
_backward = register(
    "topk_gate_backward",
    "(Tensor dweights, Tensor weights, Tensor indices, Tensor logits, bool renormalize, "
    "float temperature) -> Tensor",
    reference.topk_gate_backward,
    _fake_backward,
)
register_kernels("topk_gate")
register_kernels("topk_gate_backward", "launch_backward", module="topk_gate")


class TopkGate(torch.autograd.Function):
    """`topk_gate` with its gradient; the indices carry none."""

    @staticmethod
    def forward(logits: Tensor, top_k: int, renormalize: bool, temperature: float):
        return _forward(logits, top_k, renormalize, temperature)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        logits, _, ctx.renormalize, ctx.temperature = inputs
        weights, indices = output
        ctx.mark_non_differentiable(indices)
        ctx.save_for_backward(logits, weights, indices)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dweights: Tensor, _):
        logits, weights, indices = ctx.saved_tensors
        dlogits = _backward(
            dweights.contiguous(), weights, indices, logits, ctx.renormalize, ctx.temperature
        )
        return dlogits.to(logits.dtype), None, None, None


def topk_gate(
    logits: Tensor, top_k: int, renormalize: bool = True, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Softmax over the experts, the K largest kept, renormalised to sum 1 if asked.

        p = softmax(logits / temperature)
        weights_k = p[indices_k]        or, with renormalize, p[indices_k] / sum_j p[indices_j]

    Equal logits: the lower expert first. With K = E the experts stay in their own order.

    Args:
        logits: [N, E], any float dtype; computed in float32 (float64 for float64).
        top_k: K, from 1 to E.
        renormalize: divide by the sum of the kept probabilities.
        temperature: divides the logits, above 0.

    Returns:
        weights [N, K] float32 (float64), differentiable; indices [N, K] int32.

    Raises:
        ValueError: logits not 2-D, top_k outside [1, E], temperature not above 0.
    """
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(
            f"logits: expected a float tensor [N, E], got {logits.dtype} {[*logits.shape]}"
        )
    if not 1 <= top_k <= logits.shape[1]:
        raise ValueError(
            f"top_k: expected 1 to {logits.shape[1]} (the number of experts), got {top_k}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature: expected a number above 0, got {temperature}")
    return TopkGate.apply(logits, top_k, renormalize, float(temperature))
