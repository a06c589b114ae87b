"""Routing arrays: which pairs of a token and a slot each expert works on, as the ops pass them.

A token t has S = n K slots: K for each of n siblings. Pair t S + s is slot s of token t. The
N = n E experts of all siblings stand side by side: expert i E + e is expert e of sibling i. A place
is a position in the order of experts; places of one expert stand together.

    array                 from -> to
    order   [P]           place -> pair, P = T S; by expert, then slot, then token; pairs that are
                          not routed stand last, in the same order
    offsets [N + 1]       expert -> its first place; the last entry counts the routed pairs
    tiles   [M, 2]        tile -> its expert and first place; a tile holds up to TILE places of one
                          expert. Tiles of the pairs that are not routed have expert N, those beyond
                          the last tile expert N and first place P
    chunks  [M', 2]       the same for CHUNK places: the work list of sums over tokens

All are int32 and have shapes that depend on T, S and N alone, so that nobody waits for the device.
"""

from __future__ import annotations

import torch

# Places of a tile: the rows of one product. Few experts have more with E = 64 and T = 1024.
TILE = 64
# Places of a chunk: the longest sum over tokens that one program takes.
CHUNK = 1024


def count_tiles(pairs: int, experts: int, size: int) -> int:
    """How many tiles of `size` places hold `pairs` pairs of N experts, however they are routed."""
    # Not `min`, which would be a guard on the number of tokens in a compiled graph.
    return pairs // size + torch.sym_min(experts + 1, pairs)
