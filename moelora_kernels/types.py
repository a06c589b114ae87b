"""The structures that every part of the package passes around, and the alphabet of their shapes.

    T  tokens              I  in_features          n  siblings: linears that read the same x
    E  experts             O  out_features         S  slots of a token, S = n K
    K  experts per token   r  rank of one expert   P  pairs of a token and a slot, P = T S
    G  gate rows           R  sum of the ranks     N  experts of all siblings, N = n E
    B  sequences in x      L  tokens in one sequence: x [B, L, I] has T = B L

E and K count a shared expert: E is then num_experts + 1, and a gate with top_k has K = top_k + 1
slots. The shared expert is the last expert and the last slot. B is also the matrix B of a LoRA,
[O, R]; p is the probability of dropout.

The compute dtype is float32, or float64 for float64 tensors; see `numerics.compute_dtype`.

The structures contain tensors and numbers, and do not compute. They are NamedTuples, because an op
passes their fields to the dispatcher in order (`*gate`), and because torch.compile supports them.
Siblings are side by side: column block i of h, u, gate and logits belongs to sibling i.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# The grouped form sorts the pairs by expert (see `Routing`) and cuts the pairs of each expert into
# tiles and into chunks. A tile is the rows of one matrix product, and has up to TILE pairs. With
# E = 64, T = 1024 and top-2 an expert has 32 pairs on average, so most experts need one tile.
TILE = 64
# A chunk is the longest sum over pairs that one program computes, and has up to CHUNK pairs.
CHUNK = 1024


# The activations that the op `ffn_inner` computes.
FFN_ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu")
# On a GPU it takes at most this many experts of a token: the smallest tile has so many rows.
FFN_SLOTS = 16


class LinearTensors(NamedTuple):
    """The tensors of one linear. A layer is one linear, or n siblings that read the same x.

    A layer reads its base or calls it. Read: the op multiplies by the base's weight. Called: the
    layer passes base(x) to the op.
    """

    # [O, I] if the base is read; None if it is called.
    weight: Tensor | None
    # [O] if the base is read and has a bias; else None.
    bias: Tensor | None
    # base(x) [T, O] if the base is called; None if it is read.
    base_output: Tensor | None
    # [R, I], expert-major rows; [r, I] if the experts share A.
    lora_a: Tensor
    # [O, R], expert-major columns.
    lora_b: Tensor
    # [E, I] of a fused router: a linear router whose logits and gate the op computes. Else None.
    router_weight: Tensor | None = None
    # [E] if the fused router has a bias; else None.
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
    # The logits from which the gate was computed, in the compute dtype, or None. [G, n E]; without
    # the column of a shared expert, and with a last column for the learned threshold.
    logits: Tensor | None = None


# The gates that a user passes for router="external": dense [..., E], or sparse (weights, indices),
# both [..., K].
ExternalGates = Tensor | tuple[Tensor, Tensor]


class RouterTensors(NamedTuple):
    """The fused linear routers of n siblings; both fields are empty if a gate is passed."""

    # n x [E, I].
    weight: Sequence[Tensor] = ()
    # n x [E]; empty if the routers have no bias.
    bias: Sequence[Tensor] = ()


NO_ROUTER = RouterTensors()
# The four fields of `Gate`, for an op whose fused routers compute the gate: it gets no gate.
NO_GATE = (None, None, None, None)


class SiblingTensors(NamedTuple):
    """The fields of n `LinearTensors`: each is a list of n tensors.

    A field that is None in the linears is an empty list.
    """

    weight: Sequence[Tensor]
    bias: Sequence[Tensor]
    base_output: Sequence[Tensor]
    lora_a: Sequence[Tensor]
    lora_b: Sequence[Tensor]
    router_weight: Sequence[Tensor]
    router_bias: Sequence[Tensor]


class Dropout(NamedTuple):
    """Dropout of x before A. The mask is computed from the seed and is never stored."""

    # Probability that an element is dropped, rounded to a multiple of 2^-16
    # (`numerics.dropout_threshold`); 0 switches dropout off.
    p: float = 0.0
    # Whether every expert has a separate mask.
    per_expert: bool = False
    # One int64; None if p is 0.
    seed: Tensor | None = None


NO_DROPOUT = Dropout()


class Mixture(NamedTuple):
    """The static options of a mixture: the same for all siblings, all tokens and all steps."""

    # The rank of each of the E experts.
    ranks: tuple[int, ...]
    # The scale of each of the E experts.
    scaling: tuple[float, ...]
    # Whether all experts have the same A, [r, I].
    share_a: bool = False
    # K of a fused router; 0 if a gate is passed, also if that gate has K slots.
    router_top_k: int = 0
    # Whether a fused router divides the K weights of a token by their sum.
    renormalize: bool = True
    # The number by which a fused router divides the logits.
    temperature: float = 1.0

    def router_gate(self, weights: Tensor, experts: Tensor, logits: Tensor) -> Gate:
        """Return the gate of a fused router: dense if it keeps all experts (K = E)."""
        return Gate(weights, experts if self.router_top_k < len(self.ranks) else None, None, logits)


class Routing(NamedTuple):
    """The (token, slot) pairs of every expert: the pairs sorted by expert.

    Pairs are numbered by token, then slot: pair t S + s is slot s of token t. Expert i E + e is
    expert e of sibling i. `order` lists the pairs by expert. A sorted position is an index into
    `order`, so the pairs of an expert have a contiguous range of sorted positions.

        array               from -> to
        order   [P]         sorted position -> pair; by expert, then slot, then token. Pairs that
                            are not routed come last, in the same order.
        offsets [N + 1]     expert -> its first sorted position; the last entry is the number of
                            routed pairs.
        tiles   [M, 2]      tile -> (expert, first sorted position). A tile holds up to TILE
                            positions of one expert. Tiles of pairs that are not routed have
                            expert N; unused tiles have expert N and first position P.
        chunks  [M', 2]     the same with CHUNK positions, for sums over the pairs of an expert.

    M is count_tiles(P, N, TILE), and M' is count_tiles(P, N, CHUNK). All arrays are int32. Their
    shapes depend on T, S and N alone, so the host does not wait for the device.
    """

    order: Tensor
    offsets: Tensor
    tiles: Tensor
    chunks: Tensor


class Shrunk(NamedTuple):
    """Rank space of a forward; and the gate of fused routers (empty tensors without them)."""

    # In x's dtype, also if A is float32: float16 ends at 65504.
    h: Tensor  # [T, n R]; [T, n r] if the experts share A
    u: Tensor  # [T, n R], x's dtype
    weights: Tensor  # [T, n K], compute dtype
    experts: Tensor  # [T, n K] int32; empty if K = E
    logits: Tensor  # [T, n E], compute dtype


class ShrunkGrads(NamedTuple):
    """Rank space of a backward."""

    dh: Tensor  # [T, n R], x's dtype; [T, n r] if the experts share A
    u: Tensor  # [T, n R], x's dtype: computed again, for dB
    # Compute dtype. With fused routers the gradient of the logits, [T, n E]; else the gradient of
    # the gate's weights, in their shape.
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


class Decoded(NamedTuple):
    """The results of the op `decode`."""

    y: list[Tensor]  # n x [T, O_i]
    # The gate of fused routers, as in `Shrunk`.
    weights: Tensor
    experts: Tensor
    logits: Tensor


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
    # The experts whose A and B get gradients of zero, in rising order.
    frozen: tuple[int, ...] = ()


class FfnTensors(NamedTuple):
    """A and B of the three linears of whole-FFN experts, expert-major. F is intermediate_size."""

    gate_a: Tensor  # [R, I]
    gate_b: Tensor  # [F, R]
    up_a: Tensor  # [R, I]
    up_b: Tensor  # [F, R]
    down_a: Tensor  # [R, F]
    down_b: Tensor  # [I, R]


class InnerInputs(NamedTuple):
    """The frozen products of gate and up, and their rank space: inputs of the op `ffn_inner`."""

    gate_out: Tensor  # [T, F], the output of the frozen gate projection
    up_out: Tensor  # [T, F], the output of the frozen up projection
    # scale_e A_e dropout(x_p) by sorted position, [P, largest rank], without the gate weight.
    u_gate: Tensor
    u_up: Tensor


class InnerAdapters(NamedTuple):
    """The adapter matrices of whole-FFN experts that have the intermediate features."""

    gate_b: Tensor  # [F, R]
    up_b: Tensor  # [F, R]
    down_a: Tensor  # [R, F]


class InnerOptions(NamedTuple):
    """The options of the op `ffn_inner`, with the fields of `Dropout` between them."""

    # The ranks and the scales of the E experts.
    ranks: Sequence[int]
    scaling: Sequence[float]
    # Dropout of the activations before A of down; a mask has a row for each pair.
    p: float
    per_expert: bool
    seed: Tensor | None
    # One of FFN_ACTIVATIONS.
    activation: str

    @property
    def dropout(self) -> Dropout:
        """The dropout of the activations."""
        return Dropout(self.p, self.per_expert, self.seed)


class InnerGrads(NamedTuple):
    """The results of the op `ffn_inner_backward`."""

    dgate_out: Tensor  # [T, F], x's dtype
    dup_out: Tensor  # [T, F], x's dtype
    # The gradients of A_e dropout(x_p) by sorted position, [P, largest rank] in x's dtype.
    dh_gate: Tensor
    dh_up: Tensor
    # [T, K] in the compute dtype: the part that comes through `summed`.
    dweights: Tensor
    # The gradients of `InnerAdapters`, each in the dtype of its matrix; empty if not needed.
    dgate_b: Tensor
    dup_b: Tensor
    ddown_a: Tensor


def count_tiles(pairs: int, experts: int, size: int) -> int | torch.SymInt:
    """Return how many tiles of `size` positions are enough for P pairs in any routing.

    The bound is P // size + min(N + 1, P): each of the N experts, and the pairs that are not
    routed, can have one tile that is not full.
    """
    # Python's `min` would add a guard on the number of tokens to a compiled graph.
    return pairs // size + torch.sym_min(experts + 1, pairs)
