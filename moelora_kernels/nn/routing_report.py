"""routing_report: how the tokens are spread over the experts of each layer.

    with count_routing(model):
        for batch in batches:
            train(model, batch)
        report = routing_report(model)

The counters are on the device of each layer. Counting does not synchronise; reading does, once.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moelora_kernels.nn.layer import MixtureLayer, mixture_layers
from moelora_kernels.nn.routing_record import RoutedCall, record_routing
from moelora_kernels.nn.token_masks import call_mask, follow_masks, tokens_per_row
from moelora_kernels.nn.wrappers import named_modules, unwrap


class LayerReport(NamedTuple):
    """The routing of one layer since the last report.

    The share of an expert is the sum of its absolute gate weights divided by the sum over all
    experts of the layer. Padding and a shared expert are not counted.
    """

    load: Tensor  # [E] float32 on the CPU, the share of each expert; 0 if no token was counted
    entropy: float  # H(load) / log E: 1 if the load is balanced, 0 if one expert takes all
    top1_share: float  # the largest share of an expert
    unused: tuple[int, ...]  # the experts that no token was routed to
    drift: float | None  # sum |load - last load| / 2, 0 to 1; None without a last load
    task_load: Tensor | None  # [tasks + 1, E], sums of gate weights; row t is task t; or None

    @property
    def is_counted(self) -> bool:
        """Whether at least one token was counted."""
        return bool(self.load.any())


class RoutingReport(NamedTuple):
    """The routing of a model since the last report.

    layers: name of a layer -> its report, for all layers with at least two experts.
    """

    layers: dict[str, LayerReport]

    def __str__(self) -> str:
        lines = [f"{'layer':40} entropy  top-1  unused  drift"]
        for name, layer in self.layers.items():
            drift = "-" if layer.drift is None else f"{layer.drift:.3f}"
            lines.append(
                f"{name:40} {layer.entropy:7.3f} {layer.top1_share:6.3f} {len(layer.unused):7} "
                f"{drift:>6}"
            )
        return "\n".join(lines)


class RoutingCounter:
    """Sums of the gate weights of the layers of a model, since the last report.

    The layers, their order and the sizes of the sums depend on the model alone, so they are equal
    on all processes.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = {layer for layer in mixture_layers(model) if layer.config.num_experts > 1}
        self.layers: dict[str, MixtureLayer] = {
            name: module for name, module in named_modules(model) if module in layers
        }
        self.previous: dict[str, Tensor] = {}
        self.reset()

    def reset(self) -> None:
        """Set the sums to zero."""
        self.sums: dict[str, Tensor] = {}

    def add(self, name: str, call: RoutedCall) -> None:
        """Count one call of the layer `name`."""
        layer = self.layers[name]
        sums = call_sums(layer, call)
        self.sums[name] = self.sums[name] + sums if name in self.sums else sums

    def add_records(self) -> None:
        """Count the calls of all layers in the last forward."""
        for name, layer in self.layers.items():
            for call in layer.record.calls() or ():
                self.add(name, call)

    def flat(self, device: torch.device) -> Tensor:
        """Return all sums in one float32 tensor. Layers that did not run have zeros."""
        if not self.layers:
            return torch.zeros(0, device=device)
        sums = [
            self.sums[name].reshape(-1).to(device)
            if name in self.sums
            else torch.zeros(_rows(layer) * layer.config.num_experts, device=device)
            for name, layer in self.layers.items()
        ]
        return torch.cat(sums)

    def report(self, flat: Tensor) -> RoutingReport:
        """Return the report of the sums in `flat`, which is on the CPU, and reset the counter."""
        sizes = [_rows(layer) * layer.config.num_experts for layer in self.layers.values()]
        reports = {}
        for (name, layer), sums in zip(self.layers.items(), flat.split(sizes), strict=True):
            # An inactive adapter of a PeftModel is counted as zeros, and is not reported.
            if layer.is_selected:
                tasks = sums.view(-1, layer.config.num_experts)
                previous = self.previous.get(name)
                reports[name] = layer_report(tasks, previous, layer.config.router == "task")
                if reports[name].is_counted:
                    self.previous[name] = reports[name].load
        self.reset()
        return RoutingReport(reports)


def _rows(layer: MixtureLayer) -> int:
    """Return the number of rows of a layer's sums: one for each task, and row 0."""
    return layer.config.num_tasks + 1 if layer.config.router == "task" else 1


def call_sums(layer: MixtureLayer, call: RoutedCall) -> Tensor:
    """Return the sums of the gate weights of one call: [tasks + 1, E], or [1, E] without tasks.

    Tokens that the mask of the call leaves out are not counted. A row of several tasks counts for
    each of them in equal parts.
    """
    config = layer.config
    counts = tokens_per_row(call, call_mask(layer, call))
    weights = expert_weights(call, config.num_experts)
    weights = torch.where(counts[:, None] > 0, counts[:, None] * weights, 0)
    if config.router != "task":
        return weights.sum(dim=0, keepdim=True)
    ids = call.tasks.to(weights.device)
    ids = ids[:, None] if ids.dim() == 1 else ids
    tasks = torch.arange(_rows(layer), device=weights.device)
    # Row t of `share`: the part of each gate row that belongs to task t. Id 0 is padding.
    share = ((ids == tasks[:, None, None]) & (ids != 0)).sum(dim=2).to(weights)
    share = share / share.sum(dim=0).clamp_min(1)
    return (share[:, :, None] * weights).sum(dim=1)


