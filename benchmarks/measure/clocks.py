"""Clocks: the time of one call with cold caches, on a CPU and on a GPU."""

import math
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from moelora_kernels.tune.clocks import EventClock


def load() -> float | None:
    """Return the mean number of runnable processes over the last minute; None if unknown."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def last_level_cache() -> int:
    """Return the bytes of the processor's last level cache; 32 MiB if the system does not say."""
    size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    text = size.read_text().strip() if size.exists() else "32768K"
    unit = {"K": 2**10, "M": 2**20}[text[-1]]
    return int(text[:-1]) * unit


class ColdWeights:
    """The frozen weights of a layer and copies of them, used in turn from call to call.

    In a model, the weights of a layer come from memory because the other layers ran in between.
    x and the code are warm, because the layer before has just written and run them. The copies
    together are twice as large as the last level cache. Every timed call follows a call of the
    same provider with another copy. So it reads W from memory and finds the rest in the caches.

    cold_bytes: total size of the copies; 0: no copies.
    """

    def __init__(self, layer, cold_bytes: int):
        self.weights = [adapter.weight for adapter in layer.adapters]
        size = sum(weight.nbytes for weight in self.weights)
        count = max(1, math.ceil(cold_bytes / size))
        clones = [[weight.clone() for weight in self.weights] for _ in range(count - 1)]
        self.copies = [self.weights, *clones]
        self.current = 0

    def frozen_parameters(self, provider: nn.Module) -> list[tuple[nn.Parameter, int]]:
        """Return the parameters of a provider that are frozen weights, with the sibling's index."""
        index = {weight.data_ptr(): i for i, weight in enumerate(self.weights)}
        frozen = [p for p in provider.parameters() if not p.requires_grad]
        return [(p, index[p.data_ptr()]) for p in frozen if p.data_ptr() in index]

    def rotate(self, parameters: list[tuple[nn.Parameter, int]]) -> None:
        """Point these parameters at the copy that was read longest ago."""
        self.current = (self.current + 1) % len(self.copies)
        for parameter, index in parameters:
            parameter.data = self.copies[self.current][index]


class CpuClock:
    """Wall time of one call. ColdWeights makes its weights cold."""

    cold_kind = "copies of the frozen weights in turn: W comes from memory, the code is warm"
    # An untimed call precedes every timed one, in the place of the layer before.
    leads_in = True

    def __init__(self, cold: bool = True):
        self.cold_bytes = self.weight_bytes = 2 * last_level_cache() if cold else 0
        self.load_at_start = load()

    def sample(self, call: Callable[[], None]) -> float:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e6

    def microseconds(self, samples: list[float]) -> list[float]:
        return samples


class CudaClock(EventClock):
    """Time between two events around one call. L2 is overwritten before the call.

    The host waits for the device only after it has queued all samples of a cell. If the host is
    slower than the device, the time between the events is the host's time: users wait for it too.
    """

    cold_kind = "L2 overwritten before every call"
    leads_in = False
    weight_bytes = 0

    def __init__(self, cold: bool = True):
        super().__init__(torch.device("cuda", torch.cuda.current_device()), cold)
        self.load_at_start = load()
