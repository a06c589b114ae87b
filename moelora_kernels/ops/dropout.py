"""Dropout with a mask that is computed from a seed, so that it is never stored."""

from __future__ import annotations

import torch
from torch import Tensor

from moelora_kernels import reference
from moelora_kernels.ops.registration import register, register_kernels


def _fake(x: Tensor, p: float, seed: Tensor, stream: int) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


_op = register(
    "dropout",
    ("Tensor x", "float p", "Tensor seed", "int stream"),
    "Tensor",
    reference.dropout,
    _fake,
)
register_kernels("dropout")


def dropout(x: Tensor, p: float, seed: Tensor, stream: int = 0) -> Tensor:
    """Drop elements of x and scale the others.

        y = x (.) mask / keep_probability(p)        mask a function of (seed, stream, position)

    Args:
        x: [T, I].
        p: probability that an element is dropped, in [0, 1), rounded to a multiple of 2^-16.
        seed: one int64.
        stream: the index of the mask; one seed gives a different mask for every stream.

    Returns:
        y [T, I], x's dtype.
    """
    return _op(x, p, seed, stream)
