"""`moe_lora_linear`, a layer as a function; and `run_layer`, which all linear layers call."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from moelora_kernels import dispatch, reference
from moelora_kernels.autograd.frozen import linears_without_frozen
from moelora_kernels.autograd.linear import MoeLora, SqrtGateMoeLora, run, siblings_of
from moelora_kernels.numerics import active_dtype, dropout_seed, is_autocast
from moelora_kernels.types import NO_DROPOUT, Dropout, Gate, LayerOutput, LinearTensors, Mixture


def run_layer(
    mixture: Mixture,
    x: Tensor,
    linears: Sequence[LinearTensors],
    gate: Gate | None = None,
    dropout: Dropout = NO_DROPOUT,
    impl: str = "auto",
    *,
    sqrt_gate: bool = False,
    training: bool = False,
    frozen: tuple[int, ...] = (),
) -> LayerOutput:
    """Run n siblings on x. The caller has checked the arguments and cast the tensors.

        y_i = x Wt_i + b_i + u_i Bt_i        u = scale * gate (.) (dropout(x) At)

    Args:
        mixture: the static options, the same for all siblings.
        x: [T, I].
        linears: the tensors of n siblings. A field is None in all of them or in none.
        gate: the gate of every token; None if the linears have routers that compute it
            (`mixture.router_top_k` is then above 0).
        dropout: applied to x before A.
        impl: "auto", "wide", "grouped", "decode" or "reference".
        sqrt_gate: use the square root of the gate in the gradients of A, B and x. Needs `gate`.
        training: whether "auto" never decodes. Reentrant activation checkpointing runs a layer
            without gradients, then again with gradients: both must have the same bits.
        frozen: the experts whose A and B get gradients of zero, in rising order.

    Returns:
        y_i [T, O_i] of every sibling; and `gate`, or the gate that the routers computed.

    Raises:
        ValueError: `impl` cannot compute this layer, or the siblings have different fields.
    """
    impl = _choose_impl(mixture, x, linears, gate, impl, dropout.p, training)
    if impl == "reference":
        linears = linears_without_frozen(linears, mixture, frozen)
        apply_reference = _reference_sqrt_gate if sqrt_gate else _reference
        if not is_autocast(x.device):
            return apply_reference(mixture, x, linears, gate, dropout)
        with torch.autocast(x.device.type, enabled=False):
            return apply_reference(mixture, x, linears, gate, dropout)
    function = SqrtGateMoeLora if sqrt_gate else MoeLora
    return run(function, impl, mixture, x, linears, gate, dropout, frozen)


def _choose_impl(
    mixture: Mixture,
    x: Tensor,
    linears: Sequence[LinearTensors],
    gate: Gate | None,
    impl: str,
    dropout: float,
    training: bool,
) -> str:
    """Return the formulation to run. Raise ValueError if `impl` cannot compute this layer."""
    if impl in ("wide", "reference"):
        return impl
    num_experts = len(mixture.ranks)
    if gate is None:
        top_k = mixture.router_top_k if mixture.router_top_k < num_experts else None
    else:
        top_k = None if gate.experts is None else gate.experts.shape[1] // len(linears)
    if impl == "decode":
        dispatch.check_decode(x.shape[0], torch.is_grad_enabled(), dropout)
    if impl == "grouped":
        dispatch.check_grouped(top_k, mixture.share_a)
    if impl != "auto":
        return impl
    return dispatch.choose_impl(
        x.device.type,
        tokens=x.shape[0],
        num_experts=num_experts,
        total_rank=sum(mixture.ranks),
        top_k=top_k,
        share_a=mixture.share_a,
        trains=training or dropout > 0.0 or torch.is_grad_enabled(),
    )


def _reference(
    mixture: Mixture,
    x: Tensor,
    linears: Sequence[LinearTensors],
    gate: Gate | None,
    dropout: Dropout,
) -> LayerOutput:
    result = reference.wide(x, siblings_of(linears), gate, mixture, dropout)
    if gate is None:
        gate = mixture.router_gate(result.weights, result.experts, result.logits)
    return LayerOutput(result.y, gate)


def _reference_sqrt_gate(
    mixture: Mixture,
    x: Tensor,
    linears: Sequence[LinearTensors],
    gate: Gate | None,
    dropout: Dropout,
) -> LayerOutput:
    """Run the layer with sqrt(gate), then add the experts with gate - sqrt(gate).

    The experts of the second term are detached, so that only the router receives a gradient from
    it. The first term gives A, B and x their gradients with sqrt(gate).
    """
    assert gate is not None
    root = gate.weights.detach().sqrt()
    y, _ = _reference(mixture, x, linears, gate._replace(weights=root), dropout)
    detached = [
        LinearTensors(None, None, y_i.new_zeros(y_i.shape), s.lora_a.detach(), s.lora_b.detach())
        for y_i, s in zip(y, linears, strict=True)
    ]
    difference = gate._replace(weights=gate.weights - root)
    correction, _ = _reference(mixture, x.detach(), detached, difference, dropout)
    return LayerOutput([a + b for a, b in zip(y, correction, strict=True)], gate)


def moe_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor,
    lora_b: Tensor,
    gates: Tensor,
    indices: Tensor | None = None,
    *,
    ranks: int | Sequence[int],
    scaling: float | Sequence[float],
    rows: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """Return the output of a frozen linear with a gated mixture of LoRA experts.

        y = x Wt + b + u Bt        u = scale * gate (.) (dropout(x) At)

    Args:
        x: [..., I] with T tokens; bf16, fp16, fp32 or fp64.
        weight: [O, I] in x's dtype (under autocast: in any dtype).
        bias: [O] or None.
        lora_a: [R, I], expert-major rows, in x's dtype or float32.
        lora_b: [O, R], expert-major columns, in the dtype of lora_a.
        gates: the gate weights in any float dtype, used in float32. With `indices` [T, K]; without
            `indices` [G, E]. G is T, or 1 (one row for all tokens), or any number if `rows` is
            passed.
        indices: [T, K] int32 or int64: the expert of each slot. A value outside [0, E) means "not
            routed".
        ranks: the rank of all experts, or a sequence of E ranks. R is their sum.
        scaling: the scale of all experts, or a sequence of E scales.
        rows: [T] int32 or int64: the gate row of each token. A row outside [0, G) is a zero gate.
        dropout: the probability in [0, 1) that an element of x is dropped before A, rounded to a
            multiple of 2^-16.
        seed: the seed of the dropout mask. None: it is drawn from torch's default generator.
        impl: "auto", "wide", "grouped" (needs `indices`), "decode" (at most 64 tokens, grad mode
            off) or "reference".

    Returns:
        y [..., O] in x's dtype; under autocast in autocast's dtype.

    Raises:
        ValueError, TypeError: an argument has a wrong value, shape, dtype or device. The message
            begins with the name of the argument.

    Example:
        >>> x, weight = torch.randn(5, 16), torch.randn(32, 16)
        >>> lora_a, lora_b = torch.randn(8, 16), torch.zeros(32, 8)  # 4 experts of rank 2
        >>> gates, indices = torch.randn(5, 4).softmax(dim=-1).topk(2)
        >>> y = moe_lora_linear(
        ...     x, weight, None, lora_a, lora_b, gates, indices, ranks=2, scaling=1.0
        ... )
        >>> y.shape
        torch.Size([5, 32])

    Source: arXiv 2310.18339 (MOELoRA), arXiv 2404.09027 (MING-MOE).
    """
    dispatch.check(impl)
    required = {"x": x, "weight": weight, "lora_a": lora_a, "lora_b": lora_b, "gates": gates}
    for name, tensor in required.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor)}")
    dtype = active_dtype(x)
    expert_ranks, scales = _check_shapes(
        x, weight, bias, lora_a, lora_b, gates, indices, ranks, scaling, rows
    )
    mixture = Mixture(expert_ranks, scales)
    _check_dtypes(dtype, x, weight, bias, lora_a, lora_b, gates)
    tokens = x.reshape(-1, x.shape[-1]).to(dtype)
    seed = dropout_seed(dropout, seed, x.device)
    linear = LinearTensors(weight, bias, None, lora_a, lora_b)
    if weight.dtype != dtype:
        base_output = torch.nn.functional.linear(tokens, weight, bias)
        linear = LinearTensors(None, None, base_output, lora_a, lora_b)
    gate, drop = Gate(gates, indices, rows), Dropout(float(dropout), False, seed)
    (y,), _ = run_layer(mixture, tokens, [linear], gate, drop, impl)
    return y.view(*x.shape[:-1], lora_b.shape[0])


def _expect(condition: bool, argument: str, expected: str, actual) -> None:
    if not condition:
        raise ValueError(f"{argument}: expected {expected}, got {actual}")


def _expect_shape(argument: str, tensor: Tensor, *shape: int) -> None:
    _expect(tensor.shape == shape, argument, f"{[*shape]}", [*tensor.shape])


def _check_shapes(x, weight, bias, lora_a, lora_b, gates, indices, ranks, scaling, rows):
    """Check shapes, devices, ranks and scaling. Return one rank and one scale per expert."""
    _expect(x.dim() >= 1, "x", "[..., I]", [*x.shape])
    features = x.shape[-1]
    _expect(weight.dim() == 2, "weight", f"[O, {features}]", [*weight.shape])
    outputs = weight.shape[0]
    _expect_shape("weight", weight, outputs, features)
    if bias is not None:
        _expect_shape("bias", bias, outputs)
    _expect(lora_a.dim() == 2, "lora_a", f"[R, {features}]", [*lora_a.shape])
    total = lora_a.shape[0]
    _expect_shape("lora_a", lora_a, total, features)
    _expect_shape("lora_b", lora_b, outputs, total)
    ranks, scaling = _check_experts(total, ranks, scaling)
    _check_gates(x[..., 0].numel(), len(ranks), gates, indices, rows)
    named = {"weight": weight, "bias": bias, "lora_a": lora_a, "lora_b": lora_b, "gates": gates}
    for name, tensor in (named | {"indices": indices, "rows": rows}).items():
        if tensor is not None:
            _expect(tensor.device == x.device, name, f"x's device {x.device}", tensor.device)
    return ranks, scaling


def _expect_numbers(argument: str, actual, kinds: tuple[type, ...], expected: str) -> None:
    """Raise unless `actual` is a finite number of one of `kinds`, or a sequence of them."""
    values = actual if isinstance(actual, Sequence) and not isinstance(actual, str) else [actual]
    if any(isinstance(v, bool) or not isinstance(v, kinds) for v in values):
        raise TypeError(f"{argument}: expected {expected}, got {actual!r}")
    _expect(all(map(math.isfinite, values)), argument, "finite numbers", actual)


def _check_experts(total: int, ranks, scaling) -> tuple[tuple[int, ...], tuple[float, ...]]:
    _expect_numbers("ranks", ranks, (int,), "an int or a sequence of ints")
    _expect_numbers("scaling", scaling, (int, float), "a number or a sequence of numbers")
    if isinstance(ranks, int):
        _expect(ranks > 0 and total % ranks == 0, "ranks", f"a divisor of R = {total}", ranks)
        ranks = (ranks,) * (total // ranks)
    ranks = tuple(int(rank) for rank in ranks)
    _expect(min(ranks, default=0) > 0, "ranks", "ranks of at least 1", [*ranks])
    _expect(sum(ranks) == total, "ranks", f"a sum of {total}, the rows of lora_a", [*ranks])
    if isinstance(scaling, (int, float)):
        scaling = (scaling,) * len(ranks)
    scaling = tuple(float(factor) for factor in scaling)
    _expect(len(scaling) == len(ranks), "scaling", f"one number or {len(ranks)}", [*scaling])
    return ranks, scaling


def _check_gates(tokens: int, experts: int, gates, indices, rows) -> None:
    _expect(gates.dim() == 2, "gates", "two dimensions", [*gates.shape])
    if indices is not None:
        _expect(rows is None, "rows", "None if indices is passed", "a tensor")
        _expect_shape("gates", gates, tokens, gates.shape[1])
        _expect(
            gates.shape[1] <= experts, "gates", f"at most E = {experts} columns", gates.shape[1]
        )
        _expect_shape("indices", indices, *gates.shape)
        if indices.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"indices: expected int32 or int64, got {indices.dtype}")
        return
    _expect_shape("gates", gates, gates.shape[0], experts)
    if rows is None:
        _expect(gates.shape[0] in (1, tokens), "gates", f"1 or {tokens} rows", gates.shape[0])
        return
    _expect_shape("rows", rows, tokens)
    if rows.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"rows: expected int32 or int64, got {rows.dtype}")


def _check_dtypes(dtype, x, weight, bias, lora_a, lora_b, gates) -> None:
    named = dict(x=x, weight=weight, lora_a=lora_a, lora_b=lora_b, gates=gates)
    for name, tensor in named.items():
        if not tensor.is_floating_point():
            raise TypeError(f"{name}: expected a float dtype, got {tensor.dtype}")
    if lora_b.dtype != lora_a.dtype:
        raise TypeError(f"lora_b: expected lora_a's dtype {lora_a.dtype}, got {lora_b.dtype}")
    if lora_a.dtype not in (dtype, torch.float32):
        raise TypeError(f"lora_a: expected {dtype} or torch.float32, got {lora_a.dtype}")
    autocast = is_autocast(x.device)
    if weight.dtype != dtype and not autocast:
        raise TypeError(f"weight: expected x's dtype {dtype}, got {weight.dtype}")
    if bias is not None and bias.dtype != weight.dtype:
        raise TypeError(f"bias: expected weight's dtype {weight.dtype}, got {bias.dtype}")
