"""Which calls of a layer op are recorded and replayed."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from moelora_kernels.kernels.common import launcher
from moelora_kernels.plans.native import NativeReplay
from moelora_kernels.plans.recorder import record
from moelora_kernels.plans.steps import Plan

# An op keeps at most this many keys. If there are more, the key that was seen first leaves.
MAX_KEYS = 1024

# The states of a key without a plan: seen once; recorded, but a step was not known.
_SEEN, _UNPLANNED = "seen", "unplanned"


class PlannedOp:
    """A layer op on tensors of a GPU, with plans.

    The first call with a key runs `function`. The second call runs it, and records its steps. Later
    calls replay them. So a shape that comes once, such as a length of a batch, records nothing. A
    key whose steps are not all known runs `function` in every call.

    The replay returns the same bits as `function`, on the current stream. It launches nothing that
    is not compiled, and allocates with torch, so it may run while a CUDA graph is captured.
    Threads share the plans.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        launchers: Mapping[str, Callable[..., Any]],
        native: NativeReplay | None = None,
    ) -> None:
        """`function`: takes the flat arguments of the dispatcher.

        launchers: op of this package -> the function that launches its Triton kernel.
        native: gets the plans too, for the native library; None without one.
        """
        self.function, self.launchers, self.native = function, launchers, native
        self.plans: dict[Any, Plan | str] = {}
        # Why recorded calls have no plan, the last of them.
        self.problems: deque[str] = deque(maxlen=16)
        # Held to change `plans`.
        self._lock = threading.Lock()

    def __call__(self, *arguments: Any) -> Any:
        if not launcher.is_plain():
            return self.function(*arguments)
        key, inputs, addresses = key_of(arguments)
        plan = self.plans.get(key)
        if plan.__class__ is not Plan:
            return self._without_plan(key, plan, arguments)
        # The library may have dropped its plan of this key. Python then replays.
        driver = triton.runtime.driver.active
        device, current = inputs[0].get_device(), driver.get_current_device()
        if device in (current, -1):
            return plan.replay(inputs, addresses, driver.get_current_stream(current))
        with torch.cuda.device(device):
            return plan.replay(inputs, addresses, driver.get_current_stream(device))

    def _without_plan(self, key: Any, state: Plan | str | None, arguments: Sequence[Any]) -> Any:
        if state == _UNPLANNED:
            return self.function(*arguments)
        if state is None:
            self._keep(key, _SEEN)
            return self.function(*arguments)
        result, plan, problem = record(self.function, arguments, self.launchers)
        if plan is not None and self.native is not None:
            self.native.keep(plan, arguments)
        self._keep(key, plan or _UNPLANNED)
        if problem:
            self.problems.append(problem)
        return result

    def _keep(self, key: Any, state: Plan | str) -> None:
        with self._lock:
            if key not in self.plans and len(self.plans) >= MAX_KEYS:
                del self.plans[next(iter(self.plans))]
            self.plans[key] = state


def key_of(arguments: Sequence[Any]) -> tuple[Any, list[Tensor], list[int]]:
    """Return the key of a call, its tensors in their order, and their addresses.

    arguments: tensors, lists of tensors or numbers, numbers, dtypes and None. The key has all that
    the steps of the call depend on.
    """
    inputs: list[Tensor] = []
    key: list[Any] = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            inputs.append(argument)
            key.append(Tensor)
        elif argument.__class__ is list:
            if argument and isinstance(argument[0], Tensor):
                inputs += argument
                key.append(len(argument))
            else:
                key.append((*argument,))
        else:
            key.append(argument)
    addresses = [tensor.data_ptr() for tensor in inputs]
    for tensor, address in zip(inputs, addresses, strict=True):
        key += (
            tensor.shape,
            tensor.stride(),
            tensor.dtype,
            tensor.get_device(),
            address % launcher.ALIGNMENT,
        )
    return (*key,), inputs, addresses
