"""check_trainable: run one training step that changes nothing, and name what does not train."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from moelora_kernels.nn.base_linear import is_plain_linear
from moelora_kernels.nn.ffn import PROJECTIONS
from moelora_kernels.nn.gradient_reasons import LayerStep, gradient_reasons
from moelora_kernels.nn.group import MoeLoraGroup
from moelora_kernels.nn.layer import MixtureLayer, mixture_layers
from moelora_kernels.nn.linear import forget_outputs
from moelora_kernels.nn.recorded_forwards import kept_records
from moelora_kernels.nn.routing_record import RoutedCall, routed_experts
from moelora_kernels.nn.sharding import fsdp_types
from moelora_kernels.nn.weight_readers import watch_reads
from moelora_kernels.nn.wrappers import named_modules, unwrap

# Whole-number buffers above this size are the codes of a quantised weight, or masks. A forward does
# not write them, so they are not copied.
MAX_CODES = 2**16


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
        lines.append("all of them train" if self.ok else "not all of them train:")
        lines += lines_by_reason("layer not called", self.not_called)
        lines += lines_by_reason("layer without effect", self.unreached)
        lines += lines_by_reason("no gradient", parameters)
        cut = "the base returns no graph for an x that needs a gradient, so dx lacks its part"
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

    The step runs in training mode with autograd. It changes nothing: weights, gradients, optimizer,
    random state, buffers, routing records, tasks, modes and hooks are afterwards as before. Set
    the tasks before the call if the model has task gates.

    Compiled models run eagerly, and DDP does not communicate.

    Args:
        model: a model with mixture layers, also a PeftModel, compiled, or in DDP.
        batch: keyword arguments by name, a tuple or a list of positional arguments, or one tensor.
        loss_fn: returns the loss for the output of the model. None means output.loss; without a
            loss, the sum over all float tensors t of the output of mean(t^2).

    Returns:
        A TrainableReport. `report.ok` is True if all adapters and routers train; print(report)
        names the others with the reason.

    Raises:
        ValueError: the model has no mixture layer or is sharded by FSDP, or there is no loss.

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
    _check_sharding(model)
    model = unwrap(model)
    steps = {
        layer: LayerStep(name, layer)
        for name, layer in named_modules(model)
        if isinstance(layer, MixtureLayer) and layer.is_selected
    }
    if not steps:
        raise ValueError(
            "model: expected active adapters, got none: every adapter is inactive or merged; call "
            "set_adapter(name) or unmerge_adapter() first"
        )
    with _restored(model), kept_records(layers), _eager(), torch.enable_grad():
        model.train()
        with _watched(model, steps), watch_reads() as reads:
            tensors = _step_tensors(model)
            loss = functional_call(
                _Step(model),
                {f"model.{name}": tensor for name, tensor in tensors.items()},
                (batch, loss_fn),
                strict=False,
            )
    for layer, step in steps.items():
        step.reader = reads.readers.get(layer)
    gradients = {
        id(parameter): tensors[name].grad
        for name, parameter in model.named_parameters()
        if name in tensors
    }
    return _report(list(steps.values()), gradients, loss)


def _report(
    steps: list[LayerStep], gradients: Mapping[int, Tensor | None], loss: float
) -> TrainableReport:
    not_called = {s.name: reason for s in steps if (reason := s.call_problem())}
    unreached = {s.name: reason for s in steps if s.calls and (reason := s.output_problem())}
    unexpected, expected = gradient_reasons(steps, gradients, {**not_called, **unreached})
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


class _Step(nn.Module):
    """One forward and backward of a model; backward runs before `functional_call` ends."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: Any, loss_fn: Callable[[Any], Tensor] | None) -> float:
        if isinstance(batch, Mapping):
            output = self.model(**batch)
        else:
            output = self.model(*(batch if isinstance(batch, (tuple, list)) else (batch,)))
        loss = _loss_of(output) if loss_fn is None else loss_fn(output)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            shape = [*loss.shape] if isinstance(loss, Tensor) else type(loss)
            raise ValueError(f"loss_fn: expected a loss with one element, got {shape}")
        if loss.requires_grad:
            loss.backward()
        return float(loss.detach())


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


def _step_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors that take the place of trainable parameters and buffers in the step."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensors[name] = parameter.detach().requires_grad_()
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() or buffer.numel() <= MAX_CODES:
            tensors[name] = buffer.detach().clone()
    return tensors


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
    on_call = step.layer.record.on_call

    def note(call: RoutedCall) -> None:
        step.calls += 1
        selected = selected_experts(call.weights, call.experts, step.layer.config.num_experts)
        step.selected = selected if step.selected is None else step.selected | selected
        if on_call is not None:
            on_call(call)

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
        if output.requires_grad:
            step.has_graph = True
            output.register_hook(note_gradient)

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


@contextlib.contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    """Restore gradients, random states, hooks and attributes of modules afterwards."""
    modules = list(model.modules())
    saved = [(module, dict(module.__dict__)) for module in modules]
    # Parameters, buffers, children and hooks: transformers adds hooks in the first forward.
    contents = [
        (values, values.copy())
        for module in modules
        for values in vars(module).values()
        if isinstance(values, dict)
    ]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    numpy = sys.modules.get("numpy")
    states = random.getstate(), None if numpy is None else numpy.random.get_state()
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        with torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        random.setstate(states[0])
        if numpy is not None:
            numpy.random.set_state(states[1])
        for module, attributes in saved:
            module.__dict__.clear()
            module.__dict__.update(attributes)
        for values, previous in contents:
            values.clear()
            values.update(previous)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        forget_outputs(model)


def _eager() -> contextlib.AbstractContextManager:
    """Return a context in which compiled modules run eagerly."""
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")
