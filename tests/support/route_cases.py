"""Routings for the tests of `route`, and what is true of its arrays whoever made them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from moelora_kernels.testing import ROUTINGS, draw_experts
from moelora_kernels.types import count_tiles

NAMES = ("order", "offsets", "tiles", "chunks")


def drawn(
    routing: str, tokens: int, experts: int, top_k: int, siblings: int = 1, seed: int = 0
) -> Tensor:
    """Indices [T, n K], every sibling with draws of its own."""
    generator = torch.Generator().manual_seed(seed)
    each = [draw_experts(routing, tokens, experts, top_k, generator) for _ in range(siblings)]
    return torch.cat(each, dim=1)


def adversarial(tokens: int, slots: int, experts: int, dtype: torch.dtype) -> Tensor:
    """Indices drawn from the edges of the range, of the dtype and of int32."""
    ends = torch.iinfo(dtype)
    ids = [0, experts - 1, experts, experts + 1, -1, -experts, ends.min, ends.max]
    if dtype == torch.int64:
        # The low words are valid experts.
        ids += [2**40, 2**32, 2**32 + experts - 1, -(2**32), -(2**31)]
    chosen = torch.randint(len(ids), (tokens, slots), generator=torch.Generator().manual_seed(1))
    return torch.tensor(ids, dtype=dtype)[chosen]


def cases() -> Iterator[tuple[str, Tensor, int, int]]:
    """(name, indices, E, siblings) of every routing, small enough for PTX on a CPU."""
    for routing in ROUTINGS:
        for siblings in (1, 2, 3):
            yield f"{routing}-{siblings}", drawn(routing, 117, 6, 2, siblings), 6, siblings
    for dtype in (torch.int32, torch.int64):
        yield f"adversarial-{dtype}", adversarial(203, 6, 5, dtype), 5, 3
    yield "none_routed", torch.full((70, 2), -1), 4, 1
    yield "one_expert_repeated", torch.zeros(129, 4, dtype=torch.int32), 1, 2
    yield "no_token", torch.empty(0, 4, dtype=torch.int64), 3, 2
    yield "no_slot", torch.empty(5, 0, dtype=torch.int64), 3, 1
    yield "one_pair", torch.tensor([[2]]), 3, 1
    wide = torch.randint(0, 9, (150, 8), generator=torch.Generator().manual_seed(2))
    yield "transposed", wide.t(), 9, 2
    yield "every_third", wide[1::3, ::2], 9, 2
    yield "expanded", wide[:, :1].expand(-1, 4), 9, 2


CASES = {name: case for name, *case in cases()}


def check_properties(
    found: Sequence[Tensor], indices: Tensor, experts: int, siblings: int, sizes: Sequence[int]
) -> None:
    """What `routing` promises, pair by pair and without the reference."""
    order, offsets, *maps = (t.tolist() for t in found)
    tokens, slots = indices.shape
    total, pairs = siblings * experts, tokens * slots
    assert all(t.dtype == torch.int32 and t.is_contiguous() for t in found)
    assert sorted(order) == list(range(pairs))
    ids = indices.tolist()

    def key(pair: int) -> tuple[int, int, int]:
        t, s = divmod(pair, slots)
        routed = 0 <= ids[t][s] < experts
        return (s * siblings // slots * experts + ids[t][s] if routed else total), s, t

    keys = [key(pair) for pair in order]
    assert keys == sorted(keys)
    assert len(offsets) == total + 1
    assert offsets[0] == 0
    ends = [*offsets[1:], pairs]
    for e, (begin, end) in enumerate(zip(offsets, ends, strict=True)):
        assert begin <= end
        assert all(keys[place][0] == e for place in range(begin, end))
    for tiles, size in zip(maps, sizes, strict=True):
        assert len(tiles) == count_tiles(pairs, total, size)
        covered = []
        for e, first in tiles:
            end = ends[e]
            covered += range(first, min(first + size, end))
            assert first == pairs or offsets[e] <= first < end
            assert first != pairs or e == total
        assert covered == list(range(pairs))
