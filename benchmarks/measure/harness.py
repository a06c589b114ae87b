"""Check the providers of a cell, then time them: a row for each, in the schema of the results.

A cell is one (case, T, mode). The providers of a cell are sampled in turn: one sample of each,
then the next round. So a clock that drifts, or another process on the machine, affects all
providers equally.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from benchmarks.baselines.linear import Provider
from benchmarks.measure.check import Checker
from benchmarks.measure.clocks import ColdWeights
from benchmarks.measure.inputs import DTYPES, draw_inputs, make_layer
from benchmarks.suites.shapes import Case
from benchmarks.suites.sizes import GRAPH

# Called with a text after each cell.
Progress = Callable[[str], None]

MAX_ROUNDS = 200

# Calls of a sample of the host's time: fewer launches than the queue of the device holds.
HOST_CALLS = 8
HOST_ROUNDS = 3


@dataclass
class Options:
    """The options of a run for one suite.

    budget_s: seconds of samples in a cell, shared by its providers.
    left_out: provider -> why it has a row without a time in every cell.
    """

    device: torch.device
    dtype: str
    tokens: list[int]
    modes: list[str]
    providers: list[str]
    experts: int
    rank: int
    top_k: int
    routing: str
    budget_s: float
    min_rounds: int
    left_out: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Suite:
    """The providers that a suite times, and how it draws and checks its layers.

    skip_reason: (provider, layer, T) -> why the provider is not measured there, or "".
    without_graph: providers that no CUDA graph can hold, because their host waits for the device.
    times_host: whether the rows have the host's time of a call, on a GPU.
    """

    providers: dict[str, Provider]
    make_layer: Callable = make_layer
    make_checker: Callable = Checker
    skip_reason: Callable[..., str] = lambda name, layer, tokens: ""
    without_graph: tuple[str, ...] = ()
    times_host: bool = False

    def problem(self, name: str, layer, tokens: int, mode: str) -> str:
        """Return why a provider is not measured in a cell, or ""."""
        if mode == GRAPH and name in self.without_graph:
            return "its host waits for the device, so that it has no graph"
        return self.skip_reason(name, layer, tokens)


class Replayed(nn.Module):
    """A provider whose forward replays a CUDA graph of one call with x."""

    def __init__(self, provider: nn.Module, x: Tensor):
        super().__init__()
        self.provider = provider
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.no_grad(), torch.cuda.stream(side):
            for _ in range(2):
                provider(x)
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(self.graph):
            self.outputs = provider(x)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        self.graph.replay()
        return self.outputs


class Timed:
    """One provider in one mode, on fixed x and dy. The clock times `call()`."""

    def __init__(
        self, provider: nn.Module, weights: ColdWeights, x: Tensor, dys: list[Tensor], mode: str
    ):
        self.provider, self.dys, self.mode = provider, dys, mode
        self.weights, self.frozen = weights, weights.frozen_parameters(provider)
        self.x = x.detach().requires_grad_(mode == "fwd_bwd")

    def reset(self) -> None:
        """Make the weights cold and the gradients None, so that no call accumulates; not timed."""
        self.weights.rotate(self.frozen)
        self.provider.zero_grad(set_to_none=True)
        self.x.grad = None

    def call(self) -> None:
        """Run one forward, or one forward and backward."""
        if self.mode == "fwd_bwd":
            torch.autograd.backward(self.provider(self.x), self.dys)
        else:
            with torch.no_grad():
                self.provider(self.x)

    def extra_mib(self) -> float | None:
        """Return the memory of one call beyond x and the parameters, in MiB.

        `environment.MEMORY_KIND` says which memory it is on a CPU and on a GPU.
        """
        self.reset()
        if self.x.is_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.call()
            return (torch.cuda.max_memory_allocated() - before) / 2**20
        if self.mode != "fwd_bwd":
            return None
        return saved_bytes(self.provider, self.x) / 2**20


def saved_bytes(provider: nn.Module, x: Tensor) -> int:
    """Return the bytes of the distinct storages that one forward keeps for backward."""
    known = {x.untyped_storage().data_ptr()}
    known |= {p.untyped_storage().data_ptr() for p in provider.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # The outputs live until the count is done: a freed storage could give its address to the
        # next one.
        outputs = provider(x)
    total = sum(saved.values())
    del outputs
    return total


def sample_in_turn(timed: dict[str, Timed], options: Options, clock) -> dict[str, list[float]]:
    """Sample each provider once per round; return its microseconds per call.

    The first round is a warm-up. It says how many rounds fit into the budget.
    """
    start = time.perf_counter()
    for candidate in timed.values():
        candidate.reset()
        clock.microseconds([clock.sample(candidate.call)])
    round_s = time.perf_counter() - start
    if clock.leads_in:
        round_s *= 2
    rounds = min(max(int(options.budget_s / round_s), options.min_rounds), MAX_ROUNDS)
    samples: dict[str, list] = {name: [] for name in timed}
    for _ in range(rounds):
        for name, candidate in timed.items():
            if clock.leads_in:
                candidate.reset()
                candidate.call()
            candidate.reset()
            samples[name].append(clock.sample(candidate.call))
    return {name: clock.microseconds(values) for name, values in samples.items()}


def host_times(timed: dict, device: torch.device, rounds: int, calls: int) -> dict:
    """Return the host's microseconds per call of each provider: a sample of `calls` per round.

    The host does not wait for the device, unless a call makes it wait.
    """
    samples: dict[str, list[float]] = {name: [] for name in timed}
    for _ in range(rounds):
        for name, candidate in timed.items():
            candidate.reset()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            for _ in range(calls):
                candidate.call()
            samples[name].append((time.perf_counter() - start) * 1e6 / calls)
    return samples


def quantile(values: list[float], q: float) -> float:
    """Return a quantile, interpolated linearly between the ordered values."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low, high = ordered[math.floor(position)], ordered[math.ceil(position)]
    return low + (high - low) * (position - math.floor(position))


