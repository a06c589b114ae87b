"""Loss-free balancing: the step of the biases that selection sees and weights do not."""

from __future__ import annotations

import torch
from torch import nn

from moelora_kernels.nn.routers import BalancedRouter


@torch.no_grad()
def update_balance(model: nn.Module) -> None:
    """Move the selection bias of every expert of `model` against its load, and start counting anew.

        bias_e += balance_rate * sign(mean load - load_e)

    load_e: how often e was selected in the training forwards since the last call, so that calling
    it once per optimizer step, beside `optimizer.step()`, is right with gradient accumulation and
    activation checkpointing. Under data parallelism every rank counts its own tokens; sum first:

        for module in model.modules():
            if isinstance(module, BalancedRouter):
                torch.distributed.all_reduce(module.load)

    Raises:
        ValueError: no layer has a `balance_rate`.
        RuntimeError: a layer had no training forward since the last call.

    Source: arXiv 2408.15664.
    """
    layers = [m for m in model.modules() if isinstance(getattr(m, "router", None), BalancedRouter)]
    if not layers:
        raise ValueError("model: no layer has a balance_rate")
    if any(layer.router.load is None for layer in layers):
        raise RuntimeError("no load to balance: run a training forward first")
    for layer in layers:
        router = layer.router
        step = (router.load.mean() - router.load).sign() * layer.config.balance_rate
        router.balance_bias += step.to(router.balance_bias)
        router.load = None
