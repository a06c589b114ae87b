"""Cases for the ops of the grouped formulation, and how an implementation is compared.

An implementation is anything with the signature of the op: `ops.route`, a launcher.

    check("grouped_shrink", implementation, Inputs(CASES["plain"], dtype), dtype)
    check_what_is_not_chosen(implementations)       name of an op -> implementation
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from moelora_kernels import reference
from moelora_kernels.types import NO_DROPOUT, Dropout, RouterTensors, Routing
from support.op_cases import compare

# op -> names of its outputs, in the order in which a layer calls them.
OUTPUTS = {
    "router_logits": "logits",
    "route": "order offsets tiles chunks",
    "grouped_shrink": "h u",
    "grouped_shrink_backward": "dh u dweights",
    "grouped_expand": "y",
    "grouped_weight_grad": "da db",
    "router_grad": "drouter dbias",
}
INT_MAX, INT_MIN = 2**31 - 1, -(2**31)


class Case(NamedTuple):
    """Sizes and options of one layer; `routing` names a function below.

    tile, chunk: places of a tile and of a chunk. by_pair: x and dy have a row for every pair, and y
    is kept apart for the slots (n = 1). start: what y begins with, "" for nothing.
    """

    T: int = 29
    I: int = 40  # noqa: E741
    O: int = 24  # noqa: E741
    ranks: tuple[int, ...] = (16, 16, 16, 16)
    n: int = 1
    K: int = 2
    routing: str = "some"
    ids: torch.dtype = torch.int32
    weighted: bool = True
    weights: torch.dtype | None = None
    by_pair: bool = False
    start: str = ""
    bias: bool = False
    adapters: torch.dtype | None = None
    dropout: float = 0.0
    per_expert: bool = False
    tile: int = 16
    chunk: int = 32


# name -> case; the comment says what it would catch.
CASES = {
    # Several tiles and chunks of an expert, with tails; some slots not routed, some repeated.
    "plain": Case(start="bias"),
    # One pass that writes; tokens whose only slot is not routed get the start.
    "one_slot": Case(K=1, start="base"),
    # Passes that read what the passes before wrote; more slots than experts, so that each repeats.
    "four_slots": Case(T=29, K=4, ranks=(4, 4, 4)),
    # As many sums in 16 bits would round too often.
    "eight_slots": Case(T=7, K=8, ranks=(2,) * 10),
    "one_expert": Case(K=1, ranks=(5,)),
    # All pairs to the last expert: every other is empty, and its gradients are exact zeros; one
    # sum over all chunks. The index is repeated in a token.
    "skew": Case(T=75, routing="last", start="bias"),
    # Most pairs to one expert: sums of several chunks next to sums of one.
    "mostly_one": Case(T=90, routing="mostly_first"),
    # Empty experts between, before and behind those with tokens.
    "empty": Case(ranks=(3, 3, 3, 3, 3, 3, 3), routing="even"),
    # Exactly full tiles and chunks: no tail, and no tile beyond the last but those of N.
    "full": Case(T=64, K=1, ranks=(16, 16), routing="alternate"),
    # Tiles of as many places as programs take; chunks of several steps, with tails.
    "long": Case(T=150, I=24, O=16, ranks=(4, 4), tile=64, chunk=96),
    "mixed_ranks": Case(ranks=(1, 3, 16, 33), start="bias", bias=True),
    "rank_1": Case(ranks=(1,) * 5),
    # A rank that takes several steps, or several tiles of columns.
    "large_ranks": Case(T=21, I=33, O=20, ranks=(150, 70), routing="all"),
    "odd": Case(I=37, O=19, ranks=(5, 5, 5)),
    # Wider than one step or tile of the wide sides, one column past it.
    "wide": Case(T=9, I=257, O=161, ranks=(8, 8)),
    "no_token": Case(T=0, start="bias"),
    "one_token": Case(T=1, start="bias", bias=True),
    # More experts than pairs: all sizes come from the pairs.
    "few_pairs": Case(T=3, K=1, ranks=(2,) * 40),
    "nothing_routed": Case(routing="outside", start="base"),
    "nothing_routed_int64": Case(routing="outside", ids=torch.int64, start="bias"),
    "int64": Case(ids=torch.int64),
    # Slots and experts of a sibling stand behind those of the siblings before it.
    "siblings": Case(n=2, start="bias", bias=True),
    "three_siblings": Case(T=21, n=3, K=1, ranks=(4, 9), start="base"),
    "unweighted": Case(weighted=False),
    # Weights from outside come in any dtype.
    "weights_in_16_bits": Case(weights=torch.bfloat16),
    # What a feed-forward with whole experts calls: rows of pairs on both sides.
    "by_pair": Case(by_pair=True, start="bias"),
    "by_pair_unweighted": Case(by_pair=True, weighted=False, ranks=(1, 3, 20)),
    "by_pair_base": Case(T=21, by_pair=True, start="base"),
    # A start in float32 makes a result in float32.
    "float32_start": Case(start="base_float32"),
    "dropout": Case(dropout=0.25, n=2),
    "dropout_per_expert": Case(dropout=0.25, per_expert=True, n=2, ranks=(1, 5, 16), I=37),
    "dropout_by_pair": Case(dropout=0.25, per_expert=True, by_pair=True),
    "float32_adapters": Case(adapters=torch.float32, n=2, K=1, bias=True, start="bias"),
}


def _draw_ids(case: Case, generator: torch.Generator) -> Tensor:
    """Expert ids [T, n K] by the name of a routing."""
    E, shape = len(case.ranks), (case.T, case.n * case.K)

    def integers(low: int, high: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    place = torch.arange(case.T * case.n * case.K).view(shape)
    if case.routing == "some":
        # -1 and E are not routed.
        return integers(-1, E + 1)
    if case.routing == "all":
        return integers(0, E)
    if case.routing == "last":
        return integers(E - 1, E)
    if case.routing == "mostly_first":
        return torch.where(integers(0, 10) == 0, integers(0, E), 0)
    if case.routing == "even":
        # Neither expert 0 nor 1, then every second one, and not the last.
        return integers(1, (E - 1) // 2) * 2
    if case.routing == "alternate":
        return place % E
    far = [-1, E, INT_MAX, INT_MIN]
    if case.ids is torch.int64:
        far += [2**40, -(2**40), 2**32, 2**32 + 1]
    return torch.tensor(far)[place % len(far)]


class Inputs:
    """Random tensors of a case in one dtype, and the arguments of every op made of them."""

    def __init__(
        self, case: Case, dtype: torch.dtype, seed: int = 0, device: str | torch.device = "cpu"
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        of = case.adapters if case.adapters and dtype is not torch.float64 else dtype

        def draw(*shape: int, of: torch.dtype = dtype) -> Tensor:
            drawn = torch.randn(*shape, dtype=torch.float64, generator=generator)
            return drawn.to(of).to(device)

        T, I, O, ranks, n, K = case[:6]  # noqa: E741
        E, R = len(ranks), sum(ranks)
        rows = T * K if case.by_pair else T
        self.case, self.dtype = case, dtype
        self.scaling = [0.5 + 0.25 * (e % 5) for e in range(E)]
        self.seed = torch.tensor([-5_000_000_003], device=device) if case.dropout else None
        self.indices = _draw_ids(case, generator).to(case.ids).to(device)
        self.x = draw(rows, I)
        # Adapters are rounded to x.dtype here: what the cast inside the op costs is no error of it.
        self.lora_a = [draw(R, I).div(I**0.5).to(dtype).to(of) for _ in range(n)]
        self.lora_b = [draw(O, R).to(dtype).to(of) for _ in range(n)]
        self.dy = [draw(rows, O).div(O**0.5) for _ in range(n)]
        self.router = [draw(E, I, of=of).div(I**0.5) for _ in range(n)]
        self.bias = [draw(E, of=of) for _ in range(n)] if case.bias else []
        self.dlogits = draw(rows, n * E, of=reference.compute_dtype(self.x))
        self.weights = None
        if case.weighted:
            of_weights = case.weights or reference.compute_dtype(self.x)
            self.weights = draw(T, n * K, of=of_weights)
            # A gate that is exactly zero.
            self.weights[::3, -1] = 0
        self.start: list[Tensor | None] = [None] * n
        if case.start:
            shape = (O,) if case.start == "bias" else (T, O)
            wide = case.start == "base_float32" and dtype.itemsize == 2
            self.start = [draw(*shape, of=torch.float32 if wide else dtype) for _ in range(n)]

    def calls(self, name: str) -> list[list]:
        """The arguments of every call of an op that this layer makes."""
        return getattr(self, f"_{name}")()

    @property
    def ranks(self) -> tuple[int, ...]:
        return self.case.ranks

    @property
    def dropout(self) -> Dropout:
        return Dropout(self.case.dropout, self.case.per_expert, self.seed)

    def _route(self) -> list[list]:
        c = self.case
        return [[self.indices, len(c.ranks), c.n, c.tile, c.chunk]]

    def _router_logits(self) -> list[list]:
        return [[self.x, RouterTensors(self.router, self.bias)]]

    def _router_grad(self) -> list[list]:
        return [[self.dlogits, self.x, self.router[0].dtype]]

    def routing(self) -> Routing:
        return reference.route(*self._route()[0])

    def _grouped_shrink(self) -> list[list]:
        weights, routing = self.weights, self.routing()
        return [[self.x, self.lora_a, weights, routing, self.ranks, self.scaling, self.dropout]]

    def _grouped_shrink_backward(self) -> list[list]:
        h, _ = reference.grouped_shrink(*self._grouped_shrink()[0])
        weights, routing = self.weights, self.routing()
        return [[self.dy, self.lora_b, h, weights, routing, self.ranks, self.scaling]]

    def _grouped_expand(self) -> list[list]:
        """y of every sibling, dx, and with several siblings y without that of the first."""
        c, routing = self.case, self.routing()
        _, u = reference.grouped_shrink(*self._grouped_shrink()[0])
        dh, *_ = reference.grouped_shrink_backward(*self._grouped_shrink_backward()[0])

        def call(left, matrices, start, first, dropout):
            return [left, matrices, start, routing, self.ranks, dropout, c.T, first, c.by_pair]

        starts = enumerate(zip(self.lora_b, self.start, strict=True))
        calls = [call(u, [b], start, i, NO_DROPOUT) for i, (b, start) in starts]
        calls.append(call(dh, [a.t() for a in self.lora_a], None, 0, self.dropout))
        if c.n > 1:
            calls.append(call(u, self.lora_b[1:], self.start[0], 1, NO_DROPOUT))
        return calls

    def _grouped_weight_grad(self) -> list[list]:
        dh, u, _ = reference.grouped_shrink_backward(*self._grouped_shrink_backward()[0])
        dtype, routing = self.lora_a[0].dtype, self.routing()
        return [[self.x, dh, self.dy, u, routing, self.ranks, self.dropout, dtype]]


def check(name: str, implementation: Callable, inputs: Inputs, dtype: torch.dtype) -> None:
    """Every call of an op against float64, and twice: the same bits."""
    specification = getattr(reference, name)
    for arguments in inputs.calls(name):
        compare(OUTPUTS[name], implementation, specification, arguments, dtype)


def check_what_is_not_chosen(
    implementations: Mapping[str, Callable], dtype: torch.dtype, device: str | torch.device = "cpu"
) -> None:
    """NaN in experts that nobody chose, and in x and dy of tokens without one, stays there.

    The gradients of an expert that nobody chose are exact zeros, as is all of a token without any.
    Expert 2 is chosen with a gate of zero, for sibling 1 by the tokens that are multiples of 3.
    """
    case = Case(T=21, ranks=(3, 5, 16, 1), n=2, routing="all", start="bias")
    inputs = Inputs(case, dtype, device=device)
    inputs.indices.fill_(1)
    inputs.indices[::3, -1] = 2
    idle, nan = [4, 20], float("nan")
    inputs.indices[idle] = -1
    inputs.x[idle] = nan
    # Experts 2 and 3 are what stands behind the columns of the one that is chosen.
    others = [columns for e, columns in enumerate(reference.blocks(case.ranks)) if e != 1]
    for i in range(2):
        inputs.dy[i][idle] = nan
        for columns in others:
            inputs.lora_a[i][columns] = nan
            inputs.lora_b[i][:, columns] = nan
    run = implementations
    arguments = inputs.calls("grouped_shrink")[0]
    weights, routing = inputs.weights, inputs.routing()
    order, offsets, *_ = routing
    h, u = run["grouped_shrink"](*arguments)
    pair, routed = order.long(), int(offsets[-1])
    ungated = (weights.view(-1)[pair] == 0) | (torch.arange(len(pair), device=device) >= routed)
    _finite(h[~ungated], "h")
    _zero(h[routed:], "h of what is not routed")
    _finite(u, "u")
    _zero(u[ungated], "u where the gate is zero")

    ranks = case.ranks
    dh, u, dweights = run["grouped_shrink_backward"](
        inputs.dy, inputs.lora_b, h, weights, routing, ranks, inputs.scaling
    )
    _finite(dh, "dh")
    _zero(dh[ungated], "dh where the gate is zero")
    _finite(u, "u of the backward")
    _finite(dweights.view(-1)[pair[~ungated]], "dweights")
    _zero(dweights[idle], "dweights of what is not routed")

    expand = run["grouped_expand"]
    for i, b in enumerate(inputs.lora_b):
        start = inputs.start[i]
        y = expand(u, [b], start, routing, ranks, NO_DROPOUT, case.T, i, False)
        expected = [t for t in range(case.T) if i == 0 or t % 3 != 0]
        _finite(y[expected], "y")
        assert torch.equal(y[idle], start.expand(2, -1)), "y of what is not routed"
    a = [a.t() for a in inputs.lora_a[:1]]
    dx = expand(dh, a, None, routing, ranks, NO_DROPOUT, case.T, 0, False)
    _finite(dx, "dx")
    _zero(dx[idle], "dx of what is not routed")

    da, db = run["grouped_weight_grad"](
        inputs.x, dh, inputs.dy, u, routing, ranks, NO_DROPOUT, dtype
    )
    _finite(da, "dA")
    for i, gradient in enumerate(db):
        _finite(gradient, "dB")
        for columns in others:
            _zero(gradient[:, columns], "dB of an expert without tokens")
            _zero(da[25 * i : 25 * (i + 1)][columns], "dA of an expert without tokens")


def _finite(tensor: Tensor, what: str) -> None:
    assert torch.isfinite(tensor).all(), f"{what}: non-finite values"


def _zero(tensor: Tensor, what: str) -> None:
    assert tensor.count_nonzero() == 0, f"{what}: not zero"
