"""A whole layer for few tokens, without gradients: it computes the experts that the tokens use.

On a CPU the native library computes it in one call. On a GPU the launches of `wide` compute it.
"""

from __future__ import annotations

from torch import Tensor

from moelora_kernels import reference
from moelora_kernels.ops.registration import register
from moelora_kernels.ops.shrink_gate import shrink_gate_fake
from moelora_kernels.ops.wide import outputs_fake, wide
from moelora_kernels.types import (
    NO_DROPOUT,
    NO_GATE,
    Decoded,
    Gate,
    Mixture,
    RouterTensors,
    SiblingTensors,
)


def _fake(x: Tensor, tensors: SiblingTensors, gate: Gate, mixture: Mixture) -> Decoded:
    routers = RouterTensors(tensors.router_weight, tensors.router_bias)
    _, _, *router_gate = shrink_gate_fake(x, tensors.lora_a, routers, gate, mixture, NO_DROPOUT)
    return Decoded(outputs_fake(x, tensors), *router_gate)


# Takes flat arguments.
decode_flat = register(
    "decode",
    ("Tensor x", SiblingTensors, Gate, Mixture),
    "(Tensor[] y, Tensor weights, Tensor experts, Tensor logits)",
    reference.decode,
    _fake,
)


def decode(x: Tensor, tensors: SiblingTensors, gate: Gate | None, mixture: Mixture) -> Decoded:
    """Compute y of a layer of n siblings like `wide`, without gradients and without dropout.

        y_i = x Wt_i + b_i + sum over the experts e of a token: scale_e gate_e (x At_e) Bt_e

    In the native library an expert that a token does not use adds exactly zero, even if its A or B
    has a NaN. Up to 16 tokens it computes x Wt and the experts in one pass over W.

    Args:
        x: [T, I]. The op is fast for few tokens, and right for any number.
        tensors: the tensors of the siblings: weight and maybe bias, or base_output (x Wt + b).
        gate: the gate of every token; None if the routers in `tensors` compute it.
        mixture: the static options.

    Returns:
        y_i [T, O_i] in the dtype of base_output or x; and weights, experts and logits of
        `shrink_gate`.
    """
    if x.is_cuda:
        y, _, weights, experts, logits, *_ = wide(x, tensors, gate, mixture)
        return Decoded(y, weights, experts, logits)
    return Decoded(*decode_flat(x, *tensors, *(gate or NO_GATE), *mixture))
