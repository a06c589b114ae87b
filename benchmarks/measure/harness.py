"""Check, then time: one row per (case, tokens, mode, provider), in the schema of the results.

A cell is one (case, tokens, mode). Within a cell the providers are sampled in turn, one sample of
each, again and again: a clock that drifts, or a neighbour on the machine, hits all alike.
"""

import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.baselines import ffn
from benchmarks.baselines.linear import GROUPED_PROVIDERS, PROVIDERS, why_left_out
from benchmarks.measure.check import Checker
from benchmarks.measure.inputs import DTYPES, draw_inputs, make_layer
from benchmarks.suites.cells import Cell
from benchmarks.suites.shapes import Case


@dataclass
class Options:
    """What a run was asked for. budget_s: seconds of samples per cell, shared by its providers.

    left_out: provider -> why it has a row but no time, whatever the cell.
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
class Subject:
    """What a suite measures: how its layers are drawn and checked, and who provides them."""

    providers: dict[str, tuple[Callable, str]]
    make_layer: Callable = make_layer
    make_checker: Callable = Checker
    why_left_out: Callable = why_left_out


LINEAR = Subject(PROVIDERS)
GROUPED = Subject(GROUPED_PROVIDERS)
FEED_FORWARD = Subject(
    ffn.PROVIDERS, ffn.make_feed_forward, ffn.FeedForwardChecker, lambda name, layer, tokens: ""
)


def load() -> float | None:
    """Processes that wanted a CPU over the last minute, before this run added its own."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def last_level_cache() -> int:
    """Bytes of the processor's last level cache as the kernel reports it, else 32 MiB."""
    size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
    text = size.read_text().strip() if size.exists() else "32768K"
    unit = {"K": 2**10, "M": 2**20}[text[-1]]
    return int(text[:-1]) * unit


class ColdWeights:
    """The frozen weights of a layer and copies of them, one after the other from call to call.

    In a model a layer's weights come from memory, because the other layers ran in between, while
    x was just written and the code was just run, by the layer before. The copies together are
    twice the last level cache, and every timed call follows one of the same provider with another
    copy: it finds W in memory and everything else where a model has it.
    """

    def __init__(self, layer, cold_bytes: int):
        self.weights = [adapter.weight for adapter in layer.adapters]
        size = sum(weight.nbytes for weight in self.weights)
        count = max(1, math.ceil(cold_bytes / size))
        clones = [[weight.clone() for weight in self.weights] for _ in range(count - 1)]
        self.copies = [self.weights, *clones]
        self.place = 0

    def of(self, provider: nn.Module) -> list[tuple[nn.Parameter, int]]:
        """The parameters of a provider that are frozen weights, each with its sibling's number."""
        number = {weight.data_ptr(): i for i, weight in enumerate(self.weights)}
        frozen = [p for p in provider.parameters() if not p.requires_grad]
        return [(p, number[p.data_ptr()]) for p in frozen if p.data_ptr() in number]

    def turn(self, parameters: list[tuple[nn.Parameter, int]]) -> None:
        """Let these parameters have the values that were read longest ago."""
        self.place = (self.place + 1) % len(self.copies)
        for parameter, number in parameters:
            parameter.data = self.copies[self.place][number]


class CpuClock:
    """Wall time of one call; its weights are cold because of ColdWeights."""

    cold_kind = "copies of the frozen weights in turn: W comes from memory, the code is warm"
    # The call before the timed one: the layer before, in a model.
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


class CudaClock:
    """Time between two events around one call, with L2 overwritten before it.

    Nothing waits for the device until all samples of a cell are queued. Where the host is slower
    than the device, the time between the events is the host's: that is what a user sees.
    """

    cold_kind = "L2 overwritten before every call"
    leads_in = False
    weight_bytes = 0

    def __init__(self, cold: bool = True):
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        self.cold_bytes = 2 * properties.L2_cache_size if cold else 0
        self.buffer = torch.zeros(self.cold_bytes, dtype=torch.uint8, device="cuda")
        self.load_at_start = load()

    def sample(self, call: Callable[[], None]) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.buffer.zero_()
        start.record()
        call()
        end.record()
        return start, end

    def microseconds(self, samples: list[tuple[torch.cuda.Event, torch.cuda.Event]]) -> list[float]:
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e3 for start, end in samples]


class Timed:
    """One provider in one mode on fixed x and dy: `call()` is what the clock sees."""

    def __init__(
        self, provider: nn.Module, weights: ColdWeights, x: Tensor, dys: list[Tensor], mode: str
    ):
        self.provider, self.dys, self.mode = provider, dys, mode
        self.weights, self.frozen = weights, weights.of(provider)
        self.x = x.detach().requires_grad_(mode == "fwd_bwd")

    def reset(self) -> None:
        """Cold weights, and gradients to None so that no call accumulates; not timed."""
        self.weights.turn(self.frozen)
        self.provider.zero_grad(set_to_none=True)
        self.x.grad = None

    def call(self) -> None:
        if self.mode == "fwd":
            with torch.no_grad():
                self.provider(self.x)
        else:
            torch.autograd.backward(self.provider(self.x), self.dys)

    def extra_mib(self) -> float | None:
        """Memory of one call beyond x and parameters, as `environment.MEMORY_KIND` has it."""
        self.reset()
        if self.x.is_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.call()
            return (torch.cuda.max_memory_allocated() - before) / 2**20
        if self.mode == "fwd":
            return None
        return saved_bytes(self.provider, self.x) / 2**20


