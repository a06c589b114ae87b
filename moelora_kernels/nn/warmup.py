"""warmup: compile the kernels of a model before a CUDA graph or a measurement starts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from moelora_kernels.nn.balance import balances
from moelora_kernels.nn.forward import forward_siblings
from moelora_kernels.nn.group import MoeLoraGroup
from moelora_kernels.nn.layer import MixtureLayer
from moelora_kernels.nn.recorded_forwards import kept_records


def warmup(model: nn.Module, tokens: Sequence[int] = (1,), *, batch: int = 1) -> None:
    """Run every mixture layer of `model` forward and backward on zeros, once per token count.

    The first launch of a kernel compiles it and copies small tables to the device. Neither is
    possible while a CUDA graph is captured. The layers run in their current mode (training or
    evaluation) and under the active autocast. Gradients of parameters, random generators, routing
    records and counted loads do not change.

    Args:
        model: a model, a layer or a group. With task gates or external gates, call `set_tasks`
            first.
        tokens: the tokens per sequence to compile for.
        batch: sequences per call.

    Raises:
        ValueError: the model has no mixture layer; tokens or batch are below 1; or external gates
            are not set.
        RuntimeError: tasks are not set.

    Example:
        >>> from moelora_kernels import MoeLoraLinear, warmup
        >>> warmup(MoeLoraLinear(16, 32, num_experts=4, rank=2), tokens=(1, 8))
    """
    if not tokens or min(tokens) < 1 or batch < 1:
        raise ValueError(f"tokens: expected counts from 1, got {tokens} with batch {batch}")
    groups = list(_groups(model))
    if not groups:
        raise ValueError("model: expected a model with mixture layers, got none")
    layers = [layer for group in groups for layer in group]
    loads = [(balance, balance.load) for balance in balances(model)]
    all_devices = {layer.first_tensor().device for layer in layers}
    devices = {device for device in all_devices if device.type == "cuda"}
    with torch.random.fork_rng(list(devices)), kept_records(layers):
        for group in groups:
            for count in tokens:
                _run(group, batch, count)
    for balance, load in loads:
        balance.load = load


def _groups(model: nn.Module) -> Iterator[tuple[MixtureLayer, ...]]:
    """Yield the layers that run together: the siblings of a group or a link, else one layer."""
    yielded: set[nn.Module] = set()
    modules = list(model.modules())
    for module in modules:
        if isinstance(module, MoeLoraGroup):
            siblings = tuple(module.children())
            yielded.update(siblings)
            yield siblings
    for layer in modules:
        if isinstance(layer, MixtureLayer) and layer.is_running and layer not in yielded:
            link = getattr(layer, "link", None)
            siblings = (layer,) if link is None else link.layers
            yielded.update(siblings)
            yield siblings


def _run(group: tuple[MixtureLayer, ...], batch: int, tokens: int) -> None:
    """Run one group forward and backward on zeros."""
    first = group[0]
    features, dtype = first.input_like()
    sizes = (tokens, batch) if first.config.batch_dim == 1 else (batch, tokens)
    # Zeros on the device of A, because the weight of an offloaded base may be on another device.
    device = first.first_tensor().device
    x = torch.zeros(*sizes, features, dtype=dtype, device=device)
    with torch.enable_grad():
        x.requires_grad_()
        outputs = [first(x)] if len(group) == 1 else forward_siblings(group, x)
        trained = {p for layer in group for p in layer.parameters() if p.requires_grad}
        gradients = [torch.zeros_like(y) for y in outputs]
        torch.autograd.grad(outputs, [x, *trained], gradients, allow_unused=True)
