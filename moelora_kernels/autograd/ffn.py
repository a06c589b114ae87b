"""Whole-FFN experts with gradients, and the autograd Function that works on matrices of pairs.

Pair t K + k is slot k of token t; a matrix of pairs has P = T K rows. The layer calls the frozen
linears, once per token. `FfnExperts` computes the steps between them, on matrices of P rows, with
any activation. `FusedFfnExperts` of ffn_fused.py computes them without these matrices.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moelora_kernels import dispatch, ops, reference
from moelora_kernels.autograd.ffn_fused import FusedFfnExperts
from moelora_kernels.autograd.ffn_inputs import (
    Activation,
    FfnInputs,
    activation_name,
    tensors_without_frozen,
)
from moelora_kernels.numerics import is_autocast
from moelora_kernels.ops.apply import apply
from moelora_kernels.ops.wide import matrix
from moelora_kernels.types import NO_DROPOUT, Dropout, FfnMixture, FfnTensors, Gate, Routing

# The version of torch: (major, minor).
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])

# `apply` that torch.compile does not compile.
_apply_eagerly = torch._disable_dynamo(apply)


class _Saved(NamedTuple):
    """Results of the forward that `FfnExperts` saves for backward, besides its inputs."""

    z_gate: Tensor  # [P, F], the input of the activation; gate_out [T, F] with recompute
    z_up: Tensor  # [P, F]; up_out [T, F] with recompute
    u_gate: Tensor  # [P, largest rank]
    u_up: Tensor
    h: Tensor  # [P, largest rank], of down


class FfnExperts(torch.autograd.Function):
    """Compute summed [T, F] and delta [T, I] of `reference.ffn`; also return `_Saved`.

    Saved for backward: x, the gate weights, the routing, the parameters, u_gate, u_up and h; and
    z_gate and z_up [P, F], or with recompute gate_out and up_out [T, F].
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
        z_gate = _adapted(u_gate, i.gate_b, i.gate_out, i.routing, ranks)
        z_up = _adapted(u_up, i.up_b, i.up_out, i.routing, ranks)
        a = _gated_product(i.activation, z_gate, z_up)
        h, u = ops.grouped_shrink(a, [i.down_a], i.weights, i.routing, ranks, scaling, dropout_a)
        delta = ops.grouped_expand(u, [i.down_b], None, i.routing, ranks, tokens=i.x.shape[0])
        return _weighted_sum(a, i.weights), delta, z_gate, z_up, u_gate, u_up, h

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        i, saved = FfnInputs(*inputs), _Saved(*output[2:])
        if i.mixture.recompute:
            saved = saved._replace(z_gate=i.gate_out, z_up=i.up_out)
        ctx.static = inputs[:3]
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)
        # gate_out and up_out are not saved: z_gate and z_up contain them.
        ctx.save_for_backward(*saved, i.x, *inputs[6:])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dsummed, ddelta, *_):
        tensors = ctx.saved_tensors
        count = len(_Saved._fields)
        z_gate, z_up, u_gate, u_up, h = tensors[:count]
        x, *others = tensors[count:]
        i, needs = FfnInputs(*ctx.static, x, None, None, *others), FfnInputs(*ctx.needs_input_grad)
        ranks, scaling, recompute, frozen = i.mixture
        dropout_x, dropout_a = (Dropout(*i.dropout, seed) for seed in (i.seed_x, i.seed_a))
        T, weights, routing = x.shape[0], i.weights, i.routing
        if recompute:
            z_gate = _adapted(u_gate, i.gate_b, z_gate, routing, ranks)
            z_up = _adapted(u_up, i.up_b, z_up, routing, ranks)
        a, activation_backward = _gated_product_backward(i.activation, z_gate, z_up)
        dsummed = a.new_zeros((T, a.shape[1])) if dsummed is None else dsummed
        ddelta = a.new_zeros((T, i.down_b.shape[0])) if ddelta is None else ddelta
        ddelta = matrix(ddelta, x.dtype)

        def weight_grads(left, dh, dy, u, dropout):
            da, (db,) = ops.grouped_weight_grad(
                left, dh, [dy], u, routing, ranks, dropout, i.gate_a.dtype, frozen
            )
            return da, db

        grads: dict[str, Any] = {}
        dh, u, dweights = ops.grouped_shrink_backward(
            [ddelta], [i.down_b], h, weights, routing, ranks, scaling
        )
        if needs.down_a or needs.down_b:
            grads["down_a"], grads["down_b"] = weight_grads(a, dh, ddelta, u, dropout_a)
        if needs.weights:
            dweights = dweights + _inner_products(dsummed, a, weights)
            grads["weights"] = dweights.to(weights.dtype)
        if any((needs.x, needs.gate_out, needs.up_out, *needs[-6:-2])):
            da = ops.grouped_expand(
                dh, [i.down_a.t()], None, routing, ranks, dropout_a, tokens=T, per_pair=True
            )
            _add_weighted(da, dsummed, weights)
            dz_gate, dz_up = activation_backward(da)
            # A pair with weight zero is left out, so that a NaN of its expert does not spread.
            selected = (weights != 0).to(weights.dtype)
            if needs.gate_out:
                grads["gate_out"] = _weighted_sum(dz_gate, selected)
            if needs.up_out:
                grads["up_out"] = _weighted_sum(dz_up, selected)
            dx = None
            for name, dz, u, lora_a, lora_b in (
                ("gate", dz_gate, u_gate, i.gate_a, i.gate_b),
                ("up", dz_up, u_up, i.up_a, i.up_b),
            ):
                # Only dh is used. It does not depend on h, so u is passed in the place of h.
                dh, _, _ = ops.grouped_shrink_backward(
                    [dz], [lora_b], u, selected, routing, ranks, scaling
                )
                if any(getattr(needs, f"{name}_{m}") for m in "ab"):
                    grads[f"{name}_a"], grads[f"{name}_b"] = weight_grads(x, dh, dz, u, dropout_x)
                if needs.x:
                    dx = ops.grouped_expand(
                        dh, [lora_a.t()], dx, routing, ranks, dropout_x, tokens=T
                    )
            grads["x"] = dx
        return tuple([grads.get(name) for name in FfnInputs._fields])


