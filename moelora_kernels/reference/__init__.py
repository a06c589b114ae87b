"""The specification: every op of the package in plain PyTorch.

`moelora_kernels.types` explains the letters of the shapes.

    y   = x Wt + b + u Bt                x [T, I]   W [O, I] frozen   A [R, I]   B [O, R]
    h   = x At                           h [T, R]   without the gate
    u   = scale * gate (.) h             gate[t, e] repeated over the ranks of expert e
    du  = dy B                           du [T, R]
    dgate[t, e] = scale * <du, h>        over the ranks of expert e
    dh  = scale * gate (.) du
    dx  = dy W + dh A       dA = dh^T x       dB = dy^T u

Every function computes in the compute dtype (float32, or float64 for float64 tensors) and rounds
once, on return.
"""

from moelora_kernels.numerics import compute_dtype
from moelora_kernels.reference.ffn import (
    ffn,
    ffn_activation,
    ffn_activation_slope,
    ffn_inner,
    ffn_inner_backward,
)
from moelora_kernels.reference.gates import (
    blocks,
    dense_gate,
    dense_gate_backward,
    dropout,
    mask_numbers,
    rank_gate,
    topk_gate,
    topk_gate_backward,
)
from moelora_kernels.reference.grouped import (
    grouped_dx,
    grouped_expand,
    grouped_shrink,
    grouped_shrink_backward,
    grouped_weight_grad,
    route,
    router_grad,
    router_logits,
)
from moelora_kernels.reference.wide import (
    shrink_dx,
    shrink_gate,
    shrink_gate_backward,
    weight_grad,
    wide,
)

__all__ = [
    "blocks",
    "compute_dtype",
    "dense_gate",
    "dense_gate_backward",
    "dropout",
    "ffn",
    "ffn_activation",
    "ffn_activation_slope",
    "ffn_inner",
    "ffn_inner_backward",
    "grouped_dx",
    "grouped_expand",
    "grouped_shrink",
    "grouped_shrink_backward",
    "grouped_weight_grad",
    "mask_numbers",
    "rank_gate",
    "route",
    "router_grad",
    "router_logits",
    "shrink_dx",
    "shrink_gate",
    "shrink_gate_backward",
    "topk_gate",
    "topk_gate_backward",
    "weight_grad",
    "wide",
]
