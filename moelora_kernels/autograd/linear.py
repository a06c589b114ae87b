"""The autograd Function of a mixture-of-LoRA layer, written for n siblings that read the same x."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moelora_kernels import ops
from moelora_kernels.types import LinearTensors


class _Flat(NamedTuple):
    """What is static about a layer: the same for all siblings, all tokens and all steps."""

    ranks: tuple[int, ...]
    scaling: tuple[float, ...]
    share_a: bool = False
    # K of a linear router, 0 where the gates are given.
    top_k: int = 0
    renormalize: bool = True
    temperature: float = 1.0
    dropout: float = 0.0
    dropout_per_expert: bool = False


class MoeLora(torch.autograd.Function):
    """y_i = x Wt_i + b_i + u_i Bt_i for n siblings; see `reference` for the formulas.

    `tensors` are the siblings' tensors field by field, counts[f] of them (n or 0) for field f.
    Saves for backward x, the parameters, h, and the gate or routing: nothing that is O wide.
    """

    @staticmethod
    def forward(impl, mixture, counts, x, gates, indices, rows, seed, *tensors):
        forward = ops.grouped if impl == "grouped" else ops.wide
        fields = _split(tensors, counts)
        outputs, *rest = forward(x, *fields, gates, indices, rows, seed, *mixture)
        return (*outputs, *rest)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        _, mixture, counts, x, gates, indices, rows, seed, *tensors = inputs
        h, *routing, weights, chosen, logits = output[counts[4] :]
        if mixture.top_k:
            gates, indices = weights, chosen if mixture.top_k < len(mixture.ranks) else None
        keep_logits = mixture.top_k and not mixture.renormalize
        weight, _, _, lora_a, lora_b, router_weight, _ = _split(tensors, counts)
        ctx.mixture, ctx.counts, ctx.routing = mixture, counts, len(routing)
        ctx.mark_non_differentiable(h, *routing, weights, chosen)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            x, gates, indices, rows, seed, h, logits if keep_logits else None, *routing,
            *weight, *lora_a, *lora_b, *router_weight,
        )  # fmt: skip

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        x, gates, indices, rows, seed, h, logits, *tensors = ctx.saved_tensors
        of_weight, of_bias, of_base, of_a, of_b, of_router, of_router_bias = ctx.counts
        routing, weight, lora_a, lora_b, router_weight = _split(
            tensors, (ctx.routing, of_weight, of_a, of_b, of_router)
        )
        _, _, _, needs_x, needs_gates, _, _, _, *needs = ctx.needs_input_grad
        needs_base = needs[: of_weight + of_bias + of_base]
        dy = [
            x.new_zeros((x.shape[0], b.shape[0])) if g is None else g
            for g, b in zip(grads[:of_b], lora_b, strict=True)
        ]
        backward = ops.grouped_backward if routing else ops.wide_backward
        dx, dgate, da, drouter, dbias, db = backward(
            dy, x, weight, lora_a, lora_b, router_weight, h, gates, indices, *(routing or [rows]),
            logits, grads[-1], seed, *ctx.mixture, needs_x, any(needs[len(needs_base) :]),
        )  # fmt: skip
        of_bases = [None] * len(needs_base)
        if any(needs_base):
            of_bases = _base_gradients(dy, x, needs_base, ctx.counts)
        if not db:
            da = drouter = dbias = None
            db = [None] * of_b
        return (
            None, None, None, dx if needs_x else None,
            dgate.to(gates.dtype) if needs_gates else None, None, None, None, *of_bases,
            *_rows(da, of_a), *db, *_rows(drouter, of_router), *_rows(dbias, of_router_bias),
        )  # fmt: skip


class SqrtGateMoeLora(MoeLora):
    """`MoeLora` whose gradients of A, B and x see the root of the gates, which are given.

        dh = scale * sqrt(gate) (.) P       dB = dy^T (scale * sqrt(gate) (.) h)
        dgate = scale * <P, h>              as before: it has no gate in it

    Source: arXiv 2502.15828 (Riemannian preconditioned mixture of LoRA).
    """

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        impl, mixture, counts, x, gates, *rest = inputs
        MoeLora.setup_context(ctx, (impl, mixture, counts, x, gates.sqrt(), *rest), output)


def _base_gradients(dy: list[Tensor], x: Tensor, needs: list[bool], counts: tuple) -> list:
    """Gradients of weights, biases and called bases, where they are asked for."""
    of_weight, of_bias, of_base, *_ = counts
    makers = (
        (of_weight, lambda g: g.to(x.dtype).t() @ x),
        (of_bias, lambda g: g.to(x.dtype).sum(dim=0)),
        (of_base, lambda g: g),
    )
    made = [(make, g) for count, make in makers for g in dy[:count]]
    return [make(g) if need else None for need, (make, g) in zip(needs, made, strict=True)]


def _rows(tensor: Tensor | None, n: int) -> Sequence[Tensor | None]:
    """The row blocks of n siblings."""
    if tensor is None or n <= 1:
        return (tensor,) * n
    return tensor.chunk(n)


def _split(flat: Sequence, counts: Sequence[int]) -> list[list]:
    """`flat` cut into lists of these lengths."""
    rest = iter(flat)
    return [[next(rest) for _ in range(count)] for count in counts]


def _present(siblings: Sequence[LinearTensors]) -> list[list[str]]:
    named = (zip(LinearTensors._fields, sibling, strict=True) for sibling in siblings)
    return [[name for name, tensor in fields if tensor is not None] for fields in named]


def run(
    impl: str,
    mixture: _Flat,
    siblings: Sequence[LinearTensors],
    *inputs,
    function: type[MoeLora] = MoeLora,
) -> tuple:
    """The outputs of `MoeLora` for x, gates, indices, rows, seed; impl is "wide" or "grouped".

    function: `MoeLora` or one derived from it.

    Raises ValueError where some siblings have a tensor that others lack.
    """
    n, first = len(siblings), siblings[0]
    absent = [tensor is None for tensor in first]
    if n > 1 and any([[tensor is None for tensor in s] != absent for s in siblings]):
        raise ValueError(f"siblings: expected the same tensors of each, got {_present(siblings)}")
    tensors = [t for field in zip(*siblings, strict=True) for t in field if t is not None]
    counts = tuple([0 if missing else n for missing in absent])
    if not torch.is_grad_enabled():
        return function.forward(impl, mixture, counts, *inputs, *tensors)
    if torch._C._are_functorch_transforms_active():
        return function.apply(impl, mixture, counts, *inputs, *tensors)
    if torch.compiler.is_compiling():
        # Where nothing needs a gradient, Dynamo calls the forward of a Function with a context
        # before its arguments, which this form of a Function does not take.
        trains = any([t is not None and t.requires_grad for t in (*inputs, *tensors)])
        call = function.apply if trains else function.forward
        return call(impl, mixture, counts, *inputs, *tensors)
    # `Function.apply` looks for functorch transforms and binds its inputs to a signature on every
    # call, longer than the smallest products take.
    return super(torch.autograd.Function, function).apply(impl, mixture, counts, *inputs, *tensors)
