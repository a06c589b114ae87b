"""Dropout masks, top-k gates from router logits, and gates in rank space."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moelora_kernels.numerics import compute_dtype, dropout_threshold, keep_probability
from moelora_kernels.types import Dropout, Gate

# Philox-4x32 with 7 rounds passes all of BigCrush (Salmon et al., SC11, table 2), at 0.7 times the
# cost of the usual 10 rounds.
PHILOX_ROUNDS = 7
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
UINT32 = 0xFFFFFFFF
UINT16 = 0xFFFF
# Random numbers of 16 bits in the four words of one counter.
LANES = 8


def blocks(ranks: Sequence[int]) -> list[slice]:
    """Return the columns of each expert in rank space: expert-major, in the order of `ranks`."""
    ends = [sum(ranks[: e + 1]) for e in range(len(ranks))]
    return [slice(end - rank, end) for end, rank in zip(ends, ranks, strict=True)]


def mask_numbers(tokens: int, width: int, seed: Tensor, stream: int = 0) -> Tensor:
    """Return the random numbers of a dropout mask, [T, I] int64 from 0 to 2^16 - 1.

    Element (t, i) has lane i % 8 of Philox-4x32-7 at the counter n = t ceil(I / 8) + i // 8. The
    words of the counter are (n low, n high, stream, 0), those of the key (seed low, seed high).
    Lanes 2 j and 2 j + 1 are the low and the high half of word j.

    seed one int64; stream the index of the mask, so that one seed gives several masks.
    """
    counter = torch.arange(tokens * -(-width // LANES), device=seed.device)
    words = [
        counter & UINT32,
        (counter >> 32) & UINT32,
        torch.full_like(counter, stream),
        torch.zeros_like(counter),
    ]
    key = [seed.reshape(()) & UINT32, (seed.reshape(()) >> 32) & UINT32]
    for _ in range(PHILOX_ROUNDS):
        # int64 products wrap modulo 2^64, which leaves all 64 bits of a 32 x 32 bit product intact.
        products = [words[0] * PHILOX_MULTIPLIERS[0], words[2] * PHILOX_MULTIPLIERS[1]]
        high = [(product >> 32) & UINT32 for product in products]
        low = [product & UINT32 for product in products]
        words = [high[1] ^ words[1] ^ key[0], low[1], high[0] ^ words[3] ^ key[1], low[0]]
        key = [(k + step) & UINT32 for k, step in zip(key, PHILOX_KEY_STEPS, strict=True)]
    lanes = torch.stack([half for word in words for half in (word & UINT16, word >> 16)], dim=1)
    return lanes.view(tokens, -(-width // LANES) * LANES)[:, :width]


def dropout(x: Tensor, p: float, seed: Tensor, stream: int = 0) -> Tensor:
    """Return x (.) mask / keep_probability(p). The mask is a function of (seed, stream, position).

    An element is kept if its number (`mask_numbers`) is at least dropout_threshold(p).

    x [T, I]; seed one int64; stream the index of the mask. Returns [T, I] in x's dtype.
    """
    tokens, width = x.shape
    keep = mask_numbers(tokens, width, seed, stream) >= dropout_threshold(p)
    scaled = x.to(compute_dtype(x)) / keep_probability(p)
    return torch.where(keep, scaled, 0).to(x.dtype)


def drop_elements(x: Tensor, drop: Dropout, stream: int = 0) -> Tensor:
    """Return x after the dropout `drop`, in x's dtype. drop.p must be above 0."""
    assert drop.seed is not None
    return dropout(x, drop.p, drop.seed, stream)