def _adapted(
    u: Tensor, lora_b: Tensor, base_output: Tensor, routing: Routing, ranks: tuple[int, ...]
) -> Tensor:
    """Return z_p = base_output_t + B_e u_p, [P, F]."""
    tokens = base_output.shape[0]
    return ops.grouped_expand(
        u, [lora_b], base_output, routing, ranks, tokens=tokens, per_pair=True
    )


def _gated_product(activation: Activation, z_gate: Tensor, z_up: Tensor) -> Tensor:
    """Return act(z_gate) * z_up, [P, F], without autocast: backward computes it again without."""
    if not is_autocast(z_gate.device):
        return (activation(z_gate) * z_up).to(z_gate.dtype)
    with torch.autocast(z_gate.device.type, enabled=False):
        return (activation(z_gate) * z_up).to(z_gate.dtype)


def _gated_product_backward(activation: Activation, z_gate: Tensor, z_up: Tensor):
    """Return a = act(z_gate) * z_up, and the function da -> (dz_gate, dz_up)."""

    def product(z_gate, z_up):
        return _gated_product(activation, z_gate, z_up)

    if torch.compiler.is_compiling():
        # torch.autograd.grad breaks a compiled graph. torch.func.vjp fails if there are hooks on
        # saved tensors, so it is used only in a compiled graph.
        return torch.func.vjp(product, z_gate, z_up)
    with torch.enable_grad():
        leaves = z_gate.detach().requires_grad_(), z_up.detach().requires_grad_()
        a = product(*leaves)
    return a.detach(), lambda da: torch.autograd.grad(a, leaves, da)


