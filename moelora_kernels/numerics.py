"""The dtype and the state in which a layer computes; the seed and rate of its dropout mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of sums over `tensor`'s values: float32, or float64 for float64 tensors."""
    return torch.promote_types(tensor.dtype, torch.float32)


def absent(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an empty tensor: ops return it for an output that they do not compute."""
    return like.new_empty(0, dtype=dtype)


def cast_all(matrices: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """Return every matrix in its dtype. If all copies have one dtype, they are one launch."""
    results = [
        matrix if matrix.dtype == dtype else torch.empty_like(matrix, dtype=dtype)
        for matrix, dtype in zip(matrices, dtypes, strict=True)
    ]
    pairs = [(r, m) for r, m in zip(results, matrices, strict=True) if r is not m]
    if pairs:
        torch._foreach_copy_([r for r, _ in pairs], [m for _, m in pairs])
    return results


def host_tensor(values: Any) -> Tensor:
    """Return `values` itself if it is a tensor, else a new tensor on the CPU.

    torch.as_tensor without a device makes the tensor on torch's default device, or moves it there.
    """
    return values if isinstance(values, Tensor) else torch.as_tensor(values, device="cpu")


def is_autocast(device: torch.device) -> bool:
    """Return whether autocast is on for tensors of `device`. The meta device has no autocast."""
    # This check takes a fifth of the time of the next, and most forwards run without autocast.
    if not torch._C._is_any_autocast_enabled():
        return False
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def is_backward() -> bool:
    """Return whether backward is running. False in compiled graphs."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def active_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype a layer computes in: autocast's if it is on (not for float64), else x's."""
    if not torch._C._is_any_autocast_enabled():
        return x.dtype
    if is_autocast(x.device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def dropout_seed(p: float, seed: int | Tensor | None, device: torch.device) -> Tensor | None:
    """Return the seed of a forward's dropout mask as one int64 on `device`; None if p is 0.

    If `seed` is None, the seed is drawn from torch's generator. The same `torch.manual_seed` then
    gives the same mask. Activation checkpointing restores the generator before it recomputes, so it
    gets the same mask too.

    Raises:
        TypeError: p is not a number, or seed is not an int or a tensor with one int64.
        ValueError: p is outside [0, 1).
    """
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        raise TypeError(f"dropout: expected a number, got {p!r}")
    if not 0.0 <= p < 1.0:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {p}")
    if p == 0.0:
        return None
    if seed is None:
        return torch.randint(0, 2**62, (1,), device=device)
    if not isinstance(seed, (int, Tensor)) or isinstance(seed, bool):
        raise TypeError(f"seed: expected an int or one int64, got {seed!r}")
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.numel() != 1:
            raise TypeError(f"seed: expected one int64, got {seed.dtype} {[*seed.shape]}")
        return seed.to(device)
    return torch.tensor([seed], dtype=torch.int64, device=device)


def dropout_threshold(p: float) -> int:
    """Return how many of the 2^16 random numbers of a mask drop an element: p 2^16, rounded.

    If p is not 0, the result is at least 1, so that a small p never switches dropout off, and at
    most 2^16 - 1.
    """
    return 0 if p == 0.0 else min(max(round(p * 2**16), 1), 2**16 - 1)


def keep_probability(p: float) -> float:
    """Return the probability that a mask keeps an element: 1 - dropout_threshold(p) / 2^16.

    It differs from 1 - p by at most 2^-17, except for p within 2^-17 of 0 or 1. Dropout divides by
    it, not by 1 - p, so that the mean of dropout(x) over all seeds is x. It is exact in float32.
    """
    return 1.0 - dropout_threshold(p) / 2**16
