"""Sort the (token, slot) pairs by expert. The host does not wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from moelora_kernels import reference
from moelora_kernels.ops.registration import register
from moelora_kernels.types import CHUNK, TILE, Routing, count_tiles


def route_fake(
    experts: Tensor, num_experts: int, siblings: int, tile: int = TILE, chunk: int = CHUNK
) -> Routing:
    """Return tensors of the shapes that `route` returns."""
    P, N = experts.numel(), siblings * num_experts
    shapes = [(P,), (N + 1,)] + [(count_tiles(P, N, size), 2) for size in (tile, chunk)]
    return Routing(*(experts.new_empty(shape, dtype=torch.int32) for shape in shapes))


_op = register(
    "route",
    ("Tensor experts", "int num_experts", "int siblings", "int tile", "int chunk"),
    "(Tensor order, Tensor offsets, Tensor tiles, Tensor chunks)",
    reference.route,
    route_fake,
)


def route(
    experts: Tensor, num_experts: int, siblings: int = 1, tile: int = TILE, chunk: int = CHUNK
) -> Routing:
    """Compute the routing arrays of a sparse gate; `types.Routing` explains them.

    Args:
        experts: [T, n K] int32 or int64; columns i K to (i + 1) K belong to sibling i. An expert
            outside [0, E) means "not routed".
        num_experts: E.
        siblings: n.
        tile: the largest number of sorted positions in a tile.
        chunk: the largest number of sorted positions in a chunk.

    Raises:
        ValueError: 2^31 pairs or more.
    """
    return Routing(*_op(experts, num_experts, siblings, tile, chunk))