def _weighted_sum(rows: Tensor, weights: Tensor) -> Tensor:
    """Return sum_k w_tk rows_tk, [T, F], of rows [P, F]. Rows with weight zero are left out."""
    tokens, slots = weights.shape
    by_slot = rows.view(tokens, slots, rows.shape[1])
    total = None
    for k in range(slots):
        weight = weights[:, k, None]
        term = torch.where(weight == 0, 0, weight * by_slot[:, k])
        total = term if total is None else total + term
    return total.to(rows.dtype)


def _inner_products(dsummed: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Return <dsummed_t, rows_tk>, [T, K] in the dtype of the weights."""
    by_slot = rows.view(*weights.shape, rows.shape[1])
    dsummed = dsummed.to(weights.dtype)
    columns = [(dsummed * by_slot[:, k]).sum(dim=1) for k in range(weights.shape[1])]
    return torch.stack(columns, dim=1)


def _add_weighted(drows: Tensor, dsummed: Tensor, weights: Tensor) -> None:
    """Add w_tk dsummed_t to drows_tk in place; drows [P, F]."""
    by_slot = drows.view(*weights.shape, drows.shape[1])
    dsummed = dsummed.to(weights.dtype)
    for k in range(weights.shape[1]):
        by_slot[:, k] += weights[:, k, None] * dsummed


def ffn_experts(
    mixture: FfnMixture,
    activation: Activation,
    x: Tensor,
    gate_out: Tensor,
    up_out: Tensor,
    gate: Gate,
    tensors: FfnTensors,
    dropout_x: Dropout = NO_DROPOUT,
    dropout_a: Dropout = NO_DROPOUT,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute `reference.ffn` with its gradients. The caller has checked and cast the arguments.

    Args:
        mixture: the static options.
        activation: elementwise, applied to the output of the gate projection.
        x: [T, I].
        gate_out: [T, F], the output of the frozen gate projection, in x's dtype.
        up_out: [T, F], the output of the frozen up projection, in x's dtype.
        gate: sparse, weights [T, K] in the compute dtype.
        tensors: A and B of the three linears.
        dropout_x: applied to x before the A of gate and up.
        dropout_a: applied to the activation before the A of down; p and per_expert as dropout_x.
        impl: "auto", "fused", "grouped" or "reference". "auto" is "fused" or "grouped": see
            `dispatch.choose_ffn`. "fused" needs an activation of FFN_ACTIVATIONS.

    Returns:
        summed [T, F] and delta [T, I], see `reference.ffn`.
    """
    weights, experts, *_ = gate
    routed = (experts >= 0) & (experts < len(mixture.ranks))
    weights = torch.where(routed, weights, 0)
    if impl == "reference":
        gate = Gate(weights, experts)
        tensors = tensors_without_frozen(tensors, mixture)
        inputs = (x, gate_out, up_out, gate, tensors, activation, mixture, dropout_x, dropout_a)
        if x.device.type == "meta":
            return reference.ffn(*inputs)
        with torch.autocast(x.device.type, enabled=False):
            return reference.ffn(*inputs)
    routing = ops.route(experts, len(mixture.ranks))
    options = (
        dropout_x[:2], x, gate_out, up_out, weights, *routing, dropout_x.seed, dropout_a.seed,
        *tensors,
    )  # fmt: skip
    name = None if impl == "grouped" else activation_name(activation)
    if impl == "auto":
        impl = dispatch.choose_ffn(
            x.device.type, dtype=x.dtype, total_rank=sum(mixture.ranks), top_k=weights.shape[1]
        )
    if impl == "fused" and name is not None:
        return apply(FusedFfnExperts, mixture, name, *options)[:2]
    call = apply
    if torch.is_grad_enabled() and TORCH < (2, 13):
        # Older versions compile a wrong gradient of the activation, without an error. Without
        # fullgraph=True this error makes the compiler run the layer eagerly.
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"torch.compile: training whole-FFN experts needs torch 2.13 or newer, got {TORCH}"
            )
        # The compiler would then try to compile the functions that the layer calls.
        call = _apply_eagerly
    return call(FfnExperts, mixture, activation, *options)[:2]
