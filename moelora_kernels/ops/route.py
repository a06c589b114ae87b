"""From the experts of every token to the tokens of every expert, without asking the device."""

from __future__ import annotations

import torch

from moelora_kernels import reference
from moelora_kernels.ops.registration import register
from moelora_kernels.types import count_tiles


def _fake(indices, num_experts, siblings, tile, chunk):
    pairs, experts = indices.numel(), siblings * num_experts
    shapes = [(pairs,), (experts + 1,)]
    shapes += [(count_tiles(pairs, experts, size), 2) for size in (tile, chunk)]
    return tuple(indices.new_empty(shape, dtype=torch.int32) for shape in shapes)


route = register(
    "route",
    "(Tensor indices, int num_experts, int siblings, int tile, int chunk) "
    "-> (Tensor order, Tensor offsets, Tensor tiles, Tensor chunks)",
    reference.route,
    _fake,
)
