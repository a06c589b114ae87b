"""Softmax, top-k, renormalise for logits from anywhere, with the backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moelora_kernels.kernels.common import gates, launcher
from moelora_kernels.kernels.common.configs import ROWS


@triton.jit(do_not_specialize=["N", "temperature"])
def topk_gate_kernel(
    logits_ptr,
    weights_ptr,
    indices_ptr,
    N,
    temperature,
    E: tl.constexpr,
    K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """weights and indices [N, K] of logits [N, E]. Programs: rows."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    experts = tl.arange(0, BLOCK_E)
    inside = rows < N
    real = inside[:, None] & (experts < E)[None, :]
    at = rows[:, None] * E + experts[None, :]
    logits = tl.load(logits_ptr + at, mask=real, other=0.0).to(tl.float32)
    gate, place = gates.topk_gate(logits, temperature, E, K, RENORMALIZE, BLOCK_E)
    gates.store_routing(weights_ptr, indices_ptr, gate, place, rows, inside, 0, 1, E, K, BLOCK_E)


@triton.jit(do_not_specialize=["N", "temperature"])
def topk_gate_backward_kernel(
    dweights_ptr,
    weights_ptr,
    indices_ptr,
    logits_ptr,
    dlogits_ptr,
    N,
    temperature,
    E: tl.constexpr,
    K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Dlogits [N, E] from dweights [N, K]. Programs: rows."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < N
    gate, routed = gates.dense_gate(
        weights_ptr, indices_ptr, None, rows, inside, 0, N, 1, E, K, "sparse", BLOCK_E
    )
    dgate, _ = gates.dense_gate(
        dweights_ptr, indices_ptr, None, rows, inside, 0, N, 1, E, K, "sparse", BLOCK_E
    )
    experts = tl.arange(0, BLOCK_E)
    real = inside[:, None] & (experts < E)[None, :]
    at = rows[:, None] * E + experts[None, :]
    logits = gate
    if not RENORMALIZE:
        logits = tl.load(logits_ptr + at, mask=real, other=0.0).to(tl.float32)
    dlogits = gates.topk_gate_backward(
        dgate, gate, routed, logits, temperature, E, RENORMALIZE, BLOCK_E
    )
    tl.store(dlogits_ptr + at, dlogits, mask=real)


def launch(logits, top_k, renormalize, temperature):
    """`reference.topk_gate` on a GPU."""
    N, E = logits.shape
    weights = logits.new_empty((N, top_k), dtype=torch.float32)
    indices = logits.new_empty((N, top_k), dtype=torch.int32)
    launcher.run(
        topk_gate_kernel,
        launcher.ceil_div(N, ROWS.tokens),
        ROWS,
        dict(
            logits_ptr=logits.contiguous(), weights_ptr=weights, indices_ptr=indices, N=N,
            temperature=float(temperature),
        ),
        dict(
            E=E, K=top_k, RENORMALIZE=bool(renormalize), BLOCK_N=ROWS.tokens,
            BLOCK_E=launcher.block(E),
        ),
    )  # fmt: skip
    return weights, indices


def launch_backward(dweights, weights, indices, logits, renormalize, temperature):
    """`reference.topk_gate_backward` on a GPU."""
    N, E = logits.shape
    dlogits = logits.new_empty((N, E), dtype=torch.float32)
    launcher.run(
        topk_gate_backward_kernel,
        launcher.ceil_div(N, ROWS.tokens),
        ROWS,
        dict(
            dweights_ptr=dweights.contiguous(), weights_ptr=weights.contiguous(),
            indices_ptr=indices.contiguous(),
            logits_ptr=None if renormalize else logits.contiguous(), dlogits_ptr=dlogits, N=N,
            temperature=float(temperature),
        ),
        dict(
            E=E, K=indices.shape[1], RENORMALIZE=bool(renormalize), BLOCK_N=ROWS.tokens,
            BLOCK_E=launcher.block(E),
        ),
    )  # fmt: skip
    return dlogits
