"""One small measurement: check its calls, sample them in turn, return a row per call and ratio."""

import importlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.measure import check, harness
from benchmarks.measure.check import Verdict
from benchmarks.measure.inputs import DTYPES
from benchmarks.model import roofline

# Clock cycles that the device waits before a sample, about 250 us. The host needs less for the
# slowest call of the suite: two Triton launches and their allocations.
HEAD_START = 500_000

# Calls that the host makes before it waits for the device. The queue of the device holds about a
# thousand.
BATCH = 200

Samples = dict[str, list[float]]


class DeviceClock:
    """A clock for the device alone. All data that a call reads is cold."""

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
    """Prepare nothing."""


@dataclass
class Call:
    """One variant of a measurement. `verdict()` checks it, then `call()` is timed.

    call: None if the variant does not exist; the note says why.
    predicted: in the unit; NaN if nothing is predicted.
    provider: "moelora" for calls of the package.
    amount: bytes or FLOPs of a call, if the unit is a rate.
    reset: runs before every timed call.
    verdict: compares the outputs with float64.
    """

    variant: str
    call: Callable[[], object] | None
    predicted: float = math.nan
    provider: str = "torch"
    unit: str = "us"
    amount: float = 0.0
    reset: Callable[[], None] = nothing
    verdict: Callable[[], Verdict] | None = None
    note: str | None = None

    def value(self, microseconds: float) -> float:
        """Return a time, or the rate, in the unit of the call."""
        return microseconds if self.unit == "us" else self.amount / microseconds * 1e-6


class Ratio(NamedTuple):
    """The variant `over` another variant, with a note."""

    variant: str
    over: str
    note: str | None = None


class Bench:
    """The device, the options and the clocks of a run of the suite `machine`.

    launchers: whether the Triton launchers of the package's ops run on this device.
    """

    def __init__(self, options: harness.Options, clock):
        from moelora_kernels.ops.registration import kernels_problem

        self.options, self.clock = options, clock
        self.device, self.dtype = options.device, DTYPES[options.dtype]
        self.device_clock = DeviceClock(clock, self.device)
        on_gpu = self.device.type == "cuda"
        self.launchers = on_gpu and not kernels_problem()
        name = torch.cuda.get_device_name(self.device) if on_gpu else ""
        self.rates = roofline.assumed_rates(name, options.dtype)
        self.generator = torch.Generator(self.device).manual_seed(0)

    def draw(self, *shape: int, variance: float = 1.0) -> Tensor:
        """Draw a normal tensor in the dtype of the run."""
        drawn = torch.randn(shape, generator=self.generator, device=self.device)
        return drawn.mul_(variance**0.5).to(self.dtype)

    def operation(self, name: str) -> tuple[Callable, str]:
        """Return an op of the package without the dispatcher, and its implementation's name."""
        if self.launchers:
            return importlib.import_module(f"moelora_kernels.kernels.{name}").launch, "triton"
        return registered(name, self.device.type)

    def device_time(self, calls: dict[str, Call]) -> Samples:
        """Return microseconds of the device, whose queue is never empty."""
        return harness.sample_in_turn(calls, self.options, self.device_clock)

    def call_time(self, calls: dict[str, Call]) -> Samples:
        """Return microseconds as in the other suites: the time that a user sees."""
        return harness.sample_in_turn(calls, self.options, self.clock)

    def host_time(self, calls: dict[str, Call]) -> Samples:
        """Return microseconds of the host per call; it does not wait for the device."""
        return harness.host_times(calls, self.device, 2 * self.options.min_rounds, BATCH)


def registered(name: str, device: str) -> tuple[Callable, str]:
    """Return `moelora_kernels.ops.<name>`, and the name of its implementation on a device."""
    from moelora_kernels import info, ops

    return getattr(ops, name), info.implementations()[name][device]


def compare_outputs(
    outputs: dict[str, Tensor],
    exact: dict[str, Tensor],
    plain: dict[str, Tensor],
    dtype: torch.dtype,
) -> Verdict:
    """Return the verdict on the output closest to its budget; budgets as in `check.Checker`.

    exact: the products in float64;  plain: PyTorch's products in `dtype`.
    """
    worst = Verdict("", 0.0, math.inf)
    for name, value in exact.items():
        expected = check.Expected(value)
        budget = 2 * check.relative_rms(plain[name], expected) + check.roundoff(dtype)
        error = check.relative_rms(outputs.get(name), expected)
        if error / budget >= worst.error / worst.budget:
            worst = Verdict(name, error, budget)
    return worst


def empty_row(bench: Bench, measurement: str, case: str, variant: str, provider: str) -> dict:
    """Return a row without measurements. `predicted` is the number of a model, never measured."""
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
    """Return the fields of a row for a predicted value."""
    return {"predicted": value, "predicted_by": "model"} if math.isfinite(value) else {}


def spread(values: list[float]) -> dict:
    """Return the fields of a row for measured values."""
    low, middle, high = (harness.quantile(values, q) for q in (0.1, 0.5, 0.9))
    return {"median": middle, "p10": low, "p90": high, "samples": len(values)}


def try_call(call: Call) -> dict:
    """Run a call once; return the fields of its row that say whether it may be timed."""
    if call.call is None:
        return {"status": "absent", "reason": call.note}
    fields = {"note": call.note}
    try:
        if call.verdict:
            worst, error, budget = call.verdict()
            shown = error if math.isfinite(error) else None
            fields |= {"worst": worst, "error": shown, "error_budget": budget}
            if not error <= budget:
                reason = harness.off_by(worst, error, budget)
                return fields | {"status": "wrong", "reason": reason}
        call.reset()
        call.call()
    except Exception as error:  # one call that cannot run must not end the run
        fields |= {"status": "failed", "reason": harness.first_line(error)}
    return fields


def compare(
    bench: Bench,
    measurement: str,
    case: str,
    calls: Iterable[Call],
    sample: Callable[[dict[str, Call]], Samples],
    ratios: Sequence[Ratio] = (),
) -> list[dict]:
    """Return a row per call, and a row per ratio whose two variants were timed.

    A ratio is taken within each round, in which the two calls ran one after the other.
    """
    rows, timed = {}, {}
    for call in calls:
        row = empty_row(bench, measurement, case, call.variant, call.provider)
        row |= {"unit": call.unit} | prediction(call.predicted) | try_call(call)
        rows[call.variant] = row
        if row["status"] == "ok":
            timed[call.variant] = call
    samples = sample(timed) if timed else {}
    for name, values in samples.items():
        rows[name] |= spread([timed[name].value(microseconds) for microseconds in values])
    for name, over, note in ratios:
        if name in timed and over in timed:
            quotients = [a / b for a, b in zip(samples[name], samples[over], strict=True)]
            predicted = prediction(timed[name].predicted / timed[over].predicted)
            variant = f"{name} / {over}"
            row = empty_row(bench, measurement, case, variant, timed[name].provider)
            row |= {"unit": "ratio", "note": note} | predicted | spread(quotients)
            rows[variant] = row
    return list(rows.values())
