"""Which sample does a token belong to? The gate row of each token.

Gates of tasks and of sequences have one row per sample. A layer finds the row of a token like this:

    x [B, L, I]        row b of x is sample b; [L, B, I] with batch_dim=1
    x [T, I]           T must be the number of samples: a 2-D x says nothing else
    anything else      `set_samples` says it, or `set_tasks` on a part of the model
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

FLAT = "flat"


class Samples(NamedTuple):
    """The sample of each token, or of each row of x."""

    ids: Tensor  # int32, [T], [B, L] or [B]; below 0: the token belongs to no sample
    count: int  # the number of samples: the largest id + 1


def sample_of_tokens(
    x_shape: Sequence[int],
    count: int,
    batch_dim: int,
    samples: Samples | str | None,
    device: torch.device,
    name: str,
    kind: str = "gate rows",
) -> Tensor:
    """Return the sample of each token, [T] int32, if there are `count` samples.

    Args:
        x_shape: [..., I], the shape of x.
        count: the number of samples: task ids, gates or sequences.
        batch_dim: the dimension of x [B, L, I] that counts samples.
        samples: see `set_samples`.
        device: the device of the result.
        name: the argument that an error names.
        kind: what there are `count` of, for the error.

    Raises:
        ValueError: the shape does not tell the samples, and `samples` does not fit it.
    """
    tokens = math.prod(x_shape[:-1])
    is_batched = len(x_shape) > 2
    rows = x_shape[batch_dim] if is_batched else tokens
    inner = math.prod(x_shape[batch_dim + 1 : -1]) if is_batched else 1
    if isinstance(samples, Samples):
        if samples.count > count != 1:
            raise ValueError(
                f"samples: {samples.count} samples, but {name} has {count} rows; call set_samples "
                "and set_tasks for the same batch"
            )
        # One row is for all samples.
        ids = samples.ids.to(device) if count > 1 else samples.ids.to(device).clamp_max(0)
        if is_batched and ids.shape == (rows,):
            return ids[torch.arange(tokens, device=device) // inner % rows]
        if ids.numel() == tokens:
            if batch_dim == 1 and len(x_shape) == 3 and ids.dim() == 2:
                ids = ids.t()
            return ids.reshape(-1)
        raise ValueError(
            f"samples: {[*ids.shape]} for x {[*x_shape]}; expected one number for each of its "
            f"{tokens} tokens"
        )
    if samples == FLAT and not is_batched and batch_dim == 0 and tokens % count == 0:
        return torch.arange(tokens, device=device, dtype=torch.int32) // (tokens // count)
    if count != rows:
        raise ValueError(_mismatch(f"{name}: {count} {kind}", count, x_shape, batch_dim))
    return torch.arange(tokens, device=device, dtype=torch.int32) // inner % count


def _mismatch(start: str, count: int, x_shape: Sequence[int], batch_dim: int) -> str:
    """Return the text of the error for a number of samples that x does not have."""
    text = f"{start} for x {[*x_shape]}; "
    if len(x_shape) < 3:
        return text + (
            "expected one for all, or one per row. If the model has flattened [batch, sequence, "
            "features], call set_samples(model, 'flat'); if not, set_samples(model, samples) with "
            "the sample of each token"
        )
    rows = x_shape[batch_dim]
    text += (
        "expected one for all, one per token (router='external' only), or one per sequence "
        f"({rows}: dimension {batch_dim} of x, because batch_dim={batch_dim})"
    )
    if rows == 1:
        text += (
            ". If the samples are packed into the row, call set_samples(model, samples) with the "
            "sample of each token; if the row does not depend on the samples (embeddings of "
            "positions), leave this linear out of target_modules"
        )
    elif rows and count % rows == 0:
        text += (
            ". If the ids are repeated for beams or images, this part of the model has one row for "
            "each sample: call set_tasks on it with the ids before the repeat"
        )
    elif rows and rows % count == 0:
        n = rows // count
        text += (
            f". If each sample has {n} rows here, call set_tasks on this part of the model with "
            f"ids.repeat_interleave({n}) if they are neighbours (beams, images), or with "
            f"ids.repeat({n}) if the batch is repeated as a whole (chosen, rejected)"
        )
    return text


def mean_of_samples(
    x: Tensor, tokens: Tensor, batch_dim: int, samples: Samples | str | None
) -> Tensor:
    """Return the mean token of each sequence, [B, I]; 0 for a sequence without tokens.

    Args:
        x: [..., I], the input of the layer.
        tokens: [T, I], x in the dtype the layer computes in.
        batch_dim: the dimension of x [B, L, I] that counts sequences.
        samples: see `set_samples`.

    Raises:
        ValueError: a 2-D x does not tell its sequences, or `samples` does not fit x.
    """
    if isinstance(samples, Samples):
        ids = sample_of_tokens(x.shape, samples.count, batch_dim, samples, x.device, "samples")
        float32_tokens = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        # A product instead of index_add, whose order of sums is not fixed on a GPU.
        member = (ids == torch.arange(samples.count, device=x.device)[:, None]).to(
            float32_tokens.dtype
        )
        mean = member @ float32_tokens / member.sum(dim=1, keepdim=True).clamp_min(1)
        return mean.to(tokens.dtype)
    if x.dim() > 2:
        sequences = x.movedim(batch_dim, 0).flatten(1, -2)
    elif tokens.shape[0] < 2:
        sequences = tokens[None]
    else:
        raise ValueError(
            f"x: expected [batch, sequence, {x.shape[-1]}] for granularity='sequence', got "
            f"{[*x.shape]}, whose tokens may belong to several sequences; pass x[None] for one "
            "sequence, or call set_samples(model, samples) with the sample of each token"
        )
    # The mean over zero positions is 0, not 0 / 0.
    return sequences.mean(dim=1) if sequences.shape[1] else sequences.sum(dim=1)
