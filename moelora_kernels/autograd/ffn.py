"""The autograd Function of whole-FFN experts, and that of a linear router on its own.

A pair p = t K + k is slot k of token t; rows of pairs have P = T K of them. Everything that is
O(P) wide lives between the frozen products, which the layer calls itself, once per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moelora_kernels import ops, reference
from moelora_kernels.numerics import is_autocast
from moelora_kernels.ops.wide import matrix
from moelora_kernels.types import CHUNK, NO_DROPOUT, TILE, Dropout, FfnMixture, FfnTensors, Gate

# Release of torch, (major, minor).
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])

Activation = Callable[[Tensor], Tensor]


class _FlatFfn(NamedTuple):
    """What is static about a layer: the same for all tokens and all steps."""

    ranks: tuple[int, ...]
    scaling: tuple[float, ...]
    # Make the activations of the experts anew in backward instead of saving them.
    recompute: bool = False
    dropout: float = 0.0
    dropout_per_expert: bool = False


class FfnExperts(torch.autograd.Function):
    """summed [T, F] and delta [T, I] of `reference.ffn`.

    Saves x, weights, the routing, the parameters and rank space; and the inputs of the activation,
    two [P, F], or with recompute the frozen products gate and up, two [T, F].
    """

    @staticmethod
    def forward(
        mixture, activation, x, gate, up, weights, order, offsets, tiles, chunks, seed_x, seed_a,
        gate_a, gate_b, up_a, up_b, down_a, down_b,
    ):  # fmt: skip
        routing = (order, offsets, tiles, mixture.ranks)
        drop = (mixture.dropout, mixture.dropout_per_expert)
        u_gate, u_up = (
            ops.grouped_shrink(x, [a], None, *routing, mixture.scaling, *drop, seed_x)[1]
            for a in (gate_a, up_a)
        )
        z_gate = _adapted(u_gate, gate_b, gate, routing)
        z_up = _adapted(u_up, up_b, up, routing)
        a = _gated_product(activation, z_gate, z_up)
        h, u = ops.grouped_shrink(a, [down_a], weights, *routing, mixture.scaling, *drop, seed_a)
        tokens = x.shape[0]
        delta = ops.grouped_expand(u, [down_b], None, *routing, tokens, 0, False, 0.0, False, None)
        return _weighted_sum(a, weights), delta, z_gate, z_up, u_gate, u_up, h

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        mixture, ctx.activation, x, gate, up, *shared = inputs
        ctx.mixture = mixture
        z_gate, z_up, *of_ranks = output[2:]
        kept = (gate, up) if mixture.recompute else (z_gate, z_up)
        ctx.mark_non_differentiable(*output[2:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, *kept, *of_ranks, *shared)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dsummed, ddelta, *_):
        mixture = ctx.mixture
        (
            x, z_gate, z_up, u_gate, u_up, h, weights, order, offsets, tiles, chunks, seed_x,
            seed_a, gate_a, gate_b, up_a, up_b, down_a, down_b,
        ) = ctx.saved_tensors  # fmt: skip
        _, _, needs_x, needs_gate, needs_up, needs_weights, *_ = ctx.needs_input_grad
        needs = FfnTensors(*ctx.needs_input_grad[-6:])
        tokens, routing = x.shape[0], (order, offsets, tiles, mixture.ranks)
        drop = (mixture.dropout, mixture.dropout_per_expert)
        if mixture.recompute:
            z_gate = _adapted(u_gate, gate_b, z_gate, routing)
            z_up = _adapted(u_up, up_b, z_up, routing)
        a, activation_backward = _gated_product_backward(ctx.activation, z_gate, z_up)
        dsummed = a.new_zeros((tokens, a.shape[1])) if dsummed is None else dsummed
        ddelta = a.new_zeros((tokens, down_b.shape[0])) if ddelta is None else ddelta
        ddelta = matrix(ddelta, x.dtype)

        def weight_grads(read, dh, dy, u, seed):
            da, (db,) = ops.grouped_weight_grad(
                read, dh, [dy], u, order, offsets, chunks, gate_a.dtype, mixture.ranks, *drop, seed
            )
            return da, db

        grads = dict.fromkeys(FfnTensors._fields)
        dh, u, dweights = ops.grouped_shrink_backward(
            [ddelta], [down_b], h, weights, *routing, mixture.scaling
        )
        if needs.down_a or needs.down_b:
            grads["down_a"], grads["down_b"] = weight_grads(a, dh, ddelta, u, seed_a)
        if needs_weights:
            dweights = (dweights + _inner_products(dsummed, a, weights)).to(weights.dtype)
        dx = dgate = dup = None
        if needs_x or needs_gate or needs_up or any(needs[:4]):
            da = ops.grouped_expand(
                dh, [down_a.t()], None, *routing, tokens, 0, True, *drop, seed_a
            )
            _add_weighted(da, dsummed, weights)
            dz_gate, dz_up = activation_backward(da)
            # A pair of weight zero has no part in what follows, whatever its expert holds.
            selected = (weights != 0).to(weights.dtype)
            dgate = _weighted_sum(dz_gate, selected) if needs_gate else None
            dup = _weighted_sum(dz_up, selected) if needs_up else None
            for name, dz, u, lora_a, lora_b in (
                ("gate", dz_gate, u_gate, gate_a, gate_b),
                ("up", dz_up, u_up, up_a, up_b),
            ):
                # Only dh is used, and it does not depend on the h that is given: u stands in.
                dh, _, _ = ops.grouped_shrink_backward(
                    [dz], [lora_b], u, selected, *routing, mixture.scaling
                )
                if any(getattr(needs, f"{name}_{m}") for m in "ab"):
                    grads[f"{name}_a"], grads[f"{name}_b"] = weight_grads(x, dh, dz, u, seed_x)
                if needs_x:
                    dx = ops.grouped_expand(
                        dh, [lora_a.t()], dx, *routing, tokens, 0, False, *drop, seed_x
                    )
        dweights = dweights if needs_weights else None
        return None, None, dx, dgate, dup, dweights, *[None] * 6, *grads.values()


def _adapted(u: Tensor, lora_b: Tensor, base: Tensor, routing: tuple) -> Tensor:
    """z_p = base_t + B_e u_p, [P, F]."""
    return ops.grouped_expand(u, [lora_b], base, *routing, base.shape[0], 0, True, 0.0, False, None)


def _gated_product(activation: Activation, z_gate: Tensor, z_up: Tensor) -> Tensor:
    """act(z_gate) * z_up, [P, F], as without autocast: backward has none that is sure to match."""
    if not is_autocast(z_gate.device):
        return (activation(z_gate) * z_up).to(z_gate.dtype)
    with torch.autocast(z_gate.device.type, enabled=False):
        return (activation(z_gate) * z_up).to(z_gate.dtype)


def _gated_product_backward(activation: Activation, z_gate: Tensor, z_up: Tensor):
    """act(z_gate) * z_up once more, and the function that takes its gradient to theirs."""

    def product(z_gate, z_up):
        return _gated_product(activation, z_gate, z_up)

    if torch.compiler.is_compiling():
        # torch.autograd.grad breaks a compiled graph; torch.func.vjp fails under hooks on saved
        # tensors, which a training step may run under.
        return torch.func.vjp(product, z_gate, z_up)
    with torch.enable_grad():
        leaves = z_gate.detach().requires_grad_(), z_up.detach().requires_grad_()
        a = product(*leaves)
    return a.detach(), lambda da: torch.autograd.grad(a, leaves, da)


def _weighted_sum(rows: Tensor, weights: Tensor) -> Tensor:
    """sum_k w_tk rows_tk, [T, F] in the dtype of rows [P, F]; a weight of zero selects nothing."""
    tokens, slots = weights.shape
    by_slot = rows.view(tokens, slots, rows.shape[1])
    total = None
    for k in range(slots):
        weight = weights[:, k, None]
        term = torch.where(weight == 0, 0, weight * by_slot[:, k])
        total = term if total is None else total + term
    return total.to(rows.dtype)


def _inner_products(dsummed: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """<dsummed_t, rows_tk>, [T, K] in the dtype of the weights."""
    by_slot = rows.view(*weights.shape, rows.shape[1])
    dsummed = dsummed.to(weights.dtype)
    columns = [(dsummed * by_slot[:, k]).sum(dim=1) for k in range(weights.shape[1])]
    return torch.stack(columns, dim=1)


def _add_weighted(drows: Tensor, dsummed: Tensor, weights: Tensor) -> None:
    """drows_tk += w_tk dsummed_t, in place; drows [P, F]."""
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
    impl: str = "grouped",
) -> tuple[Tensor, Tensor]:
    """`reference.ffn` with its gradients. The caller has checked and cast the arguments.

    Args:
        mixture: the static options.
        activation: elementwise, applied to the output of the gate projection.
        x: [T, I].
        gate_out: [T, F], the output of the frozen gate projection, in x's dtype.
        up_out: [T, F], the output of the frozen up projection, in x's dtype.
        gate: sparse, weights [T, K] in the compute dtype.
        tensors: A and B of the three linears.
        dropout_x: of x on its way into the A of gate and up.
        dropout_a: of the activation on its way into the A of down; p and per_expert as dropout_x.
        impl: "grouped" or "reference".

    Returns:
        summed [T, F] and delta [T, I], see `reference.ffn`.
    """
    flat = _FlatFfn(*mixture, *dropout_x[:2])
    return _ffn_experts(
        flat, activation, x, gate_out, up_out, gate.weights, gate.experts, tensors,
        dropout_x.seed, dropout_a.seed, impl,
    )  # fmt: skip


def _ffn_experts(
    mixture: _FlatFfn,
    activation: Activation,
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    weights: Tensor,
    indices: Tensor,
    adapters: FfnTensors,
    seed_x: Tensor | None = None,
    seed_a: Tensor | None = None,
    impl: str = "grouped",
) -> tuple[Tensor, Tensor]:
    """`reference.ffn` with its gradients (arguments checked and cast by the caller).

    x [T, I]; gate, up [T, F] in x's dtype; weights [T, K] in the compute dtype; indices [T, K]: one
    outside [0, E) means "not routed". impl: "grouped" or "reference". Returns summed, delta.
    """
    routed = (indices >= 0) & (indices < len(mixture.ranks))
    weights = torch.where(routed, weights, 0)
    if impl == "reference":
        static = (mixture.ranks, mixture.scaling, mixture.dropout, mixture.dropout_per_expert)
        inputs = (x, gate, up, weights, indices, *adapters, activation, *static, seed_x, seed_a)
        if x.device.type == "meta":
            return reference.ffn(*inputs)
        with torch.autocast(x.device.type, enabled=False):
            return reference.ffn(*inputs)
    if torch.is_grad_enabled() and torch.compiler.is_compiling() and TORCH < (2, 13):
        # Its gradient of the activation comes out wrong, without a word. Outside fullgraph=True
        # the compiler runs the layer eagerly instead.
        raise RuntimeError(f"training whole-FFN experts compiled needs torch 2.13, this is {TORCH}")
    routing = ops.route(indices, len(mixture.ranks), 1, TILE, CHUNK)
    inputs = (mixture, activation, x, gate, up, weights, *routing, seed_x, seed_a, *adapters)
    if not torch.is_grad_enabled():
        return FfnExperts.forward(*inputs)[:2]
    return FfnExperts.apply(*inputs)[:2]


class RouterLogits(torch.autograd.Function):
    """logits = x Wrt + br, [T, E] in the compute dtype, of a linear router; saves x as it is."""

    @staticmethod
    def forward(x, weight, bias):
        return ops.router_logits(x, [weight], [] if bias is None else [bias])

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dlogits):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        dx = dweight = dbias = None
        if needs_x:
            dx = dlogits.to(x.dtype) @ weight.to(x.dtype)
        if needs_weight or needs_bias:
            dweight, dbias = ops.router_grad(dlogits.contiguous(), x, weight.dtype)
        return dx, dweight, dbias if needs_bias else None
