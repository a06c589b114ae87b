"""collect_aux_loss: the auxiliary losses of the routers of a model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moelora_kernels.nn.gates import normalized_entropy, split_threshold
from moelora_kernels.nn.layer import MixtureLayer, mixture_layers
from moelora_kernels.nn.routing_record import RoutingRecord


def collect_aux_loss(model: nn.Module, mask: Tensor | None = None) -> Tensor:
    """Return the weighted sum of all auxiliary losses of the last forward; zero if there are none.

        load_balance = E sum_e f_e p_e      1 if balanced. f_e: the share of expert e in the routed
                                            (token, slot) pairs. p_e: the mean probability of e,
                                            minus tau with a learned threshold.
        z            = mean (logsumexp logits)^2
        entropy      = mean H(p) / max H    0 if every token is certain. H: see `entropy_index`.

    Args:
        model: a model whose layers have `aux` in their config.
        mask: [batch, sequence] (also with batch_dim=1), or one entry per token in the order of x;
            nonzero if a token counts. For per-sequence or per-task gates, a sequence counts if any
            of its tokens does; a mask with one entry per gate row is also accepted.

    Raises:
        RuntimeError: there was no forward since the last call, or it ran without a graph (reentrant
            activation checkpointing does: use use_reentrant=False).
        ValueError: the mask does not fit the tokens or the gate rows.

    Example:
        >>> import torch
        >>> from moelora_kernels import MoeLoraLinear, collect_aux_loss
        >>> layer = MoeLoraLinear(16, 32, num_experts=4, rank=2, top_k=2, aux="load_balance")
        >>> y = layer(torch.randn(2, 5, 16))
        >>> collect_aux_loss(layer, torch.ones(2, 5)).shape
        torch.Size([])

    Source: arXiv 2101.03961 (load balance), arXiv 2202.08906 (z), arXiv 2504.00661 (entropy),
    arXiv 2405.00361 (load balance with a learned threshold).
    """
    losses = []
    for layer in mixture_layers(model):
        if not (layer.config.aux and layer.is_running):
            continue
        record = layer.record
        if record.logits is None:
            raise RuntimeError("no routing to compute a loss from: run a forward first")
        trains = any(p.requires_grad for p in layer.router.parameters())
        if torch.is_grad_enabled() and trains and not record.logits.requires_grad:
            raise RuntimeError(
                "the last forward ran without a graph, so the auxiliary loss would not train the "
                "router; under activation checkpointing use use_reentrant=False"
            )
        losses.append(_aux_loss(layer, mask))
        record.clear()
    if losses:
        return torch.stack(losses).sum()
    first = next(model.parameters(), torch.empty(0))
    return torch.zeros((), device=first.device)


def _aux_loss(layer: MixtureLayer, mask: Tensor | None) -> Tensor:
    """Return the weighted sum of one layer's auxiliary losses."""
    record, config = layer.record, layer.config
    logits = record.logits.to(torch.promote_types(record.logits.dtype, torch.float32))
    logits, tau = split_threshold(logits, config)
    counts = torch.ones_like(logits[:, 0])
    if mask is not None:
        if config.batch_dim == 1 and config.granularity == "token" and mask.dim() > 1:
            # The tokens of x [sequence, batch, I] are in the order [sequence, batch].
            mask = mask.transpose(0, 1)
        counts = _row_mask(mask, logits.shape[0], config.granularity).to(counts)
    total = counts.sum().clamp_min(1.0)

    def mean(values: Tensor) -> Tensor:
        # Not a matrix product, which autocast would compute in bfloat16.
        return (counts[:, None] * values).sum(dim=0) / total

    loss = logits.new_zeros(())
    for name, weight in config.aux:
        if name == "z":
            loss = loss + weight * mean(logits.logsumexp(dim=1, keepdim=True).square()).sum()
            continue
        if name == "entropy":
            entropy = normalized_entropy(logits / config.temperature, config.entropy_index)
            loss = loss + weight * mean(entropy[:, None]).sum()
            continue
        probabilities = (logits / config.temperature).softmax(dim=1)
        if tau is not None:
            probabilities = probabilities - tau
        share = mean(_routed(record, config.num_experts).to(counts.dtype))
        share = share / share.sum().clamp_min(torch.finfo(share.dtype).tiny)
        loss = loss + weight * config.num_experts * (share * mean(probabilities)).sum()
    return loss


def _row_mask(mask: Tensor, rows: int, granularity: str) -> Tensor:
    """Return which rows of the logits count, [rows], from a mask of the tokens or of the rows."""
    if mask.numel() == rows:
        return mask.reshape(-1)
    if granularity != "token" and mask.dim() > 0 and rows in (1, mask.shape[0]):
        return (mask != 0).reshape(rows, mask.numel() // rows).any(dim=1)
    kind = "tokens" if granularity == "token" else f"gate rows, or [{rows}, ...] of their tokens"
    raise ValueError(f"mask: expected one entry for each of {rows} {kind}, got {[*mask.shape]}")


def _routed(record: RoutingRecord, num_experts: int) -> Tensor:
    """Return how often each token is routed to each expert, [T, E]."""
    if record.indices is None:
        return record.weights[:, :num_experts] != 0
    experts = torch.arange(num_experts, device=record.indices.device)
    return (record.indices[:, :, None] == experts).sum(dim=1)