def implementation(provider: nn.Module, x: Tensor) -> str | None:
    """Return the formulation that the package runs for x; None for the other providers."""
    formulation = getattr(provider, "implementation", None)
    return formulation(x) if formulation else None


def empty_row(case: Case, tokens: int, mode: str, name: str, options: Options) -> dict:
    """Return the row of a provider without its measurements. frozen has no mixture.

    host_us is None if it is not measured; on a CPU the whole time is the host's.
    """
    row = {
        "suite": case.suite,
        "case": case.name,
        "tokens": tokens,
        "in_features": case.in_features,
        "out_features": list(case.out_features),
        "experts": options.experts,
        "rank": options.rank,
        "top_k": options.top_k,
        "routing": options.routing,
        "dtype": options.dtype,
        "mode": mode,
        "provider": name,
        "impl": None,
        "status": "ok",
        "reason": None,
        "median_us": None,
        "p10_us": None,
        "p90_us": None,
        "samples": 0,
        "host_us": None,
        "peak_extra_mib": None,
        "error": None,
        "error_budget": None,
        "worst": None,
        "used_by": list(case.used_by),
    }
    if name == "frozen":
        for key in ("experts", "rank", "top_k", "routing"):
            del row[key]
    return row


def first_line(error: Exception) -> str:
    """Return the type and the first line of an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def off_by(name: str, error: float, budget: float) -> str:
    """Say how wrong a tensor is."""
    size = f"off by {error:.2e}" if math.isfinite(error) else "missing or not finite"
    return f"{name} is {size}, allowed {budget:.2e}"


def run_cell(
    suite: Suite, weights: ColdWeights, checker: Checker, mode: str, options: Options, clock
) -> list[dict]:
    """Check the providers of one cell, time the right ones and return a row for each."""
    layer, x, dys = checker.layer, checker.x, checker.dys
    rows, timed = {}, {}
    for name, (build, formula) in suite.providers.items():
        if name not in options.providers and name not in options.left_out:
            continue
        row = rows[name] = empty_row(layer.case, len(x), mode, name, options)
        reason = options.left_out.get(name) or suite.problem(name, layer, len(x), mode)
        if reason:
            row |= {"status": "left out", "reason": reason}
            continue
        try:
            # A forward alone is that of generation, for which layers are in evaluation mode.
            provider = build(layer).train(mode == "fwd_bwd")
            row["impl"] = implementation(provider, x)
            if mode == GRAPH:
                provider = Replayed(provider, x)
            worst, error, budget = checker.verdict(provider, formula, mode)
            row |= {"worst": worst, "error_budget": budget}
            row["error"] = error if math.isfinite(error) else None
            if error > budget:
                row |= {"status": "wrong", "reason": off_by(worst, error, budget)}
                continue
            candidate = Timed(provider, weights, x, dys, mode)
            candidate.reset()
            candidate.call()
            row["peak_extra_mib"] = candidate.extra_mib()
            timed[name] = candidate
        except Exception as error:  # one provider that cannot run must not end the run
            row |= {"status": "failed", "reason": first_line(error)}
    for name, samples in sample_in_turn(timed, options, clock).items() if timed else ():
        rows[name] |= {
            "median_us": quantile(samples, 0.5),
            "p10_us": quantile(samples, 0.1),
            "p90_us": quantile(samples, 0.9),
            "samples": len(samples),
        }
    if suite.times_host and options.device.type == "cuda":
        for name, times in host_times(timed, options.device, HOST_ROUNDS, HOST_CALLS).items():
            rows[name]["host_us"] = quantile(times, 0.5)
    return list(rows.values())


def run_case(case: Case, options: Options, clock, progress: Progress, suite: Suite) -> list[dict]:
    """Measure every cell of a case and return the rows."""
    layer = suite.make_layer(
        case,
        options.experts,
        options.rank,
        options.top_k,
        DTYPES[options.dtype],
        options.device,
    )
    weights = ColdWeights(layer, clock.weight_bytes)
    rows = []
    for tokens in options.tokens:
        x, dys = draw_inputs(layer, tokens, options.routing)
        checker = suite.make_checker(layer, x, dys)
        for mode in options.modes:
            rows += run_cell(suite, weights, checker, mode, options, clock)
            progress(f"{case.suite} {case.name} {mode} T={tokens}")
    return rows
