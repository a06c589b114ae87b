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
    ZERO_GRADIENT,
    LayerStep,
    gradient_reasons,
    layer_steps,
    own_parameters,
)
from moelora_kernels.nn.recorded_forwards import last_calls
from moelora_kernels.nn.sharding import is_dtensor
from moelora_kernels.nn.weight_readers import watch_reads

logger = logging.getLogger(__name__)


# A step can give every adapter a gradient of zero: equal rewards in GRPO. If all of them are zero
# without another reason, they are named after this many optimizer steps.
MAX_STEPS = 10


class FirstStep:
    """The calls and the gradients of the layers of a model in the first optimizer step.

    Attributes:
        is_open: whether more optimizer steps are needed: the first one, or up to MAX_STEPS if the
            gradients of all adapters are zero.
        num_steps: the number of optimizer steps so far.
        exists, largest: id of a parameter -> whether it had a gradient, and its largest absolute
            value, in the steps so far.
        named: the layers and parameters that a warning has named.
    """

    def __init__(self, model: nn.Module) -> None:
        self.is_open = True
        self.num_steps = 0
        self.model = model
        self.steps = layer_steps(model)
        self.exists: dict[int, bool] = {}
        self.largest: dict[int, float] = {}
        self.named: set[str] = set()

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
        """Warn of what has no gradient, before an optimizer step. Each name is warned of once.

        All processes call it: a layer counts as called if any process called it.
        """
        if not (self.is_open and self.steps):
            return
        self.num_steps += 1
        self._add_gradients(trainer)
        names = [(p, name) for step in self.steps for name, p in own_parameters(step.layer)]
        is_zero = not any(self.largest[id(p)] for p, name in names if "lora_" in name)
        self.is_open = (
            is_zero
            and self.num_steps < MAX_STEPS
            and ZERO_GRADIENT in self._problems(trainer).values()
        )
        self._warn(trainer)

    def end(self, trainer: Trainer) -> None:
        """Warn of gradients that were zero in all steps of a training with few steps."""
        if self.is_open and self.num_steps:
            self.is_open = False
            self._warn(trainer)

    def _warn(self, trainer: Trainer) -> None:
        """Warn of the names that no warning has had. A zero gradient waits while `is_open`."""
        left_out = {
            name: why
            for name, why in self._problems(trainer).items()
            if name not in self.named and not (self.is_open and why == ZERO_GRADIENT)
        }
        self.named |= left_out.keys()
        if left_out and trainer.is_world_process_zero():
            count = self.num_steps
            steps = "training step" if count == 1 else f"{count} training steps"
            logger.warning(
                "some adapters or routers got no gradient in the first %s:\n%s\n"
                "they do not train unless a later step reaches them; check_trainable(model, batch) "
                "checks the model with any batch, without a trainer",
                steps,
                "\n".join(lines_by_reason("no gradient", left_out)),
            )

    def _add_gradients(self, trainer: Trainer) -> None:
        """Add the calls and the gradients of this step, of all processes, to those before it."""
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
            step.calls = int(count > 0)
        for key, (count, size) in zip(parameters, flat[len(calls) :].view(-1, 2), strict=True):
            self.exists[key] = self.exists.get(key, False) or bool(count > 0)
            self.largest[key] = max(self.largest.get(key, 0.0), float(size))

    def _problems(self, trainer: Trainer) -> dict[str, str]:
        """Return the layers and parameters without gradient in the steps so far -> why."""
        problems = {s.name: reason for s in self.steps if (reason := s.call_problem())}
        if _hides_gradients(trainer):
            return problems
        for step in self.steps:
            if step.name not in problems and not _is_reached(step, self.exists):
                problems[step.name] = UNUSED
        unexpected, _ = gradient_reasons(self.steps, self.largest, problems)
        known = set(problems.values())
        return problems | {name: why for name, why in unexpected.items() if why not in known}


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
