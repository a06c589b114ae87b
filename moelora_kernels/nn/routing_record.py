"""RoutingRecord: the gate and the logits of a layer's last forward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


class RoutingRecord:
    """The gate weights, experts and logits of a layer's last forward.

    A forward overwrites the record. The repeated forward of activation checkpointing does not.
    Copies of a layer start with an empty record.

    Attributes:
        weights: [T, K] with `indices`; else dense [G, E]. Detached.
        indices: [T, K], the expert of each slot; None for dense gates.
        logits: [G, E] in float32 ([G, E + 1] with a learned threshold, whose logit is the last
            column), attached to the graph; None without a router.
        wanted: whether `record_routing` asked for records.
    """

    def __init__(self) -> None:
        self.wanted = False
        self.clear()

    def clear(self) -> None:
        """Drop the routing of the last forward."""
        self.weights: Tensor | None = None
        self.indices: Tensor | None = None
        self.logits: Tensor | None = None

    def keep(self, weights: Tensor, experts: Tensor | None, logits: Tensor | None) -> None:
        """Store the routing of a forward, unless backward is running: it repeats a forward."""
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return
        self.weights = weights.detach()
        self.indices = experts
        self.logits = logits

    def __deepcopy__(self, memo) -> RoutingRecord:
        return RoutingRecord()

    def __reduce__(self):
        return RoutingRecord, ()


@contextlib.contextmanager
def record_routing(model: nn.Module) -> Iterator[None]:
    """Keep the routing of each layer's last forward in `layer.record` inside the context.

    Leaving the context clears all records, so read them inside.

    Example:
        >>> import torch
        >>> from moelora_kernels import MoeLoraLinear, record_routing
        >>> layer = MoeLoraLinear(16, 32, num_experts=4, rank=2, top_k=2)
        >>> with record_routing(layer):
        ...     y = layer(torch.randn(3, 16))
        ...     print(layer.record.weights.shape, layer.record.indices.shape)
        torch.Size([3, 2]) torch.Size([3, 2])
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
