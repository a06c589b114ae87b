"""Cases at the sizes of real layers, for the tests marked `gpu`."""

from __future__ import annotations

import torch

from moelora_kernels.types import CHUNK, TILE
from support.cases import Case, grouped_case

# R = 128, the largest that one program holds.
EIGHT = (16,) * 8
# The ops of the wide form. name -> case; the comment says what it would catch.
LARGE_WIDE = {
    # The sizes that the benchmarks time: full tiles, one launch per direction, a split in
    # weight_grad alone.
    "router": Case(T=8192, I=4096, O=4096, ranks=EIGHT),
    # dy and B are the wide side; sums over 14336 columns.
    "up": Case(T=8192, I=4096, O=14336, ranks=EIGHT, router_bias=True, start="bias"),
    # One token: every product is split, and 63 rows of each tile are masked.
    "one_token": Case(T=1, I=4096, O=14336, ranks=(8,) * 8),
    # A tail of one token in the second tile; the smallest rank tile, half of it masked per expert.
    "few_tokens": Case(T=17, I=4096, O=4096, ranks=(2,) * 8),
    # R = 256: two column tiles, partials and a second launch; the router spread over the tiles.
    "two_tiles": Case(T=1000, I=4096, O=4096, ranks=(32,) * 8, router_bias=True, start="bias"),
    "two_tiles_long": Case(T=8192, I=4096, O=4096, ranks=(32,) * 8, gate="dense"),
    # Weights and experts from outside, some of them "not routed".
    "sparse": Case(T=8192, I=4096, O=4096, ranks=EIGHT, gate="sparse"),
    "dense": Case(T=1000, I=4096, O=14336, ranks=(8,) * 8, gate="dense"),
    # The gradient of one row is a sum over all tokens, that of five a product with rows.
    "one_row": Case(T=8192, I=4096, O=4096, ranks=(8,) * 8, gate="one_row"),
    "task_rows": Case(T=1000, I=4096, O=4096, ranks=EIGHT, gate="rows"),
    # Tuples of pointers, and the sibling of a program.
    "siblings": Case(T=1000, I=4096, O=4096, ranks=(8,) * 8, n=3, aux=True),
    # Experts across the borders of tiles; R = 148 is no multiple of anything.
    "mixed_ranks": Case(T=1000, I=4096, O=4096, ranks=(1, 3, 16, 128)),
    "share_a": Case(T=1000, I=4096, O=4096, ranks=EIGHT, share_a=True),
    "dropout": Case(T=8192, I=4096, O=4096, ranks=EIGHT, dropout=0.1),
    "dropout_per_expert": Case(T=1000, I=4096, O=4096, ranks=EIGHT, dropout=0.1, per_expert=True),
    # A, B and router in float32 under 16-bit x: logits of float32 grade, gradients not rounded.
    "float32_adapters": Case(
        T=1000,
        I=4096,
        O=4096,
        ranks=EIGHT,
        adapters=torch.float32,
        router_bias=True,
        start="bias",
    ),
    # The softmax before the choice: its backward reads the logits of all experts.
    "softmax_before_topk": Case(
        T=1000, I=4096, O=4096, ranks=(8,) * 8, renormalize=False, temperature=1.7, aux=True
    ),
    # More experts than one program routes.
    "many_experts": Case(T=1000, I=4096, O=4096, ranks=(2,) * 64, K=6),
    # Rows that start at no multiple of 16 bytes, tails on every side.
    "odd": Case(T=1000, I=4099, O=4097, ranks=(5,) * 7),
}

LONG = grouped_case(T=4096, I=4096, O=4096, routing="all", tile=TILE, chunk=CHUNK)
# The ops of the grouped form. name -> case; the comment says what it would catch.
LARGE_GROUPED = {
    # The sizes that the benchmarks time: full tiles, one sum of every expert.
    "E=64 r=64 K=4": LONG._replace(ranks=(64,) * 64, K=4),
    # As many sums in float32, the last of which writes y.
    "E=256 r=16 K=8": LONG._replace(ranks=(16,) * 256, K=8),
    "qkv": LONG._replace(ranks=(16,) * 8, n=3, start="bias"),
    # All tokens to one expert: 8 parts of its sums, and zeros for all others.
    "skew": LONG._replace(ranks=(16,) * 64, routing="last"),
    # Whole feed-forwards: rows of pairs on both sides.
    "per_pair": LONG._replace(ranks=(16,) * 8, O=11008, per_pair=True),
    # Columns of B that start at no multiple of 16 bytes; tails on every side.
    "odd": LONG._replace(T=1000, I=4099, O=4097, ranks=(1, 3, 16, 33, 150), routing="some"),
    "one_token": LONG._replace(T=1, ranks=(64,) * 64),
    "dropout": LONG._replace(ranks=(16,) * 64, dropout=0.1, per_expert=True),
    "float32_adapters": LONG._replace(T=1000, ranks=(64,) * 16, adapters=torch.float32),
}

# Whole layers in the grouped form; in the wide form LARGE_WIDE serves. 64 experts are above the
# threshold of every device with K = 2.
LARGE_LAYERS = {
    "E=64 r=16": Case(T=4096, I=4096, O=4096, ranks=(16,) * 64),
    "E=64 r=64 K=4": Case(T=2048, I=4096, O=4096, ranks=(64,) * 64, K=4),
    "siblings": Case(
        T=1000, I=4096, O=4096, ranks=(8,) * 32, n=3, aux=True, router_bias=True, start="bias"
    ),
    "mixed_ranks": Case(T=1000, I=4096, O=4096, ranks=(1, 3, 16, 128), gate="sparse"),
    "dropout": Case(T=1000, I=4096, O=4096, ranks=(16,) * 64, dropout=0.1, per_expert=True),
}
