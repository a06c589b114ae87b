"""The forward of n siblings: layers that read the same x."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from moelora_kernels.functional import run_layer
from moelora_kernels.nn.base_linear import call_base, check_adapters, check_input, dense_weight
from moelora_kernels.nn.gates import concat_gates, gate_rows
from moelora_kernels.nn.layer import LoraLayer, MixtureLayer
from moelora_kernels.nn.merge import forward_merged
from moelora_kernels.numerics import active_dtype, dropout_seed
from moelora_kernels.types import NO_DROPOUT, Dropout, Gate, LinearTensors


def forward_siblings(
    layers: Sequence[LoraLayer], x: Tensor, gates: Tensor | None = None
) -> list[Tensor]:
    """The outputs of layers that read the same x and share their options, in one pass over x."""
    first = layers[0]
    config = first.config
    check_input(x, first.in_features, gates, config.router)
    if any(layer.merged for layer in layers):
        if len(layers) == 1:
            return [forward_merged(first, x, gates)]
        return [forward_siblings((layer,), x, gates)[0] for layer in layers]
    dtype = active_dtype(x)
    tokens = x if x.dim() == 2 else x.reshape(-1, first.in_features)
    tokens = tokens if tokens.dtype == dtype else tokens.to(dtype)
    fused = all(layer.fuses_router() for layer in layers)
    read = all(_is_read(layer.base_layer, tokens) for layer in layers) and (
        len(layers) == 1 or len({layer.bias is None for layer in layers}) == 1
    )
    linears = [_sibling(layer, x, read, fused) for layer in layers]
    mixture, dropout = first.fused_mixture if fused else first.mixture, NO_DROPOUT
    if config.dropout > 0.0 and first.training:
        seed = dropout_seed(config.dropout, None, x.device)
        dropout = Dropout(config.dropout, config.dropout_mask == "per_expert", seed)
    gate = None if fused else siblings_gate(layers, x, tokens, gates)
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


def _sibling(layer: LoraLayer, x: Tensor, read: bool, fused: bool) -> LinearTensors:
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


def siblings_gate(
    layers: Sequence[LoraLayer], x: Tensor, tokens: Tensor, gates: Tensor | None
) -> Gate:
    """Return the gate of n siblings side by side, with the gate row of each token.

    Raises:
        ValueError: the gate has a number of rows that does not fit x.
    """
    gate = concat_gates([layer.make_gate(x, tokens, gates) for layer in layers])
    source = "set_tasks" if gates is None else "gates"
    rows = gate_rows(gate.weights, x.shape, x.device, source, layers[0].config)
    return gate if rows is None else gate._replace(rows=rows)


def keep_routing(layers: Sequence[MixtureLayer], gate: Gate) -> None:
    """Split the gate of n siblings among the records of the layers."""
    n = len(layers)
    columns = [
        [None] * n if t is None else t.chunk(n, dim=1)
        for t in (gate.weights, gate.experts, gate.logits)
    ]
    for layer, weights, experts, logits in zip(layers, *columns, strict=True):
        layer.record.keep(weights, experts, logits)
