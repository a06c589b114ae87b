"""FirstStep: name the adapters and routers that the first training step gives no gradient."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import Trainer

from moelora_kernels.nn.check import lines_by_reason
from moelora_kernels.nn.gradient_reasons import (
    UNUSED,
    LayerStep,
    gradient_reasons,
    layer_steps,
    own_parameters,
)
from moelora_kernels.nn.recorded_forwards import last_calls
from moelora_kernels.nn.sharding import is_dtensor
from moelora_kernels.nn.weight_readers import watch_reads

logger = logging.getLogger(__name__)


class FirstStep:
    """The calls and the gradients of the layers of a model in the first optimizer step.

    Attributes:
        is_open: whether the first optimizer step is still to come.
    """

    def __init__(self, model: nn.Module) -> None:
        self.is_open = True
        self.model = model
        self.steps = layer_steps(model)

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Note the layers that a forward calls. Routing is recorded in this context."""
        if not self.is_open:
            yield
            return
        with watch_reads() as reads:
            yield
        calls = last_calls(self.model, [step.layer for step in self.steps])
        for step in self.steps:
            step.calls += len(calls[step.layer] or ())
            step.reader = step.reader or reads.readers.get(step.layer)

    def finish(self, trainer: Trainer) -> None:
        """Warn once of what has no gradient, before the first optimizer step.

        All processes call it: a layer counts as called if any process called it.
        """
        if not (self.is_open and self.steps):
            return
        self.is_open = False
        parameters = {
            id(parameter): parameter
            for step in self.steps
            for _, parameter in own_parameters(step.layer)
        }
        calls = torch.tensor([float(step.calls) for step in self.steps], device=trainer.args.device)
        # The layers of a model can be on several devices.
        flags = [_gradient_flags(parameter).to(calls.device) for parameter in parameters.values()]
        flat = torch.cat([calls, *flags])
        flat = trainer.accelerator.reduce(flat, "sum").cpu()
        for step, count in zip(self.steps, flat.tolist(), strict=False):
            step.calls = int(count)
        sums = flat[len(calls) :].view(-1, 2)
        exists = dict(zip(parameters, (sums[:, 0] > 0).tolist(), strict=True))
        magnitudes = dict(zip(parameters, sums[:, 1].tolist(), strict=True))
        problems = {s.name: reason for s in self.steps if (reason := s.call_problem())}
        left_out = dict(problems)
        if not _hides_gradients(trainer):
            for step in self.steps:
                if step.name not in problems and not _is_reached(step, exists):
                    problems[step.name] = left_out[step.name] = UNUSED
            unexpected, _ = gradient_reasons(self.steps, magnitudes, problems)
            known = set(problems.values())
            left_out |= {name: why for name, why in unexpected.items() if why not in known}
        if left_out and trainer.is_world_process_zero():
            logger.warning(
                "some adapters or routers got no gradient in the first training step, so they do "
                "not train:\n%s\n"
                "check_trainable(model, batch) checks the model with any batch, without a trainer",
                "\n".join(lines_by_reason("no gradient", left_out)),
            )


def _gradient_flags(parameter: nn.Parameter) -> Tensor:
    """Return [whether a gradient exists, its largest absolute value] as float32 [2]."""
    gradient = parameter.grad
    if gradient is None:
        return torch.zeros(2, device=parameter.device)
    gradient = gradient.to_local() if is_dtensor(gradient) else gradient
    flags = torch.ones(2, device=gradient.device)
    # A gradient that is not finite counts as 1: the first step of a loss scaler can overflow.
    flags[1] = gradient.abs().max().float().nan_to_num(1.0, 1.0) if gradient.numel() else 0.0
    return flags


def _is_reached(step: LayerStep, exists: dict[int, bool]) -> bool:
    """Return whether a parameter of the layer has a gradient, or none of them needs one."""
    matrices = [p for name, p in own_parameters(step.layer) if "router." not in name]
    trained = [parameter for parameter in matrices if parameter.requires_grad]
    return not trained or any(exists[id(parameter)] for parameter in trained)


def _hides_gradients(trainer: Trainer) -> bool:
    """Return whether `parameter.grad` is not the gradient: DeepSpeed and FSDP1 keep others."""
    fsdp1 = trainer.is_fsdp_enabled and not getattr(trainer.accelerator, "is_fsdp2", False)
    return trainer.is_deepspeed_enabled or fsdp1
