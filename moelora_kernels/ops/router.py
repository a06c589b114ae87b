"""A linear router on its own: its logits, and the gradients of its weight and bias."""

from __future__ import annotations

import torch
from torch import Tensor

from moelora_kernels import reference
from moelora_kernels.ops.registration import register, register_kernels


def _fake_logits(x: Tensor, router_weight: list[Tensor], router_bias: list[Tensor]) -> Tensor:
    experts = sum(w.shape[0] for w in router_weight)
    return x.new_empty((x.shape[0], experts), dtype=reference.compute_dtype(x))


def _fake_weight_grad(
    dlogits: Tensor, x: Tensor, router_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    experts = dlogits.shape[1]
    return (
        x.new_empty((experts, x.shape[1]), dtype=router_dtype),
        x.new_empty(experts, dtype=router_dtype),
    )


router_logits = register(
    "router_logits",
    "(Tensor x, Tensor[] router_weight, Tensor[] router_bias) -> Tensor",
    reference.router_logits,
    _fake_logits,
)
router_grad = register(
    "router_grad",
    "(Tensor dlogits, Tensor x, ScalarType router_dtype) -> (Tensor drouter, Tensor dbias)",
    reference.router_grad,
    _fake_weight_grad,
)
register_kernels("router_logits", "launch_logits", module="router")
register_kernels("router_grad", "launch_grad", module="router")
