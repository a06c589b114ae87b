"""The registered ops: importing this package registers them; Triton is imported when one runs.

Every op is in the namespace `moelora`. The reference is its implementation for any device. Faster
implementations take precedence: the native library on a CPU, Triton on a GPU.
"""

from moelora_kernels import native  # noqa: F401  (registers the CPU ops where it is built)
from moelora_kernels.ops.dropout import dropout
from moelora_kernels.ops.ffn_inner import ffn_inner, ffn_inner_backward
from moelora_kernels.ops.grouped import grouped, grouped_backward
from moelora_kernels.ops.grouped_dx import grouped_dx
from moelora_kernels.ops.grouped_expand import grouped_expand
from moelora_kernels.ops.grouped_shrink import grouped_shrink, grouped_shrink_backward
from moelora_kernels.ops.grouped_weight_grad import grouped_weight_grad
from moelora_kernels.ops.route import route
from moelora_kernels.ops.router import router_grad, router_logits
from moelora_kernels.ops.shrink_dx import shrink_dx
from moelora_kernels.ops.shrink_gate import shrink_gate, shrink_gate_backward
from moelora_kernels.ops.topk_gate import topk_gate, topk_gate_backward
from moelora_kernels.ops.weight_grad import weight_grad
from moelora_kernels.ops.wide import wide, wide_backward

__all__ = [
    "dropout",
    "ffn_inner",
    "ffn_inner_backward",
    "grouped",
    "grouped_backward",
    "grouped_dx",
    "grouped_expand",
    "grouped_shrink",
    "grouped_shrink_backward",
    "grouped_weight_grad",
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
    "wide_backward",
]
