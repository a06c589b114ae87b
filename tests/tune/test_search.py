"""Which tiles are tried, refused and chosen. The clock is fake, and Triton interprets."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import triton

from moelora_kernels.kernels.common import configs, launcher
from moelora_kernels.tune.calls import op_launcher
from moelora_kernels.tune.candidates import candidates, shared_bytes
from support.backends import needs_triton
from support.tune_search import CPU, SHIPPED, fake_clock, faulty, run_search

pytestmark = needs_triton
WIDE_KERNELS = {"shrink_gate", "shrink_gate_backward", "weight_grad", "shrink_dx"}
GROUPED_KERNELS = {
    "router_logits", "grouped_shrink", "grouped_expand", "grouped_shrink_backward",
    "grouped_weight_grad", "router_grad",
}  # fmt: skip


@pytest.mark.parametrize(
    ("form", "kernels"), (("wide", WIDE_KERNELS), ("grouped", GROUPED_KERNELS))
)
def test_the_fastest_tile_of_every_kernel_is_chosen(form, kernels, capsys):
    result = run_search(form, {SHIPPED: 10.0, 8: 7.0, 9: 8.0}, numbers=(1, 3))
    assert {key[0] for key in result.entries} == kernels
    assert list(result.refused()) == []
    for key in result.entries:
        chosen = result.chosen(key)
        assert chosen.tile.stages == 8
        # Once, and three times; `grouped_expand` and `grouped_dx` take the same tile.
        calls = 8 if key[0] == "grouped_expand" else 4
        assert chosen.microseconds == 7.0 * calls
        assert result.entries[key][0].microseconds == 10.0 * calls
    # Three candidates of every op on two layers.
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6 * (4 if form == "wide" else 7)
    assert lines[-1].startswith(f"[{len(lines)}/{len(lines)}] {form} 48x32 T=20 ")


def test_a_gain_within_the_noise_changes_nothing():
    result = run_search("wide", {SHIPPED: 10.0, 8: 9.9, 9: 11.0})
    for key, (shipped, *_) in result.entries.items():
        assert result.chosen(key) is shipped
        assert shipped.tile == configs.TILE_CONFIGS["sm_90"][key]


def add_one(output: torch.Tensor) -> None:
    output += 1


@pytest.mark.parametrize("form", ("wide", "grouped"))
def test_a_wrong_tile_is_refused_and_named(form):
    result = run_search(form, {SHIPPED: 10.0, 8: 5.0, 9: 8.0}, faulty(add_one, stages=(8,)))
    refused = list(result.refused())
    assert [key for key, _ in refused] == list(result.entries)
    for key, candidate in refused:
        assert candidate.tile.stages == 8
        assert "exceeds" in candidate.problem
        assert result.chosen(key).tile.stages == 9
    names = {candidate.problem.split()[1] for _, candidate in refused}
    assert names >= ({"h:", "dh:", "da:", "dx:"} if form == "wide" else {"h:", "y:", "logits:"})


def test_a_tile_of_two_ops_is_checked_with_both():
    """`grouped_dx` takes the tile of `grouped_expand`."""
    wrong = faulty(add_one, stages=(8,), kernel="grouped_expand")

    def launcher_of(op):
        return wrong(op) if op == "grouped_dx" else op_launcher(op)

    result = run_search("grouped", {SHIPPED: 10.0, 8: 5.0, 9: 8.0}, launcher_of)
    ((key, candidate),) = result.refused()
    assert key == ("grouped_expand", 2, 16)
    assert candidate.tile.stages == 8
    assert candidate.problem.startswith("AssertionError: dx: error")
    assert result.chosen(key).tile.stages == 9


def test_memory_that_a_tile_does_not_write_is_noticed():
    def forget(output: torch.Tensor) -> None:
        output[-1] = torch.empty_like(output[-1])

    result = run_search("wide", {SHIPPED: 10.0, 8: 5.0, 9: 8.0}, faulty(forget, stages=(8,)))
    assert {candidate.problem[-17:] for _, candidate in result.refused()} == {"non-finite values"}


def test_a_tile_that_does_not_repeat_its_bits_is_refused():
    runs = []

    def change_the_last_run(output: torch.Tensor) -> None:
        runs.append(None)
        if len(runs) == 4:
            # The last bit of one number: within the budget.
            output.view(torch.int16)[0, 0] ^= 1

    result = run_search(
        "wide", {SHIPPED: 10.0, 8: 5.0, 9: 8.0}, faulty(change_the_last_run, stages=(8,)), repeats=4
    )
    ((key, candidate),) = result.refused()
    assert key[0] == "shrink_gate"
    assert candidate.tile.stages == 8
    assert candidate.problem == "h: runs of 4 differ"


def test_a_tile_that_does_not_run_is_refused():
    def fail(output: torch.Tensor) -> None:
        raise RuntimeError("out of resource: shared memory\nand more")

    result = run_search("wide", {SHIPPED: 10.0, 8: 5.0, 9: 8.0}, faulty(fail, stages=(8,)))
    problems = {candidate.problem for _, candidate in result.refused()}
    assert problems == {"RuntimeError: out of resource: shared memory"}


def test_a_shipped_tile_may_be_refused():
    result = run_search("wide", {SHIPPED: 5.0, 8: 9.0, 9: 8.0}, faulty(add_one, stages=(2, 3)))
    key = ("shrink_gate", 2, 16)
    assert result.entries[key][0].problem
    assert result.chosen(key).tile.stages == 9


def test_a_shipped_tile_that_does_not_fit_is_refused(monkeypatch):
    class TooLarge:
        def __getitem__(self, grid):
            raise triton.OutOfResources(300_000, 232_448, "shared memory")

    def run(kernel, programs, tile_config, *rest):
        real_run(TooLarge() if tile_config in shipped else kernel, programs, tile_config, *rest)

    real_run, shipped = launcher.run, configs.TILE_CONFIGS["sm_90"].values()
    monkeypatch.setattr(launcher, "run", run)
    result = run_search("wide", {SHIPPED: 5.0, 8: 9.0, 9: 8.0})
    assert {key[0] for key in result.entries} == WIDE_KERNELS
    for key, (shipped_tile, *_) in result.entries.items():
        assert shipped_tile.problem.startswith("RuntimeError: out of resource: shared memory")
        assert result.chosen(key).tile.stages == 9


def interrupted_clock(calls: int) -> Callable:
    """Return a clock whose last one of so many calls raises KeyboardInterrupt."""
    clock, left = fake_clock({SHIPPED: 10.0, 8: 7.0, 9: 8.0}), [None] * calls

    def interrupted(call: Callable[[], object]) -> float:
        left.pop()
        if not left:
            raise KeyboardInterrupt
        return clock(call)

    return interrupted


def test_an_interrupted_search_returns_the_entries_that_are_timed():
    # Three candidates of two kernels, and the first of the third kernel.
    result = run_search("wide", interrupted_clock(7))
    assert result.interrupted
    assert [key[0] for key in result.entries] == ["shrink_gate", "shrink_gate_backward"]
    for key in result.entries:
        assert result.chosen(key).microseconds == 7.0
    with pytest.raises(KeyboardInterrupt):
        run_search("wide", interrupted_clock(3))
    # The second layer has not been timed.
    with pytest.raises(KeyboardInterrupt):
        run_search("wide", interrupted_clock(13), numbers=(1, 1))


def test_no_tile_is_chosen_if_all_are_refused():
    def launcher_of(op):
        def launch(*arguments, **options):
            raise RuntimeError("no kernel")

        return launch

    result = run_search("wide", {SHIPPED: 5.0, 8: 9.0, 9: 8.0}, launcher_of)
    assert {result.chosen(key) for key in result.entries} == {None}


def test_the_shipped_tiles_are_back_after_a_search():
    run_search("wide", {SHIPPED: 10.0, 8: 5.0, 9: 8.0})
    tile = configs.tile_config("shrink_gate", CPU, torch.bfloat16, 16)
    assert tile is configs.TILE_CONFIGS["sm_90"]["shrink_gate", 2, 16]


@pytest.mark.parametrize("architecture", configs.TILE_CONFIGS)
@pytest.mark.parametrize("quick", (False, True))
def test_candidates_are_neighbours_of_the_shipped_tile(architecture, quick):
    for key, shipped in configs.TILE_CONFIGS[architecture].items():
        tiles = candidates(key, shipped, architecture, quick)
        assert tiles[0] is shipped
        assert len({*tiles}) == len(tiles)
        assert len(tiles) >= (4 if quick else 8)
        for tile in tiles:
            differing = [a != b for a, b in zip(tile, shipped, strict=True)]
            assert sum(differing) <= (1 if quick else 2)
            assert shared_bytes(key, tile) <= configs.SHARED[architecture]
            assert tile.stages >= 1
            assert tile.tokens % 16 == tile.step % 16 == 0
            if key[0] in ("grouped_shrink", "grouped_shrink_backward", "grouped_expand"):
                assert tile.tokens == shipped.tokens


def test_shared_memory_of_kernels_that_keep_an_operand():
    """The rows or columns that stay count once, and the others once for each stage but one."""
    tile = configs.TileConfig(64, 128, 8, 3)
    assert shared_bytes(("grouped_expand", 2, 32), tile) == (64 + 2 * 128) * 32 * 2
    assert shared_bytes(("shrink_dx", 2, 128), tile) == (2 * 64 + 128) * 128 * 2
    assert shared_bytes(("shrink_dx", 2, 64), tile) == 2 * (64 + 128) * 64 * 2
