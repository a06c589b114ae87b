"""Which tiles are tried, refused and chosen. The clock is fake, and Triton interprets."""

from __future__ import annotations

import pytest
import torch

from moelora_kernels.kernels.common import configs
from moelora_kernels.tune.candidates import candidates, shared_bytes
from support.backends import needs_triton
from support.tune_search import CPU, SHIPPED, faulty, run_search

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
        # Once, and three times.
        assert chosen.microseconds == 28.0
        assert result.entries[key][0].microseconds == 40.0
    # Three candidates of every kernel on two layers.
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 6 * len(kernels)
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
