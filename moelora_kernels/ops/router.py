"""Linear routers without a layer: the logits, and the gradients of the weights and biases."""

from __future__ import annotations

import torch
from torch import Tensor

from moelora_kernels import reference
from moelora_kernels.numerics import compute_dtype
from moelora_kernels.ops.registration import register, register_kernels
from moelora_kernels.types import RouterTensors


def _fake_logits(x: Tensor, router: RouterTensors) -> Tensor:
    num_logits = sum(w.shape[0] for w in router.weight)
    return x.new_empty((x.shape[0], num_logits), dtype=compute_dtype(x))


def _fake_grad(dlogits: Tensor, x: Tensor, router_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    num_logits = dlogits.shape[1]
    return (
        x.new_empty((num_logits, x.shape[1]), dtype=router_dtype),
        x.new_empty(num_logits, dtype=router_dtype),
    )


_op_logits = register(
    "router_logits", ("Tensor x", RouterTensors), "Tensor", reference.router_logits, _fake_logits
)
_op_grad = register(
    "router_grad",
    ("Tensor dlogits", "Tensor x", "ScalarType router_dtype"),
    "(Tensor drouter, Tensor dbias)",
    reference.router_grad,
    _fake_grad,
)
register_kernels("router_logits", "launch_logits", module="router")
register_kernels("router_grad", "launch_grad", module="router")


def router_logits(x: Tensor, router: RouterTensors) -> Tensor:
    """Compute the logits x Wrt + br of n linear routers.

    Args:
        x: [T, I].
        router: weights n x [E, I]; biases n x [E], or an empty list.

    Returns:
        [T, n E] in float32 (float64 for float64 x).
    """
    return _op_logits(x, *router)


def router_grad(dlogits: Tensor, x: Tensor, router_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Compute the gradients of n linear routers: dWr = dlogits^T x and dbr = sum_t dlogits.

    Args:
        dlogits: [T, n E], contiguous.
        x: [T, I].
        router_dtype: the dtype of the results.

    Returns:
        dWr [n E, I], dbr [n E].
    """
    return _op_grad(dlogits, x, router_dtype)
