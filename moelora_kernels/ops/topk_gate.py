"""Softmax, top-k, renormalise: from router logits to the weights of a gate, with the backward."""

from __future__ import annotations

import torch
from torch import Tensor

from moelora_kernels import reference
from moelora_kernels.numerics import compute_dtype
from moelora_kernels.ops.apply import apply
from moelora_kernels.ops.registration import register, register_kernels


def _fake_forward(
    logits: Tensor, top_k: int, renormalize: bool, temperature: float
) -> tuple[Tensor, Tensor]:
    shape = (logits.shape[0], top_k)
    return (
        logits.new_empty(shape, dtype=compute_dtype(logits)),
        logits.new_empty(shape, dtype=torch.int32),
    )


def _fake_backward(
    dweights: Tensor,
    weights: Tensor,
    experts: Tensor,
    logits: Tensor,
    renormalize: bool,
    temperature: float,
) -> Tensor:
    return torch.empty(logits.shape, dtype=compute_dtype(logits), device=logits.device)


_op = register(
    "topk_gate",
    ("Tensor logits", "int top_k", "bool renormalize", "float temperature"),
    "(Tensor weights, Tensor experts)",
    reference.topk_gate,
    _fake_forward,
)
_op_backward = register(
    "topk_gate_backward",
    (
        "Tensor dweights",
        "Tensor weights",
        "Tensor experts",
        "Tensor logits",
        "bool renormalize",
        "float temperature",
    ),
    "Tensor",
    reference.topk_gate_backward,
    _fake_backward,
)
register_kernels("topk_gate")
register_kernels("topk_gate_backward", "launch_backward", module="topk_gate")


class TopkGate(torch.autograd.Function):
    """`topk_gate` with its gradient; the expert ids have none."""

    @staticmethod
    def forward(logits: Tensor, top_k: int, renormalize: bool, temperature: float):
        return _op(logits, top_k, renormalize, temperature)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        logits, _, ctx.renormalize, ctx.temperature = inputs
        weights, experts = output
        ctx.mark_non_differentiable(experts)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, weights, experts)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dweights: Tensor | None, _):
        if dweights is None:
            return None, None, None, None
        logits, weights, experts = ctx.saved_tensors
        dlogits = _op_backward(
            dweights.contiguous(), weights, experts, logits, ctx.renormalize, ctx.temperature
        )
        return dlogits.to(logits.dtype), None, None, None


def topk_gate(
    logits: Tensor, top_k: int, renormalize: bool = True, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Apply softmax over the experts, keep the K largest, and renormalise them if requested.

        p = softmax(logits / temperature)
        weights_k = p[experts_k]        or, with renormalize, p[experts_k] / sum_j p[experts_j]

    If logits are equal, the lower expert comes first. With K = E, slot k is expert k.

    Args:
        logits: [G, E], any float dtype; computed in float32 (float64 for float64).
        top_k: K, from 1 to E.
        renormalize: divide by the sum of the kept probabilities.
        temperature: divides the logits, above 0.

    Returns:
        weights [G, K] float32 (float64), differentiable; experts [G, K] int32.

    Raises:
        ValueError: logits not 2-D, top_k outside [1, E], temperature not above 0.
    """
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ValueError(
            f"logits: expected a float tensor [G, E], got {logits.dtype} {[*logits.shape]}"
        )
    if not 1 <= top_k <= logits.shape[1]:
        raise ValueError(
            f"top_k: expected 1 to {logits.shape[1]} (the number of experts), got {top_k}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature: expected a number above 0, got {temperature}")
    return apply(TopkGate, logits, top_k, renormalize, float(temperature))


def topk_gate_backward(
    dweights: Tensor,
    weights: Tensor,
    experts: Tensor,
    logits: Tensor,
    renormalize: bool,
    temperature: float = 1.0,
) -> Tensor:
    """Compute dlogits from dweights.

        mean = sum_j weights_j dweights_j
        dlogits[experts_k] = weights_k (dweights_k - mean) / temperature     with renormalize
        dlogits_e = p_e (dweights_e - mean) / temperature                    without

    dweights_e is the entry of dweights whose expert is e; 0 if e was not kept.

    Args:
        dweights: [G, K], contiguous.
        weights, experts: [G, K], the results of `topk_gate`.
        logits: [G, E]; if renormalize, only their shape is read.
        renormalize, temperature: as in the forward.

    Returns:
        [G, E] in float32 (float64 for float64 logits).
    """
    return _op_backward(dweights, weights, experts, logits, renormalize, temperature)
