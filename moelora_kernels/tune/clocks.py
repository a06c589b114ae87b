"""Clocks: functions that return the median microseconds of a call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

Clock = Callable[[Callable[[], object]], float]


class EventClock:
    """The time of a call on the device, between two events.

    If `cold`, L2 is overwritten before every call: `cold_bytes` of memory are.
    """

    def __init__(self, device: torch.device, cold: bool = True) -> None:
        self.device = device
        size = 2 * torch.cuda.get_device_properties(device).L2_cache_size
        self.cold_bytes = size if cold else 0
        self.buffer = torch.zeros(self.cold_bytes, dtype=torch.uint8, device=device)

    def sample(self, call: Callable[[], object]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        """Return the events before and behind a call, which may still run."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.buffer.zero_()
        start.record()
        call()
        end.record()
        return start, end

    def microseconds(self, samples: list[tuple[torch.cuda.Event, torch.cuda.Event]]) -> list[float]:
        """Return the time between the events of each sample, after all calls have ended."""
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) * 1e3 for start, end in samples]


class CudaClock:
    """The time of a call on the device, with a cold L2.

    The launches of the call are replayed from a CUDA graph, so that the time of the host does not
    count. The call must have run once before.
    """

    def __init__(self, device: torch.device, samples: int) -> None:
        self.events, self.samples = EventClock(device), samples

    def __call__(self, call: Callable[[], object]) -> float:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
        graph.replay()
        samples = [self.events.sample(graph.replay) for _ in range(self.samples)]
        return statistics.median(self.events.microseconds(samples))


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
