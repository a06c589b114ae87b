"""The part of dx that comes from the experts and from linear routers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from moelora_kernels import reference
from moelora_kernels.ops.registration import register, register_kernels
from moelora_kernels.types import NO_DROPOUT, Dropout


def _fake(
    dh: Tensor,
    dlogits: Tensor | None,
    lora_a: Sequence[Tensor],
    router_weight: Sequence[Tensor],
    ranks: Sequence[int],
    dropout: Dropout,
) -> Tensor:
    return dh.new_empty((dh.shape[0], lora_a[0].shape[1]))


_op = register(
    "shrink_dx",
    (
        "Tensor dh",
        "Tensor? dlogits",
        "Tensor[] lora_a",
        "Tensor[] router_weight",
        "int[] ranks",
        Dropout,
    ),
    "Tensor",
    reference.shrink_dx,
    _fake,
)
register_kernels("shrink_dx")


def shrink_dx(
    dh: Tensor,
    dlogits: Tensor | None,
    lora_a: Sequence[Tensor],
    router_weight: Sequence[Tensor],
    ranks: Sequence[int],
    dropout: Dropout = NO_DROPOUT,
) -> Tensor:
    """Compute dropout(dh A) + dlogits Wr, summed over the n siblings.

    Args:
        dh: [T, n R]; [T, n r] if the experts share A.
        dlogits: [T, n E], or None without routers.
        lora_a: n x [R, I], or n x [r, I].
        router_weight: n x [E, I], or empty.
        ranks: the ranks of the E experts.
        dropout: the dropout of the forward. Its masks are computed again from the seed.

    Returns:
        [T, I] in dh's dtype. The part dy W of dx is not included.
    """
    return _op(dh, dlogits, lora_a, router_weight, ranks, *dropout)
