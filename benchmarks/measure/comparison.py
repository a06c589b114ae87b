"""Rivals of one small measurement: check each, sample them in turn, one row per rival and ratio."""

import importlib
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.measure import check, harness
from benchmarks.measure.inputs import DTYPES
from benchmarks.model import roofline

# Clock cycles the device waits before a sample, about 250 us: chosen well above what the host is
# expected to need for the slowest call here, two Triton launches and their allocations.
HEAD_START = 500_000

# Calls that the host makes before it waits for the device, whose queue holds about a thousand.
BATCH = 200

Samples = dict[str, list[float]]


class DeviceClock:
    """A clock of the harness for the device alone, everything that is read cold."""

    leads_in = False

    def __init__(self, clock, device: torch.device):
        self.clock, self.on_gpu = clock, device.type == "cuda"
        self.cold_bytes, self.load_at_start = clock.cold_bytes, clock.load_at_start
        self.cold_kind = clock.cold_kind if self.on_gpu else "caches overwritten before every call"
        self.microseconds = clock.microseconds
        self.buffer = torch.zeros(0 if self.on_gpu else self.cold_bytes, dtype=torch.uint8)

    def sample(self, call: Callable[[], object]):
        if self.on_gpu:
            torch.cuda._sleep(HEAD_START)
        self.buffer.zero_()
        return self.clock.sample(call)


def nothing() -> None:
    """What precedes a call that needs no preparation."""


@dataclass
class Call:
    """One rival: after one `verdict()`, `call()` is timed, each time after `reset()`.

    call: None for what is not there, as the note says.  predicted: in the unit, NaN: nothing is.
    provider: "moelora" for what the package answers for.  amount: bytes or FLOPs of a call, where
    the unit is a rate.  verdict: (name, error, budget) of the output closest to its budget.
    """

    variant: str
    call: Callable[[], object] | None
    predicted: float = math.nan
    provider: str = "torch"
    unit: str = "us"
    amount: float = 0.0
    reset: Callable[[], None] = nothing
    verdict: Callable[[], tuple[str, float, float]] | None = None
    note: str | None = None

    def value(self, microseconds: float) -> float:
        return microseconds if self.unit == "us" else self.amount / microseconds * 1e-6


class Bench:
    """Where and how a run measures. launchers: the package's ops are its Triton launchers here."""

    def __init__(self, options: harness.Options, clock):
        from moelora_kernels.ops.registration import why_no_kernels

        self.options, self.clock = options, clock
        self.device, self.dtype = options.device, DTYPES[options.dtype]
        self.device_clock = DeviceClock(clock, self.device)
        on_gpu = self.device.type == "cuda"
        self.launchers = on_gpu and not why_no_kernels()
        name = torch.cuda.get_device_name(self.device) if on_gpu else ""
        self.rates = roofline.rates(name, options.dtype)
        self.generator = torch.Generator(self.device).manual_seed(0)

    def draw(self, *shape: int, variance: float = 1.0) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator, device=self.device)
        return drawn.mul_(variance**0.5).to(self.dtype)

    def operation(self, name: str) -> tuple[Callable, str]:
        """An op of the package as its kernels are launched, and what serves it here."""
        if self.launchers:
            return importlib.import_module(f"moelora_kernels.kernels.{name}").launch, "triton"
        return registered(name, self.device.type)

    def device_time(self, calls: dict[str, Call]) -> Samples:
        """Microseconds of the device, whose queue is never empty."""
        return harness.sample_in_turn(calls, self.options, self.device_clock)

    def call_time(self, calls: dict[str, Call]) -> Samples:
        """Microseconds as a user sees them, as in the other suites."""
        return harness.sample_in_turn(calls, self.options, self.clock)

    def host_time(self, calls: dict[str, Call]) -> Samples:
        """Microseconds until the host has a call behind it; nobody waits for the device."""
        samples: Samples = {name: [] for name in calls}
        for _ in range(2 * self.options.min_rounds):
            for name, each in calls.items():
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)
                start = time.perf_counter()
                for _ in range(BATCH):
                    each.call()
                samples[name].append((time.perf_counter() - start) * 1e6 / BATCH)
        return samples


