"""The part of dx that comes from the experts and from linear routers, in the grouped form."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moelora_kernels import reference
from moelora_kernels.ops.registration import register, register_kernels
from moelora_kernels.types import NO_DROPOUT, Dropout, Routing


def _fake(
    dh: Tensor,
    dlogits: Tensor | None,
    lora_a: Sequence[Tensor],
    router_weight: Sequence[Tensor],
    routing: Routing,
    ranks: Sequence[int],
    dropout: Dropout,
    tokens: int,
    sparse_dlogits: bool,
) -> Tensor:
    return dh.new_empty((tokens, lora_a[0].shape[1]))


_op = register(
    "grouped_dx",
    (
        "Tensor dh",
        "Tensor? dlogits",
        "Tensor[] lora_a",
        "Tensor[] router_weight",
        Routing,
        "int[] ranks",
        Dropout,
        "SymInt tokens",
        "bool sparse_dlogits",
    ),
    "Tensor",
    reference.grouped_dx,
    _fake,
)
register_kernels("grouped_dx", "launch_dx", module="grouped_expand")


def grouped_dx(
    dh: Tensor,
    dlogits: Tensor | None,
    lora_a: Sequence[Tensor],
    router_weight: Sequence[Tensor],
    routing: Routing,
    ranks: Sequence[int],
    dropout: Dropout = NO_DROPOUT,
    tokens: int = 0,
    sparse_dlogits: bool = False,
) -> Tensor:
    """Add the rank-space parts of dx over the pairs of every token, and dlogits Wr.

        dx_t = sum over the pairs p of t: dropout(dh_p A_e) + dlogits_t Wr

    Args:
        dh: [P, largest rank], in the order of sorted positions.
        dlogits: [T, n E], or None without routers.
        lora_a: n x [R, I].
        router_weight: n x [E, I], or empty.
        routing: the routing of the gate's experts.
        ranks: the ranks of the E experts.
        dropout: the dropout of the forward. Its masks are computed again from the seed.
        tokens: T.
        sparse_dlogits: whether dlogits is 0 for every expert that a token has no pair of. The
            pairs of a token then have different experts, and the kernel reads their dlogits alone.

    Returns:
        [T, I] in dh's dtype, to which dlogits and Wr are rounded unless sparse_dlogits. The part
        dy W of dx is not included.
    """
    return _op(
        dh, dlogits, lora_a, router_weight, *routing, ranks, *dropout, tokens, sparse_dlogits
    )
