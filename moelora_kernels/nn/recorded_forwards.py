"""Which calls of the layers of a model belong to its last forward?

follow_forwards    adds hooks to a model that begin and end its forwards in the records
last_calls         reads the calls of the last forward; an error if they are not known
record_routing     records in a context
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Collection, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from moelora_kernels.nn.forward_hooks import ModelHooks, end_interrupted
from moelora_kernels.nn.routing_record import RoutedCall, RoutingRecord
from moelora_kernels.nn.wrappers import named_modules, unwrap


class ForwardHooks(ModelHooks):
    """The hooks of a model that begin and end a forward in the records of its layers.

    `layers` has only layers whose record is on. During a forward of the whole model, the hooks of
    its submodules do nothing.
    """

    attribute = "_moelora_forward_hooks"

    def __init__(self) -> None:
        self.layers: list[nn.Module] | None = None

    def find_layers(self, model: nn.Module) -> None:
        """Find the layers of `model` whose record is on."""
        self.layers = [layer for layer in _recording(model) if layer.record.is_on]

    def begin(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Begin a forward of `model` in the records that no other forward is running in."""
        if self.layers is None:
            self.find_layers(model)
        for layer in self.layers:
            running = layer.record.thread.running
            # A compiled forward that raised has not ended.
            is_left = running is model and torch.compiler.is_compiling()
            if layer.is_running and (running is None or is_left):
                layer.record.begin(model)

    def end(self, model: nn.Module) -> None:
        """End a forward of `model`, unless it ran inside another one of the same model."""
        if not torch.compiler.is_compiling() and self.is_nested():
            return
        for layer in self.layers or ():
            thread = layer.record.thread
            if thread.running is model:
                thread.running = None

    def interrupt(self, model: nn.Module) -> None:
        """End a forward of `model` that was interrupted, and drop its calls."""
        for layer in self.layers or ():
            thread = layer.record.thread
            if thread.running is model:
                thread.with_graph.pop(model, None)
                thread.without_graph.pop(model, None)
                thread.last = []
        self.end(model)


def follow_forwards(model: nn.Module) -> None:
    """Add the hooks that begin and end a forward in the records of the layers of `model`.

    The two hooks are added once, to the model inside its wrappers. Call the function again after
    you add layers.
    """
    model = forward_root(model)
    if ForwardHooks.attribute not in model.__dict__:
        is_layer = hasattr(model, "record")
        if is_layer or not any(layer.record.is_on for layer in _recording(model)):
            return
    ForwardHooks.add_to(model).find_layers(model)


def forward_root(model: nn.Module) -> nn.Module:
    """Return the module whose forwards are those of `model`: the one inside all wrappers.

    The forward of a PeftModel is one forward of its base model.
    """
    model = unwrap(model)
    peft = sys.modules.get("peft")
    kinds = [getattr(peft, name, None) for name in ("PeftModel", "PeftMixedModel")]
    if any(kind is not None and isinstance(model, kind) for kind in kinds):
        return unwrap(model.get_base_model())
    return model


def _recording(model: nn.Module) -> list[nn.Module]:
    """Return the layers of `model`: the modules that have a record."""
    return [module for module in model.modules() if _record(module) is not None]


def _record(module: nn.Module) -> RoutingRecord | None:
    record = getattr(module, "record", None)
    return record if isinstance(record, RoutingRecord) else None


def last_calls(
    model: nn.Module, layers: Collection[nn.Module]
) -> dict[nn.Module, list[RoutedCall] | None]:
    """Return the calls of `layers` in the last forward of `model`; None if there was none.

    It is the last forward of the model, or of a model around it. If there was none, the calls by a
    method that is not forward, or by a part of the model, count if there was one for each layer.

    Raises:
        RuntimeError: it is not known which calls of a layer belong to the last forward. There were
            several calls by such methods or parts; or such calls and a forward, except for calls
            before a forward that called the layer too. All of these calls are dropped.
    """
    end_interrupted()
    scope = Scope(model)
    result: dict[nn.Module, list[RoutedCall] | None] = {}
    for layer in layers:
        _, forwards = layer.record.readable()
        whole: list[RoutedCall] | None = None
        parts: list[RoutedCall] | None = None
        passes = 0
        for other, (calls, is_repeated) in reversed(forwards.items()):
            kind = scope.kind(layer, other)
            if kind == "part":
                parts = calls if parts is None else [*calls, *parts]
                passes += 2 if is_repeated else len(calls) > 0
            elif kind == "whole":
                is_last = whole is None
                whole = calls if is_last else whole
                # Calls before a forward count for nothing, unless it took their result instead of
                # calling the layer (`encoder_outputs`).
                if whole or not is_last:
                    break
        if passes > 1 or (passes and whole is not None):
            drop_calls(model, layers)
            raise RuntimeError(_ambiguous(model, layer))
        result[layer] = parts if whole is None else whole
    return result


