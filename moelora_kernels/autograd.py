"""The autograd Function of a mixture-of-LoRA layer, written for n siblings that read the same x."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moelora_kernels import ops


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


FIELDS = len(Sibling._fields)


def _columns(tensor: Tensor, n: int) -> Sequence[Tensor]:
    return (tensor,) if n == 1 else tensor.chunk(n, dim=1)


def _rows(tensor: Tensor, n: int) -> Sequence[Tensor]:
    return (tensor,) if n == 1 else tensor.chunk(n)


def _matrix(dy: Tensor | None, x: Tensor, lora_b: Tensor) -> Tensor:
    """dy [T, O] in x.dtype with dense rows that do not overlap; zero where there is none."""
    if dy is None:
        return x.new_zeros((x.shape[0], lora_b.shape[0]))
    dy = dy if dy.dtype == x.dtype else dy.to(x.dtype)
    return dy if dy.stride(1) == 1 and dy.stride(0) >= dy.shape[1] else dy.contiguous()


class MoeLora(torch.autograd.Function):
    """y_i = x Wt_i + b_i + u_i Bt_i for n siblings; see `reference` for the formulas.

    Saves for backward x, the parameters, h, and the gate or routing: nothing that is O wide.
    """

    @staticmethod
    def forward(plan, x, gates, indices, rows, seed, *tensors):
        siblings = _siblings(tensors)
        h, u, weights, chosen, logits = ops.shrink_gate(
            x,
            [s.lora_a for s in siblings],
            gates,
            indices,
            rows,
            [s.router_weight for s in siblings if s.router_weight is not None],
            [s.router_bias for s in siblings if s.router_bias is not None],
            *plan,
            seed,
        )
        outputs = []
        for sibling, gated in zip(siblings, _columns(u, len(siblings)), strict=True):
            weight, bias, base, _, b, *_ = sibling
            if base is not None:
                # The result keeps the base's dtype; the base's output may be saved elsewhere.
                outputs.append(torch.addmm(base, gated.to(base.dtype), b.to(base.dtype).t()))
                continue
            # Expand first, base product last and in place: y is written once by each product, and
            # the large one is rounded once together with the small one.
            b = (b if b.dtype == x.dtype else b.to(x.dtype)).t()
            y = torch.mm(gated, b) if bias is None else torch.addmm(bias, gated, b)
            outputs.append(y.addmm_(x, weight.t()))
        return (*outputs, h, weights, chosen, logits)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        plan, x, gates, indices, rows, seed, *tensors = inputs
        h, weights, chosen, logits = output[-4:]
        if plan.top_k:
            gates, indices = weights, chosen if plan.top_k < len(plan.ranks) else None
        keep_logits = plan.top_k and not plan.renormalize
        ctx.plan = plan
        ctx.mark_non_differentiable(h, weights, chosen)
        ctx.set_materialize_grads(False)
        saved = [x, gates, indices, rows, seed, h, logits if keep_logits else None]
        for weight, _, _, lora_a, lora_b, router_weight, _ in _siblings(tensors):
            # Of a base that is called nothing is needed, of the biases neither.
            saved += weight, None, None, lora_a, lora_b, router_weight, None
        ctx.save_for_backward(*saved)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        plan = ctx.plan
        x, gates, indices, rows, seed, h, logits, *tensors = ctx.saved_tensors
        siblings = _siblings(tensors)
        n = len(siblings)
        lora_a = [s.lora_a for s in siblings]
        lora_b = [s.lora_b for s in siblings]
        routers = [s.router_weight for s in siblings if s.router_weight is not None]
        dy = [_matrix(g, x, b) for g, b in zip(grads[:n], lora_b, strict=True)]
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
            for g, s in zip(dy, siblings, strict=True):
                if s.weight is not None:
                    dx.addmm_(g, s.weight)
        if ctx.needs_input_grad[2]:
            dgates = dgate.to(gates.dtype)

        needs = _siblings(ctx.needs_input_grad[6:])
        of_a = of_b = of_router = of_router_bias = (None,) * n
        if any(any(need[3:]) for need in needs):
            da, drouter, dbias, of_b = ops.gram(
                x, dh, dlogits, dy, u, lora_a[0].dtype, routers[0].dtype if routers else x.dtype,
                plan.ranks, plan.dropout, plan.dropout_per_expert, seed,
            )  # fmt: skip
            of_a = _rows(da, n)
            if routers:
                of_router, of_router_bias = _rows(drouter, n), _rows(dbias, n)
        of_siblings = []
        for i, need in enumerate(needs):
            of_siblings += [
                dy[i].t() @ x if need.weight else None,
                dy[i].sum(dim=0) if need.bias else None,
                grads[i] if need.base else None,
                of_a[i],
                of_b[i],
                of_router[i],
                of_router_bias[i] if need.router_bias else None,
            ]
        return (None, dx, dgates, None, None, None, *of_siblings)


def run(*inputs) -> tuple:
    """What `MoeLora.apply` returns, with less of Python around it where none of it is needed.

    `Function.apply` looks for functorch transforms and binds its inputs to a signature on every
    call, longer than the smallest products take.
    """
    if not torch.is_grad_enabled():
        return MoeLora.forward(*inputs)
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return MoeLora.apply(*inputs)
    return super(torch.autograd.Function, MoeLora).apply(*inputs)


def _siblings(flat: Sequence) -> list[Sibling]:
    """What the flat inputs of the Function stand for: n siblings, one after the other."""
    return [Sibling._make(flat[i : i + FIELDS]) for i in range(0, len(flat), FIELDS)]
