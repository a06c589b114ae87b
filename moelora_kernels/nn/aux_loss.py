"""collect_aux_loss: the auxiliary losses of the routers of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from moelora_kernels.nn.base_linear import tensor_problem
from moelora_kernels.nn.gates import normalized_entropy, split_threshold
from moelora_kernels.nn.layer import MixtureLayer, mixture_layers
from moelora_kernels.nn.recorded_forwards import drop_calls, follow_forwards, last_calls
from moelora_kernels.nn.routing_record import RoutedCall, routed_experts
from moelora_kernels.nn.token_masks import call_mask, tokens_per_row

# The layer, and one of its calls -> which rows of the logits count, [G]; None if all do.
MaskOfCall = Callable[[MixtureLayer, RoutedCall], Tensor | None]


def collect_aux_loss(model: nn.Module, mask: Tensor | None = None) -> Tensor:
    """Return the weighted sum of all auxiliary losses of the last forward; zero if there are none.

    There are none if no layer has `aux` in its config, or if the forward reached no layer that has.

    A layer that the forward did not reach adds nothing. A layer that it called several times counts
    the tokens of all calls: a gate row (a token, or a sequence) counts with the number of its
    tokens.

        load_balance = E sum_e f_e p_e      1 if balanced. f_e: the share of expert e in the routed
                                            (token, slot) pairs. p_e: the mean probability of e,
                                            minus tau with a learned threshold.
        z            = mean (logsumexp logits)^2
        entropy      = mean H(p) / max H    0 if every token is certain. H: see `entropy_index`.

    Args:
        model: a model with mixture layers.
        mask: [batch, sequence] (also with batch_dim=1), or one entry per token in the order of x;
            nonzero if a token counts. For per-sequence or per-task gates, a sequence counts if any
            of its tokens counts; a mask with one entry per gate row is also accepted.

    Raises:
        RuntimeError: there was no forward since the last call, or it ran without a graph. (Under
            activation checkpointing use use_reentrant=False.) A forward without autograd between
            the training forward and this call does not matter. Or a layer was called several times
            outside of the forwards of `model`, so that the last forward is not known.
        ValueError: `model` has no mixture layer, or the mask does not fit the tokens or the gate
            rows.
        TypeError: the mask is not a tensor.

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
    if mask is not None and (problem := tensor_problem(mask)):
        raise TypeError(
            f"mask: expected a tensor [batch, sequence], or one entry per token, got {problem}"
        )
    return _collect(model, lambda layer, call: _given_mask(mask, layer, call))


def collect_aux_loss_of_parts(model: nn.Module) -> Tensor:
    """Return the same as `collect_aux_loss`, with the mask that `follow_masks` stored in each call.

    A mask that does not fit the tokens of a call is not used: all of them count. The loss is zero
    if there was no forward since the last call.
    """
    return _collect(model, _part_mask, needs_forward=False)


def _collect(model: nn.Module, mask_of: MaskOfCall, needs_forward: bool = True) -> Tensor:
    all_layers = mixture_layers(model)
    if needs_forward and not all_layers:
        raise ValueError(
            "model: expected a model with mixture layers, got none; call replace_linears first, or "
            "do not collect the loss of this model"
        )
    layers = [layer for layer in all_layers if layer.config.aux and layer.is_running]
    if layers:
        follow_forwards(model)
    calls = last_calls(model, layers)
    if missing := [layer for layer in layers if calls[layer] is None]:
        # Reentrant checkpointing runs a training forward without a graph; see `_check_graph`.
        with torch.no_grad():
            calls |= last_calls(model, missing)
    was_run = any(layer_calls is not None for layer_calls in calls.values())
    if layers and needs_forward and not was_run:
        raise RuntimeError("no routing is recorded: run a forward first")
    losses = []
    for layer, layer_calls in calls.items():
        if layer_calls:
            _check_graph(layer, layer_calls)
            losses.append(_aux_loss(layer, layer_calls, mask_of))
    drop_calls(model, layers)
    if losses:
        return torch.stack(losses).sum()
    first = next(model.parameters(), torch.empty(0))
    return torch.zeros((), device=first.device)


def _check_graph(layer: MixtureLayer, calls: Sequence[RoutedCall]) -> None:
    """Raise RuntimeError if a loss of these calls would not train the router."""
    trains = torch.is_grad_enabled() and any(p.requires_grad for p in layer.router.parameters())
    if trains and any(not call.logits.requires_grad for call in calls):
        raise RuntimeError(
            "the last forward ran without a graph, so the auxiliary loss would not train the "
            "router; under activation checkpointing use use_reentrant=False, and run passes under "
            "torch.no_grad() outside of the forward that trains"
        )


def _given_mask(mask: Tensor | None, layer: MixtureLayer, call: RoutedCall) -> Tensor | None:
    """Return which rows of the logits count, [G], from the mask of `collect_aux_loss`."""
    if mask is None:
        return None
    config = layer.config
    if config.batch_dim == 1 and config.granularity == "token" and mask.dim() > 1:
        # The tokens of x [sequence, batch, I] are in the order [sequence, batch].
        mask = mask.transpose(0, 1)
    return _row_mask(mask, call.logits.shape[0], config.granularity)


def _part_mask(layer: MixtureLayer, call: RoutedCall) -> Tensor | None:
    """Return which rows of the logits count, [G], from the mask stored in the call."""
    mask = call_mask(layer, call)
    return None if mask is None else tokens_per_row(call, mask) > 0


def _aux_loss(layer: MixtureLayer, calls: Sequence[RoutedCall], mask_of: MaskOfCall) -> Tensor:
    """Return the weighted sum of one layer's auxiliary losses over all tokens of its calls."""
    config = layer.config
    logits = torch.cat([call.logits for call in calls]) if len(calls) > 1 else calls[0].logits
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    logits, tau = split_threshold(logits, config)
    counts = torch.cat([_row_counts(call, mask_of(layer, call)) for call in calls]).to(logits)
    total = counts.sum().clamp_min(1.0)

    def mean(values: Tensor) -> Tensor:
        # A sum and not a matrix product, which autocast would compute in bfloat16.
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
        routed = torch.cat(
            [routed_experts(c.weights, c.experts, config.num_experts) for c in calls]
        )
        share = mean(routed.to(counts.dtype))
        share = share / share.sum().clamp_min(torch.finfo(share.dtype).tiny)
        loss = loss + weight * config.num_experts * (share * mean(probabilities)).sum()
    return loss


def _row_counts(call: RoutedCall, mask: Tensor | None) -> Tensor:
    """Return how much each row of the logits of a call counts, [G]: by its tokens.

    mask: which rows count, [G]; None if all do.
    """
    counts = tokens_per_row(call)
    return counts if mask is None else counts * mask.to(counts)


def _row_mask(mask: Tensor, rows: int, granularity: str) -> Tensor:
    """Return which rows of the logits count, [rows], from a mask of the tokens or of the rows."""
    if mask.numel() == rows:
        return mask.reshape(-1)
    if granularity != "token" and mask.dim() > 0 and rows in (1, mask.shape[0]):
        return (mask != 0).reshape(rows, mask.numel() // rows).any(dim=1)
    kind = "tokens" if granularity == "token" else f"gate rows, or [{rows}, ...] of their tokens"
    raise ValueError(f"mask: expected one entry for each of {rows} {kind}, got {[*mask.shape]}")
