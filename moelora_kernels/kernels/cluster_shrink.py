"""`shrink_gate` on a GPU: CUDA C++ for clusters of sm_90a if it is predicted faster, else Triton.

The kernel of `csrc/cuda/shrink_gate.cuh` shares each tile of A between the four blocks of a
cluster, so it reads A from L2 once for 256 tokens. It computes all outputs in one launch. It is in
the native library if that is built with CUDA for sm_90a.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from moelora_kernels.kernels import shrink_gate
from moelora_kernels.kernels.common import configs, launcher
from moelora_kernels.types import Dropout, Gate, Mixture, RouterTensors

# The sizes of csrc/cuda/shrink_gate.cuh.
TOKENS, CLUSTER = 64, 4
RANKS, MOST_EXPERTS = (64, 128), 16
# A block fills a multiprocessor, so blocks run in waves. Below this share of their waves the kernel
# of Triton is faster, which splits the sum over I (modelled for an H200: `kernels/README.md`).
FILL = 0.625

torch.library.define(
    "moelora::cluster_shrink",
    "(Tensor x, Tensor lora_a, Tensor router_weight, Tensor router_bias, int[] ranks, "
    "float[] scaling, int top_k, bool renormalize, float temperature) "
    "-> (Tensor h, Tensor u, Tensor weights, Tensor experts, Tensor logits)",
)


@cache
def op() -> Any:
    """Return the op of the native library; None if the library is not built for sm_90a."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key("moelora::cluster_shrink", "CUDA")
    return torch.ops.moelora.cluster_shrink.default if has_kernel else None


def blocks_at_once(processors: int) -> int:
    """Return how many blocks run at the same time, assumed: 128 on 132 multiprocessors.

    The blocks of a cluster run on neighbouring multiprocessors, so some of these stay empty.
    """
    at_once = processors // CLUSTER * CLUSTER
    return at_once - CLUSTER if at_once == processors else at_once


def fills_waves(tokens: int, processors: int) -> bool:
    """Return whether blocks for so many tokens fill their waves well enough."""
    at_once, blocks = blocks_at_once(processors), launcher.ceil_div(tokens, TOKENS)
    return blocks >= FILL * at_once * launcher.ceil_div(blocks, at_once)


def _is_matrix(tensor: Tensor) -> bool:
    """Return whether a tensor map describes a matrix: bfloat16, rows at multiples of 16 bytes."""
    pitch, step = tensor.stride()
    is_aligned = pitch % 8 == 0 and tensor.data_ptr() % launcher.ALIGNMENT == 0
    is_apart = step == 1 and pitch >= tensor.shape[1]
    return tensor.dtype == torch.bfloat16 and is_apart and is_aligned


def is_faster(
    x: Tensor, lora_a: Sequence[Tensor], router: RouterTensors, mixture: Mixture, dropout: Dropout
) -> bool:
    """Return whether the op can compute this call, and is predicted to take less time than Triton.

    It computes one linear with a router of up to 16 experts, in bfloat16, without dropout.
    """
    if op() is None or len(router.weight) != 1 or dropout.p > 0 or mixture.share_a:
        return False
    if not _is_on_gpu(x) or sum(mixture.ranks) not in RANKS or len(mixture.ranks) > MOST_EXPERTS:
        return False
    architecture, processors = configs.processors(x.device)
    if architecture != "sm_90" or not fills_waves(x.shape[0], processors):
        return False
    return all(map(_is_matrix, (x, lora_a[0], router.weight[0])))


def _is_on_gpu(x: Tensor) -> bool:
    return x.is_cuda


def launch_op(
    x: Tensor,
    lora_a: Sequence[Tensor],
    router: RouterTensors,
    gate: Gate,
    mixture: Mixture,
    dropout: Dropout,
):
    """Return h, u and the gate of the router, computed by the op."""
    bias = x.new_empty(0, dtype=torch.float32)
    if router.bias:
        bias = router.bias[0].float().contiguous()
    ranks, scaling, _, *options = mixture
    return op()(x, lora_a[0], router.weight[0], bias, ranks, scaling, *options)


def launch(
    x: Tensor,
    lora_a: Sequence[Tensor],
    router: RouterTensors,
    gate: Gate,
    mixture: Mixture,
    dropout: Dropout,
):
    """Return h, u and the gate of the routers, like `reference.shrink_gate`.

    If the op fails, the kernel of Triton computes them, and a warning gives the reason.
    """
    arguments = x, lora_a, router, gate, mixture, dropout
    if is_faster(x, lora_a, router, mixture, dropout):
        try:
            return launch_op(*arguments)
        except RuntimeError as error:
            warnings.warn(
                f"moelora_kernels: cluster_shrink failed, and Triton takes its place: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
    return shrink_gate.launch(*arguments)