def topk_gate(
    logits: Tensor, top_k: int, renormalize: bool, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Apply softmax over the experts, keep the K largest, and renormalise them if requested.

        p = softmax(logits / temperature)
        weights_k = p[experts_k]        or, with renormalize, p[experts_k] / sum_j p[experts_j]

    If logits are equal, the lower expert comes first. With K = E, slot k is expert k.

    logits [G, E]. Returns weights [G, K] in the compute dtype and experts [G, K] int32.
    """
    scaled = logits.to(compute_dtype(logits)) / temperature
    if top_k == logits.shape[1]:
        experts = torch.arange(top_k, device=logits.device).expand(logits.shape)
    else:
        experts = scaled.sort(dim=1, descending=True, stable=True).indices[:, :top_k]
    if renormalize:
        weights = scaled.gather(1, experts).softmax(dim=1)
    else:
        weights = scaled.softmax(dim=1).gather(1, experts)
    return weights, experts.to(torch.int32).contiguous()


def topk_gate_backward(
    dweights: Tensor,
    weights: Tensor,
    experts: Tensor,
    logits: Tensor,
    renormalize: bool,
    temperature: float = 1.0,
) -> Tensor:
    """Compute dlogits from dweights.

        mean = sum_j weights_j dweights_j
        dlogits[experts_k] = weights_k (dweights_k - mean) / temperature           with renormalize
        dlogits_e = p_e (dweights_e - mean) / temperature                          without

    dweights_e is the entry of dweights whose expert is e; 0 if e was not kept.

    dweights, weights, experts [G, K]; logits [G, E]: if renormalize, only their shape is read.
    Returns [G, E] in the compute dtype.
    """
    dtype = compute_dtype(logits)
    weights, dweights = weights.to(dtype), dweights.to(dtype)
    mean = (weights * dweights).sum(dim=1, keepdim=True)
    zeros = torch.zeros(logits.shape, dtype=dtype, device=logits.device)
    if renormalize:
        dlogits = zeros.scatter(1, experts.long(), weights * (dweights - mean))
    else:
        probabilities = (logits.to(dtype) / temperature).softmax(dim=1)
        dlogits = probabilities * (zeros.scatter(1, experts.long(), dweights) - mean)
    return dlogits / temperature


def dense_gate(
    gate: Gate, tokens: int, siblings: int, num_experts: int, dtype: torch.dtype
) -> Tensor:
    """Return a dense or sparse gate as the gate of every token and expert, [T, n, E].

    It is zero if the token is not routed to the expert.

    Dense gate: row rows[t] of weights [G, n E] for token t. Without rows, G is T or 1. A row
    outside [0, G) gates with zero. Sparse gate: weights and experts [T, n K]. An expert outside
    [0, E) means "not routed". If an expert is repeated in a token, its weights are added.
    """
    weights, experts, rows, _ = gate
    weights = weights.to(dtype)
    if experts is not None:
        slots = experts.view(tokens, siblings, experts.shape[1] // siblings, 1)
        is_expert = slots == torch.arange(num_experts, device=weights.device)
        return torch.where(is_expert, weights.view(slots.shape), 0).sum(dim=2)
    if rows is not None:
        valid = (rows >= 0) & (rows < weights.shape[0])
        # With G = 0 there is no row 0 to index, so one row of zeros is added.
        padded = weights if weights.shape[0] else weights.new_zeros((1, weights.shape[1]))
        weights = torch.where(valid[:, None], padded[torch.where(valid, rows, 0).long()], 0)
    return weights.expand(tokens, -1).reshape(tokens, siblings, num_experts)


def dense_gate_backward(dgate: Tensor, gate: Gate) -> Tensor:
    """Return the gradient of gate.weights from dgate [T, n, E].

    It has the shape of the weights: [G, n E] for a dense gate, [T, n K] for a sparse one.
    """
    tokens, siblings, num_experts = dgate.shape
    weights, experts, rows, _ = gate
    if experts is not None:
        slots = experts.view(tokens, siblings, experts.shape[1] // siblings).long()
        valid = (slots >= 0) & (slots < num_experts)
        dslots = dgate.gather(2, torch.where(valid, slots, 0))
        return torch.where(valid, dslots, 0).view(weights.shape)
    flat = dgate.reshape(tokens, siblings * num_experts)
    if rows is not None:
        reads_row = rows[None, :] == torch.arange(weights.shape[0], device=weights.device)[:, None]
        return torch.where(reads_row[:, :, None], flat, 0).sum(dim=1)
    return flat.sum(dim=0, keepdim=True) if weights.shape[0] == 1 else flat


def rank_gate(gate: Tensor, ranks: Sequence[int], scaling: Sequence[float]) -> Tensor:
    """Return scale * gate, repeated over the ranks of each expert: [T, n, E] -> [T, n, R]."""
    scaled = gate * torch.tensor(scaling, dtype=gate.dtype, device=gate.device)
    expert = [e for e, rank in enumerate(ranks) for _ in range(rank)]
    return scaled[..., torch.tensor(expert, device=gate.device)]
