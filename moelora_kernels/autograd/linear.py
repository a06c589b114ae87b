"""The autograd Function of a mixture-of-LoRA layer: n siblings that read the same x."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moelora_kernels import ops
from moelora_kernels.autograd.frozen import zero_frozen
from moelora_kernels.ops.apply import apply
from moelora_kernels.types import (
    NO_GATE,
    Dropout,
    Gate,
    LayerOutput,
    LinearTensors,
    Mixture,
    Needs,
    Routing,
    SiblingTensors,
)


class _Inputs(NamedTuple):
    """The inputs of `MoeLora.forward` before the tensors of the linears; also their gradients."""

    impl: Any
    mixture: Any
    p: Any
    per_expert: Any
    frozen: Any
    x: Any
    weights: Any
    experts: Any
    rows: Any
    seed: Any


_NUM_INPUTS = len(_Inputs._fields)
_NUM_FIELDS = len(LinearTensors._fields)
_NUM_ROUTING = len(Routing._fields)


def siblings_of(linears: Sequence[LinearTensors]) -> SiblingTensors:
    """Return the tensors of n linears, field by field."""
    return SiblingTensors(*_tensors_by_field(_flat(linears), len(linears)))


def _flat(linears: Sequence[LinearTensors]) -> Sequence[Tensor | None]:
    """Return the first field of all n linears, then the second field of all, and so on."""
    if len(linears) == 1:
        return linears[0]
    return [tensor for field in zip(*linears, strict=True) for tensor in field]


def _by_field(flat: Sequence[Any], n: int) -> list[Sequence[Any]]:
    """Return the n values of each field. flat: the values of n linears, in the order of `_flat`."""
    return [flat[i : i + n] for i in range(0, len(flat), n)]


def _tensors_by_field(flat: Sequence[Tensor | None], n: int) -> list[list[Tensor]]:
    """Return the n tensors of each field; an empty list for a field that is None."""
    return [[] if flat[i] is None else [*flat[i : i + n]] for i in range(0, len(flat), n)]


class MoeLora(torch.autograd.Function):
    """Compute y_i = x Wt_i + b_i + u_i Bt_i for n siblings; `reference` has the formulas.

    The inputs are the fields of `_Inputs`, then the tensors of the linears in the order of `_flat`.
    The outputs are the y_i, then the other fields of `types.LayerForward` in their order; "wide"
    has no routing arrays.

    Saved for backward: x, the parameters, h, the gate, and the routing if impl is "grouped". No
    output of width O is saved.
    """

    @staticmethod
    def forward(*inputs):
        impl, mixture, p, per_expert, _, x, weights, experts, rows, seed, *linears = inputs
        tensors = SiblingTensors(*_tensors_by_field(linears, len(linears) // _NUM_FIELDS))
        gate, dropout = Gate(weights, experts, rows), Dropout(p, per_expert, seed)
        op = ops.grouped if impl == "grouped" else ops.wide
        y, h, weights, experts, logits, *routing = op(x, tensors, gate, mixture, dropout)
        outputs = (*y, h, weights, experts, logits)
        return (*outputs, *routing) if impl == "grouped" else outputs

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        impl, mixture, p, per_expert, frozen, x, weights, experts, rows, seed, *linears = inputs
        n = len(linears) // _NUM_FIELDS
        base_weight, _, _, lora_a, lora_b, router_weight, _ = _by_field(linears, n)
        h, out_weights, out_experts, out_logits, *routing = output[n:]
        logits = None
        if mixture.router_top_k:
            weights, experts, _, logits = mixture.router_gate(out_weights, out_experts, out_logits)
            # Without renormalize the backward of the softmax reads the logits.
            logits = None if mixture.renormalize else logits
        ctx.impl, ctx.mixture, ctx.dropout = impl, mixture, (p, per_expert)
        ctx.frozen = frozen
        # Only the y_i and the logits have a gradient. The gate of a fused router is returned for
        # the routing record; losses on it use the logits.
        ctx.mark_non_differentiable(h, out_weights, out_experts, *routing)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(
            x, weights, experts, rows, logits, seed, h, *(routing or [None] * _NUM_ROUTING),
            *base_weight, *lora_a, *lora_b, *router_weight,
        )  # fmt: skip

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        # Read once, because under activation checkpointing a second read fails.
        try:
            saved = ctx.saved_tensors
        except RuntimeError as error:
            saved = _kept_tensors(ctx, error)
        x, weights, experts, rows, logits, seed, h, *others = saved
        _, _, _, _, _, needs_x, needs_weights, _, _, _, *needs_linears = ctx.needs_input_grad
        n = len(needs_linears) // _NUM_FIELDS
        base_weight, lora_a, lora_b, router_weight = _tensors_by_field(others[_NUM_ROUTING:], n)
        tensors = SiblingTensors(base_weight, [], [], lora_a, lora_b, router_weight, [])
        gate, dropout = Gate(weights, experts, rows, logits), Dropout(*ctx.dropout, seed)
        # The outputs are n x y, h, weights, experts, logits, and the routing.
        dlogits = grads[n + 3]
        dy = [
            x.new_zeros((x.shape[0], b.shape[0])) if g is None else g
            for g, b in zip(grads[:n], lora_b, strict=True)
        ]
        needs_weight, needs_bias, needs_output, *needs_adapters = _by_field(needs_linears, n)
        needs = Needs(needs_x, any(map(any, needs_adapters)))
        unused: set[int] = set()
        if n > 1 and not torch.compiler.is_compiling():
            unused = getattr(ctx, "unused", unused)
            if not torch._C._autograd._get_current_graph_task_keep_graph():
                _keep_tensors(ctx, saved, grads[:n], unused)
        if ctx.impl == "grouped":
            routing = Routing(*others[:_NUM_ROUTING])
            result = ops.grouped_backward(
                dy, x, tensors, h, gate, dlogits, routing, ctx.mixture, dropout, needs, ctx.frozen
            )
        else:
            result = ops.wide_backward(
                dy, x, tensors, h, gate, dlogits, ctx.mixture, dropout, needs
            )
        dx, dgate, da, drouter, drouter_bias, db = result

        # The layers freeze the base, but its weight and bias can require a gradient: after a user's
        # requires_grad_, or in `moe_lora_linear`.
        absent: Sequence[Tensor | None] = [None] * n
        dweight = dbias = absent
        if any(needs_weight):
            dweight = [
                g.to(x.dtype).t() @ x if needed else None
                for g, needed in zip(dy, needs_weight, strict=True)
            ]
        if any(needs_bias):
            dbias = [
                g.to(x.dtype).sum(dim=0) if needed else None
                for g, needed in zip(dy, needs_bias, strict=True)
            ]
        da_blocks = _row_blocks(da, n) if needs.adapters else absent
        if needs.adapters and ctx.frozen and ctx.impl != "grouped":
            # Experts that share A have no rows of their own; it does not train then.
            zero_frozen(
                absent if ctx.mixture.share_a else da_blocks, db, ctx.mixture.ranks, ctx.frozen
            )
        has_router = needs.adapters and len(router_weight) > 0
        # In the order of `LinearTensors`.
        fields = (
            dweight,
            dbias,
            dy if any(needs_output) else absent,
            da_blocks,
            db if needs.adapters else absent,
            _row_blocks(drouter, n) if has_router else absent,
            # A router may have no bias.
            _row_blocks(drouter_bias, n) if has_router and any(needs_adapters[-1]) else absent,
        )
        gradients = [gradient for field in fields for gradient in field]
        if dlogits is None and hasattr(ctx, "unused"):
            # Called alone, a linked sibling whose output no loss reads has no gradient.
            unused = unused | {i for i, g in enumerate(grads[:n]) if g is None}
        if unused:
            gradients = [None if i % n in unused else g for i, g in enumerate(gradients)]
        dx = dx if needs_x else None
        dweights = dgate.to(weights.dtype) if needs_weights else None
        # In the order of `_Inputs`.
        return (None, None, None, None, None, dx, dweights, None, None, None, *gradients)


class SqrtGateMoeLora(MoeLora):
    """`MoeLora` whose gradients of A, B and x use the square root of the gate.

        dh = scale * sqrt(gate) (.) du      dB = dy^T (scale * sqrt(gate) (.) h)
        dgate = scale * <du, h>             as in `MoeLora`: this formula does not contain the gate

    It takes a gate; it does not work with routers in `linears`.

    Source: arXiv 2502.15828 (Riemannian preconditioned mixture of LoRA).
    """

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        saved_inputs = _Inputs(*inputs[:_NUM_INPUTS])
        saved_inputs = saved_inputs._replace(weights=saved_inputs.weights.sqrt())
        MoeLora.setup_context(ctx, (*saved_inputs, *inputs[_NUM_INPUTS:]), output)


class _Kept(NamedTuple):
    """The saved tensors of siblings after a backward from some of the outputs."""

    tensors: list[Tensor | None]
    versions: list[int]
    # The positions of the outputs without a gradient so far.
    pending: set[int]


class Unused(set[int]):
    """The positions of the outputs of `run` that are not used, so that they get no gradient.

    The caller removes the position of an output when it uses it.

    is_closed: whether a backward has freed the graph, so that the others can no longer be used.
    """

    is_closed = False


class SkipUnused(torch.autograd.Function):
    """Return tensors of n siblings unchanged. Those of unused siblings get no gradient.

    The backward of a concatenation returns zeros for them. With a gradient of zeros, weight decay
    would change the parameters of a sibling that was not called.

    The inputs are an `Unused`, n, and the tensors: one of every sibling, then the next of every
    sibling. A tensor can be None.
    """

    @staticmethod
    def forward(ctx, unused, n, *tensors):
        ctx.unused, ctx.n = unused, n
        ctx.set_materialize_grads(False)
        return tensors

    @staticmethod
    def backward(ctx, *grads):
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.unused.is_closed = True
        return (None, None, *[None if i % ctx.n in ctx.unused else g for i, g in enumerate(grads)])


def share_unused(y: Tensor, unused: Unused) -> None:
    """Set the positions of the outputs of `run` that are not used. y: an output, or a view of one.

    A backward that frees the graph closes `unused`.
    """
    node = y.grad_fn
    if node is not None and y._is_view():
        node = node.next_functions[0][0]
    if isinstance(node, torch.autograd.function.BackwardCFunction):
        node.unused = unused


def _keep_tensors(
    ctx: Any,
    flat: Sequence[Tensor | None],
    dy: Sequence[Tensor | None],
    unused: set[int],
) -> None:
    """Keep the saved tensors, which torch frees now, if other outputs still wait for backward.

    Each layer alone has a graph, so the outputs of siblings can also run backward one by one.
    """
    if unused:
        ctx.unused.is_closed = True
    kept = getattr(ctx, "kept", None)
    waiting = range(len(dy)) if kept is None else kept.pending
    pending = {i for i in waiting if dy[i] is None and i not in unused}
    # torch frees the nodes behind this one too. Only the graph of x may have any.
    is_leaf = all([node is None or hasattr(node, "variable") for node, _ in ctx.next_functions[1:]])
    ctx.kept = None
    if pending and is_leaf:
        # An output of the node would keep the node alive. A detached one has the same version.
        tensors = [t if t is None else t.detach() for t in flat]
        ctx.kept = _Kept(tensors, [0 if t is None else t._version for t in tensors], pending)


def _kept_tensors(ctx: Any, error: RuntimeError) -> list[Tensor | None]:
    """Return the saved tensors, which torch has freed. Raise RuntimeError if they are not kept."""
    kept = getattr(ctx, "kept", None)
    is_one_layer = len(ctx.needs_input_grad) == _NUM_INPUTS + _NUM_FIELDS
    if kept is None and is_one_layer:
        raise error
    if kept is None:
        raise RuntimeError(
            "the outputs of this layer and of its siblings have one graph, and backward has freed "
            "it already. Call backward once, for the sum of the losses; or pass retain_graph=True "
            "in every backward but the last"
        ) from error
    if kept.versions != [0 if t is None else t._version for t in kept.tensors]:
        raise RuntimeError(
            "x or a parameter of siblings was changed in place between the backwards of two "
            "outputs, so the gradient cannot be computed; run the forward again"
        ) from error
    return kept.tensors


def _row_blocks(tensor: Tensor, n: int) -> Sequence[Tensor]:
    """Return n row blocks of the same size."""
    return [tensor] if n == 1 else tensor.chunk(n)


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
    frozen: tuple[int, ...] = (),
) -> LayerOutput:
    """Run `function`, which is `MoeLora` or derived from it; impl is "wide", "grouped" or "decode".

    frozen: the experts whose A and B get gradients of zero, in rising order. "decode" needs grad
    mode off and no dropout; the caller has checked it.

    Raises ValueError if some siblings have a tensor that others lack.
    """
    n, first = len(linears), linears[0]
    if n > 1:
        is_missing = [tensor is None for tensor in first]
        if any([[tensor is None for tensor in s] != is_missing for s in linears]):
            names = [_field_names(linear) for linear in linears]
            raise ValueError(f"siblings: expected the same tensors for every linear, got {names}")
    if impl == "decode":
        y, weights, experts, logits = ops.decode(x, siblings_of(linears), gate, mixture)
    elif torch.is_grad_enabled():
        weights, experts, rows, _ = gate or NO_GATE
        p, per_expert, seed = dropout
        static = (impl, mixture, p, per_expert, frozen)
        inputs = (*static, x, weights, experts, rows, seed, *_flat(linears))
        outputs = apply(function, *inputs)
        y, (_, weights, experts, logits, *_) = [*outputs[:n]], outputs[n:]
    else:
        op = ops.grouped if impl == "grouped" else ops.wide
        y, _, weights, experts, logits, *_ = op(x, siblings_of(linears), gate, mixture, dropout)
    if gate is None:
        gate = mixture.router_gate(weights, experts, logits)
    return LayerOutput(y, gate)
