"""check_trainable: run one training step that changes nothing, and name what does not train."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from moelora_kernels.nn.base_linear import is_plain_linear
from moelora_kernels.nn.ffn import PROJECTIONS
from moelora_kernels.nn.gradient_reasons import (
    LayerStep,
    gradient_reasons,
    has_gradient,
    layer_steps,
    magnitude,
)
from moelora_kernels.nn.group import MoeLoraGroup
from moelora_kernels.nn.layer import MixtureLayer, mixture_layers
from moelora_kernels.nn.routing_record import RoutedCall, routed_experts
from moelora_kernels.nn.sharding import fsdp_types
from moelora_kernels.nn.trial_step import trial_step
from moelora_kernels.nn.weight_readers import watch_reads
from moelora_kernels.nn.wrappers import unwrap


class TrainableReport(NamedTuple):
    """The result of `check_trainable`. Printed, it has one line per reason.

    Layers and parameters have their names in the model without wrappers (torch.compile, DDP).
    """

    loss: float
    layers: tuple[str, ...]  # the layers that were checked
    not_called: dict[str, str]  # layer -> why
    unreached: dict[str, str]  # layer that was called, but has no effect on the loss -> why
    without_gradient: dict[str, str]  # parameter without gradient for an unexpected reason -> why
    expected: dict[str, str]  # parameter without gradient in this step, although it trains -> why
    unselected: dict[str, list[int]]  # layer -> the experts that no token of the batch selected
    cut_bases: tuple[str, ...]  # layers whose base gives no gradient for x

    @property
    def ok(self) -> bool:
        """Whether all adapters and routers train."""
        return not (self.not_called or self.unreached or self.without_gradient or self.cut_bases)

    def __str__(self) -> str:
        """Return the report as text, one line per reason."""
        in_layers = {**self.not_called, **self.unreached}
        parameters = {
            name: reason
            for name, reason in self.without_gradient.items()
            if reason not in (in_layers.get(layer) for layer in in_layers if name.startswith(layer))
        }
        lines = [f"{len(self.layers)} layers with experts, loss {self.loss:.6g}"]
        lines.append("all of them train" if self.ok else "some adapters or routers do not train:")
        lines += lines_by_reason("layer not called", self.not_called)
        lines += lines_by_reason("layer without effect", self.unreached)
        lines += lines_by_reason("no gradient", parameters)
        cut = (
            "the base returns no graph for an x that needs a gradient, so the gradients of the "
            "layers before it are wrong: use a base with a backward"
        )
        lines += lines_by_reason("base without gradient", dict.fromkeys(self.cut_bases, cut))
        lines += lines_by_reason("no gradient in this step", self.expected, limit=4)
        experts = {
            name: f"no token of this batch selected experts {', '.join(map(str, numbers))}"
            for name, numbers in self.unselected.items()
        }
        return "\n".join(lines + lines_by_reason("experts", experts, limit=4))


def lines_by_reason(title: str, reasons: Mapping[str, str], limit: int | None = None) -> list[str]:
    """Return one line per reason with at most `limit` of its names."""
    groups: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        groups.setdefault(reason, []).append(name)
    lines = []
    for reason, names in groups.items():
        rest = "" if limit is None or len(names) <= limit else f" and {len(names) - limit} more"
        lines.append(f"  {title}: {', '.join(names[:limit])}{rest}: {reason}")
    return lines


def check_trainable(
    model: nn.Module,
    batch: Mapping[str, Any] | tuple | list | Tensor,
    loss_fn: Callable[[Any], Tensor] | None = None,
) -> TrainableReport:
    """Run one training step of `model`, and name the adapters and routers that do not train.

    The step runs in training mode with autograd, also inside torch.no_grad or inference_mode. It
    changes nothing: weights, gradients, optimizer, random state, buffers, routing records, counters
    (`count_routing`), tasks, modes, hooks and the batch are afterwards as before. The same holds
    for the modules that `loss_fn` uses. Set the tasks before the call if the model has task gates.

    Compiled models run eagerly, and DDP does not communicate.

    Args:
        model: a model with mixture layers, also a PeftModel, compiled, or in DDP.
        batch: keyword arguments by name, a tuple or a list of positional arguments, or one tensor.
        loss_fn: returns the loss for the output of the model. None means output.loss; without a
            loss, the sum over all float tensors t of the output of mean(t^2). Pass the loss that
            you train with if it is another one, such as
            `lambda output: output.loss + collect_aux_loss(model)`.

    Returns:
        A TrainableReport. `report.ok` is True if all adapters and routers train; print(report)
        names the others with the reason.

    Raises:
        ValueError: the model has no mixture layer, is sharded by FSDP, or was built under
            torch.inference_mode; or there is no loss.
        TypeError: `batch` is None or a DataLoader.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from moelora_kernels import MoeLoraConfig, check_trainable, replace_linears
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> names = replace_linears(model, MoeLoraConfig.preset("ming"), ["0", "2"])
        >>> check_trainable(model, torch.randn(3, 16)).ok
        True
    """
    layers = mixture_layers(model)
    if not layers:
        raise ValueError(
            "model: expected a model with mixture layers, got none; call replace_linears first"
        )
    if batch is None or isinstance(batch, DataLoader):
        raise TypeError(
            "batch: expected keyword arguments by name, a tuple or a list of positional arguments, "
            f"or one tensor, got {type(batch)}; pass one batch, or () for a model without arguments"
        )
    _check_sharding(model)
    model = unwrap(model)
    steps = {step.layer: step for step in layer_steps(model)}
    if not steps:
        raise ValueError(
            "model: expected active adapters, got none: every adapter is inactive or merged; call "
            "set_adapter(name) or unmerge_adapter() first"
        )
    if isinstance(batch, Mapping):
        batch = dict(batch.items())
    with (
        trial_step(model, loss_fn) as trial,
        _eager(),
        _watched(model, steps),
        watch_reads() as reads,
    ):
        loss = _run(model, trial.copy(batch), loss_fn)
        trial.backward(loss)
    for layer, step in steps.items():
        step.reader = reads.readers.get(layer)
    magnitudes = {id(p): magnitude(trial.gradient(p)) for p in model.parameters()}
    return _report(list(steps.values()), magnitudes, float(loss.detach()))


def _report(
    steps: list[LayerStep], magnitudes: Mapping[int, float], loss: float
) -> TrainableReport:
    not_called = {s.name: reason for s in steps if (reason := s.call_problem())}
    unreached = {
        step.name: reason
        for step in steps
        if step.calls and not has_gradient(step.layer, magnitudes)
        if (reason := step.output_problem())
    }
    unexpected, expected = gradient_reasons(steps, magnitudes, {**not_called, **unreached})
    unselected = {}
    for step in steps:
        if step.selected is not None and not step.selected.all():
            unselected[step.name] = (~step.selected).nonzero().flatten().tolist()
    return TrainableReport(
        loss,
        tuple(step.name for step in steps),
        not_called,
        unreached,
        unexpected,
        expected,
        unselected,
        tuple(step.name for step in steps if step.base_is_cut),
    )


def _run(model: nn.Module, batch: Any, loss_fn: Callable[[Any], Tensor] | None) -> Tensor:
    """Return the loss of one forward, with one element."""
    if isinstance(batch, dict):
        output = model(**batch)
    else:
        output = model(*(batch if isinstance(batch, (tuple, list)) else (batch,)))
    loss = _loss_of(output) if loss_fn is None else loss_fn(output)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shape = [*loss.shape] if isinstance(loss, Tensor) else type(loss)
        raise ValueError(f"loss_fn: expected a loss with one element, got {shape}")
    return loss


def _loss_of(output: Any) -> Tensor:
    """Return output.loss, or the sum of mean(t^2) over the float tensors t of the output."""
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(loss, Tensor):
        return loss.mean()
    tensors = list(_float_tensors(output))
    if not tensors:
        raise ValueError(
            f"loss_fn: the model returned a {type(output)} without a float tensor; pass loss_fn"
        )
    return torch.stack([t.float().square().mean().to(tensors[0].device) for t in tensors]).sum()


def _float_tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.numel():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _float_tensors(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _float_tensors(value)


def _check_sharding(model: nn.Module) -> None:
    """Raise ValueError if FSDP shards a module of the model."""
    if any(isinstance(module, fsdp_types()) for module in model.modules()):
        raise ValueError("model: FSDP shards it; call check_trainable before the model is sharded")


@contextlib.contextmanager
def _watched(model: nn.Module, steps: Mapping[nn.Module, LayerStep]) -> Iterator[None]:
    """Note calls, outputs, their gradients and the routing of the layers in `steps`."""
    handles = []
    for layer, step in steps.items():
        handles.append(layer.register_forward_hook(_note_output(step)))
        layer.record.is_on = True
        layer.record.on_call = _note_call(step)
        for base in _called_bases(layer):
            handles.append(base.register_forward_hook(_note_base(step)))
    for module in model.modules():
        if isinstance(module, MoeLoraGroup):
            siblings = [steps[layer] for layer in module.children() if layer in steps]
            handles.append(module.register_forward_hook(_note_group(siblings)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _note_call(step: LayerStep) -> Callable[[RoutedCall], None]:
    def note(call: RoutedCall) -> None:
        step.calls += 1
        selected = selected_experts(call.weights, call.experts, step.layer.config.num_experts)
        step.selected = selected if step.selected is None else step.selected | selected

    return note


def selected_experts(weights: Tensor, experts: Tensor | None, num_experts: int) -> Tensor:
    """Return which experts have a weight, bool [E], without a shared expert."""
    return routed_experts(weights, experts, num_experts).any(dim=0)


def _note_output(step: LayerStep) -> Callable[[nn.Module, tuple, Tensor], None]:
    def note_gradient(gradient: Tensor | None) -> None:
        # None: the output of a sibling reached the loss, and this one did not.
        if gradient is None:
            return
        step.is_reached = True
        step.is_nonzero = step.is_nonzero or bool(gradient.any())

    def note(layer: nn.Module, args: tuple, output: Tensor) -> None:
        step.has_graph = step.has_graph or output.requires_grad
        if output.requires_grad:
            # Code that writes into a view, such as `y /= 2`, drops the hooks of the view.
            is_reshaped = output._is_view() and output._base.numel() == output.numel()
            (output._base if is_reshaped else output).register_hook(note_gradient)

    return note


def _note_group(siblings: list[LayerStep]) -> Callable[[nn.Module, tuple, tuple], None]:
    notes = [_note_output(step) for step in siblings]

    def note(group: nn.Module, args: tuple, outputs: tuple) -> None:
        for step, note_output, output in zip(siblings, notes, outputs, strict=True):
            note_output(step.layer, args, output)

    return note


def _called_bases(layer: MixtureLayer) -> list[nn.Module]:
    """Return the frozen modules that a layer calls, except linears that certainly have gradients.

    A hook on a plain nn.Linear would change how a layer runs it.
    """
    bases = [getattr(layer, name, None) for name in ("base_layer", *PROJECTIONS)]
    return [
        base
        for base in bases
        if not (base is None or is_plain_linear(base) or isinstance(base, MixtureLayer))
    ]


def _note_base(step: LayerStep) -> Callable[[nn.Module, tuple, Any], None]:
    def note(base: nn.Module, args: tuple, output: Any) -> None:
        needs_gradient = bool(args) and isinstance(args[0], Tensor) and args[0].requires_grad
        if needs_gradient and torch.is_grad_enabled() and isinstance(output, Tensor):
            step.base_is_cut = step.base_is_cut or not output.requires_grad

    return note


def _eager() -> contextlib.AbstractContextManager:
    """Return a context in which compiled modules run eagerly."""
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")
