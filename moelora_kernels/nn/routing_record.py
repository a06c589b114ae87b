"""RoutingRecord: the gates and the logits that a layer used in one forward of the model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

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


Forwards = dict[nn.Module | None, tuple[list[RoutedCall], bool]]


class ThreadRecord:
    """The part of a RoutingRecord that belongs to one thread.

    Attributes:
        running: the model whose forward is running, or None.
        mask: the token mask that the next calls store, or None; see `follow_masks`.
        last: the calls of the last forward.
        with_graph: the model of a forward -> the calls of its last forward with autograd since the
            last `drop`, and whether there were several such forwards; the latest forward is last.
            The key of a call outside of the forwards that hooks follow is None.
        without_graph: the same for forwards without autograd.
        together: a list for the calls of all forwards with autograd, or None; see `all_forwards`.
    """

    def __init__(self) -> None:
        self.running: nn.Module | None = None
        self.mask: Tensor | None = None
        self.last: list[RoutedCall] = []
        self.with_graph: Forwards = {}
        self.without_graph: Forwards = {}
        self.together: list[RoutedCall] | None = None


class ThreadRecords(threading.local):
    """The ThreadRecord of the running thread."""

    # An attribute, because torch.compile loses what is assigned to an object of threading.local.
    def __init__(self) -> None:
        self.record = ThreadRecord()


class RoutingRecord:
    """The routing of the calls of a layer in the last forward of each model that contains it.

    A forward of a model drops the routing of the model's previous forward, also in layers that it
    does not call. If it calls a layer several times, the record has one entry for each call. A
    forward without autograd (evaluation, a reference model) does not drop the routing of a forward
    with autograd, so the auxiliary loss of the training forward stays available. Activation
    checkpointing repeats a forward; the repeated forward is not recorded. A forward in which the
    layer is switched off (an adapter of a PeftModel) leaves its record alone.

    `follow_forwards` adds hooks to a model, so that the records know when a forward of the model
    begins. Without these hooks, or in a method that is not forward, each call of a layer counts as
    one forward. `last_calls` raises an error if it cannot tell which of them belong together.

    Every thread has its own records. Copies of a layer start with an empty record.

    Attributes:
        weights: [T, K] with `indices`; else dense [G, E]. Detached. None if the layer was not
            called. The rows of several calls are concatenated.
        indices: [T, K], the expert of each slot; None for dense gates.
        logits: [G, E] in float32 ([G, E + 1] with a learned threshold, whose logit is the last
            column), attached to the graph; None without a router.
        always: whether the layer has auxiliary losses, which need a record of every forward.
        is_on: whether calls are recorded: if `always`, or inside `record_routing`.
        contexts: the number of `record_routing` contexts that are open.
        on_call: a function that gets every stored call, or None; see `count_routing`.
        newest: the ThreadRecord of the last forward of any thread, or None. A thread that has run
            no forward reads it.
    """

    def __init__(self, always: bool = False) -> None:
        self.always = self.is_on = always
        self.contexts = 0
        self.on_call: Callable[[RoutedCall], None] | None = None
        self.reset()

    def reset(self) -> None:
        """Drop the routing of all threads."""
        self.threads = ThreadRecords()
        self.newest: ThreadRecord | None = None

    @property
    def thread(self) -> ThreadRecord:
        """The ThreadRecord of the running thread."""
        return self.threads.record

    def begin(self, model: nn.Module | None) -> None:
        """Begin a forward of `model`: drop the routing of its previous one.

        None: a call outside of the forwards that hooks follow.
        """
        thread = self.newest = self.thread
        forwards, calls = thread.without_graph, []
        if torch.is_grad_enabled():
            forwards = thread.with_graph
            calls = calls if thread.together is None else thread.together
        is_repeated = model in forwards
        # The latest forward is the last entry.
        forwards.pop(model, None)
        forwards[model] = (calls, is_repeated)
        thread.last = calls
        thread.running = model

    def keep(self, gate: Gate, shape: Sequence[int], tasks: Tensor | None = None) -> None:
        """Store the routing of a call, unless backward is running: it repeats a forward."""
        if is_backward():
            return
        thread = self.thread
        if thread.running is None:
            self.begin(None)
        call = RoutedCall(
            gate.weights.detach(),
            gate.experts,
            gate.logits,
            tuple(shape),
            gate.rows,
            tasks,
            thread.mask,
        )
        thread.last.append(call)
        if self.on_call is not None:
            self.on_call(call)

    def readable(self) -> tuple[ThreadRecord, Forwards]:
        """Return the ThreadRecord to read, and its forwards.

        If autograd is on, these are the forwards with autograd. Otherwise they are the forwards
        without autograd, or, if there was none, those with autograd.
        """
        threads = [self.thread] if self.newest is None else [self.thread, self.newest]
        for thread in threads:
            is_training = torch.is_grad_enabled() or not thread.without_graph
            if forwards := thread.with_graph if is_training else thread.without_graph:
                return thread, forwards
        return threads[0], {}

    @property
    def last(self) -> list[RoutedCall]:
        """The calls of the last forward."""
        last = self.thread.last
        return self.newest.last if not last and self.newest is not None else last

    @property
    def mask(self) -> Tensor | None:
        """The token mask that the next calls store."""
        return self.thread.mask

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
