"""update_balance: the optimizer step of loss-free balancing."""

from __future__ import annotations

import torch
from torch import nn

from moelora_kernels.nn.layer import mixture_layers
from moelora_kernels.nn.routers import Balance, BalancedRouter


@torch.no_grad()
def update_balance(model: nn.Module) -> None:
    """Update the selection bias of every expert of `model` from its load, and reset the loads.

        bias_e += balance_rate * sign(mean load - load_e)

    load_e counts how often e was selected in the training forwards since the last call. Call it
    once per optimizer step, next to `optimizer.step()`. It works with gradient accumulation and
    with activation checkpointing. With data parallelism every rank counts its local tokens, so sum
    the loads first:

        for balance in balances(model):
            torch.distributed.all_reduce(balance.load)

    Raises:
        ValueError: no layer has a `balance_rate`.
        RuntimeError: a layer had no training forward since the last call.

    Example:
        >>> import torch
        >>> from moelora_kernels import MoeLoraConfig, MoeLoraLinear, update_balance
        >>> config = MoeLoraConfig(num_experts=4, rank=2, top_k=2, balance_rate=0.01)
        >>> layer = MoeLoraLinear(16, 32, config=config)
        >>> y = layer(torch.randn(3, 16))
        >>> update_balance(layer)
        >>> layer.router.balance.bias.shape
        torch.Size([4])

    Source: arXiv 2408.15664.
    """
    rates = balances(model)
    if not rates:
        raise ValueError("model: no layer has a balance_rate")
    if any(balance.load is None for balance in rates):
        raise RuntimeError("no load to balance: run a training forward first")
    for balance, rate in rates.items():
        balance.bias += ((balance.load.mean() - balance.load).sign() * rate).to(balance.bias)
        balance.load = None


def balances(model: nn.Module) -> dict[Balance, float]:
    """Return every Balance of `model` with its rate; in a PeftModel, of the active adapters."""
    return {
        layer.router.balance: layer.config.balance_rate
        for layer in mixture_layers(model)
        if layer.is_selected and isinstance(layer.router, BalancedRouter)
    }
