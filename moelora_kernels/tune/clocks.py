"""Clocks: functions that return the median microseconds of a call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

Clock = Callable[[Callable[[], object]], float]


class CudaClock:
    """The time of a call on the device, between two events. L2 is overwritten before every call.

    The launches of the call are replayed from a CUDA graph, so that the time of the host does not
    count. The call must have run once before.
    """

    def __init__(self, device: torch.device, samples: int) -> None:
        self.device, self.samples = device, samples
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        self.buffer = torch.zeros(size, dtype=torch.uint8, device=device)

    def __call__(self, call: Callable[[], object]) -> float:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        graph.replay()
        events = []
        for _ in range(self.samples):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self.buffer.zero_()
            start.record()
            graph.replay()
            end.record()
            events.append((start, end))
        torch.cuda.synchronize(self.device)
        return statistics.median(start.elapsed_time(end) * 1e3 for start, end in events)


class HostClock:
    """The time of a call on the host, for kernels that Triton interprets."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __call__(self, call: Callable[[], object]) -> float:
        times = []
        for _ in range(self.samples):
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e6)
        return statistics.median(times)
