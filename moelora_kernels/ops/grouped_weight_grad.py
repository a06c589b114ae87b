"""The gradients of A and B as sums over the pairs of each expert."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moelora_kernels import reference
from moelora_kernels.ops.registration import register, register_kernels
from moelora_kernels.types import Dropout, Routing


def grouped_weight_grad_fake(
    x: Tensor,
    dh: Tensor,
    dy: Sequence[Tensor],
    u: Tensor,
    routing: Routing,
    ranks: Sequence[int],
    dropout: Dropout,
    lora_dtype: torch.dtype,
    frozen: Sequence[int] = (),
) -> tuple[Tensor, list[Tensor]]:
    """Return tensors of the shapes and dtypes that `grouped_weight_grad` returns."""
    R = sum(ranks)
    da = x.new_empty((len(dy) * R, x.shape[1]), dtype=lora_dtype)
    return da, [x.new_empty((g.shape[1], R), dtype=lora_dtype) for g in dy]


_op = register(
    "grouped_weight_grad",
    (
        "Tensor x",
        "Tensor dh",
        "Tensor[] dy",
        "Tensor u",
        Routing,
        "int[] ranks",
        Dropout,
        "ScalarType lora_dtype",
        "int[] frozen",
    ),
    "(Tensor da, Tensor[] db)",
    reference.grouped_weight_grad,
    grouped_weight_grad_fake,
)
register_kernels("grouped_weight_grad")


def grouped_weight_grad(
    x: Tensor,
    dh: Tensor,
    dy: Sequence[Tensor],
    u: Tensor,
    routing: Routing,
    ranks: Sequence[int],
    dropout: Dropout,
    lora_dtype: torch.dtype,
    frozen: Sequence[int] = (),
) -> tuple[Tensor, list[Tensor]]:
    """Compute dA and dB of every expert; exact zeros for an expert without pairs, or frozen.

        dA_e = sum_p dh_p^T dropout(x_p)        dB_e = sum_p dy_p^T u_p

    Args:
        x: [T, I] or [P, I].
        dh, u: [P, largest rank], in the order of sorted positions.
        dy: n x [T, O_i], or one [P, O].
        routing: the routing of the gate's experts.
        ranks: the ranks of the E experts.
        dropout: the dropout of the forward. Its masks are computed again from the seed.
        lora_dtype: the dtype of the results.
        frozen: experts, 0 to E - 1, whose pairs are skipped.

    Returns:
        dA [n R, I] and n x dB_i [O_i, R].
    """
    return _op(x, dh, dy, u, *routing, ranks, *dropout, lora_dtype, frozen)