def saved_bytes(provider: nn.Module, x: Tensor) -> int:
    """Bytes of the distinct storages that one forward keeps for backward."""
    known = {x.untyped_storage().data_ptr()}
    known |= {p.untyped_storage().data_ptr() for p in provider.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        # Held until counted: a freed storage could hand its address to the next one.
        outputs = provider(x)
    total = sum(saved.values())
    del outputs
    return total


def sample_in_turn(timed: dict[str, Timed], options: Options, clock) -> dict[str, list[float]]:
    """Microseconds per call of each provider, all warm; as many rounds as the budget has."""
    start = time.perf_counter()
    for each in timed.values():
        each.reset()
        clock.microseconds([clock.sample(each.call)])
    one_round = time.perf_counter() - start
    rounds = min(max(int(options.budget_s / one_round), options.min_rounds), 200)
    samples: dict[str, list] = {name: [] for name in timed}
    for _ in range(rounds):
        for name, each in timed.items():
            if clock.leads_in:
                each.reset()
                each.call()
            each.reset()
            samples[name].append(clock.sample(each.call))
    return {name: clock.microseconds(taken) for name, taken in samples.items()}


def quantile(values: list[float], q: float) -> float:
    """Linear interpolation between the ordered values."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low, high = ordered[math.floor(place)], ordered[math.ceil(place)]
    return low + (high - low) * (place - math.floor(place))


def implementation(provider: nn.Module, x: Tensor) -> str | None:
    """What the package's impl="auto" chose here; None for the rivals."""
    chosen = getattr(provider, "implementation", None)
    return chosen(x) if chosen else None


def empty_row(case: Case, tokens: int, mode: str, name: str, options: Options) -> dict:
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
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]


def run_cell(
    subject: Subject, weights: ColdWeights, checker: Checker, mode: str, options: Options, clock
) -> Iterator[dict]:
    """Rows of one cell, each provider checked, those that are right timed."""
    layer, x, dys = checker.layer, checker.x, checker.dys
    rows, timed = {}, {}
    for name, (build, formula) in subject.providers.items():
        if name not in options.providers and name not in options.left_out:
            continue
        row = rows[name] = empty_row(layer.case, len(x), mode, name, options)
        reason = options.left_out.get(name) or subject.why_left_out(name, layer, len(x))
        if reason:
            row |= {"status": "left out", "reason": reason}
            continue
        try:
            provider = build(layer)
            row["impl"] = implementation(provider, x)
            worst, error, budget = checker.verdict(provider, formula, mode)
            row |= {"worst": worst, "error_budget": budget}
            row["error"] = error if math.isfinite(error) else None
            if error > budget:
                shown = f"off by {error:.2e}" if math.isfinite(error) else "missing or not finite"
                row |= {"status": "wrong", "reason": f"{worst} is {shown}, allowed {budget:.2e}"}
                continue
            candidate = Timed(provider, weights, x, dys, mode)
            candidate.reset()
            candidate.call()
            row["peak_extra_mib"] = candidate.extra_mib()
            timed[name] = candidate
        except Exception as error:  # one provider that cannot run must not end the run
            row |= {"status": "failed", "reason": first_line(error)}
    for name, taken in sample_in_turn(timed, options, clock).items() if timed else ():
        rows[name] |= {
            "median_us": quantile(taken, 0.5),
            "p10_us": quantile(taken, 0.1),
            "p90_us": quantile(taken, 0.9),
            "samples": len(taken),
        }
    yield from rows.values()


def run_case(
    case: Case,
    options: Options,
    clock,
    progress: Callable[[str], None],
    subject: Subject = LINEAR,
) -> list[dict]:
    """All rows of a case; `progress(text)` is called after each cell."""
    layer = subject.make_layer(
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
        checker = subject.make_checker(layer, x, dys)
        for mode in options.modes:
            rows += run_cell(subject, weights, checker, mode, options, clock)
            progress(f"{case.name} {mode} T={tokens}")
    return rows


def run_mixture(
    case: Case, cell: Cell, options: Options, clock, progress: Callable[[str], None]
) -> list[dict]:
    """All rows of one cell of the suite `grouped`, with its name and the tables that show it."""
    experts, rank, top_k = cell.mixture
    of_cell = replace(
        options, experts=experts, rank=rank, top_k=top_k, routing=cell.routing, tokens=[cell.tokens]
    )
    told = lambda text: progress(f"{text} E={experts} r={rank} K={top_k} {cell.routing}")  # noqa: E731
    rows = run_case(case, of_cell, clock, told, GROUPED)
    return [row | {"cell": cell.name, "tables": list(cell.tables)} for row in rows]
