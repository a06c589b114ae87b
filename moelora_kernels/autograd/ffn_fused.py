"""The autograd Function of whole-FFN experts that stores no matrix of [P, F]."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moelora_kernels import ops
from moelora_kernels.autograd.ffn_inputs import FfnInputs
from moelora_kernels.autograd.frozen import zero_frozen
from moelora_kernels.ops.wide import matrix
from moelora_kernels.types import Dropout, InnerAdapters, InnerInputs, InnerOptions


class _Saved(NamedTuple):
    """Results of the forward that `FusedFfnExperts` saves for backward, besides its inputs."""

    u_gate: Tensor  # [P, largest rank]
    u_up: Tensor
    h: Tensor  # of down


class FusedFfnExperts(torch.autograd.Function):
    """Compute summed [T, F] and delta [T, I] of `reference.ffn`; also return `_Saved`.

    Saved for backward: x, gate_out and up_out [T, F], the gate weights, the routing, the
    parameters, u_gate, u_up and h. Nothing else grows with F, and nothing of [T, F] with K.
    """

    @staticmethod
    def forward(*inputs):
        i = FfnInputs(*inputs)
        ranks, scaling = i.mixture[:2]
        dropout_x, dropout_a = (Dropout(*i.dropout, seed) for seed in (i.seed_x, i.seed_a))
        u_gate, u_up = (
            ops.grouped_shrink(i.x, [a], None, i.routing, ranks, scaling, dropout_x)[1]
            for a in (i.gate_a, i.up_a)
        )
        summed, h, u = ops.ffn_inner(
            InnerInputs(i.gate_out, i.up_out, u_gate, u_up),
            InnerAdapters(i.gate_b, i.up_b, i.down_a),
            i.weights,
            i.routing,
            InnerOptions(ranks, scaling, *dropout_a, i.activation),
        )
        delta = ops.grouped_expand(u, [i.down_b], None, i.routing, ranks, tokens=i.x.shape[0])
        return summed, delta, u_gate, u_up, h

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        ctx.static = inputs[:3]
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output[2:], *inputs[3:])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dsummed, ddelta, *_):
        tensors = ctx.saved_tensors
        u_gate, u_up, h = tensors[: len(_Saved._fields)]
        i = FfnInputs(*ctx.static, *tensors[len(_Saved._fields) :])
        needs = FfnInputs(*ctx.needs_input_grad)
        ranks, scaling, _, frozen = i.mixture
        dropout_x, dropout_a = (Dropout(*i.dropout, seed) for seed in (i.seed_x, i.seed_a))
        x, routing, T = i.x, i.routing, i.x.shape[0]
        dsummed = torch.zeros_like(i.gate_out) if dsummed is None else dsummed
        ddelta = x.new_zeros((T, i.down_b.shape[0])) if ddelta is None else ddelta
        ddelta = matrix(ddelta, x.dtype)
        # An operand of `grouped_weight_grad` without features, in the place of a gradient that is
        # computed elsewhere.
        nothing = x.new_empty((T, 0))

        grads: dict[str, Any] = {}
        dh, u, dweights = ops.grouped_shrink_backward(
            [ddelta], [i.down_b], h, i.weights, routing, ranks, scaling
        )
        if needs.down_b:
            _, (grads["down_b"],) = ops.grouped_weight_grad(
                nothing, dh, [ddelta], u, routing, ranks, Dropout(), i.down_b.dtype, frozen
            )
        inner = ops.ffn_inner_backward(
            dsummed,
            InnerInputs(i.gate_out, i.up_out, u_gate, u_up),
            InnerAdapters(i.gate_b, i.up_b, i.down_a),
            dh,
            i.weights,
            routing,
            InnerOptions(ranks, scaling, *dropout_a, i.activation),
            needs_adapters=needs.gate_b or needs.up_b or needs.down_a,
        )
        grads["gate_out"], grads["up_out"] = inner.dgate_out, inner.dup_out
        grads["weights"] = (dweights + inner.dweights).to(i.weights.dtype)
        if needs.gate_b or needs.up_b or needs.down_a:
            grads["gate_b"], grads["up_b"] = inner.dgate_b, inner.dup_b
            grads["down_a"] = inner.ddown_a
            zero_frozen([inner.ddown_a], [inner.dgate_b, inner.dup_b], ranks, frozen)
        for name, dh_x, u_x, lora_a in (
            ("gate_a", inner.dh_gate, u_gate, i.gate_a),
            ("up_a", inner.dh_up, u_up, i.up_a),
        ):
            if getattr(needs, name):
                grads[name], _ = ops.grouped_weight_grad(
                    x, dh_x, [nothing], u_x, routing, ranks, dropout_x, lora_a.dtype, frozen
                )
            if needs.x:
                grads["x"] = ops.grouped_expand(
                    dh_x, [lora_a.t()], grads.get("x"), routing, ranks, dropout_x, tokens=T
                )
        return tuple([grads.get(name) for name in FfnInputs._fields])
