"""Memory that a layer saves for backward, and the number of tiles that it works on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moelora_kernels import ops
from moelora_kernels.types import CHUNK, TILE, count_tiles
from support.cases import Case, layer_case
from support.inputs import Inputs


def saved_bytes(inputs: Inputs, impl: str) -> int:
    """Return the bytes of the storages saved for backward, without x, parameters and gates."""
    x, linears = inputs.x.clone().requires_grad_(), inputs.trainable()
    arguments = [x, *inputs.gate, *(t for s in linears for t in s)]
    known = {t.untyped_storage().data_ptr() for t in arguments if t is not None}
    saved = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        ys, _ = inputs.forward(x, linears, impl)
    torch.autograd.backward(ys, inputs.dy)
    return sum(saved.values())


@pytest.mark.parametrize(
    "options", ({}, {"K": 4}, {"renormalize": False}, {"gate": "sparse"}), ids=str
)
def test_wide_saves_h_and_the_gate(options: dict) -> None:
    """At most 2 R + 12 E bytes per token in 16 bits."""
    inputs = Inputs(layer_case(T=128, gate_dtype=torch.float32, **options), torch.bfloat16)
    R, E = sum(inputs.case.ranks), len(inputs.case.ranks)
    assert 128 * 2 * R <= saved_bytes(inputs, "wide") <= 128 * (2 * R + 12 * E)


def expected_bytes(case: Case, itemsize: int) -> int:
    """Return the bytes of h, weights, experts, order, offsets, tiles and chunks.

    itemsize: bytes of an element of x.
    """
    experts, pairs = case.n * len(case.ranks), case.T * case.n * case.K
    result = pairs * (max(case.ranks) * itemsize + 4)
    if case.gate == "router":
        result += pairs * 8
        if not case.renormalize:
            result += case.T * experts * 4
    tiles = sum(count_tiles(pairs, experts, size) for size in (TILE, CHUNK))
    return result + (experts + 1) * 4 + tiles * 8


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize(
    "options",
    ({}, {"K": 1}, {"n": 2, "O": (13, 5)}, {"gate": "sparse"}, {"renormalize": False}),
    ids=str,
)
def test_grouped_saves_h_of_the_pairs_and_the_routing(options: dict, dtype: torch.dtype) -> None:
    inputs = Inputs(layer_case(T=130, ranks=(3, 5, 4, 1), **options), dtype)
    assert saved_bytes(inputs, "grouped") == expected_bytes(inputs.case, dtype.itemsize)


def test_256_experts_save_as_much_as_8() -> None:
    """T = 8192, top-8 of rank 16: forward and backward, and memory that grows with K alone."""
    saved = {}
    for E, K in ((256, 8), (8, 8), (256, 2)):
        case = layer_case(T=8192, I=64, O=64, ranks=(16,) * E, K=K, gate="sparse")
        inputs = Inputs(case, torch.bfloat16)
        saved[E, K] = saved_bytes(inputs, "grouped")
        assert saved[E, K] == expected_bytes(case, 2)
    # The offsets, and a tile and a chunk of two numbers for each expert more.
    assert saved[256, 8] - saved[8, 8] == (256 - 8) * (4 + 8 + 8)
    assert saved[256, 8] > 3.9 * saved[256, 2]


def test_the_number_of_tiles_does_not_depend_on_the_routing() -> None:
    """If one expert has all tokens, or all have as many: equal within one tile per expert."""
    T, E, used = 500, 16, {}
    for routing in ("uniform", "one", "zipf", "empty"):
        case = layer_case(T=T, ranks=(1,) * E, gate="sparse", routing=routing)
        experts = Inputs(case, torch.float32).experts
        *_, tiles, chunks = ops.route(experts, E, 1, TILE, CHUNK)
        assert len(tiles) == count_tiles(2 * T, E, TILE), routing
        assert len(chunks) == count_tiles(2 * T, E, CHUNK), routing
        used[routing] = int((tiles[:, 0] < E).sum())
    full = 2 * T // TILE
    assert all(full <= count <= full + E for count in used.values()), used
