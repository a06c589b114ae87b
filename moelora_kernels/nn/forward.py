"""The forward of n siblings: layers that read the same x and have the same options."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from moelora_kernels import dispatch, ops
from moelora_kernels.autograd.linear import SkipUnused, Unused
from moelora_kernels.functional import run_layer
from moelora_kernels.nn.base_linear import (
    call_base,
    check_adapters,
    check_input,
    dense_weight,
    flat_rows,
    is_plain_linear,
    member,
)
from moelora_kernels.nn.gates import concat_gates, row_of_tokens, slots_of_tokens
from moelora_kernels.nn.layer import LoraLayer, MixtureLayer, WeightBias
from moelora_kernels.nn.merge import forward_merged
from moelora_kernels.nn.samples import Samples
from moelora_kernels.numerics import active_dtype, dropout_seed
from moelora_kernels.types import (
    NO_DROPOUT,
    NO_GATE,
    Dropout,
    ExternalGates,
    Gate,
    LinearTensors,
)

Structure = TypeVar("Structure", Gate, LinearTensors)


def forward_siblings(
    layers: Sequence[LoraLayer], x: Tensor, gates: ExternalGates | None = None
) -> list[Tensor]:
    """Run n siblings on x in one pass: x is read once for all of them.

        y_i = base_i(x) + u_i Bt_i        u_i = scale * gate_i (.) (dropout(x) At_i)

    If a layer is merged, or `set_tasks` or `set_samples` gave the layers different numbers of gate
    rows or different samples, they run one by one.

    Args:
        layers: n layers with the same in_features and config; the caller has checked it.
        x: [..., I].
        gates: external gates, [..., E] or weights and indices [..., K]; None means the gates that
            `set_tasks` set.

    Returns:
        y_i [..., O_i] of every layer, in x's dtype (under autocast: autocast's).

    Raises:
        ValueError, TypeError: x or gates do not fit the layers.
    """
    if len(layers) > 1 and (any([layer.merged for layer in layers]) or gate_rows_differ(layers)):
        return [forward_siblings((layer,), x, gates)[0] for layer in layers]
    outputs, gate = run_siblings(layers, x, gates)
    for i, layer in enumerate(layers):
        if layer.record.is_on:
            keep_routing(layer, gate, x.shape[:-1], i, len(layers))
    return outputs


def run_siblings(
    layers: Sequence[LoraLayer],
    x: Tensor,
    gates: ExternalGates | None = None,
    unused: Unused | None = None,
) -> tuple[list[Tensor], Gate | None]:
    """Return the outputs of `forward_siblings`, and the gate of all layers side by side.

    The records of the layers do not change.

    Args:
        layers: one layer, or siblings that are not merged and for which `gate_rows_differ` is
            False.
        x, gates: as in `forward_siblings`.
        unused: the positions of the layers that get no gradient. The gate and the reference join
            the tensors of all siblings, so these are passed through `SkipUnused`.

    Returns:
        The outputs; and the gate, or None for a merged layer.
    """
    first = layers[0]
    config = first.config
    # The cheapest conditions come first: a layer in training or on a GPU makes no more calls.
    can_decode = gates is None and not first.training and type(x) is Tensor and x.is_cpu
    if can_decode and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        decoded = _decode_plain(layers, x)
        if decoded is not None:
            return decoded
    check_input(x, first.in_features, gates, config.router, first)
    if first.merged:
        return [forward_merged(first, x, gates)], None
    dtype = active_dtype(x)
    tokens = x if x.dim() == 2 else flat_rows(x)
    tokens = tokens if tokens.dtype == dtype else tokens.to(dtype)
    routers = [layer.fused_router() for layer in layers]
    fuse_router = all(routers)
    bases = [_readable_base(member(layer, "base_layer"), tokens) for layer in layers]
    # The op takes the biases of all siblings or of none, so bases of both kinds are called.
    read_base = all(bases)
    if read_base and len(bases) > 1:
        read_base = len({bias is None for _, bias in filter(None, bases)}) == 1
    linears = [
        _linear_tensors(layer, x, base if read_base else None, router if fuse_router else None)
        for layer, base, router in zip(layers, bases, routers, strict=True)
    ]
    mixture = first.fused_mixture if fuse_router else first.mixture
    dropout = NO_DROPOUT
    if config.dropout > 0.0 and first.training:
        seed = dropout_seed(config.dropout, None, x.device)
        dropout = Dropout(config.dropout, config.dropout_mask == "per_expert", seed)
    if unused is not None and config.impl == "reference":
        linears = _skip_unused(linears, unused)
    passed_gate = None if fuse_router else siblings_gate(layers, x, tokens, gates, unused)
    outputs, gate = run_layer(
        mixture,
        tokens,
        linears,
        passed_gate,
        dropout,
        config.impl,
        sqrt_gate=config.grad_gate == "sqrt",
        training=first.training,
        frozen=config.frozen_experts,
    )
    if x.dim() != 2:
        outputs = [y.view(*x.shape[:-1], y.shape[-1]) for y in outputs]
    return outputs, gate


def _decode_plain(
    layers: Sequence[LoraLayer], x: Tensor
) -> tuple[list[Tensor], Gate | None] | None:
    """Return the results of `run_siblings` for the commonest layers on a CPU without gradients.

    These are layers with a plain base and a fused router, on few tokens. The caller has checked
    that they are in evaluation and that x is a plain tensor on a CPU. One function has all of it,
    because a call from Python to Python takes as long as a part of the op. Return None for any
    other call.
    """
    first = layers[0]
    mixture, config, features = first.fused_mixture, first.config, first.in_features
    if (
        mixture is None
        or config.impl not in ("auto", "decode")
        or x.layout is not torch.strided
        or x.is_nested
        or not (shape := x.shape)
        or shape[-1] != features
        or features == 0
        or torch._C._is_any_autocast_enabled()
        or torch._C._are_functorch_transforms_active()
        or x.numel() > dispatch.decode_limit("cpu") * features
    ):
        return None
    weights, biases, lora_a, lora_b, routers, router_biases = [], [], [], [], [], []
    for layer in layers:
        parameters, modules = layer._parameters, layer._modules
        base, router = modules.get("base_layer"), modules.get("router")
        if layer.merged or not is_plain_linear(base) or not is_plain_linear(router):
            return None
        weights.append(base._parameters.get("weight"))
        biases.append(base._parameters.get("bias"))
        lora_a.append(parameters.get("lora_A"))
        lora_b.append(parameters.get("lora_B"))
        routers.append(router._parameters.get("weight"))
        router_biases.append(router._parameters.get("bias"))
    for tensor in (*weights, *lora_a, *lora_b, *routers):
        if type(tensor) not in (nn.Parameter, Tensor) or not tensor.is_cpu:
            return None
    dtype = x.dtype
    if any([weight.dtype != dtype for weight in weights]):
        return None
    # The op takes the biases of all siblings or of none.
    for values in (biases, router_biases):
        missing = sum([bias is None for bias in values])
        if missing == len(values):
            values.clear()
        elif missing:
            return None
    tokens = x if len(shape) == 2 else x.reshape(-1, features)
    ys, gate_weights, experts, logits = ops.decode_flat(
        tokens, weights, biases, [], lora_a, lora_b, routers, router_biases, *NO_GATE, *mixture
    )
    if len(shape) != 2:
        ys = [y.view(*shape[:-1], y.shape[-1]) for y in ys]
    return ys, mixture.router_gate(gate_weights, experts, logits)


def gate_rows_differ(layers: Sequence[LoraLayer]) -> bool:
    """Return whether siblings cannot share one table with the gate row of each token.

    `set_tasks` or `set_samples` may have been called on one of them alone.
    """
    first, *others = layers
    if first.config.granularity == "token" and first.config.router != "external":
        return False
    rows = _task_rows(first)
    return any(
        not _same_samples(layer.samples, first.samples) or _task_rows(layer) != rows
        for layer in others
    )


def _same_samples(samples: Samples | str | None, other: Samples | str | None) -> bool:
    """Return whether two settings of `set_samples` are known to be equal, without a wait."""
    if samples is other or not isinstance(samples, Samples) or not isinstance(other, Samples):
        return samples == other if isinstance(samples, str) else samples is other
    return not samples.ids.is_cuda and not other.ids.is_cuda and torch.equal(samples.ids, other.ids)


def _task_rows(layer: LoraLayer) -> tuple | None:
    """Return the number of tasks, or the shape of the gates, that `set_tasks` set; else None."""
    if layer.config.router == "task":
        tasks = layer.current_task_ids()
        return None if tasks is None else (len(tasks),)
    gates = layer.external_gates
    return None if gates is None else (*gates.shape, layer.external_experts is None)


def _readable_base(base: nn.Module, tokens: Tensor) -> WeightBias | None:
    """Return weight and bias of a plain dense nn.Linear with the dtype and device of `tokens`.

    None for every other base.
    """
    weight = dense_weight(base)
    if weight is None or weight.dtype != tokens.dtype or weight.device != tokens.device:
        return None
    return weight, member(base, "bias")


def _linear_tensors(
    layer: LoraLayer, x: Tensor, base: WeightBias | None, router: WeightBias | None
) -> LinearTensors:
    """Return the tensors of one layer.

    base: of a base that the op reads; None calls the base on x. router: of a fused router, or None.
    """
    weight = bias = base_output = None
    if base is None:
        base_output = call_base(layer.base_layer, x, layer.out_features)
    else:
        weight, bias = base
    lora_a, lora_b = member(layer, "lora_A"), member(layer, "lora_B")
    check_adapters(lora_a, x)
    router_weight, router_bias = router or (None, None)
    return LinearTensors(weight, bias, base_output, lora_a, lora_b, router_weight, router_bias)


def _skip_unused(siblings: list[Structure], unused: Unused) -> list[Structure]:
    """Return the tensors of siblings. Those of unused siblings get no gradient."""
    n = len(siblings)
    by_field = [tensor for field in zip(*siblings, strict=True) for tensor in field]
    tensors = SkipUnused.apply(unused, n, *by_field)
    return [type(sibling)(*tensors[i::n]) for i, sibling in enumerate(siblings)]


def siblings_gate(
    layers: Sequence[LoraLayer],
    x: Tensor,
    tokens: Tensor,
    gates: ExternalGates | None,
    unused: Unused | None = None,
) -> Gate:
    """Return the gate of n siblings side by side, with the gate row of each token.

    A sparse gate has no rows: it has the slots of each token.

    Args:
        layers: n layers with the same config.
        x: [..., I], the input of the layers.
        tokens: [T, I], x in the dtype the layers compute in.
        gates: external gates; None means the gates that `set_tasks` set.
        unused: as in `run_siblings`.

    Raises:
        ValueError: the number of gate rows does not fit x.
    """
    parts = [layer.make_gate(x, tokens, gates) for layer in layers]
    gate = concat_gates(parts if unused is None else _skip_unused(parts, unused))
    source = "set_tasks" if gates is None else "gates"
    first = layers[0]
    rows = row_of_tokens(gate.weights, x.shape, x.device, source, first.config, first.samples)
    if gate.experts is not None:
        return slots_of_tokens(gate, rows, x.shape, first.config.batch_dim, first.samples)
    return gate if rows is None else Gate(gate.weights, gate.experts, rows, gate.logits)


def keep_routing(
    layer: MixtureLayer, gate: Gate | None, shape: Sequence[int], sibling: int = 0, n: int = 1
) -> None:
    """Store the routing of one call in the layer's record, if the layer records.

    gate: the gate of n siblings side by side; the layer has column block `sibling`. None is not
        stored.
    shape: the shape of x without the features.
    """
    if gate is None or not layer.record.is_on:
        return
    weights, experts, logits = (
        tensor if tensor is None or n == 1 else tensor.chunk(n, dim=1)[sibling]
        for tensor in (gate.weights, gate.experts, gate.logits)
    )
    part = Gate(weights, experts, gate.rows, logits)
    layer.record.keep(part, shape, layer.current_task_ids())
