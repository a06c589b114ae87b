"""Wrappers of a model: torch.compile, data parallelism, FSDP."""

from __future__ import annotations

import sys

from torch import nn


def unwrap(model: nn.Module) -> nn.Module:
    """Return the model inside torch.compile's module, DataParallel, DDP and FSDP1.

    FSDP2 (`fully_shard`) changes the class of a model in place and wraps nothing.
    """
    while (inner := _wrapped(model)) is not None:
        model = inner
    return model


def _wrapped(model: nn.Module) -> nn.Module | None:
    """Return the module that `model` wraps, or None if it is no wrapper."""
    if "_orig_mod" in model._modules:
        return model._modules["_orig_mod"]
    wrappers: tuple[type, ...] = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    # A model that FSDP wraps has imported it.
    if (fsdp := sys.modules.get("torch.distributed.fsdp")) is not None:
        wrappers += (fsdp.FullyShardedDataParallel,)
    return model.module if isinstance(model, wrappers) else None
