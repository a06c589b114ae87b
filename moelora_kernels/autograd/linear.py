"""The autograd Function of a mixture-of-LoRA layer: n siblings that read the same x."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moelora_kernels import ops
from moelora_kernels.types import (
    NO_GATE,
    Dropout,
    Gate,
    LayerForward,
    LayerOutput,
    LinearTensors,
    Mixture,
    Needs,
    Routing,
    SiblingTensors,
)

# The number of arguments of `MoeLora.forward` before the tensors of the linears.
_LEADING = 9
_FIELDS = len(LinearTensors._fields)


def siblings_of(linears: Sequence[LinearTensors]) -> SiblingTensors:
    """Return the tensors of n linears, field by field."""
    fields = zip(*linears, strict=True)
    return SiblingTensors(*[[t for t in field if t is not None] for field in fields])


def _linears(flat: Sequence[Tensor | None]) -> list[LinearTensors]:
    """Return the linears of a flat list that has all fields of linear 0, then of linear 1, ..."""
    return [LinearTensors(*flat[i : i + _FIELDS]) for i in range(0, len(flat), _FIELDS)]


class MoeLora(torch.autograd.Function):
    """Compute y_i = x Wt_i + b_i + u_i Bt_i for n siblings; `reference` has the formulas.

    The inputs are impl, mixture, p and per_expert of the dropout, x, the weights, experts and rows
    of the gate, the seed, and the fields of every linear, linear by linear. The outputs are the
    y_i, then the other fields of `types.LayerForward` in their order.

    Saved for backward: x, the parameters, h, the gate, and the routing if impl is "grouped". No
    output of width O is saved.
    """

    @staticmethod
    def forward(*inputs):
        # torch binds the inputs to this signature on every call. That takes time for every name.
        impl, mixture, p, per_expert, x, weights, experts, rows, seed, *fields = inputs
        tensors, gate = siblings_of(_linears(fields)), Gate(weights, experts, rows)
        y, *rest = _op(impl)(x, tensors, gate, mixture, Dropout(p, per_expert, seed))
        return (*y, *(rest if impl == "grouped" else rest[:4]))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        impl, mixture, p, per_expert, x, weights, experts, rows, seed, *fields = inputs
        linears = _linears(fields)
        result = LayerForward([], *output[len(linears) :])
        logits = None
        if mixture.router_top_k:
            weights, experts, _, logits = mixture.router_gate(
                result.weights, result.experts, result.logits
            )
            # Without renormalize the backward of the softmax reads the logits.
            logits = None if mixture.renormalize else logits
        ctx.impl, ctx.mixture, ctx.dropout = impl, mixture, (p, per_expert)
        routing = (result.order, result.offsets, result.tiles, result.chunks)
        integers = [t for t in (result.experts, *routing) if t is not None]
        ctx.mark_non_differentiable(result.h, result.weights, *integers)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            x, weights, experts, rows, logits, seed, result.h, *routing,
            *[t for s in linears for t in (s.weight, s.lora_a, s.lora_b, s.router_weight)],
        )  # fmt: skip

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        # Read once, because under activation checkpointing a second read fails.
        x, weights, experts, rows, logits, seed, h, *others = ctx.saved_tensors
        routing, saved = Routing(*others[:4]), others[4:]
        base_weight, lora_a, lora_b, router_weight = (
            [t for t in saved[field::4] if t is not None] for field in range(4)
        )
        tensors = SiblingTensors(base_weight, [], [], lora_a, lora_b, router_weight, [])
        n, needs = len(lora_b), ctx.needs_input_grad
        dy = [
            x.new_zeros((x.shape[0], b.shape[0])) if g is None else g
            for g, b in zip(grads[:n], lora_b, strict=True)
        ]
        gate, dlogits = Gate(weights, experts, rows, logits), grads[n + 3]
        needs_linear = _linears(needs[_LEADING:])
        needed_grads = Needs(needs[4], any([any(needed[3:]) for needed in needs_linear]))
        mixture, dropout = ctx.mixture, Dropout(*ctx.dropout, seed)
        if ctx.impl == "grouped":
            result = ops.grouped_backward(
                dy, x, tensors, h, gate, dlogits, routing, mixture, dropout, needed_grads
            )
        else:
            result = ops.wide_backward(
                dy, x, tensors, h, gate, dlogits, mixture, dropout, needed_grads
            )
        dx, dgate, da, drouter, dbias, db = result
        has_adapters, has_router = len(db) > 0, len(db) > 0 and len(router_weight) > 0
        gradients: list[Tensor | None] = []
        for i, (g, needed) in enumerate(zip(dy, needs_linear, strict=True)):
            gradients += [
                g.to(x.dtype).t() @ x if needed.weight else None,
                g.to(x.dtype).sum(dim=0) if needed.bias else None,
                g if needed.base_output else None,
                _row_block(da, i, n) if has_adapters else None,
                db[i] if has_adapters else None,
                _row_block(drouter, i, n) if has_router else None,
                _row_block(dbias, i, n) if has_router and needed.router_bias else None,
            ]
        return (
            None, None, None, None, dx if needs[4] else None,
            dgate.to(weights.dtype) if needs[5] else None, None, None, None, *gradients,
        )  # fmt: skip


class SqrtGateMoeLora(MoeLora):
    """`MoeLora` whose gradients of A, B and x use the square root of the gate.

        dh = scale * sqrt(gate) (.) du      dB = dy^T (scale * sqrt(gate) (.) h)
        dgate = scale * <du, h>             as in `MoeLora`, because the gate is not a factor of it

    It takes a gate; it does not work with routers in `linears`.

    Source: arXiv 2502.15828 (Riemannian preconditioned mixture of LoRA).
    """

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        weights = inputs[5]
        MoeLora.setup_context(ctx, (*inputs[:5], weights.sqrt(), *inputs[6:]), output)


def _row_block(tensor: Tensor, i: int, n: int) -> Tensor:
    """Return row block i of n."""
    return tensor if n == 1 else tensor.chunk(n)[i]


def _op(impl: str) -> Callable[..., LayerForward]:
    return ops.grouped if impl == "grouped" else ops.wide


def _field_names(linear: LinearTensors) -> list[str]:
    return [name for name, t in zip(linear._fields, linear, strict=True) if t is not None]


def run(
    function: type[MoeLora],
    impl: str,
    mixture: Mixture,
    x: Tensor,
    linears: Sequence[LinearTensors],
    gate: Gate | None,
    dropout: Dropout,
) -> LayerOutput:
    """Run `function`, which is `MoeLora` or derived from it; impl is "wide" or "grouped".

    Raises ValueError if some siblings have a tensor that others lack.
    """
    n, first = len(linears), linears[0]
    if n > 1:
        absent = [tensor is None for tensor in first]
        if any([[tensor is None for tensor in s] != absent for s in linears]):
            names = [_field_names(linear) for linear in linears]
            raise ValueError(f"siblings: expected the same tensors for every linear, got {names}")
    if not torch.is_grad_enabled():
        output = _op(impl)(x, siblings_of(linears), gate, mixture, dropout)
        if gate is None:
            gate = mixture.router_gate(output.weights, output.experts, output.logits)
        return LayerOutput(output.y, gate)
    weights, experts, rows, _ = gate or NO_GATE
    p, per_expert, seed = dropout
    fields = first if n == 1 else [t for linear in linears for t in linear]
    inputs = (impl, mixture, p, per_expert, x, weights, experts, rows, seed, *fields)
    outputs = _call(function)(*inputs)
    if gate is None:
        gate = mixture.router_gate(*outputs[n + 1 : n + 4])
    return LayerOutput([*outputs[:n]], gate)


def _call(function: type[MoeLora]):
    """Return the function that runs `function` and records its graph."""
    if torch._C._are_functorch_transforms_active():
        return function.apply
    if torch.compiler.is_compiling():
        return _compiled(function)
    # `Function.apply` looks for functorch transforms and binds its inputs to a signature on every
    # call. For small layers that takes longer than the products, so it is skipped.
    return super(torch.autograd.Function, function).apply


def _compiled(function: type[MoeLora]):
    def call(*inputs):
        # If no input needs a gradient, Dynamo passes a context to the forward of a Function. A
        # Function with `setup_context` does not take one.
        trains = any([isinstance(t, Tensor) and t.requires_grad for t in inputs])
        return function.apply(*inputs) if trains else function.forward(*inputs)

    return call
