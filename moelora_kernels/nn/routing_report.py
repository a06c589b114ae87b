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
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moelora_kernels.nn.layer import MixtureLayer, mixture_layers
from moelora_kernels.nn.recorded_forwards import last_calls, record_routing
from moelora_kernels.nn.routing_record import RoutedCall
from moelora_kernels.nn.samples import sample_of_tokens
from moelora_kernels.nn.token_masks import call_mask, follow_masks, tokens_per_row
from moelora_kernels.nn.wrappers import named_modules, unwrap
from moelora_kernels.numerics import host_tensor


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
    # [tasks + 1, E], the sums of the gate weights: row t is task t, row 0 is no task; None if the
    # layer is not counted by task
    task_load: Tensor | None

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

    Args:
        model: a model with mixture layers.
        num_tasks: the number of tasks of `set_tasks`; None if the layers without task gates are not
            counted by task.
    """

    def __init__(self, model: nn.Module, num_tasks: int | None = None) -> None:
        self.num_tasks = num_tasks
        self.tasks: Tensor | None = None
        layers = {layer for layer in mixture_layers(model) if layer.config.num_experts > 1}
        self.layers: dict[str, MixtureLayer] = {
            name: module for name, module in named_modules(model) if module in layers
        }
        self.previous: dict[str, Tensor] = {}
        self.reset()

    def reset(self) -> None:
        """Set the sums to zero."""
        self.sums: dict[str, Tensor] = {}

    def set_tasks(self, tasks: Tensor | Sequence[int]) -> None:
        """Set the task ids [B] of the coming forwards, for layers without task gates.

        The ids run from 1 to num_tasks. They are used for counting alone.
        """
        tasks = host_tensor(tasks)
        if self.num_tasks is None:
            raise ValueError("num_tasks: expected a number in count_routing, got None")
        if tasks.dim() != 1 or tasks.is_floating_point():
            raise ValueError(f"tasks: expected ids [batch], got {tasks.dtype} {[*tasks.shape]}")
        # One copy here, and not one in each call of a layer.
        first = next(iter(self.layers.values()))
        self.tasks = tasks.to(first.first_tensor().device)

    def num_rows(self, layer: MixtureLayer) -> int:
        """Return the number of rows of a layer's sums: one for each task, and row 0."""
        num_tasks = layer.config.num_tasks if layer.config.router == "task" else self.num_tasks
        return 1 if num_tasks is None else num_tasks + 1

    def add(self, name: str, call: RoutedCall) -> None:
        """Count one call of the layer `name`."""
        layer = self.layers[name]
        tasks = call.tasks
        if layer.config.router != "task" and self.tasks is not None:
            tasks = tasks_of_rows(layer, call, self.tasks)
        sums = call_sums(layer, call, tasks, self.num_rows(layer))
        self.sums[name] = self.sums[name] + sums if name in self.sums else sums

    def add_records(self, model: nn.Module) -> None:
        """Count the calls of all layers in the last forward of `model`."""
        calls = last_calls(model, self.layers.values())
        for name, layer in self.layers.items():
            for call in calls[layer] or ():
                self.add(name, call)

    def flat(self, device: torch.device) -> Tensor:
        """Return all sums in one float32 tensor. Layers that did not run have zeros."""
        if not self.layers:
            return torch.zeros(0, device=device)
        sums = [
            self.sums[name].reshape(-1).to(device)
            if name in self.sums
            else torch.zeros(self.num_rows(layer) * layer.config.num_experts, device=device)
            for name, layer in self.layers.items()
        ]
        return torch.cat(sums)

    def report(self, flat: Tensor) -> RoutingReport:
        """Return the report of the sums in `flat`, which is on the CPU, and reset the counter."""
        sizes = [self.num_rows(x) * x.config.num_experts for x in self.layers.values()]
        reports = {}
        for (name, layer), sums in zip(self.layers.items(), flat.split(sizes), strict=True):
            # An inactive adapter of a PeftModel is counted as zeros, and is not reported.
            if layer.is_selected:
                tasks = sums.view(-1, layer.config.num_experts)
                previous = self.previous.get(name)
                reports[name] = layer_report(tasks, previous, len(tasks) > 1)
                if reports[name].is_counted:
                    self.previous[name] = reports[name].load
        self.reset()
        return RoutingReport(reports)


def tasks_of_rows(layer: MixtureLayer, call: RoutedCall, tasks: Tensor) -> Tensor | None:
    """Return the task of each gate row of a call, [G]; None if x does not tell it.

    tasks: [B], the tasks of the samples.
    """
    rows, device = call.weights.shape[0], call.weights.device
    tasks = tasks.to(device)
    if len(tasks) in (1, rows):
        return tasks.expand(rows)
    if rows != math.prod(call.shape):
        return None
    x_shape, batch_dim = (*call.shape, 1), layer.config.batch_dim
    try:
        samples = sample_of_tokens(x_shape, len(tasks), batch_dim, layer.samples, device, "tasks")
    except ValueError:
        # Counting never stops a training: these tokens have no task.
        return None
    return torch.where(samples < 0, 0, tasks[samples.clamp_min(0).long()])


def call_sums(layer: MixtureLayer, call: RoutedCall, tasks: Tensor | None, num_rows: int) -> Tensor:
    """Return the sums of the gate weights of one call, [num_rows, E].

    Row t is task t; row 0 has the tokens without a task. Tokens that the mask of the call leaves
    out are not counted. A gate row of several tasks counts for each of them in equal parts.

    tasks: [G] or [G, J], the task ids of the gate rows, with 0 as padding; or None.
    """
    counts = tokens_per_row(call, call_mask(layer, call))
    weights = expert_weights(call, layer.config.num_experts)
    weights = torch.where(counts[:, None] > 0, counts[:, None] * weights, 0)
    if num_rows == 1:
        return weights.sum(dim=0, keepdim=True)
    if tasks is None:
        tasks = torch.zeros(len(weights), dtype=torch.int64, device=weights.device)
    tasks = tasks.to(weights.device)
    tasks = tasks[:, None] if tasks.dim() == 1 else tasks
    numbers = torch.arange(num_rows, device=weights.device)
    # Row t of `share`: the part of each gate row that belongs to task t.
    share = ((tasks == numbers[:, None, None]) & (tasks != 0)).sum(dim=2).to(weights)
    total = share.sum(dim=0)
    share = share / total.clamp_min(1)
    share[0] = (total == 0).to(share)
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
def count_routing(model: nn.Module, num_tasks: int | None = None) -> Iterator[RoutingCounter]:
    """Count the routing of all forwards of `model` inside the context, for `routing_report`.

    Tokens with 0 in the attention mask of their part of the model do not count; see `follow_masks`.
    A forward that activation checkpointing repeats counts once.

    Layers with task gates are counted by task. For the other layers, pass `num_tasks`, and call
    `counter.set_tasks(ids)` before each forward with the task ids [B] of its samples.

    Args:
        model: a model with mixture layers.
        num_tasks: the number of tasks, for layers without task gates; None counts without tasks.

    Returns:
        A context whose value is the counter.

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
    counter = RoutingCounter(model, num_tasks)
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
            yield counter
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
        counter.add_records(model)
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
