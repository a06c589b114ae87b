"""The autograd Function of a mixture-of-LoRA layer: n siblings that read the same x."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moelora_kernels import ops
from moelora_kernels.ops.apply import apply
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


class _Inputs(NamedTuple):
    """The inputs of `MoeLora.forward` before the tensors of the linears; also their gradients."""

    impl: Any
    mixture: Any
    p: Any
    per_expert: Any
    x: Any
    weights: Any
    experts: Any
    rows: Any
    seed: Any


class _LinearNeeds(NamedTuple):
    """Whether each field of `LinearTensors` needs a gradient."""

    weight: bool
    bias: bool
    base_output: bool
    lora_a: bool
    lora_b: bool
    router_weight: bool
    router_bias: bool


class _Saved(NamedTuple):
    """The tensors that `MoeLora` saves for backward, before those of the linears."""

    x: Tensor
    # The gate.
    weights: Tensor
    experts: Tensor | None
    rows: Tensor | None
    logits: Tensor | None
    seed: Tensor | None
    h: Tensor
    # The routing; None if impl is "wide".
    order: Tensor | None
    offsets: Tensor | None
    tiles: Tensor | None
    chunks: Tensor | None


class _SavedLinear(NamedTuple):
    """The tensors of one linear that `MoeLora` saves for backward."""

    weight: Tensor | None
    lora_a: Tensor
    lora_b: Tensor
    router_weight: Tensor | None


_NUM_INPUTS = len(_Inputs._fields)
_NUM_SAVED = len(_Saved._fields)
# The position of the logits among the outputs of `MoeLora`, after the y_i.
_LOGITS = LayerForward._fields.index("logits") - 1


def siblings_of(linears: Sequence[LinearTensors]) -> SiblingTensors:
    """Return the tensors of n linears, field by field."""
    return SiblingTensors(*_by_field(linears))


def _by_field(linears: Sequence[NamedTuple]) -> list[list[Tensor]]:
    """Return one list of tensors for each field of n linears, without None."""
    return [[t for t in field if t is not None] for field in zip(*linears, strict=True)]


def _by_linear(structure: type, flat: Sequence[Any]) -> list[Any]:
    """Return one `structure` per linear. flat: all fields of linear 0, then of linear 1, ..."""
    size = len(structure._fields)
    return [structure(*flat[i : i + size]) for i in range(0, len(flat), size)]


class MoeLora(torch.autograd.Function):
    """Compute y_i = x Wt_i + b_i + u_i Bt_i for n siblings; `reference` has the formulas.

    The inputs are the fields of `_Inputs`, then the fields of `LinearTensors` of every linear,
    linear by linear. The outputs are the y_i, then the other fields of `types.LayerForward` in
    their order; "wide" has no routing arrays.

    Saved for backward: x, the parameters, h, the gate, and the routing if impl is "grouped". No
    output of width O is saved.
    """

    @staticmethod
    def forward(*inputs):
        impl, mixture, p, per_expert, x, weights, experts, rows, seed, *fields = inputs
        tensors = siblings_of(_by_linear(LinearTensors, fields))
        gate, dropout = Gate(weights, experts, rows), Dropout(p, per_expert, seed)
        result = _op(impl)(x, tensors, gate, mixture, dropout)
        outputs = (*result.y, result.h, result.weights, result.experts, result.logits)
        if impl == "grouped":
            outputs += (result.order, result.offsets, result.tiles, result.chunks)
        return outputs

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        impl, mixture, p, per_expert, x, weights, experts, rows, seed, *fields = inputs
        linears = _by_linear(LinearTensors, fields)
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
        # Only the y_i and the logits have a gradient. The gate of a fused router is returned for
        # the routing record; losses on it use the logits.
        ctx.mark_non_differentiable(result.h, result.weights, *integers)
        ctx.set_materialize_grads(False)
        # In the order of `_Saved`, then of `_SavedLinear`.
        ctx.save_for_backward(
            x, weights, experts, rows, logits, seed, result.h, *routing,
            *[t for s in linears for t in (s.weight, s.lora_a, s.lora_b, s.router_weight)],
        )  # fmt: skip

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        # Read once, because under activation checkpointing a second read fails.
        try:
            flat = ctx.saved_tensors
        except RuntimeError as error:
            flat = _kept_tensors(ctx, error)
        saved = _Saved(*flat[:_NUM_SAVED])
        x, weights, seed = saved.x, saved.weights, saved.seed
        base_weight, lora_a, lora_b, router_weight = _by_field(
            _by_linear(_SavedLinear, flat[_NUM_SAVED:])
        )
        tensors = SiblingTensors(base_weight, [], [], lora_a, lora_b, router_weight, [])
        n = len(lora_b)
        dy = [
            x.new_zeros((x.shape[0], b.shape[0])) if g is None else g
            for g, b in zip(grads[:n], lora_b, strict=True)
        ]
        gate, dlogits = Gate(weights, saved.experts, saved.rows, saved.logits), grads[n + _LOGITS]
        needs_input = _Inputs(*ctx.needs_input_grad[:_NUM_INPUTS])
        needs_linears = _by_linear(_LinearNeeds, ctx.needs_input_grad[_NUM_INPUTS:])
        needs_adapters = any(
            [s.lora_a or s.lora_b or s.router_weight or s.router_bias for s in needs_linears]
        )
        needs = Needs(needs_input.x, needs_adapters)
        unused: set[int] = set()
        if n > 1 and not torch.compiler.is_compiling():
            unused = getattr(ctx, "unused", unused)
            if not torch._C._autograd._get_current_graph_task_keep_graph():
                _keep_tensors(ctx, flat, grads[:n], unused)
        mixture, dropout = ctx.mixture, Dropout(*ctx.dropout, seed)
        if ctx.impl == "grouped":
            routing = Routing(saved.order, saved.offsets, saved.tiles, saved.chunks)
            result = ops.grouped_backward(
                dy, x, tensors, saved.h, gate, dlogits, routing, mixture, dropout, needs
            )
        else:
            result = ops.wide_backward(
                dy, x, tensors, saved.h, gate, dlogits, mixture, dropout, needs
            )
        dx, dgate, da, drouter, dbias, db = result
        has_adapters, has_router = len(db) > 0, len(db) > 0 and len(router_weight) > 0
        gradients: list[Tensor | None] = []
        for i, (g, needed) in enumerate(zip(dy, needs_linears, strict=True)):
            if i in unused:
                gradients += [None] * len(needed)
                continue
            # In the order of `LinearTensors`. The layers freeze the base, but its weight and bias
            # can require a gradient: after a user's requires_grad_, or in `moe_lora_linear`.
            gradients += [
                g.to(x.dtype).t() @ x if needed.weight else None,
                g.to(x.dtype).sum(dim=0) if needed.bias else None,
                g if needed.base_output else None,
                _row_block(da, i, n) if has_adapters else None,
                db[i] if has_adapters else None,
                _row_block(drouter, i, n) if has_router else None,
                _row_block(dbias, i, n) if has_router and needed.router_bias else None,
            ]
        dx = dx if needs_input.x else None
        dweights = dgate.to(weights.dtype) if needs_input.weights else None
        # In the order of `_Inputs`.
        return (None, None, None, None, dx, dweights, None, None, None, *gradients)


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
    is_one_layer = len(ctx.needs_input_grad) == _NUM_INPUTS + len(LinearTensors._fields)
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
        is_missing = [tensor is None for tensor in first]
        if any([[tensor is None for tensor in s] != is_missing for s in linears]):
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
    outputs = apply(function, *inputs)
    if gate is None:
        result = LayerForward([], *outputs[n:])
        gate = mixture.router_gate(result.weights, result.experts, result.logits)
    return LayerOutput([*outputs[:n]], gate)
