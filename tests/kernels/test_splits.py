"""Into how many parts the launchers split a sum: the programs fill whole waves of the GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.model.gpus import GPUS as MODEL_GPUS
from benchmarks.model.gpus import blocks_per_multiprocessor
from benchmarks.model.launches import LAYERS, Layer, record, stores_partials
from benchmarks.model.machine_code import MachineCode
from moelora_kernels.kernels.common import configs
from moelora_kernels.kernels.common.configs import TileConfig
from moelora_kernels.kernels.common.splits import num_splits

# GPU -> architecture and multiprocessors.
GPUS = {
    "A100": ("sm_80", 108),
    "H100 PCIe": ("sm_90", 114),
    "H200": ("sm_90", 132),
}
REPORT = Path(__file__).parents[2] / "benchmarks/results/ahead-of-time/kernels.json"
SPLIT = ("shrink_gate_kernel", "shrink_gate_backward_kernel", "weight_grad_kernel")


@pytest.fixture
def gpu(monkeypatch):
    """Choose tiles and splits for the GPU of this name."""

    def choose(name: str) -> None:
        architecture, multiprocessors = GPUS[name]
        monkeypatch.setattr(configs, "_assumed", architecture)
        monkeypatch.setitem(configs.PROCESSORS, architecture, multiprocessors)

    return choose


@pytest.mark.parametrize(
    ("name", "tokens"),
    (
        # 128 tiles of 64 and of 128 tokens are 1.19 and 1.12 waves.
        ("A100", 8192),
        ("H100 PCIe", 16384),
        # 133 to 188 tiles are 1.01 to 1.42 waves.
        *(("H200", tokens) for tokens in (16897, 18432, 20480, 22528, 24000)),
    ),
)
def test_no_second_wave_is_mostly_empty(gpu, name: str, tokens: int) -> None:
    """A launch of 1 to 1.6 waves takes the time of two."""
    gpu(name)
    _, multiprocessors = GPUS[name]
    waves = {}
    for launch in record(Layer("router", tokens=tokens)):
        if launch.kernel.fn.__name__ in SPLIT:
            blocks = launch.tile_config.blocks[stores_partials(launch)]
            waves[launch.kernel.fn.__name__] = launch.programs / (multiprocessors * blocks)
    assert set(waves) == set(SPLIT)
    assert not {kernel: count for kernel, count in waves.items() if 1.0 < count < 1.6}


@pytest.mark.parametrize(
    ("blocks", "programs", "steps", "split"),
    (
        # A full wave, and one that is nearly full.
        ((1, 1), 132, 64, 1),
        ((1, 2), 128, 64, 1),
        ((2, 2), 264, 64, 1),
        # 1.5 waves become 3 of half the steps.
        ((1, 1), 198, 64, 2),
        # Too few steps for two parts of 4.
        ((1, 1), 133, 7, 1),
        ((1, 1), 1, 1, 1),
        # Nothing to do: a table without rows.
        ((1, 1), 0, 1, 1),
        # Many waves: the last one is a small part.
        ((2, 2), 3000, 64, 1),
    ),
)
def test_split(gpu, blocks: tuple[int, int], programs: int, steps: int, split: int) -> None:
    gpu("H200")
    tile_config = TileConfig(64, 64, 8, 3, blocks=blocks)
    device = torch.device("meta")
    assert num_splits(device, tile_config, programs, steps) == split


def test_a_split_is_free_to_fill_a_gpu_that_adds_partial_sums_anyway(gpu) -> None:
    """Without its launch, a split pays with fewer steps."""
    gpu("H200")
    tile_config, device = TileConfig(64, 64, 8, 3, blocks=(1, 1)), torch.device("meta")
    splits = [
        num_splits(device, tile_config, 64, 16, stores_partials)
        for stores_partials in (False, True)
    ]
    assert splits == [1, 2]


def machine_code_of(row: dict) -> MachineCode:
    """Return the machine code of a row of the report; without fields that blocks do not need."""
    return MachineCode(
        threads=32 * row["tile"][2], registers=row["registers"], shared=row["shared"],
        spills=row["spills"], stack=row["stack"], instructions=0, loop=0,
        tensor_core=row["tensor_core"], accesses=row["accesses"],
    )  # fmt: skip


@pytest.mark.parametrize("name", ("A100", "L40S", "H200", "B200"))
def test_blocks_are_those_of_the_compiled_kernels(name: str) -> None:
    """If tiles or kernels change, the report and `blocks.BLOCKS` change with them."""
    gpu = MODEL_GPUS[name]
    rows = {
        (row["layer"], row["kernel"]): row
        for row in json.loads(REPORT.read_text())["rows"]
        if row["architecture"] == gpu.architecture
    }
    compared, wrong = 0, {}
    with configs.assume(gpu.architecture):
        for layer in (each for each in LAYERS if each.plain):
            for launch in record(layer):
                kernel = launch.kernel.fn.__name__
                # What several layers share is a row of the first of them.
                row = rows.get((layer.name, kernel))
                if kernel not in SPLIT or row is None:
                    continue
                tile = launch.tile_config[:4]
                assert tuple(row["tile"]) == tile, "run benchmarks/ahead_of_time.py again"
                compared += 1
                compiled = blocks_per_multiprocessor(machine_code_of(row), gpu)
                if launch.tile_config.blocks[stores_partials(launch)] != compiled:
                    wrong[layer.name, kernel] = compiled
    assert compared >= 24
    assert not wrong