def expert_weights(call: RoutedCall, num_experts: int) -> Tensor:
    """Return |gate[g, e]| of each gate row of a call, [G, E] in float32, without a shared expert.

    call: the routing of one call of a layer.
    """
    weights = call.weights.float().abs()
    if call.experts is not None:
        experts = torch.arange(num_experts, device=weights.device)
        # `where` and not a product, because the weight of a slot that is not routed can be NaN.
        routed = call.experts[:, :, None] == experts
        weights = torch.where(routed, weights[:, :, None], 0).sum(dim=1)
    # A shared expert is the last column.
    return weights[:, :num_experts]


def layer_report(sums: Tensor, previous: Tensor | None, has_tasks: bool) -> LayerReport:
    """Return the report of one layer.

    Args:
        sums: [tasks + 1, E] or [1, E], the sums of the gate weights, on the CPU.
        previous: [E], the load in the last report, or None.
        has_tasks: whether the rows of `sums` are tasks.
    """
    total = sums.sum(dim=0)
    load = total / total.sum().clamp_min(torch.finfo(total.dtype).tiny)
    drift = None
    if previous is not None and load.any():
        drift = (load - previous).abs().sum().item() / 2
    entropy = torch.special.entr(load).sum().item() / math.log(len(load))
    unused = tuple((load == 0).nonzero().flatten().tolist())
    return LayerReport(load, entropy, load.max().item(), unused, drift, sums if has_tasks else None)


@contextlib.contextmanager
def count_routing(model: nn.Module) -> Iterator[None]:
    """Count the routing of all forwards of `model` inside the context, for `routing_report`.

    Tokens with 0 in the attention mask of their part of the model do not count; see `follow_masks`.
    A forward that activation checkpointing repeats counts once.

    Raises:
        ValueError: `model` has no layer with at least two experts, or its routing is counted
            already.

    Example:
        >>> import torch
        >>> from moelora_kernels import MoeLoraLinear, count_routing, routing_report
        >>> layer = MoeLoraLinear(16, 32, num_experts=4, rank=2, top_k=2)
        >>> with count_routing(layer):
        ...     for _ in range(3):
        ...         y = layer(torch.randn(2, 5, 16))
        ...     report = routing_report(layer)
        >>> round(report.layers[""].load.sum().item(), 4)
        1.0
    """
    counter = RoutingCounter(model)
    model = unwrap(model)
    if not counter.layers:
        raise ValueError("model: expected a model with mixture layers, got none")
    if getattr(model, "_moelora_routing_counter", None) is not None:
        raise ValueError("model: count_routing is already active on it")
    follow_masks(model)
    model._moelora_routing_counter = counter
    with record_routing(model):
        for name, layer in counter.layers.items():
            layer.record.on_call = partial(counter.add, name)
        try:
            yield
        finally:
            for layer in counter.layers.values():
                layer.record.on_call = None
            del model._moelora_routing_counter


def routing_report(model: nn.Module, *, all_ranks: bool = True) -> RoutingReport:
    """Return how the tokens were spread over the experts of each layer since the last report.

    Inside `count_routing` this covers all forwards since the last report. Otherwise it covers the
    last recorded forward: inside `record_routing`, or of layers with auxiliary losses.

    Args:
        model: a model with mixture layers.
        all_ranks: whether the counts of all processes of torch.distributed are added. This is one
            collective, so every process must call the function. Without torch.distributed it has no
            effect.

    Raises:
        RuntimeError: nothing was counted or recorded.

    Example:
        >>> import torch
        >>> from moelora_kernels import MoeLoraLinear, count_routing, routing_report
        >>> layer = MoeLoraLinear(16, 32, num_experts=4, rank=2, top_k=2)
        >>> with count_routing(layer):
        ...     y = layer(torch.randn(2, 5, 16))
        ...     report = routing_report(layer)
        >>> report.layers[""].load.shape
        torch.Size([4])
    """
    counter = getattr(unwrap(model), "_moelora_routing_counter", None)
    is_counting = counter is not None
    if not is_counting:
        counter = RoutingCounter(model)
        counter.add_records()
    parameter = next(model.parameters(), None)
    flat = counter.flat(torch.device("cpu") if parameter is None else parameter.device)
    # Before any error, so that no process waits for another one.
    if all_ranks and dist.is_available() and dist.is_initialized():
        dist.all_reduce(flat)
    flat = flat.cpu()
    if not is_counting and not flat.any():
        raise RuntimeError(
            "no routing is counted: run the forwards inside `with count_routing(model):`"
        )
    return counter.report(flat)
