"""Loss-free balancing: the step of the biases that selection sees and weights do not."""

from __future__ import annotations

import torch
from torch import nn

from moelora_kernels.nn.layer import mixture_layers
from moelora_kernels.nn.routers import Balance, BalancedRouter


@torch.no_grad()
def update_balance(model: nn.Module) -> None:
    """Move the selection bias of every expert of `model` against its load, and start counting anew.

        bias_e += balance_rate * sign(mean load - load_e)

    load_e: how often e was selected in the training forwards since the last call, so that calling
    it once per optimizer step, beside `optimizer.step()`, is right with gradient accumulation and
    activation checkpointing. Under data parallelism every rank counts its own tokens; sum first:

        for balance in balances(model):
            torch.distributed.all_reduce(balance.load)

    Raises:
        ValueError: no layer has a `balance_rate`.
        RuntimeError: a layer had no training forward since the last call.

    Source: arXiv 2408.15664.
    """
    found = balances(model)
    if not found:
        raise ValueError("model: no layer has a balance_rate")
    if any(balance.load is None for balance in found):
        raise RuntimeError("no load to balance: run a training forward first")
    for balance, rate in found.items():
        balance.bias += ((balance.load.mean() - balance.load).sign() * rate).to(balance.bias)
        balance.load = None


def balances(model: nn.Module) -> dict[Balance, float]:
    """Every balance in `model` (of active adapters in a PeftModel), and its rate."""
    return {
        layer.router.balance: layer.config.balance_rate
        for layer in mixture_layers(model)
        if layer.is_selected and isinstance(layer.router, BalancedRouter)
    }
