"""The autograd Function of a mixture-of-LoRA layer, written for n siblings that read the same x."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moelora_kernels import ops

INPUTS_PER_SIBLING = 7


class Plan(NamedTuple):
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


class Sibling(NamedTuple):
    """The tensors of one linear: `base` is the output of a base that is called, not read."""

    weight: Tensor | None  # [O, I]
    bias: Tensor | None  # [O]
    base: Tensor | None  # [T, O]
    lora_a: Tensor  # [R, I], or [r, I] with share_a
    lora_b: Tensor  # [O, R]
    router_weight: Tensor | None  # [E, I]
    router_bias: Tensor | None  # [E]


def _present(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [t for t in tensors if t is not None]


def _columns(tensor: Tensor, n: int) -> Sequence[Tensor]:
    return (tensor,) if n == 1 else tensor.chunk(n, dim=1)


def _rows(tensor: Tensor, n: int) -> Sequence[Tensor]:
    return (tensor,) if n == 1 else tensor.chunk(n)


def _rows_apart(dy: Tensor) -> Tensor:
    """dy itself if its rows are dense and do not overlap, else a contiguous copy."""
    if dy.stride(1) == 1 and dy.stride(0) >= dy.shape[1]:
        return dy
    return dy.contiguous()


class MoeLora(torch.autograd.Function):
    """y_i = x Wt_i + b_i + u_i Bt_i for n siblings; see `reference` for the formulas.

    Saves for backward x, the parameters, h, and the gate or routing: nothing that is O wide.
    """

    @staticmethod
    def forward(plan, x, gates, indices, rows, seed, *tensors):
        siblings = [Sibling(*fields) for fields in zip(*_fields(tensors), strict=True)]
        h, u, weights, chosen, logits = ops.shrink_gate(
            x,
            [s.lora_a for s in siblings],
            gates,
            indices,
            rows,
            _present([s.router_weight for s in siblings]),
            _present([s.router_bias for s in siblings]),
            plan.ranks,
            plan.scaling,
            plan.share_a,
            plan.top_k,
            plan.renormalize,
            plan.temperature,
            plan.dropout,
            plan.dropout_per_expert,
            seed,
        )
        outputs = []
        for sibling, gated in zip(siblings, _columns(u, len(siblings)), strict=True):
            if sibling.base is not None:
                # The result keeps the base's dtype; the base's output may be saved elsewhere.
                base = sibling.base
                b = sibling.lora_b.to(base.dtype)
                outputs.append(torch.addmm(base, gated.to(base.dtype), b.t()))
                continue
            # Expand first, base product last and in place: y is written once by each product, and
            # the large one is rounded once together with the small one.
            b = sibling.lora_b if sibling.lora_b.dtype == x.dtype else sibling.lora_b.to(x.dtype)
            if sibling.bias is None:
                y = torch.mm(gated, b.t())
            else:
                y = torch.addmm(sibling.bias, gated, b.t())
            outputs.append(y.addmm_(x, sibling.weight.t()))
        return (*outputs, h, weights, chosen, logits)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        plan, x, gates, indices, rows, seed, *tensors = inputs
        weight, _, _, lora_a, lora_b, router_weight, _ = _fields(tensors)
        h, weights, chosen, logits = output[-4:]
        if plan.top_k:
            gates, indices = weights, chosen if plan.top_k < len(plan.ranks) else None
        keep_logits = plan.top_k and not plan.renormalize
        ctx.plan = plan
        ctx.siblings = len(lora_a)
        ctx.mark_non_differentiable(h, weights, chosen)
        ctx.set_materialize_grads(False)
        ctx.shapes = [y.shape for y in output[:-4]]
        ctx.save_for_backward(
            x, gates, indices, rows, seed, h, logits if keep_logits else None,
            *weight, *lora_a, *lora_b, *router_weight,
        )  # fmt: skip

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        plan, n = ctx.plan, ctx.siblings
        x, gates, indices, rows, seed, h, logits, *tensors = ctx.saved_tensors
        weight, lora_a, lora_b, routers = (tensors[i * n : (i + 1) * n] for i in range(4))
        routers = _present(routers)
        dy = [
            x.new_zeros(shape) if g is None else _rows_apart(g.to(x.dtype))
            for g, shape in zip(grads[:n], ctx.shapes, strict=True)
        ]
        dh, u, dgate = ops.shrink_gate_backward(
            dy, lora_b, h, gates, indices, rows, logits, grads[-1],
            plan.ranks, plan.scaling, plan.share_a, plan.top_k, plan.renormalize, plan.temperature,
        )  # fmt: skip
        dlogits = dgate if routers else None

        dx = dgates = None
        if ctx.needs_input_grad[1]:
            dx = ops.shrink_dx(
                dh, dlogits, lora_a, routers,
                plan.ranks, plan.dropout, plan.dropout_per_expert, seed,
            )  # fmt: skip
            for g, w in zip(dy, weight, strict=True):
                if w is not None:
                    dx.addmm_(g, w)
        if ctx.needs_input_grad[2]:
            dgates = dgate.to(gates.dtype)

        needs = Sibling(*_fields(ctx.needs_input_grad[-INPUTS_PER_SIBLING * n :]))
        none = (None,) * n
        of_a = of_b = of_router = of_router_bias = none
        if any(needs.lora_a + needs.lora_b + needs.router_weight + needs.router_bias):
            da, drouter, dbias, of_b = ops.gram(
                x, dh, dlogits, dy, u, lora_a[0].dtype, routers[0].dtype if routers else x.dtype,
                plan.ranks, plan.dropout, plan.dropout_per_expert, seed,
            )  # fmt: skip
            of_a = _rows(da, n)
            if routers:
                of_router = _rows(drouter, n)
            if any(needs.router_bias):
                of_router_bias = _rows(dbias, n)
        of_weight = [g.t() @ x if need else None for g, need in zip(dy, needs.weight, strict=True)]
        of_bias = [g.sum(dim=0) if need else None for g, need in zip(dy, needs.bias, strict=True)]
        of_base = [g if need else None for g, need in zip(grads[:n], needs.base, strict=True)]
        return (
            None, dx, dgates, None, None, None,
            *of_weight, *of_bias, *of_base, *of_a, *of_b, *of_router, *of_router_bias,
        )  # fmt: skip


def _fields(tensors: Sequence) -> list[list]:
    """The flat inputs of the Function, one list of n per field of `Sibling`."""
    n = len(tensors) // INPUTS_PER_SIBLING
    return [list(tensors[i * n : (i + 1) * n]) for i in range(INPUTS_PER_SIBLING)]


class _Bound(inspect.BoundArguments):
    """Arguments that are bound already: all by position, none left to a default."""

    def __init__(self, given: tuple) -> None:
        self.given = given

    args = property(lambda self: self.given)
    kwargs = property(lambda self: {})

    def apply_defaults(self) -> None:
        """There are none."""


class _Positional(inspect.Signature):
    """A signature whose arguments all come by position, so that binding them changes nothing."""

    def bind(self, *args) -> _Bound:
        """The arguments as they are."""
        return _Bound(args)


# `Function.apply` binds its arguments to the signature of `forward` on every call, which takes
# longer than the smallest of the products (200 of 2,900 us forward and backward at T = 16,
# 2048 -> 2048, with cold caches).
MoeLora.forward.__signature__ = _Positional.from_callable(MoeLora.forward)
