"""The cases of the ops `ffn_inner` and `ffn_inner_backward`, and their random tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moelora_kernels import reference
from moelora_kernels.reference.grouped import gate_rank_space
from moelora_kernels.types import Dropout, InnerAdapters, InnerInputs, InnerOptions
from support.cases import Case
from support.inputs import draw_experts_of_case


class FfnCase(NamedTuple):
    """Sizes and options of whole-FFN experts; the fields of the same name are those of `Case`."""

    T: int = 13
    F: int = 45
    ranks: tuple[int, ...] = (4, 4, 4, 4)
    K: int = 2
    routing: str = "some"
    ids: torch.dtype = torch.int32
    gate_dtype: torch.dtype = torch.float32
    activation: str = "silu"
    dropout: float = 0.0
    per_expert: bool = False
    adapters: torch.dtype | None = None


# name -> case; the comment says what it would catch.
FFN_INNER = {
    # A strip that is not full; some slots not routed, some experts repeated.
    "plain": FfnCase(),
    "gelu": FfnCase(activation="gelu"),
    "gelu_tanh": FfnCase(activation="gelu_tanh"),
    "relu": FfnCase(activation="relu"),
    "no_token": FfnCase(T=0),
    "one_token": FfnCase(T=1),
    "one_slot": FfnCase(K=1),
    "one_expert": FfnCase(ranks=(5,), K=1),
    # Several strips, blocks of tokens and chunks, with tails.
    "long": FfnCase(T=307, F=397, ranks=(8, 8, 8), routing="uniform"),
    # More strips than ranges.
    "wide": FfnCase(T=5, F=37 * 128 + 1, ranks=(2, 2)),
    # All pairs to one expert: partial sums, and experts without pairs.
    "skew": FfnCase(T=331, F=130, routing="last"),
    "empty": FfnCase(ranks=(3, 3, 3, 3, 3, 3, 3), routing="even"),
    "nothing_routed": FfnCase(routing="outside", ids=torch.int64),
    "four_slots": FfnCase(T=29, K=4, ranks=(4, 4, 4)),
    "mixed_ranks": FfnCase(T=29, ranks=(1, 3, 16, 33)),
    "large_ranks": FfnCase(T=21, F=70, ranks=(150, 70), routing="all"),
    # Chunks of a few pairs.
    "many_experts": FfnCase(T=90, ranks=(2,) * 64, K=6, routing="uniform"),
    "weights_in_16_bits": FfnCase(gate_dtype=torch.bfloat16),
    "dropout": FfnCase(F=141, dropout=0.25),
    "dropout_per_expert": FfnCase(F=141, dropout=0.25, per_expert=True, ranks=(1, 5, 16)),
    "float32_adapters": FfnCase(F=141, adapters=torch.float32),
}
# Sizes of real layers, for the tests marked `gpu`; the comment says what it would catch.
LARGE_FFN = {
    # Full tiles; sums over F and over tokens that are split.
    "mixlora": FfnCase(T=8192, F=5504, ranks=(16,) * 8, routing="uniform"),
    # Most programs of a tile are of one token tile; half of each rank tile is masked.
    "few_tokens": FfnCase(T=17, F=14336, ranks=(4,) * 8, K=4),
    # Experts across the borders of 16 columns, and a mask for each of them.
    "mixed_ranks": FfnCase(T=1000, F=4099, ranks=(1, 3, 16, 66), dropout=0.1, per_expert=True),
    "gelu": FfnCase(T=1000, F=4096, ranks=(4,) * 4, activation="gelu", adapters=torch.float32),
}


class FfnInputs:
    """Random tensors of a case. A test may replace each of them before it uses them."""

    def __init__(self, case: FfnCase, dtype: torch.dtype, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        exact = dtype is torch.float64

        def normal(*shape: int, to: torch.dtype = dtype) -> Tensor:
            values = torch.randn(*shape, dtype=torch.float64, generator=generator)
            return values.to(to)

        def adapter(*shape: int, terms: int) -> Tensor:
            # Rounded before the cast: the rounding of the cast inside an op is not its error.
            values = normal(*shape).div(terms**0.5)
            return values if case.adapters is None or exact else values.to(case.adapters)

        T, F, K, ranks = case.T, case.F, case.K, case.ranks
        E, R = len(ranks), sum(ranks)
        self.case, self.dtype = case, dtype
        self.scaling = tuple(0.5 + 0.25 * (e % 5) for e in range(E))
        seed_of_mask = torch.tensor([-5_000_000_003]) if case.dropout else None
        self.dropout = Dropout(case.dropout, case.per_expert, seed_of_mask)
        ids = Case(T=T, ranks=ranks, K=K, routing=case.routing, ids=case.ids)
        self.experts = draw_experts_of_case(ids, generator).to(case.ids)
        self.routing = reference.route(self.experts, E)
        self.weights = normal(T, K, to=dtype if exact else case.gate_dtype)
        self.weights[::3, -1] = 0
        shape = (T * K, max(ranks))
        self.inner = InnerInputs(
            normal(T, F),
            normal(T, F),
            *(
                gate_rank_space(normal(*shape), None, self.routing, ranks, self.scaling)
                for _ in range(2)
            ),
        )
        self.adapters = InnerAdapters(
            adapter(F, R, terms=max(ranks)),
            adapter(F, R, terms=max(ranks)),
            adapter(R, F, terms=F),
        )
        self.dsummed = normal(T, F)
        dh = normal(*shape)
        self.dh = gate_rank_space(dh, self.weights, self.routing, ranks, self.scaling)

    @property
    def _options(self) -> list:
        case = self.case
        options = InnerOptions(case.ranks, self.scaling, *self.dropout, case.activation)
        return [self.weights, self.routing, options]

    def forward(self) -> list:
        """Return the arguments of `ffn_inner`."""
        return [self.inner, self.adapters, *self._options]

    def backward(self) -> list:
        """Return the arguments of `ffn_inner_backward`."""
        return [self.dsummed, self.inner, self.adapters, self.dh, *self._options]
