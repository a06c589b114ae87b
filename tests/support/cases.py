"""The cases of the ops and of whole layers: sizes and options, in tables with names.

`support.inputs.Inputs(case, dtype)` draws the tensors of a case.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from moelora_kernels.types import TILE


class Case(NamedTuple):
    """Sizes and options of one layer: n siblings that read the same x."""

    T: int = 13
    I: int = 70  # noqa: E741
    # One size for all siblings, or n of them.
    O: int | tuple[int, ...] = 45  # noqa: E741
    ranks: tuple[int, ...] = (16, 16, 16, 16)
    n: int = 1
    K: int = 2
    # "router": linear routers make it. "dense": one row per token. "one_row": one row for all
    # tokens. "rows": 5 rows, and the row of each token; some of these are not in [0, 5).
    # "sparse": K weights and experts per token. "unweighted": K experts, all with weight 1; only
    # the ops of the grouped form take it.
    gate: str = "router"
    # Which experts a sparse gate names: a key of `support.inputs.EXPERTS` or `testing.ROUTINGS`.
    routing: str = "some"
    # Dtype of experts and of rows.
    ids: torch.dtype = torch.int32
    # Dtype of the gate's weights; None: the dtype of x.
    gate_dtype: torch.dtype | None = None
    renormalize: bool = True
    temperature: float = 1.0
    # Whether the routers have a bias.
    router_bias: bool = False
    # Whether a gradient from elsewhere (an auxiliary loss) reaches the routers' logits.
    aux: bool = False
    # Whether all experts share the rows of A.
    share_a: bool = False
    dropout: float = 0.0
    per_expert: bool = False
    # Dtype of A, B and the routers; None: the dtype of x.
    adapters: torch.dtype | None = None
    # Dtype of the routers; None: the dtype of A and B.
    routers: torch.dtype | None = None
    # The tensor that y begins with: "" (none), "bias" [O], "base" [T, O], or "base_float32",
    # which is [T, O] in float32. A whole layer takes "" and "bias".
    start: str = ""
    # Ops of the grouped form: x and dy have a row for every pair of a token and a slot, and so has
    # y (n = 1). A whole feed-forward calls them like this.
    per_pair: bool = False
    # Sorted positions of a tile and of a chunk, for the ops of the grouped form.
    tile: int = 16
    chunk: int = 32

    @property
    def out_features(self) -> tuple[int, ...]:
        return self.O if isinstance(self.O, tuple) else (self.O,) * self.n

    @property
    def impls(self) -> tuple[str, ...]:
        """The formulations that a whole layer of this case has."""
        sparse = self.gate == "sparse" or (self.gate == "router" and len(self.ranks) > self.K)
        return ("wide", "grouped") if sparse and not self.share_a else ("wide",)


def grouped_case(**options) -> Case:
    """Return a case of the ops of the grouped form; a router makes weights in float32."""
    defaults = dict(T=29, I=40, O=24, gate="sparse", gate_dtype=torch.float32)
    return Case(**{**defaults, **options})


def layer_case(**options) -> Case:
    """Return a case of a whole layer: with biases, every token with K different experts."""
    defaults = dict(T=23, I=19, O=13, ranks=(4, 4, 4, 4), routing="uniform")
    return Case(**{**defaults, "router_bias": True, "start": "bias", **options})


# The ops of the wide form. name -> case; the comment says what it would catch.
WIDE = {
    "plain": Case(),
    # Column blocks of the router, token tiles, tails of both, two threads.
    "long": Case(T=523, I=2100, router_bias=True),
    "no_token": Case(T=0),
    "no_token_dense": Case(T=0, gate="dense"),
    "one_token": Case(T=1),
    "one_expert": Case(ranks=(5,), K=1),
    "one_expert_dense": Case(ranks=(16,), gate="dense"),
    "all_experts": Case(K=4),
    "all_experts_softmax": Case(K=4, renormalize=False, temperature=0.7),
    # The softmax before the choice: its backward reads the logits of all experts.
    "softmax_before_topk": Case(renormalize=False, temperature=1.7, aux=True),
    "many_experts": Case(T=31, ranks=(2,) * 67, K=6),
    "mixed_ranks": Case(ranks=(1, 3, 16, 128), router_bias=True, aux=True),
    "mixed_ranks_dense": Case(ranks=(1, 3, 16, 128), gate="dense"),
    "siblings": Case(n=3, router_bias=True, start="bias", aux=True),
    "siblings_sparse": Case(n=3, gate="sparse"),
    "siblings_dense": Case(n=3, ranks=(4, 9), gate="dense"),
    "sparse_int64": Case(gate="sparse", ids=torch.int64),
    # The gradient of one row is a sum over all tokens, that of five a product with rows.
    "one_row": Case(T=131, gate="one_row"),
    "rows": Case(T=131, gate="rows"),
    "rows_int64": Case(T=131, gate="rows", ids=torch.int64, n=2),
    "share_a": Case(share_a=True, ranks=(8, 8, 8), n=2),
    "share_a_dense": Case(share_a=True, ranks=(8, 8, 8), gate="dense"),
    "dropout": Case(dropout=0.25, n=2),
    "dropout_per_expert": Case(dropout=0.25, per_expert=True, n=2, ranks=(1, 5, 16)),
    "float32_adapters": Case(n=2, adapters=torch.float32, router_bias=True),
    # The kernels get cast A and B beside float32 routers.
    "float32_routers": Case(n=2, routers=torch.float32, router_bias=True),
}

# The ops of the grouped form. name -> case; the comment says what it would catch.
GROUPED = {
    # Several tiles and chunks of an expert, with tails; some slots not routed, some repeated.
    "plain": grouped_case(start="bias"),
    # One pass that writes; tokens whose only slot is not routed get the start.
    "one_slot": grouped_case(K=1, start="base"),
    # Passes that read what the passes before wrote; more slots than experts, so that each repeats.
    "four_slots": grouped_case(T=29, K=4, ranks=(4, 4, 4)),
    # As many sums in 16 bits would round too often.
    "eight_slots": grouped_case(T=7, K=8, ranks=(2,) * 10),
    "one_expert": grouped_case(K=1, ranks=(5,)),
    # Different experts in a token: dx reads the dlogits of these alone.
    "distinct_experts": grouped_case(n=2, ranks=(4, 9, 16, 2, 4), routing="uniform"),
    # All pairs to the last expert: every other is empty, and its gradients are exact zeros; one
    # sum over all chunks. A token names its expert twice.
    "skew": grouped_case(T=75, routing="last", start="bias"),
    # Most pairs to one expert: sums of several chunks next to sums of one.
    "mostly_one": grouped_case(T=90, routing="mostly_first"),
    # Empty experts between, before and behind those with tokens.
    "empty": grouped_case(ranks=(3, 3, 3, 3, 3, 3, 3), routing="even"),
    # Exactly full tiles and chunks: no tail, and no tile beyond the last but those of N.
    "full": grouped_case(T=64, K=1, ranks=(16, 16), routing="alternate"),
    # Tiles of as many positions as programs take; chunks of several steps, with tails.
    "long": grouped_case(T=150, I=24, O=16, ranks=(4, 4), tile=64, chunk=96),
    "mixed_ranks": grouped_case(ranks=(1, 3, 16, 33), start="bias", router_bias=True),
    "rank_1": grouped_case(ranks=(1,) * 5),
    # A rank that takes several steps, or several tiles of columns.
    "large_ranks": grouped_case(T=21, I=33, O=20, ranks=(150, 70), routing="all"),
    "odd": grouped_case(I=37, O=19, ranks=(5, 5, 5)),
    # Wider than one step, tile or walk of the wide sides, one column past it.
    "wide": grouped_case(T=9, I=257, O=1025, ranks=(8, 8)),
    "no_token": grouped_case(T=0, start="bias"),
    "one_token": grouped_case(T=1, start="bias", router_bias=True),
    # More experts than pairs: all sizes come from the pairs.
    "few_pairs": grouped_case(T=3, K=1, ranks=(2,) * 40),
    "nothing_routed": grouped_case(routing="outside", start="base"),
    "nothing_routed_int64": grouped_case(routing="outside", ids=torch.int64, start="bias"),
    "int64": grouped_case(ids=torch.int64),
    # Slots and experts of a sibling stand behind those of the siblings before it.
    "siblings": grouped_case(n=2, start="bias", router_bias=True),
    "three_siblings": grouped_case(T=21, n=3, K=1, ranks=(4, 9), start="base"),
    "unweighted": grouped_case(gate="unweighted"),
    # Weights from outside come in any dtype.
    "weights_in_16_bits": grouped_case(gate_dtype=torch.bfloat16),
    # A feed-forward with whole experts: rows of pairs on both sides.
    "per_pair": grouped_case(per_pair=True, start="bias"),
    "per_pair_unweighted": grouped_case(per_pair=True, gate="unweighted", ranks=(1, 3, 20)),
    "per_pair_base": grouped_case(T=21, per_pair=True, start="base"),
    # A start in float32 makes a result in float32.
    "float32_start": grouped_case(start="base_float32"),
    "dropout": grouped_case(dropout=0.25, n=2),
    "dropout_per_expert": grouped_case(dropout=0.25, per_expert=True, n=2, ranks=(1, 5, 16), I=37),
    "dropout_per_pair": grouped_case(dropout=0.25, per_expert=True, per_pair=True),
    "float32_adapters": grouped_case(
        adapters=torch.float32, n=2, K=1, router_bias=True, start="bias"
    ),
}

# Whole layers, through autograd. name -> case; the comment says what it would catch.
LAYERS = {
    "router": layer_case(),
    "odd_sizes": layer_case(T=37, I=31, O=17, ranks=(3, 3, 3)),
    "more_positions_than_a_tile": layer_case(T=3 * TILE + 5, ranks=(4, 4, 4)),
    "ranks_of_1": layer_case(ranks=(1,) * 8),
    # Past every block of columns that a product is cut into.
    "wide": layer_case(T=19, I=2051, O=323, ranks=(3, 18, 1)),
    "rank_128": layer_case(ranks=(128, 128, 128), I=40),
    "rank_128_all_experts": layer_case(ranks=(128, 128), I=40),
    # A running sum over all ranks would miss the budget.
    "rank_4000": layer_case(ranks=(4000, 1), K=1, I=8, T=50),
    "ranks_that_differ": layer_case(ranks=(1, 16, 3, 64, 2)),
    "one_expert": layer_case(ranks=(5,), K=1),
    "one_expert_sparse": layer_case(ranks=(5,), K=1, gate="sparse"),
    "one_token": layer_case(T=1),
    # A prime number of tokens over several blocks.
    "prime_tokens": layer_case(T=257, I=67, O=71),
    "many_experts": layer_case(ranks=(4,) * 64, K=6),
    "top_1": layer_case(K=1),
    "all_experts": layer_case(K=4),
    "all_experts_softmax": layer_case(K=4, renormalize=False),
    "softmax_before_topk": layer_case(renormalize=False, temperature=0.7),
    "aux": layer_case(aux=True, renormalize=False),
    "no_biases": layer_case(router_bias=False, start=""),
    "siblings": layer_case(n=3, O=(17, 5, 9), aux=True),
    "share_a": layer_case(share_a=True, n=2, O=(17, 5)),
    "dropout": layer_case(dropout=0.3, n=2, O=(17, 5)),
    "dropout_per_expert": layer_case(dropout=0.3, per_expert=True, ranks=(1, 3, 2, 4)),
    "dense": layer_case(gate="dense"),
    "dense_share_a": layer_case(gate="dense", share_a=True),
    "rows": layer_case(gate="rows", n=2, O=(17, 5)),
    "one_row": layer_case(gate="one_row"),
    "sparse": layer_case(gate="sparse"),
    "sparse_all_experts": layer_case(gate="sparse", K=4),
    "sparse_siblings": layer_case(gate="sparse", n=2, O=(17, 5)),
    "sparse_siblings_no_biases": layer_case(gate="sparse", n=2, O=(17, 5), start=""),
    "sparse_dropout": layer_case(gate="sparse", dropout=0.5),
}
