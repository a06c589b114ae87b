"""RoutingRecord: the gates and the logits that a layer used in one forward of the model."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moelora_kernels.nn.wrappers import unwrap
from moelora_kernels.numerics import is_backward
from moelora_kernels.types import Gate


class RoutedCall(NamedTuple):
    """The routing of one call of a layer."""

    weights: Tensor  # [T, K] with `experts`, else dense [G, E]; detached
    experts: Tensor | None  # [T, K], the expert of each slot
    logits: Tensor | None  # [G, E] float32, attached to the graph; None without a router
    shape: tuple[int, ...]  # the shape of x without the features: T is its product
    rows: Tensor | None = None  # int32 [T], the gate row of each token; None if G is T or 1
    tasks: Tensor | None = None  # [G] or [G, L], the task ids of the gate rows; None without tasks
    mask: Tensor | None = None  # the token mask of the layer's part of the model; see token_masks


class RoutingRecord:
    """The routing of the calls of a layer in the last forward of the model.

    A forward of the model drops the routing of the forward before it, also in layers that it does
    not call. If it calls a layer several times, the record has one entry for each call. A forward
    without autograd (evaluation, a reference model) does not drop the routing of a forward with
    autograd, so the auxiliary loss of the training forward stays available. Activation
    checkpointing repeats a forward; the repeated forward is not recorded.

    `follow_forwards` adds hooks to a model, so that the records know when a forward of the model
    begins. Without these hooks each call of a layer counts as one forward.

    Copies of a layer start with an empty record.

    Attributes:
        weights: [T, K] with `indices`; else dense [G, E]. Detached. None if the layer was not
            called. The rows of several calls are concatenated.
        indices: [T, K], the expert of each slot; None for dense gates.
        logits: [G, E] in float32 ([G, E + 1] with a learned threshold, whose logit is the last
            column), attached to the graph; None without a router.
        always: whether the layer has auxiliary losses, which need a record of every forward.
        is_on: whether calls are recorded: if `always`, or inside `record_routing`.
        model: the model whose forward is running, or None.
        mask: the token mask that the next calls store, or None; see `follow_masks`.
        on_call: a function that gets every stored call, or None; see `count_routing`.
        adds_forwards: whether a forward with autograd keeps the routing of the ones before it,
            because one loss is computed of all of them.
    """

    def __init__(self, always: bool = False) -> None:
        self.always = self.is_on = always
        self.model: nn.Module | None = None
        self.mask: Tensor | None = None
        self.on_call: Callable[[RoutedCall], None] | None = None
        self.adds_forwards = False
        self.clear()

    def clear(self) -> None:
        """Drop the routing of all forwards."""
        # None: there was no forward since the last `clear`. []: the forward did not call the layer.
        self.with_graph: list[RoutedCall] | None = None
        self.without_graph: list[RoutedCall] | None = None
        self.last: list[RoutedCall] = []

    def begin(self) -> None:
        """Begin a forward of the model: drop the routing of the previous one."""
        if self.adds_forwards and torch.is_grad_enabled() and self.with_graph is not None:
            self.last = self.with_graph
            return
        self.last = []
        if torch.is_grad_enabled():
            self.with_graph = self.last
        else:
            self.without_graph = self.last

    def keep(self, gate: Gate, shape: Sequence[int], tasks: Tensor | None = None) -> None:
        """Store the routing of a call, unless backward is running: it repeats a forward."""
        if is_backward():
            return
        if self.model is None:
            self.begin()
        call = RoutedCall(
            gate.weights.detach(),
            gate.experts,
            gate.logits,
            tuple(shape),
            gate.rows,
            tasks,
            self.mask,
        )
        self.last.append(call)
        if self.on_call is not None:
            self.on_call(call)

    def calls(self) -> list[RoutedCall] | None:
        """Return the calls of the last forward; None if there was none.

        If autograd is on, it is the last forward with autograd. Otherwise it is the last forward
        without autograd, or, if there was none, the last one with autograd.
        """
        if torch.is_grad_enabled() or self.without_graph is None:
            return self.with_graph
        return self.without_graph

    @property
    def weights(self) -> Tensor | None:
        return _concat([call.weights for call in self.last])

    @property
    def indices(self) -> Tensor | None:
        return _concat([call.experts for call in self.last])

    @property
    def logits(self) -> Tensor | None:
        return _concat([call.logits for call in self.last])

    def __reduce__(self):
        return RoutingRecord, (self.always,)


def routed_experts(weights: Tensor, experts: Tensor | None, num_experts: int) -> Tensor:
    """Return how often each token is routed to each expert, [T, E], without a shared expert.

    Args:
        weights, experts: of a RoutedCall. A dense gate routes to the experts whose weight is not 0.
        num_experts: E.
    """
    if experts is None:
        return weights[:, :num_experts] != 0
    numbers = torch.arange(num_experts, device=experts.device)
    return (experts[:, :, None] == numbers).sum(dim=1)


def _concat(tensors: list[Tensor | None]) -> Tensor | None:
    if not tensors or tensors[0] is None:
        return None
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors)


class ForwardHooks:
    """The hooks of a model that begin and end a forward in the records of its layers.

    `records` has only records that are on. During a forward of the whole model, the hooks of its
    submodules do nothing.
    """

    def __init__(self) -> None:
        self.records: list[RoutingRecord] | None = None
        # Forwards of the model that run inside one another.
        self.depth = 0

    def find_records(self, model: nn.Module) -> None:
        """Find the records of `model` that are on."""
        self.records = [record for record in _records(model) if record.is_on]

    def before(self, model: nn.Module, args: tuple) -> None:
        """Begin a forward of `model`."""
        if self.records is None:
            self.find_records(model)
        if is_backward() or not self.records or self.records[0].model not in (None, model):
            return
        # A compiled forward that raises does not call `after`, so it counts no depth.
        if not torch.compiler.is_compiling():
            self.depth += 1
            if self.depth > 1:
                return
        for record in self.records:
            record.model = model
            record.begin()

    def after(self, model: nn.Module, args: tuple, output: object) -> None:
        """End a forward of `model`, also if it raised."""
        if is_backward():
            return
        if self.depth > 0 and not torch.compiler.is_compiling():
            self.depth -= 1
            if self.depth > 0:
                return
        for record in self.records or ():
            if record.model is model:
                record.model = None

    def __reduce__(self):
        # A copy of a model has other records, so it must find them again.
        return ForwardHooks, ()


def follow_forwards(model: nn.Module) -> None:
    """Add the hooks that begin and end a forward in the records of the layers of `model`.

    The two hooks are added once, to the model inside its wrappers. Call the function again after
    you add layers.
    """
    model = unwrap(model)
    hooks = model.__dict__.get("_moelora_forward_hooks")
    if hooks is None:
        is_layer = hasattr(model, "record")
        if is_layer or not any(record.is_on for record in _records(model)):
            return
        hooks = model._moelora_forward_hooks = ForwardHooks()
        model.register_forward_pre_hook(hooks.before)
        model.register_forward_hook(hooks.after, always_call=True)
    hooks.find_records(model)


def _records(model: nn.Module) -> list[RoutingRecord]:
    records = [getattr(module, "record", None) for module in model.modules()]
    return [record for record in records if isinstance(record, RoutingRecord)]


@contextlib.contextmanager
def record_routing(model: nn.Module) -> Iterator[None]:
    """Keep the routing of the last forward of `model` in `layer.record` inside the context.

    Leaving the context clears all records, so read them inside. Contexts can be nested. If no
    forward with autograd ran inside, the routing that an auxiliary loss needs stays as it was.

    Example:
        >>> import torch
        >>> from moelora_kernels import MoeLoraLinear, record_routing
        >>> layer = MoeLoraLinear(16, 32, num_experts=4, rank=2, top_k=2)
        >>> with record_routing(layer):
        ...     y = layer(torch.randn(3, 16))
        ...     print(layer.record.weights.shape, layer.record.indices.shape)
        torch.Size([3, 2]) torch.Size([3, 2])
    """
    records = _records(model)
    was_on = [record.is_on for record in records]
    earlier = [record.with_graph if record.always else None for record in records]
    for record in records:
        record.is_on = True
    follow_forwards(model)
    try:
        yield
    finally:
        for record, is_on, calls in zip(records, was_on, earlier, strict=True):
            record.is_on = is_on
            is_pending = calls is not None and record.with_graph is calls
            record.clear()
            if is_pending:
                record.with_graph = record.last = calls
        follow_forwards(model)


@contextlib.contextmanager
def all_forwards(model: nn.Module) -> Iterator[None]:
    """Record all forwards with autograd inside the context together, as if they were one.

    For a loss that is computed of several forwards, such as a contrastive one.
    """
    records = _records(model)
    for record in records:
        record.adds_forwards = True
    try:
        yield
    finally:
        for record in records:
            record.adds_forwards = False
