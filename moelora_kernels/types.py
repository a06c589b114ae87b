"""The structures that every part of the package passes around, and the alphabet of their shapes.

    T  tokens              I  in_features          n  siblings: linears that read the same x
    E  experts             O  out_features         S  slots of a token, S = n K
    K  experts per token   r  rank of one expert   P  pairs of a token and a slot, P = T S
    G  gate rows           R  sum of the ranks     N  experts of all siblings, N = n E

Structures hold tensors and numbers, and no code that computes. They are NamedTuples, so that an op
passes their fields to the dispatcher in order (`*gate`) and torch.compile knows them. Siblings
stand side by side: column block i of h, u, gate and logits belongs to sibling i.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# Sorted positions in a tile: the rows of one matrix product. With E = 64 and T = 1024 few experts
# have more.
TILE = 64
# Sorted positions in a chunk: the longest sum over tokens that one program takes.
CHUNK = 1024


class LinearTensors(NamedTuple):
    """The tensors of one linear. A layer is one linear, or n siblings that read the same x."""

    # [O, I] of a base that is read; None for a base that is called.
    weight: Tensor | None
    # [O], or None.
    bias: Tensor | None
    # [T, O] of a base that is called: its output. None for a base that is read.
    base_output: Tensor | None
    # [R, I], expert-major rows; [r, I] if the experts share A.
    lora_a: Tensor
    # [O, R], expert-major columns.
    lora_b: Tensor
    # [E, I] of a linear router whose logits the shrink computes; None if the gate is given.
    router_weight: Tensor | None = None
    # [E], or None.
    router_bias: Tensor | None = None


class Gate(NamedTuple):
    """How much of every expert a token gets, for n siblings.

    Dense (`experts` is None): `weights` [G, n E]. `rows` [T] names the gate row of each token;
    without `rows`, G is T (a row per token) or 1 (one row for all tokens).

    Sparse: `weights` [T, n K] and `experts` [T, n K]. Entry (t, k) is slot k of token t. An expert
    outside [0, E) means "not routed": the slot adds nothing and its gradient is zero.
    """

    weights: Tensor
    # [T, n K] int32 or int64, or None.
    experts: Tensor | None = None
    # [T] int32 or int64, or None. A row outside [0, G) gates with zero.
    rows: Tensor | None = None
    # [G, n E] float32: the logits of the router that made the gate, or None.
    logits: Tensor | None = None


class RouterTensors(NamedTuple):
    """The linear routers of n siblings: n weights [E, I]; n biases [E], or none. May be empty."""

    weight: Sequence[Tensor] = ()
    bias: Sequence[Tensor] = ()


NO_ROUTER = RouterTensors()
# What an op gets in the place of a gate that its routers make.
NO_GATE = (None, None, None, None)


class SiblingTensors(NamedTuple):
    """`LinearTensors` of n siblings, field by field: n tensors, or none if the linears lack it."""

    weight: Sequence[Tensor]
    bias: Sequence[Tensor]
    base_output: Sequence[Tensor]
    lora_a: Sequence[Tensor]
    lora_b: Sequence[Tensor]
    router_weight: Sequence[Tensor]
    router_bias: Sequence[Tensor]


class Dropout(NamedTuple):
    """Dropout of x on its way into A. The mask is a function of the seed and is never stored."""

    # Probability that an element is dropped; 0 switches dropout off.
    p: float = 0.0
    # Whether every expert has a mask of its own.
    per_expert: bool = False
    # One int64; None if p is 0.
    seed: Tensor | None = None


NO_DROPOUT = Dropout()


class Mixture(NamedTuple):
    """The static description of a mixture: the same for all siblings, all tokens and all steps."""

    # Rank and scale of every expert, E of each.
    ranks: tuple[int, ...]
    scaling: tuple[float, ...]
    share_a: bool = False
    # K of a linear router whose logits the shrink computes; 0 if the gate is given.
    top_k: int = 0
    # Whether that router's K weights are divided by their sum, and what divides its logits.
    renormalize: bool = True
    temperature: float = 1.0

    def router_gate(self, weights: Tensor, experts: Tensor, logits: Tensor) -> Gate:
        """Return the gate that a fused router made: dense if it keeps all experts (K = E)."""
        return Gate(weights, experts if self.top_k < len(self.ranks) else None, None, logits)


class Routing(NamedTuple):
    """Which pairs each expert works on, sorted by expert.

    Pair t S + s is slot s of token t. Expert i E + e is expert e of sibling i. A sorted position
    is an index into the pairs sorted by expert, so each expert owns a contiguous range of them.

        array               from -> to
        order   [P]         sorted position -> pair; by expert, then slot, then token. Pairs that
                            are not routed come last, in the same order.
        offsets [N + 1]     expert -> its first sorted position; the last entry is the number of
                            routed pairs.
        tiles   [M, 2]      tile -> (expert, first sorted position). A tile holds up to TILE
                            positions of one expert. Tiles of pairs that are not routed have
                            expert N; unused tiles have expert N and first position P.
        chunks  [M', 2]     the same with CHUNK positions: the work list of sums over tokens.

    All are int32. Their shapes depend on T, S and N alone, so no host waits for the device.
    """

    order: Tensor
    offsets: Tensor
    tiles: Tensor
    chunks: Tensor


class Shrunk(NamedTuple):
    """Rank space of a forward, and the gate that routers made (empty tensors if it was given)."""

    h: Tensor  # [T, n R], x's dtype; [T, n r] if the experts share A
    u: Tensor  # [T, n R], x's dtype
    weights: Tensor  # [T, n K] float32
    experts: Tensor  # [T, n K] int32; empty if K = E
    logits: Tensor  # [T, n E] float32


class ShrunkGrads(NamedTuple):
    """Rank space of a backward."""

    dh: Tensor  # [T, n R], x's dtype; [T, n r] if the experts share A
    u: Tensor  # [T, n R], x's dtype: computed again, for dB
    # Float32: the gradient of the router's logits [T, n E] if top_k is above 0, else the gradient
    # of the gate's weights, in their shape.
    dgate: Tensor


class WeightGrads(NamedTuple):
    """Gradients of the parameters of n siblings, row blocks one below the other."""

    da: Tensor  # [n R, I]
    drouter: Tensor  # [n E, I]; empty without routers
    dbias: Tensor  # [n E], of the routers; empty without routers
    db: list[Tensor]  # n x [O_i, R]


class LayerForward(NamedTuple):
    """What the ops `wide` and `grouped` return; `wide` has no routing."""

    y: list[Tensor]  # n x [T, O_i]
    h: Tensor  # `Shrunk.h`; grouped: [P, largest rank], by sorted position
    weights: Tensor
    experts: Tensor
    logits: Tensor
    order: Tensor | None = None
    offsets: Tensor | None = None
    tiles: Tensor | None = None
    chunks: Tensor | None = None


class Needs(NamedTuple):
    """Which gradients of a layer are computed; the others are returned empty."""

    x: bool
    # Those of A, B and the routers.
    adapters: bool


class LayerGrads(NamedTuple):
    """What the ops `wide_backward` and `grouped_backward` return; empty if not asked for."""

    dx: Tensor  # [T, I]
    dgate: Tensor  # `ShrunkGrads.dgate`
    da: Tensor  # from here on `WeightGrads`
    drouter: Tensor
    dbias: Tensor
    db: list[Tensor]


class LayerOutput(NamedTuple):
    """What a layer of n siblings returns."""

    # n x [T, O_i].
    y: list[Tensor]
    # The gate that was given, or the one that the fused router made, with its logits.
    gate: Gate


class FfnMixture(NamedTuple):
    """The static description of a mixture of whole-FFN experts."""

    # Rank and scale of every expert, E of each.
    ranks: tuple[int, ...]
    scaling: tuple[float, ...]
    # Recompute the experts' activations in backward instead of saving them.
    recompute: bool = False


class FfnTensors(NamedTuple):
    """A and B of the three linears of whole-FFN experts, expert-major. F is intermediate_size."""

    gate_a: Tensor  # [R, I]
    gate_b: Tensor  # [F, R]
    up_a: Tensor  # [R, I]
    up_b: Tensor  # [F, R]
    down_a: Tensor  # [R, F]
    down_b: Tensor  # [I, R]


def count_tiles(pairs: int, experts: int, size: int) -> int | torch.SymInt:
    """Return how many tiles of `size` positions hold P pairs of N experts, however they are routed.

    The bound is P // size + min(N + 1, P): each of the N experts, and the pairs that are not
    routed, can leave one tile that is not full.
    """
    # Python's `min` would be a guard on the number of tokens in a compiled graph.
    return pairs // size + torch.sym_min(experts + 1, pairs)
