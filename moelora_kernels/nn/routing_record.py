"""The record of what a layer's last forward routed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class RoutingRecord:
    """Weights, indices and logits of a layer's last forward.

    weights [T, K] with indices [T, K], or dense gates [G, E] with indices None; logits [G, E] in
    float32 ([G, E + 1] with that of a learned threshold last), attached to the graph. A forward
    overwrites it; the one that activation checkpointing repeats in backward does not. Copies of a
    layer start with an empty record.
    """

    def __init__(self) -> None:
        self.wanted = False
        self.clear()

    def clear(self) -> None:
        """Forget the last forward."""
        self.weights: Tensor | None = None
        self.indices: Tensor | None = None
        self.logits: Tensor | None = None

    def keep(self, weights: Tensor, indices: Tensor | None, logits: Tensor | None) -> None:
        """Hold the routing of a forward, unless autograd is running: that one is a repetition."""
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return
        self.weights = weights.detach()
        self.indices = indices
        self.logits = logits

    def __deepcopy__(self, memo) -> RoutingRecord:
        return RoutingRecord()

    def __reduce__(self):
        return RoutingRecord, ()


@contextlib.contextmanager
def record_routing(model: nn.Module) -> Iterator[None]:
    """Within it every layer of `model` keeps the routing of its last forward in `layer.record`.

    A record holds weights [T, K] with indices [T, K], or weights [G, E] with indices None where all
    experts are gated or the gate belongs to a sequence or task (one row for each of them), and the
    router's logits. Leaving the context clears all records: take what you need inside.
    """
    candidates = [getattr(module, "record", None) for module in model.modules()]
    records = [record for record in candidates if isinstance(record, RoutingRecord)]
    for record in records:
        record.wanted = True
    try:
        yield
    finally:
        for record in records:
            record.wanted = False
            record.clear()
