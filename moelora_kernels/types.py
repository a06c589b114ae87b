"""The structures that every part of the package passes around, and the alphabet of their shapes.

    T  tokens              I  in_features          n  siblings: linears that read the same x
    E  experts             O  out_features         S  slots of a token, S = n K
    K  experts per token   r  rank of one expert   P  pairs of a token and a slot, P = T S
    G  gate rows           R  sum of the ranks     N  experts of all siblings, N = n E

The structures contain tensors and numbers, and do not compute. They are NamedTuples, because an op
passes their fields to the dispatcher in order (`*gate`), and because torch.compile supports them.
Siblings are side by side: column block i of h, u, gate and logits belongs to sibling i.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# The most sorted positions of a tile. A tile is the rows of one matrix product. With E = 64 and
# T = 1024 few experts have more than 64 pairs.
TILE = 64
# The most sorted positions of a chunk. A chunk is the longest sum over pairs in one program.
CHUNK = 1024


class LinearTensors(NamedTuple):
    """The tensors of one linear. A layer is one linear, or n siblings that read the same x."""

    # [O, I], if the layer reads the base's weight; None if it calls the base.
    weight: Tensor | None
    # [O], or None.
    bias: Tensor | None
    # [T, O], the output of the base, if the layer calls it; else None.
    base_output: Tensor | None
    # [R, I], expert-major rows; [r, I] if the experts share A.
    lora_a: Tensor
    # [O, R], expert-major columns.
    lora_b: Tensor
    # [E, I], if the op computes the logits of a linear router (a fused router); else None.
    router_weight: Tensor | None = None
    # [E], or None.
    router_bias: Tensor | None = None


class Gate(NamedTuple):
    """The weight of every expert for every token, for n siblings.

    Dense (`experts` is None): `weights` [G, n E]. `rows` [T] names the gate row of each token;
    without `rows`, G is T (a row per token) or 1 (one row for all tokens).

    Sparse: `weights` [T, n K] and `experts` [T, n K]. Entry (t, k) is slot k of token t. An expert
    outside [0, E) means "not routed": the slot adds nothing and its gradient is zero.
    """

    # Any float dtype: [G, n E] of a dense gate, [T, n K] of a sparse one.
    weights: Tensor
    # [T, n K] int32 or int64, or None.
    experts: Tensor | None = None
    # [T] int32 or int64, or None. A row outside [0, G) gates with zero.
    rows: Tensor | None = None
    # [G, n E] float32: the logits from which the gate was computed, or None.
    logits: Tensor | None = None


class RouterTensors(NamedTuple):
    """The linear routers of n siblings: n weights [E, I]; n biases [E] or (). Both can be ()."""

    weight: Sequence[Tensor] = ()
    bias: Sequence[Tensor] = ()


NO_ROUTER = RouterTensors()
# The fields of the gate that an op gets if its routers compute the gate.
NO_GATE = (None, None, None, None)


class SiblingTensors(NamedTuple):
    """The tensors of n siblings. A field has n tensors, or none if it is None in the linears."""

    weight: Sequence[Tensor]
    bias: Sequence[Tensor]
    base_output: Sequence[Tensor]
    lora_a: Sequence[Tensor]
    lora_b: Sequence[Tensor]
    router_weight: Sequence[Tensor]
    router_bias: Sequence[Tensor]


class Dropout(NamedTuple):
    """Dropout of x before A. The mask is computed from the seed and is never stored."""

    # Probability that an element is dropped; 0 switches dropout off.
    p: float = 0.0
    # Whether every expert has a separate mask.
    per_expert: bool = False
    # One int64; None if p is 0.
    seed: Tensor | None = None


NO_DROPOUT = Dropout()


class Mixture(NamedTuple):
    """The static options of a mixture: the same for all siblings, all tokens and all steps."""

    # The ranks and the scales of the E experts.
    ranks: tuple[int, ...]
    scaling: tuple[float, ...]
    share_a: bool = False
    # K of a fused router; 0 if a gate is passed instead.
    router_top_k: int = 0
    # Of a fused router: whether the K weights of a token are divided by their sum.
    renormalize: bool = True
    # Of a fused router: the divisor of the logits.
    temperature: float = 1.0

    def router_gate(self, weights: Tensor, experts: Tensor, logits: Tensor) -> Gate:
        """Return the gate of a fused router: dense if it keeps all experts (K = E)."""
        return Gate(weights, experts if self.router_top_k < len(self.ranks) else None, None, logits)


class Routing(NamedTuple):
    """The (token, slot) pairs of every expert: the pairs sorted by expert.

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
        chunks  [M', 2]     the same with CHUNK positions, for sums over the pairs of an expert.

    All are int32. Their shapes depend on T, S and N alone, so the host does not wait for the
    device.
    """

    order: Tensor
    offsets: Tensor
    tiles: Tensor
    chunks: Tensor


class Shrunk(NamedTuple):
    """Rank space of a forward; and the gate of fused routers (empty tensors without them)."""

    h: Tensor  # [T, n R], x's dtype; [T, n r] if the experts share A
    u: Tensor  # [T, n R], x's dtype
    weights: Tensor  # [T, n K] float32
    experts: Tensor  # [T, n K] int32; empty if K = E
    logits: Tensor  # [T, n E] float32


class ShrunkGrads(NamedTuple):
    """Rank space of a backward."""

    dh: Tensor  # [T, n R], x's dtype; [T, n r] if the experts share A
    u: Tensor  # [T, n R], x's dtype: computed again, for dB
    # Float32. With fused routers the gradient of the logits, [T, n E]; else the gradient of the
    # gate's weights, in their shape.
    dgate: Tensor


class WeightGrads(NamedTuple):
    """Gradients of the parameters of n siblings. Row block i of da and drouter is sibling i's."""

    da: Tensor  # [n R, I]
    drouter: Tensor  # [n E, I]; empty without routers
    dbias: Tensor  # [n E], of the routers' biases; empty without routers
    db: list[Tensor]  # n x [O_i, R]


class LayerForward(NamedTuple):
    """The results of the ops `wide` and `grouped`. Only `grouped` returns the routing arrays."""

    y: list[Tensor]  # n x [T, O_i]
    # `Shrunk.h`; of `grouped` [P, largest rank], by sorted position.
    h: Tensor
    # The gate of fused routers, as in `Shrunk`.
    weights: Tensor
    experts: Tensor
    logits: Tensor
    # The fields of `Routing`; None from `wide`.
    order: Tensor | None = None
    offsets: Tensor | None = None
    tiles: Tensor | None = None
    chunks: Tensor | None = None


class Needs(NamedTuple):
    """The gradients of a layer that backward computes. The others are returned empty."""

    x: bool
    # A, B and the routers.
    adapters: bool


class LayerGrads(NamedTuple):
    """The results of the ops `wide_backward` and `grouped_backward`; empty if not needed."""

    dx: Tensor  # [T, I]
    dgate: Tensor  # `ShrunkGrads.dgate`
    # The fields of `WeightGrads`.
    da: Tensor
    drouter: Tensor
    dbias: Tensor
    db: list[Tensor]


class LayerOutput(NamedTuple):
    """The results of a layer of n siblings."""

    # n x [T, O_i].
    y: list[Tensor]
    # The gate that was passed, or the gate of the fused routers with its logits.
    gate: Gate


class FfnMixture(NamedTuple):
    """The static options of a mixture of whole-FFN experts."""

    # The ranks and the scales of the E experts.
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
    """Return how many tiles of `size` positions are enough for P pairs in any routing.

    The bound is P // size + min(N + 1, P): each of the N experts, and the pairs that are not
    routed, can have one tile that is not full.
    """
    # Python's `min` would add a guard on the number of tokens to a compiled graph.
    return pairs // size + torch.sym_min(experts + 1, pairs)
