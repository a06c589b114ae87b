"""Map the rank-space rows of every expert to the output width."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moelora_kernels import reference
from moelora_kernels.ops.registration import register, register_kernels
from moelora_kernels.types import NO_DROPOUT, Dropout, Routing


def _fake(
    u: Tensor,
    matrices: Sequence[Tensor],
    start: Tensor | None,
    routing: Routing,
    ranks: Sequence[int],
    dropout: Dropout,
    tokens: int,
    first_sibling: int,
    per_pair: bool,
) -> Tensor:
    dtype = start.dtype if start is not None and start.dim() == 2 else u.dtype
    rows = routing.order.shape[0] if per_pair else tokens
    return u.new_empty((rows, matrices[0].shape[0]), dtype=dtype)


_op = register(
    "grouped_expand",
    (
        "Tensor u",
        "Tensor[] matrices",
        "Tensor? start",
        Routing,
        "int[] ranks",
        Dropout,
        "SymInt tokens",
        "int first_sibling",
        "bool per_pair",
    ),
    "Tensor",
    reference.grouped_expand,
    _fake,
)
register_kernels("grouped_expand")


def grouped_expand(
    u: Tensor,
    matrices: Sequence[Tensor],
    start: Tensor | None,
    routing: Routing,
    ranks: Sequence[int],
    dropout: Dropout = NO_DROPOUT,
    tokens: int = 0,
    first_sibling: int = 0,
    per_pair: bool = False,
) -> Tensor:
    """Multiply every pair's row of u with its expert's matrix, and add the slots of a token.

        y_t = start + sum over the pairs p of t: dropout(u_p Mt_e)        [T, O]
        y_p = start_t + dropout(u_p Mt_e)                with per_pair    [P, O]

    Args:
        u: [P, largest rank], in the order of sorted positions.
        matrices: m x [O, R], any strides, one for each sibling from `first_sibling` on. Pairs of
            other siblings add nothing.
        start: [O] or [T, O]; None means 0.
        routing: the routing of the gate's experts.
        ranks: the ranks of the E experts.
        dropout: applied to the product. Only a backward uses it, for the gradient of dropout(x).
        tokens: T.
        first_sibling: the sibling that matrices[0] belongs to.
        per_pair: return one row per pair, in the order of pairs. Needs a single sibling.

    Returns:
        y in the dtype of `start` if that is [T, O], else in u's dtype. The slots of a token are
        added in their order.
    """
    return _op(u, matrices, start, *routing, ranks, *dropout, tokens, first_sibling, per_pair)