def drop_calls(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Drop what `last_calls` has read. Forwards of other models stay."""
    scope = Scope(model)
    for layer in layers:
        thread, _ = layer.record.readable()
        for forwards in (thread.with_graph, thread.without_graph):
            for other in [other for other in forwards if scope.kind(layer, other)]:
                del forwards[other]
        thread.last = []


class Scope:
    """Which forwards are forwards of one model, and which are forwards of its parts."""

    def __init__(self, model: nn.Module) -> None:
        self.root = forward_root(model)
        self.parts = set(self.root.modules())
        self.contains: dict[nn.Module, bool] = {self.root: True}

    def kind(self, layer: nn.Module, other: nn.Module | None) -> str | None:
        """Return "whole" or "part" for a forward of `other`; None if it is another model's.

        layer: the layer that the forward called.
        """
        if other is None:
            return "whole" if layer is self.root else "part"
        if other not in self.contains:
            self.contains[other] = self.root in set(other.modules())
        if self.contains[other]:
            return "whole"
        return "part" if other in self.parts else None


def _ambiguous(model: nn.Module, layer: nn.Module) -> str:
    """Return the text of the error for calls that cannot be assigned to one forward."""
    name = next((name for name, module in named_modules(model) if module is layer), "")
    return (
        f"{name or type(layer).__name__}: its calls cannot be assigned to one forward of the "
        "model: it was called in a method that is not forward, in a part of the model, or before "
        "the model was known. Do one of these: call collect_aux_loss(model) after each pass and "
        "add the losses; run passes that do not count under torch.no_grad(); for a model that you "
        "built from layers, call adapter_parameters(model) before its first forward"
    )


@contextlib.contextmanager
def record_routing(model: nn.Module) -> Iterator[None]:
    """Keep the routing of the last forward of `model` in `layer.record` inside the context.

    Leaving the context drops what was recorded inside, so read it inside. Contexts can be nested.
    What was recorded before, for an auxiliary loss, stays unless a forward with autograd of the
    same model ran inside.

    Example:
        >>> import torch
        >>> from moelora_kernels import MoeLoraLinear, record_routing
        >>> layer = MoeLoraLinear(16, 32, num_experts=4, rank=2, top_k=2)
        >>> with record_routing(layer):
        ...     y = layer(torch.randn(3, 16))
        ...     print(layer.record.weights.shape, layer.record.indices.shape)
        torch.Size([3, 2]) torch.Size([3, 2])
    """
    records = [layer.record for layer in _recording(model)]
    earlier = [dict(record.thread.with_graph) for record in records]
    _count_contexts(records, 1)
    follow_forwards(model)
    try:
        yield
    finally:
        _count_contexts(records, -1)
        for record, forwards in zip(records, earlier, strict=True):
            thread = record.thread
            pending = {
                other: entry
                for other, entry in forwards.items()
                if record.always and thread.with_graph.get(other) is entry
            }
            thread.with_graph = pending
            thread.without_graph = {}
            thread.last = [*pending.values()][-1][0] if pending else []
            if not record.is_on:
                record.reset()
        follow_forwards(model)


_CONTEXTS = threading.Lock()


def _count_contexts(records: Iterable[RoutingRecord], change: int) -> None:
    """Add `change` to the number of open contexts of each record."""
    with _CONTEXTS:
        for record in records:
            record.contexts += change
            record.is_on = record.always or record.contexts > 0


@contextlib.contextmanager
def all_forwards(model: nn.Module) -> Iterator[None]:
    """Record all forwards with autograd inside the context together, as if they were one.

    For a loss that is computed of several forwards, such as a contrastive one. Forwards with
    autograd from before are dropped.
    """
    root, threads = forward_root(model), [layer.record.thread for layer in _recording(model)]
    for thread in threads:
        thread.together, thread.with_graph = [], {}
    try:
        yield
    finally:
        for thread in threads:
            thread.with_graph = {root: (thread.together, False)} if thread.with_graph else {}
            thread.together = None


@contextlib.contextmanager
def kept_records(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Give the layers in `modules` empty records in the context, and the previous ones after it."""
    records = [record for module in modules if (record := _record(module)) is not None]
    saved = [(record, vars(record).copy()) for record in records]
    for record, _ in saved:
        record.reset()
    try:
        yield
    finally:
        for record, values in saved:
            vars(record).clear()
            vars(record).update(values)
