"""ModelHooks: hooks around every forward of a model, by thread."""

from __future__ import annotations

import sys
import threading
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import nn

from moelora_kernels.numerics import is_backward


class RunningForward(NamedTuple):
    """A forward that a thread has begun and not ended."""

    hooks: ModelHooks
    model: nn.Module
    frame: FrameType  # of the call of the model


class RunningForwards(threading.local):
    """The forwards that a thread has begun and not ended, the innermost last."""

    def __init__(self) -> None:
        self.stack: list[RunningForward] = []


RUNNING = RunningForwards()


class ModelHooks:
    """Two hooks of a model. They call `begin` before and `end` after each forward of the model.

    A forward that raises ends too. PyTorch calls no hook after a KeyboardInterrupt, so the next
    call of `end_interrupted` in the same thread ends that forward with `interrupt`. Activation
    checkpointing repeats forwards in backward; these are left out.

    A subclass sets `attribute`, the name under which a model stores its hooks. A copy of a model
    has other layers, so the copy of its hooks starts anew.
    """

    attribute: str

    @classmethod
    def add_to(cls, model: nn.Module) -> ModelHooks:
        """Return the hooks of `model`. They are added by the first call."""
        hooks = model.__dict__.get(cls.attribute)
        if hooks is None:
            hooks = cls()
            setattr(model, cls.attribute, hooks)
            model.register_forward_pre_hook(hooks.before, with_kwargs=True)
            model.register_forward_hook(hooks.after, always_call=True)
        return hooks

    def begin(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Begin a forward of `model`."""
        raise NotImplementedError

    def end(self, model: nn.Module) -> None:
        """End a forward of `model`."""
        raise NotImplementedError

    def interrupt(self, model: nn.Module) -> None:
        """End a forward of `model` that an exception has interrupted."""
        self.end(model)

    def before(self, model: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        """Begin a forward; PyTorch calls this method before it."""
        if is_backward():
            return
        # A compiled forward has no frame, and if it raises, it calls no hook.
        is_eager = not torch.compiler.is_compiling()
        if is_eager:
            end_interrupted()
        self.begin(model, args, kwargs)
        if is_eager:
            RUNNING.stack.append(RunningForward(self, model, sys._getframe(1)))

    def after(self, model: nn.Module, args: tuple, output: object) -> None:
        """End a forward; PyTorch calls this method after it, also if it raised."""
        if is_backward():
            return
        if not torch.compiler.is_compiling():
            stack = RUNNING.stack
            for i in reversed(range(len(stack))):
                if stack[i].hooks is self:
                    del stack[i]
                    break
        self.end(model)

    def is_nested(self) -> bool:
        """Return whether another forward of the model is running in this thread."""
        return any(running.hooks is self for running in RUNNING.stack)

    def __reduce__(self):
        return type(self), ()


def end_interrupted() -> None:
    """End the forwards of this thread that a KeyboardInterrupt has left open."""
    stack = RUNNING.stack
    if not stack:
        return
    frames = set()
    frame = sys._getframe(1)
    while frame is not None:
        frames.add(frame)
        frame = frame.f_back
    while stack and stack[-1].frame not in frames:
        running = stack.pop()
        running.hooks.interrupt(running.model)
