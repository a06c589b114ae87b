"""Whole-FFN experts between their frozen products: forward and backward, without [P, F] tensors."""

from __future__ import annotations

from torch import Tensor

from moelora_kernels import reference
from moelora_kernels.numerics import absent, compute_dtype
from moelora_kernels.ops.registration import register, register_kernels
from moelora_kernels.types import InnerAdapters, InnerGrads, InnerInputs, InnerOptions, Routing


def _fake(
    inner: InnerInputs,
    adapters: InnerAdapters,
    weights: Tensor,
    routing: Routing,
    options: InnerOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    out, u = inner.gate_out, inner.u_gate
    return out.new_empty(out.shape), out.new_empty(u.shape), out.new_empty(u.shape)


def _fake_backward(
    dsummed: Tensor,
    inner: InnerInputs,
    adapters: InnerAdapters,
    dh: Tensor,
    weights: Tensor,
    routing: Routing,
    options: InnerOptions,
    needs_adapters: bool,
) -> InnerGrads:
    out, u = inner.gate_out, inner.u_gate
    results = [out.new_empty(shape) for shape in (out.shape, out.shape, u.shape, u.shape)]
    results.append(out.new_empty(weights.shape, dtype=compute_dtype(out)))
    for matrix in adapters:
        is_absent = absent(out, matrix.dtype)
        results.append(matrix.new_empty(matrix.shape) if needs_adapters else is_absent)
    return InnerGrads(*results)


_op = register(
    "ffn_inner",
    (
        InnerInputs,
        InnerAdapters,
        "Tensor weights",
        Routing,
        InnerOptions,
    ),
    "(Tensor summed, Tensor h, Tensor u)",
    reference.ffn_inner,
    _fake,
)
_op_backward = register(
    "ffn_inner_backward",
    (
        "Tensor dsummed",
        InnerInputs,
        InnerAdapters,
        "Tensor dh",
        "Tensor weights",
        Routing,
        InnerOptions,
        "bool needs_adapters",
    ),
    "(Tensor dgate_out, Tensor dup_out, Tensor dh_gate, Tensor dh_up, Tensor dweights, "
    "Tensor dgate_b, Tensor dup_b, Tensor ddown_a)",
    reference.ffn_inner_backward,
    _fake_backward,
)
register_kernels("ffn_inner")
register_kernels("ffn_inner_backward")


def ffn_inner(
    inner: InnerInputs,
    adapters: InnerAdapters,
    weights: Tensor,
    routing: Routing,
    options: InnerOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute everything between the frozen products of whole-FFN experts.

        z_tk     = gate_out_t + Bg_e u_gate_tk
        a_tk     = act(z_tk) * (up_out_t + Bu_e u_up_tk)
        summed_t = sum_k w_tk a_tk
        h_tk     = Ad_e dropout(a_tk)               u_tk = scale_e w_tk h_tk

    e is the expert of slot k of token t. a is never stored as a whole. A slot that is not routed,
    or whose weight is zero, adds zero to `summed`, even if its expert contains NaN.

    Args:
        inner: gate_out, up_out [T, F] in x's dtype; u_gate, u_up [P, largest rank].
        adapters: gate_b, up_b [F, R]; down_a [R, F].
        weights: [T, K], the gate weights.
        routing: the routing of the gate's experts.
        options: ranks and scales of the E experts, dropout of a before Ad, activation.

    Returns:
        summed [T, F]; h, u [P, largest rank] in the order of sorted positions, 0 beyond the rank of
        an expert and for pairs that are not routed. All in x's dtype.
    """
    return _op(*inner, *adapters, weights, *routing, *options)


def ffn_inner_backward(
    dsummed: Tensor,
    inner: InnerInputs,
    adapters: InnerAdapters,
    dh: Tensor,
    weights: Tensor,
    routing: Routing,
    options: InnerOptions,
    *,
    needs_adapters: bool = True,
) -> InnerGrads:
    """Compute the gradients of `ffn_inner`, whose z and a are computed again.

        da_tk      = dropout(Ad_e^T dh_tk) + w_tk dsummed_t
        dz_up_tk   = da_tk * act(z_tk)              dz_gate_tk = da_tk * z_up_tk * act'(z_tk)
        dgate_out  = sum_k dz_gate_tk               dup_out    = sum_k dz_up_tk
        dh_gate_tk = scale_e Bg_e^T dz_gate_tk      dh_up_tk   = scale_e Bu_e^T dz_up_tk
        dweight_tk = <dsummed_t, a_tk>              dAd_e      = sum_p dh_p^T dropout(a_p)
        dBg_e      = sum_p dz_gate_p^T u_gate_p     dBu_e      = sum_p dz_up_p^T u_up_p

    dz is zero for a pair whose weight is zero.

    Args:
        dsummed: [T, F], the gradient of `summed`.
        inner, adapters, weights, routing, options: as in the forward.
        dh: [P, largest rank], the gradient of h: scale_e w_tk times the gradient of u.
        needs_adapters: whether to compute dgate_b, dup_b and ddown_a.
    """
    return InnerGrads(
        *_op_backward(dsummed, *inner, *adapters, dh, weights, *routing, *options, needs_adapters)
    )
