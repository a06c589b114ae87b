"""Softmax, top-k and renormalisation of logits from any router, and the backward."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from moelora_kernels.kernels.common import gates, gates_backward, launcher
from moelora_kernels.kernels.common.configs import ROW_TILE


@triton.jit(do_not_specialize=["G", "temperature"])
def topk_gate_kernel(
    logits_ptr,
    weights_ptr,
    experts_ptr,
    G,
    temperature,
    E: tl.constexpr,
    K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """weights, experts = the K largest of softmax(logits / temperature), by row.

    logits  [G, E] of any float dtype
    weights [G, K] float32
    experts [G, K] int32, the largest weight first

    Programs: tiles of BLOCK_G rows.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)
    experts = tl.arange(0, BLOCK_E)
    rows_in = rows < G
    in_bounds = rows_in[:, None] & (experts < E)[None, :]
    offsets = rows[:, None] * E + experts[None, :]
    logits = tl.load(logits_ptr + offsets, mask=in_bounds, other=0.0).to(tl.float32)
    gate, slot = gates.topk_gate(logits, temperature, E, K, RENORMALIZE, BLOCK_E)
    gates.store_topk(weights_ptr, experts_ptr, gate, slot, rows, rows_in, 0, 1, E, K, BLOCK_E)


@triton.jit(do_not_specialize=["G", "temperature"])
def topk_gate_backward_kernel(
    dweights_ptr,
    weights_ptr,
    experts_ptr,
    logits_ptr,
    dlogits_ptr,
    G,
    temperature,
    E: tl.constexpr,
    K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """dlogits = the gradient of logits through `topk_gate_kernel`.

    dweights [G, K], weights [G, K], experts [G, K]
    logits   [G, E]; None with RENORMALIZE, whose backward needs the weights only
    dlogits  [G, E] float32

    Programs: tiles of BLOCK_G rows.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)
    rows_in = rows < G

    # From slots to experts: [BLOCK_G, BLOCK_E].
    gate, routed = gates.dense_gate(
        weights_ptr, experts_ptr, None, rows, rows_in, 0, G, 1, E, K, "sparse", BLOCK_E
    )
    dgate, _ = gates.dense_gate(
        dweights_ptr, experts_ptr, None, rows, rows_in, 0, G, 1, E, K, "sparse", BLOCK_E
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
    """Return weights [G, K] float32 and experts [G, K] int32, like `reference.topk_gate`."""
    G, E = logits.shape
    weights = logits.new_empty((G, top_k), dtype=torch.float32)
    experts = logits.new_empty((G, top_k), dtype=torch.int32)
    launcher.run(
        topk_gate_kernel,
        launcher.ceil_div(G, ROW_TILE.tokens),
        ROW_TILE,
        dict(
            logits_ptr=launcher.aligned(logits),
            weights_ptr=weights,
            experts_ptr=experts,
            G=G,
            temperature=float(temperature),
        ),
        dict(
            E=E,
            K=top_k,
            RENORMALIZE=bool(renormalize),
            BLOCK_G=ROW_TILE.tokens,
            BLOCK_E=launcher.block(E),
        ),
    )
    return weights, experts


def launch_backward(dweights, weights, experts, logits, renormalize, temperature):
    """Return dlogits [G, E] float32, like `reference.topk_gate_backward`."""
    G, E = logits.shape
    dlogits = logits.new_empty((G, E), dtype=torch.float32)
    launcher.run(
        topk_gate_backward_kernel,
        launcher.ceil_div(G, ROW_TILE.tokens),
        ROW_TILE,
        dict(
            dweights_ptr=launcher.aligned(dweights),
            weights_ptr=launcher.aligned(weights),
            experts_ptr=launcher.aligned(experts),
            logits_ptr=None if renormalize else launcher.aligned(logits),
            dlogits_ptr=dlogits,
            G=G,
            temperature=float(temperature),
        ),
        dict(
            E=E,
            K=experts.shape[1],
            RENORMALIZE=bool(renormalize),
            BLOCK_G=ROW_TILE.tokens,
            BLOCK_E=launcher.block(E),
        ),
    )
    return dlogits
