"""The forward of n siblings: layers that read the same x."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moelora_kernels.functional import run_layer
from moelora_kernels.nn.base_linear import call_base, check_adapters, check_input, dense_weight
from moelora_kernels.nn.gates import (
    add_shared_expert,
    external_gates,
    gate_of_logits,
    rows_of_gates,
)
from moelora_kernels.nn.merge import forward_merged
from moelora_kernels.nn.routers import layer_logits
from moelora_kernels.numerics import active_dtype, dropout_seed
from moelora_kernels.types import NO_DROPOUT, Dropout, Gate, LinearTensors


def _is_fused(layer: nn.Module) -> bool:
    """Whether the router's logits come out of the shrink: a bare linear router with a topk_gate."""
    return (
        layer._fusable
        and dense_weight(layer.router) is not None
        and not (layer.training and layer.config.noise > 0)
    )


def forward_siblings(
    layers: Sequence[nn.Module], x: Tensor, gates: Tensor | None = None
) -> list[Tensor]:
    """The outputs of layers that read the same x and share their options, in one pass over x."""
    first = layers[0]
    config = first.config
    if config.rank_activation is not None:
        raise ValueError("siblings: a MoeLoraAdapter runs alone, it reads what its base returns")
    check_input(x, first.in_features, gates, config.router)
    if any(layer.merged for layer in layers):
        if len(layers) == 1:
            return [forward_merged(first, x, gates)]
        return [forward_siblings((layer,), x, gates)[0] for layer in layers]
    dtype = active_dtype(x)
    tokens = x if x.dim() == 2 else x.reshape(-1, first.in_features)
    tokens = tokens if tokens.dtype == dtype else tokens.to(dtype)
    fused = all(_is_fused(layer) for layer in layers)
    read = all(_is_read(layer.base_layer, tokens) for layer in layers) and (
        len(layers) == 1 or len({layer.bias is None for layer in layers}) == 1
    )
    linears = [_sibling(layer, x, read, fused) for layer in layers]
    mixture, dropout = first._fused_mixture if fused else first._mixture, NO_DROPOUT
    if config.dropout > 0.0 and first.training:
        seed = dropout_seed(config.dropout, None, x.device)
        dropout = Dropout(config.dropout, config.dropout_mask == "per_expert", seed)
    gate = None if fused else gates_of(layers, x, tokens, gates)
    outputs, gate = run_layer(
        mixture, tokens, linears, gate, dropout, config.impl, sqrt_gate=config.grad_gate == "sqrt"
    )
    if config.aux or any(layer.record.wanted for layer in layers):
        keep_routing(layers, gate)
    return outputs if x.dim() == 2 else [y.view(*x.shape[:-1], y.shape[-1]) for y in outputs]


def _is_read(base: nn.Module, tokens: Tensor) -> bool:
    """Whether `base` is a plain dense nn.Linear, of the dtype and device of the layer's input."""
    weight = dense_weight(base)
    return weight is not None and weight.dtype == tokens.dtype and weight.device == tokens.device


def _sibling(layer: nn.Module, x: Tensor, read: bool, fused: bool) -> LinearTensors:
    """The tensors of a layer; a base that is not to be read is called."""
    base, router = layer.base_layer, layer.router
    weight = bias = output = router_weight = router_bias = None
    if read:
        weight, bias = base.weight, base.bias
    else:
        output = call_base(base, x, layer.out_features)
    check_adapters(layer.lora_A, x)
    if fused:
        router_weight, router_bias = router.weight, router.bias
    return LinearTensors(
        weight, bias, output, layer.lora_A, layer.lora_B, router_weight, router_bias
    )


def gates_of(layers: Sequence[nn.Module], x: Tensor, tokens: Tensor, gates: Tensor | None) -> Gate:
    """The gate of all siblings side by side, with the logits of their routers."""
    config = layers[0].config
    parts: list[tuple[Tensor, Tensor | None]] = []
    all_logits = []
    for layer in layers:
        logits, own = None, gates if gates is not None else layer.external_gates
        if config.router is None:
            gate = (x.new_ones((1, config.num_experts), dtype=torch.float32), None)
        elif config.router == "external":
            gate = external_gates(own, config.num_experts), None
        else:
            logits = layer_logits(layer, x, tokens)
            gate = gate_of_logits(logits, config, layer.training, layer.router)
            all_logits.append(logits)
        parts.append(add_shared_expert(*gate, config))
    weights = torch.cat([w for w, _ in parts], dim=1) if len(parts) > 1 else parts[0][0]
    indices = None
    if parts[0][1] is not None:
        indices = torch.cat([i for _, i in parts], dim=1) if len(parts) > 1 else parts[0][1]
    source = "set_tasks" if gates is None else "gates"
    rows = rows_of_gates(weights, x.shape, x.device, source, config)
    return Gate(weights, indices, rows, torch.cat(all_logits, dim=1) if all_logits else None)


def keep_routing(layers: Sequence[nn.Module], gate: Gate) -> None:
    """Split the gate of n siblings among the records of the layers."""
    n = len(layers)
    columns = [
        [None] * n if t is None else t.chunk(n, dim=1)
        for t in (gate.weights, gate.experts, gate.logits)
    ]
    for layer, weights, experts, logits in zip(layers, *columns, strict=True):
        layer.record.keep(weights, experts, logits)
