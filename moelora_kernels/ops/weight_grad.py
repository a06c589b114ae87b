"""The gradients of A, B and linear routers: products that sum over the tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moelora_kernels import reference
from moelora_kernels.ops.registration import register, register_kernels
from moelora_kernels.types import Dropout, WeightGrads


def weight_grad_fake(
    x: Tensor,
    dh: Tensor,
    dlogits: Tensor | None,
    dy: Sequence[Tensor],
    u: Tensor,
    ranks: Sequence[int],
    dropout: Dropout,
    lora_dtype: torch.dtype,
    router_dtype: torch.dtype,
) -> WeightGrads:
    """Return tensors of the shapes and dtypes that `weight_grad` returns."""
    R = u.shape[1] // len(dy)
    num_logits = 0 if dlogits is None else dlogits.shape[1]
    return WeightGrads(
        x.new_empty((dh.shape[1], x.shape[1]), dtype=lora_dtype),
        x.new_empty((num_logits, x.shape[1]) if num_logits else 0, dtype=router_dtype),
        x.new_empty(num_logits, dtype=router_dtype),
        [x.new_empty((g.shape[1], R), dtype=lora_dtype) for g in dy],
    )


_op = register(
    "weight_grad",
    (
        "Tensor x",
        "Tensor dh",
        "Tensor? dlogits",
        "Tensor[] dy",
        "Tensor u",
        "int[] ranks",
        Dropout,
        "ScalarType lora_dtype",
        "ScalarType router_dtype",
    ),
    "(Tensor da, Tensor drouter, Tensor dbias, Tensor[] db)",
    reference.weight_grad,
    weight_grad_fake,
)
register_kernels("weight_grad")


def weight_grad(
    x: Tensor,
    dh: Tensor,
    dlogits: Tensor | None,
    dy: Sequence[Tensor],
    u: Tensor,
    ranks: Sequence[int],
    dropout: Dropout,
    lora_dtype: torch.dtype,
    router_dtype: torch.dtype,
) -> WeightGrads:
    """Compute the gradients of the parameters of n siblings.

        dA = dh^T dropout(x)        [n R, I]        dB_i = dy_i^T u_i       [O_i, R]
        dWr = dlogits^T x           [n E, I]        dbr = sum_t dlogits     [n E]

    Args:
        x: [T, I].
        dh: [T, n R]; [T, n r] if the experts share A.
        dlogits: [T, n E], or None without routers: dWr and dbr are then empty.
        dy: n x [T, O_i].
        u: [T, n R].
        ranks: the ranks of the E experts.
        dropout: the dropout of the forward. Its masks are computed again from the seed.
        lora_dtype: the dtype of dA and dB.
        router_dtype: the dtype of dWr and dbr.
    """
    return WeightGrads(*_op(x, dh, dlogits, dy, u, ranks, *dropout, lora_dtype, router_dtype))
