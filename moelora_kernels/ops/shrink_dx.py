"""The rank-space part of dx: products only, so ATen serves every device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moelora_kernels import reference
from moelora_kernels.ops.dropout import dropout
from moelora_kernels.ops.registration import register

_SCHEMA = (
    "(Tensor dh, Tensor? dlogits, Tensor[] lora_a, Tensor[] router_weight, int[] ranks, "
    "float dropout, bool dropout_per_expert, Tensor? seed) -> Tensor"
)


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat([*tensors])


def _products(dh, dlogits, lora_a, router_weight, ranks, p, dropout_per_expert, seed) -> Tensor:
    a = [t.to(dh.dtype) for t in lora_a]
    routers = [t.to(dh.dtype) for t in router_weight]
    if dlogits is not None:
        dlogits = dlogits.to(dh.dtype)
    if p > 0.0:
        dx = _dropped(dh, a, ranks, p, dropout_per_expert, seed)
        return dx if dlogits is None else dx.addmm_(dlogits, _stack(routers))
    if dlogits is None:
        left, right = dh, a
    else:
        left, right = torch.cat([dh, dlogits], dim=1), [*a, *routers]
    # One product over all rows of A and the routers, unless copying those rows side by side costs
    # more than the passes over dx that it saves.
    if left.shape[0] >= left.shape[1]:
        return left @ _stack(right)
    columns = left.split([rows.shape[0] for rows in right], dim=1)
    dx = columns[0] @ right[0]
    for column, rows in zip(columns[1:], right[1:], strict=True):
        dx.addmm_(column, rows)
    return dx


def _dropped(dh, a, ranks, p, dropout_per_expert, seed) -> Tensor:
    """dropout(dh A): the masks of the forward, regenerated from its seed."""
    if not dropout_per_expert:
        return dropout(dh @ _stack(a), p, seed, 0)
    columns = dh.split([*ranks] * len(a), dim=1)
    rows = _stack(a).split([*ranks] * len(a))
    parts = [
        dropout(column @ row, p, seed, i % len(ranks))
        for i, (column, row) in enumerate(zip(columns, rows, strict=True))
    ]
    return torch.stack(parts).sum(dim=0)


def _fake(dh, dlogits, lora_a, router_weight, ranks, p, dropout_per_expert, seed) -> Tensor:
    return dh.new_empty((dh.shape[0], lora_a[0].shape[1]))


shrink_dx = register("shrink_dx", _SCHEMA, _products, _fake)
shrink_dx.__doc__ = reference.shrink_dx.__doc__
