"""A search for tiles on the CPU: Triton interprets, and the clock is fake."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from unittest import mock

import torch

from moelora_kernels.kernels.common import configs, launcher
from moelora_kernels.kernels.common.configs import TileConfig
from moelora_kernels.tune import search
from moelora_kernels.tune.calls import Layer, op_launcher
from moelora_kernels.tune.progress import Progress

CPU = torch.device("cpu")
SHIPPED = 0


def fake_clock(times: dict[int, float]) -> Callable:
    """Return a clock that reads the time from the tile of the first launch.

    times: stages -> microseconds; SHIPPED: of all other stages. In the interpreter the number of
    stages changes nothing.
    """

    def clock(call: Callable[[], object]) -> float:
        with launcher.recording() as launches:
            call()
        return times.get(launches[0].tile_config.stages, times[SHIPPED])

    return clock


def faulty(
    fault: Callable[[torch.Tensor], None], stages: Sequence[int], kernel: str = ""
) -> Callable:
    """Return op -> its launcher, whose first output `fault` changes if the tile has `stages`.

    kernel: whose tile; "": the name of the op.
    """

    def launcher_of(op: str) -> Callable:
        def launch(*arguments, **options):
            outputs = op_launcher(op)(*arguments, **options)
            name, table = kernel or op, configs._table(CPU)
            if any(tile.stages in stages for key, tile in table.items() if key == (name, 2, 16)):
                fault(outputs if isinstance(outputs, torch.Tensor) else outputs[0])
            return outputs

        return launch

    return launcher_of


def three_candidates(key, shipped: TileConfig, architecture: str, quick: bool) -> list[TileConfig]:
    """Return the shipped tile, and the same with 8 and with 9 stages."""
    return [shipped, shipped._replace(stages=8), shipped._replace(stages=9)]


def run_search(
    form: str,
    times: dict[int, float] | Callable,
    launcher_of: Callable = op_launcher,
    numbers: Sequence[int] = (1,),
    repeats: int = 2,
) -> search.Search:
    """Search with `three_candidates` for a small layer of a form; one for each of `numbers`.

    times: of `fake_clock`, or a clock.
    """
    layer = Layer(form, 20, 48, 32, 4, 4, 2, torch.bfloat16)
    layers = [search.Weighted(layer, number) for number in numbers]
    clock = times if callable(times) else fake_clock(times)
    options = search.Options(CPU, clock, Progress, repeats, launcher_of=launcher_of)
    with mock.patch.object(search, "candidates", three_candidates):
        return search.search(layers, options)