def registered(name: str, device: str) -> tuple[Callable, str]:
    """`torch.ops.moelora.<name>` as the package calls it, and what serves it on a device."""
    from moelora_kernels import info

    return getattr(torch.ops.moelora, name).default, info.implementations()[name][device]


def judge(found: dict, truth: dict, plain: dict, dtype: torch.dtype) -> tuple[str, float, float]:
    """(name, error, budget) of the tensor closest to its budget; budgets as in `check.Checker`.

    truth: the plain products in float64;  plain: the same in `dtype`.
    """
    worst = ("", 0.0, math.inf)
    for name, value in truth.items():
        expected = check.Expected(value)
        budget = 2 * check.relative_rms(plain[name], expected) + check.roundoff(dtype)
        error = check.relative_rms(found.get(name), expected)
        if error / budget >= worst[1] / worst[2]:
            worst = (name, error, budget)
    return worst


def empty_row(bench: Bench, measurement: str, case: str, variant: str, provider: str) -> dict:
    """A row without numbers. `predicted` is the model's and stays apart from what was measured."""
    return {
        "suite": "machine",
        "measurement": measurement,
        "case": case,
        "variant": variant,
        "provider": provider,
        "dtype": bench.options.dtype,
        "unit": "us",
        "median": None,
        "p10": None,
        "p90": None,
        "samples": 0,
        "predicted": None,
        "predicted_by": None,
        "status": "ok",
        "reason": None,
        "note": None,
        "error": None,
        "error_budget": None,
        "worst": None,
    }


def prediction(value: float) -> dict:
    """The fields of a row that were predicted."""
    return {"predicted": value, "predicted_by": "model"} if math.isfinite(value) else {}


def spread(values: list[float]) -> dict:
    """The fields of a row that were measured."""
    low, middle, high = (harness.quantile(values, q) for q in (0.1, 0.5, 0.9))
    return {"median": middle, "p10": low, "p90": high, "samples": len(values)}


def try_call(each: Call) -> dict:
    """The fields of a row that say whether a call is right, and so may be timed."""
    if each.call is None:
        return {"status": "absent", "reason": each.note}
    found = {"note": each.note}
    try:
        if each.verdict:
            worst, error, budget = each.verdict()
            shown = error if math.isfinite(error) else None
            found |= {"worst": worst, "error": shown, "error_budget": budget}
            if not error <= budget:
                off = f"off by {error:.2e}" if shown is not None else "missing or not finite"
                reason = f"{worst} is {off}, allowed {budget:.2e}"
                return found | {"status": "wrong", "reason": reason}
        each.reset()
        each.call()
    except Exception as error:  # one rival that cannot run must not end the run
        found |= {"status": "failed", "reason": harness.first_line(error)}
    return found


def compare(
    bench: Bench,
    measurement: str,
    case: str,
    calls: Iterable[Call],
    sample: Callable[[dict[str, Call]], Samples],
    ratios: Sequence[tuple[str, str, str | None]] = (),
) -> list[dict]:
    """A row per call, and one per (variant, over variant, note) of `ratios` where both were timed.

    A ratio is taken within each round, where the two ran one after the other.
    """
    rows, timed = {}, {}
    for each in calls:
        row = empty_row(bench, measurement, case, each.variant, each.provider)
        row |= {"unit": each.unit} | prediction(each.predicted) | try_call(each)
        rows[each.variant] = row
        if row["status"] == "ok":
            timed[each.variant] = each
    samples = sample(timed) if timed else {}
    for name, taken in samples.items():
        rows[name] |= spread([timed[name].value(microseconds) for microseconds in taken])
    for name, over, note in ratios:
        if name in timed and over in timed:
            quotients = [a / b for a, b in zip(samples[name], samples[over], strict=True)]
            predicted = prediction(timed[name].predicted / timed[over].predicted)
            variant = f"{name} / {over}"
            row = empty_row(bench, measurement, case, variant, timed[name].provider)
            row |= {"unit": "ratio", "note": note} | predicted | spread(quotients)
            rows[variant] = row
    return list(rows.values())
