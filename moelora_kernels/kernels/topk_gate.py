"""Softmax, top-k and renormalisation of logits from any router, and the backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moelora_kernels.kernels.common import gates, gates_backward, launcher
from moelora_kernels.kernels.common.configs import ROW_TILE


@triton.jit(do_not_specialize=["N", "temperature"])
def topk_gate_kernel(
    logits_ptr,
    weights_ptr,
    experts_ptr,
    N,
    temperature,
    E: tl.constexpr,
    K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """weights, experts = the K largest of softmax(logits / temperature), by row.

    logits  [N, E] of any float dtype
    weights [N, K] float32
    experts [N, K] int32, the largest weight first

    Programs: tiles of BLOCK_N rows.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    experts = tl.arange(0, BLOCK_E)
    rows_in = rows < N
    in_bounds = rows_in[:, None] & (experts < E)[None, :]
    offsets = rows[:, None] * E + experts[None, :]
    logits = tl.load(logits_ptr + offsets, mask=in_bounds, other=0.0).to(tl.float32)
    gate, slot = gates.topk_gate(logits, temperature, E, K, RENORMALIZE, BLOCK_E)
    gates.store_topk(weights_ptr, experts_ptr, gate, slot, rows, rows_in, 0, 1, E, K, BLOCK_E)


@triton.jit(do_not_specialize=["N", "temperature"])
def topk_gate_backward_kernel(
    dweights_ptr,
    weights_ptr,
    experts_ptr,
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
    """dlogits = the gradient of logits through `topk_gate_kernel`.

    dweights [N, K], weights [N, K], experts [N, K]
    logits   [N, E]; None with RENORMALIZE, whose backward needs the weights only
    dlogits  [N, E] float32

    Programs: tiles of BLOCK_N rows.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_in = rows < N

    # From slots to experts: [BLOCK_N, BLOCK_E].
    gate, routed = gates.dense_gate(
        weights_ptr, experts_ptr, None, rows, rows_in, 0, N, 1, E, K, "sparse", BLOCK_E
    )
    dgate, _ = gates.dense_gate(
        dweights_ptr, experts_ptr, None, rows, rows_in, 0, N, 1, E, K, "sparse", BLOCK_E
    )

    experts = tl.arange(0, BLOCK_E)
    in_bounds = rows_in[:, None] & (experts < E)[None, :]
    offsets = rows[:, None] * E + experts[None, :]
    logits = gate
    if not RENORMALIZE:
        logits = tl.load(logits_ptr + offsets, mask=in_bounds, other=0.0).to(tl.float32)
    dlogits = gates_backward.topk_gate_backward(
        dgate, gate, routed, logits, temperature, E, RENORMALIZE, BLOCK_E
    )
    tl.store(dlogits_ptr + offsets, dlogits, mask=in_bounds)


def launch(logits, top_k, renormalize, temperature):
    """Return weights [N, K] float32 and experts [N, K] int32, like `reference.topk_gate`."""
    N, E = logits.shape
    weights = logits.new_empty((N, top_k), dtype=torch.float32)
    experts = logits.new_empty((N, top_k), dtype=torch.int32)
    launcher.run(
        topk_gate_kernel,
        launcher.ceil_div(N, ROW_TILE.tokens),
        ROW_TILE,
        dict(
            logits_ptr=logits.contiguous(),
            weights_ptr=weights,
            experts_ptr=experts,
            N=N,
            temperature=float(temperature),
        ),
        dict(
            E=E,
            K=top_k,
            RENORMALIZE=bool(renormalize),
            BLOCK_N=ROW_TILE.tokens,
            BLOCK_E=launcher.block(E),
        ),
    )
    return weights, experts


def launch_backward(dweights, weights, experts, logits, renormalize, temperature):
    """Return dlogits [N, E] float32, like `reference.topk_gate_backward`."""
    N, E = logits.shape
    dlogits = logits.new_empty((N, E), dtype=torch.float32)
    launcher.run(
        topk_gate_backward_kernel,
        launcher.ceil_div(N, ROW_TILE.tokens),
        ROW_TILE,
        dict(
            dweights_ptr=dweights.contiguous(),
            weights_ptr=weights.contiguous(),
            experts_ptr=experts.contiguous(),
            logits_ptr=None if renormalize else logits.contiguous(),
            dlogits_ptr=dlogits,
            N=N,
            temperature=float(temperature),
        ),
        dict(
            E=E,
            K=experts.shape[1],
            RENORMALIZE=bool(renormalize),
            BLOCK_N=ROW_TILE.tokens,
            BLOCK_E=launcher.block(E),
        ),
    )
    return dlogits
