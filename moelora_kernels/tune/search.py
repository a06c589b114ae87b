"""Check and time the candidates of every kernel on every layer, and choose a tile for each entry.

The device, the clock and the launchers are arguments, so that the tests run this on a CPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moelora_kernels.kernels.common import configs, launcher
from moelora_kernels.kernels.common.configs import TileConfig
from moelora_kernels.kernels.common.tuned import Key
from moelora_kernels.tune.calls import Call, Layer, draw_calls, op_launcher
from moelora_kernels.tune.candidates import candidates
from moelora_kernels.tune.check import Expectation, named
from moelora_kernels.tune.clocks import Clock
from moelora_kernels.tune.progress import Progress

# A tile takes the place of the shipped one if it saves at least this share of the time.
LEAST_GAIN = 0.02
# The calls of the variant "split" have at most this number of tokens. They are not timed.
SPLIT_TOKENS = 1000

Table = dict[Key, TileConfig]


class Weighted(NamedTuple):
    """A layer, and how many of them the model has."""

    layer: Layer
    number: int


@dataclass
class Candidate:
    """A tile for an entry of the table.

    microseconds: the sum of its times over the layers, each multiplied by the number of the layer,
    and over the ops that take the entry.
    problem: why the tile is refused, or "".
    """

    tile: TileConfig
    microseconds: float = 0.0
    problem: str = ""


@dataclass
class Search:
    """The candidates of the entries that the layers take; the first one is the shipped tile.

    interrupted: a KeyboardInterrupt ended the search, and the other entries are left out.
    """

    entries: dict[Key, list[Candidate]] = field(default_factory=dict)
    interrupted: bool = False

    def chosen(self, key: Key) -> Candidate | None:
        """Return the candidate that an entry should have; None if all are refused."""
        shipped = self.entries[key][0]
        accepted = [each for each in self.entries[key] if not each.problem]
        if not accepted:
            return None
        best = min(accepted, key=lambda each: each.microseconds)
        gain = shipped.microseconds - best.microseconds
        keeps = not shipped.problem and gain < LEAST_GAIN * shipped.microseconds
        return shipped if keeps else best

    def refused(self) -> Iterator[tuple[Key, Candidate]]:
        """Yield the candidates that are refused."""
        for key, each in self.entries.items():
            yield from ((key, candidate) for candidate in each if candidate.problem)


class Options(NamedTuple):
    """The device, the clock and the effort of a search.

    progress: takes the number of steps, and returns an object that is called after each of them.
    repeats: how often a candidate must return the same bits. quick: fewer candidates.
    """

    device: torch.device
    clock: Clock
    progress: Callable[[int], Progress]
    repeats: int = 50
    quick: bool = False
    # Op -> the function that launches its kernel.
    launcher_of: Callable[[str], Callable] = op_launcher


def search(layers: Sequence[Weighted], options: Options) -> Search:
    """Return the candidates of every entry that the layers take, with times and problems.

    A KeyboardInterrupt ends the search: it returns the entries that are fully timed, or raises the
    KeyboardInterrupt again if there is none.
    """
    result = Search()
    with configs.shipped_tiles(options.device) as table:
        keys = _taken_keys(layers, table, options)
        architecture, _ = configs.processors(options.device)
        # Entry -> its trials that are left.
        left = Counter(key for layer, _ in layers for key in keys[layer].values())
        for key in left:
            tiles = candidates(key, table[key], architecture, options.quick)
            result.entries[key] = [Candidate(tile) for tile in tiles]
        total = sum(number * len(result.entries[key]) for key, number in left.items())
        try:
            with closing(options.progress(total)) as progress:
                for layer, number in layers:
                    for trial in _trials(layer, options):
                        key = keys[layer][trial.call.op]
                        for candidate in result.entries[key]:
                            if not candidate.problem:
                                with _tile(table, key, candidate.tile):
                                    trial.run(candidate, number)
                            progress(f"{layer.name} {trial.call.op}")
                        left[key] -= 1
        except KeyboardInterrupt:
            result.interrupted = True
            for key in +left:
                del result.entries[key]
            if not result.entries:
                raise
    return result


def _trials(layer: Layer, options: Options) -> Iterator[Trial]:
    """Yield a trial of every op of a layer."""
    small = layer._replace(tokens=min(layer.tokens, SPLIT_TOKENS))
    calls = draw_calls(layer, options.device), draw_calls(small, options.device, "split")
    for call, split in zip(*calls, strict=True):
        yield Trial(call, split, layer.dtype, options)


def _taken_keys(
    layers: Sequence[Weighted], table: Table, options: Options
) -> dict[Layer, dict[str, Key]]:
    """Return layer -> op -> the key of the entry that the launcher of the op takes.

    It does not depend on the widths of the layer, nor on the tokens from FEW_ROWS on.
    """
    keys: dict[Layer, dict[str, Key]] = {}
    taken: dict[Layer, dict[str, Key]] = {}
    for layer, _ in layers:
        tokens = 64 if layer.tokens < configs.FEW_ROWS else configs.FEW_ROWS
        small = layer._replace(tokens=tokens, in_features=64, out_features=64)
        if small not in taken:
            taken[small] = _keys_of(small, table, options)
        keys[layer] = taken[small]
    return keys


def _keys_of(layer: Layer, table: Table, options: Options) -> dict[str, Key]:
    """Return op -> the key of the entry that its launcher takes for this layer."""
    keys = {}
    for call in draw_calls(layer, options.device):
        # A launch is recorded before it runs. If the shipped tile does not run on this GPU,
        # `Trial` refuses it.
        with launcher.recording() as launches, suppress(Exception):
            op_launcher(call.op)(*call.arguments, **call.options)
        tiles = {id(launch.tile_config) for launch in launches}
        keys[call.op] = next(key for key, tile in table.items() if id(tile) in tiles)
    return keys


class Trial:
    """The calls of one op on one layer, on which every candidate is checked and timed."""

    def __init__(self, call: Call, split: Call, dtype: torch.dtype, options: Options) -> None:
        self.launch = options.launcher_of(call.op)
        self.call, self.options = call, options
        self.expectations = [
            (each, Expectation(each.op, each.arguments, dtype)) for each in (call, split)
        ]

    def run(self, candidate: Candidate, number: int) -> None:
        """Check and time a candidate, whose tile is in the table. Add `number` times its time."""
        candidate.problem = self.problem()
        if not candidate.problem:
            candidate.microseconds += number * self.options.clock(lambda: self._run(self.call))

    def problem(self) -> str:
        """Return why the tile in the table is refused; "" if it is right and repeats its bits."""
        try:
            for call, expectation in self.expectations:
                with poisoned_memory():
                    outputs = self._run(call)
                first = expectation.check(outputs)
                if name := self._differing(call, first):
                    return f"{name}: runs of {self.options.repeats} differ"
        except Exception as error:
            self._require_device(error)
            lines = str(error).strip().splitlines()
            return f"{type(error).__name__}: {lines[0] if lines else ''}"
        return ""

    def _run(self, call: Call) -> Any:
        return self.launch(*call.arguments, **call.options)

    def _differing(self, call: Call, first: dict[str, Tensor]) -> str:
        """Return the name of an output whose bits are not those of `first` in every run, or ""."""
        # The results of the comparisons stay on the device until all runs are launched.
        differing = {name: torch.zeros((), device=t.device).bool() for name, t in first.items()}
        for _ in range(self.options.repeats - 1):
            for name, again in named(call.op, self._run(call)).items():
                differing[name] |= (_bits(again) != _bits(first[name])).any()
        return next((name for name, differs in differing.items() if differs.item()), "")

    def _require_device(self, error: Exception) -> None:
        """Raise RuntimeError if an error of the tile left the GPU unusable for this process."""
        if self.options.device.type != "cuda":
            return
        try:
            torch.cuda.synchronize(self.options.device)
        except RuntimeError as device_error:
            message = f"{self.call.op}: a tile made the GPU fail: {device_error}"
            raise RuntimeError(message) from error


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


@contextmanager
def _tile(table: Table, key: Key, tile: TileConfig) -> Iterator[None]:
    """Take this tile for an entry of the table, whatever the number of tokens of a call."""
    kernel, *shape = key
    kernel = kernel.removesuffix(configs.FEW)
    entries = ((name, *shape) for name in (kernel, kernel + configs.FEW))
    outer = {entry: table[entry] for entry in entries if entry in table}
    table.update(dict.fromkeys(outer, tile))
    try:
        yield
    finally:
        table.update(outer)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Make torch.empty return NaN, or the largest integer, so that memory never written shows."""
    settings: Any = torch.utils.deterministic
    fills = settings.fill_uninitialized_memory
    is_on = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(is_on, warn_only=warns)
        settings.fill_uninitialized_memory = fills
