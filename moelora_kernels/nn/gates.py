"""The gate of a layer: from logits (score, select, normalize), or from external gates.

In this file E is num_experts, without a shared expert, until `gate_from` appends it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moelora_kernels import ops
from moelora_kernels.config import MoeLoraConfig
from moelora_kernels.nn.external_gates import external_gates, external_slots
from moelora_kernels.nn.samples import Samples, sample_of_tokens
from moelora_kernels.types import ExternalGates, Gate


def gate_of_logits(
    logits: Tensor, config: MoeLoraConfig, training: bool, router: nn.Module | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return the gate of router logits, in float32 (float64 for float64 logits).

        gate = normalize(select(score(logits / temperature)))

    With a learned threshold, tau of `split_threshold` is subtracted from the scores before they are
    selected.

    Args:
        logits: [G, E]; [G, E + 1] with a learned threshold, whose logit is the last column.
        config: the options of the layer.
        training: whether noise is added to the logits and the selection is counted.
        router: the layer's router. It is used only if the config has a `balance_rate`, and is then
            a BalancedRouter: its `balance` has the bias of the selection, and counts it.

    Returns:
        weights [G, K] and experts [G, K] int32 if the gate selects a fixed K < E experts per token,
        else dense weights [G, E] and None.
    """
    logits = logits.float() if logits.dtype != torch.float64 else logits
    logits, tau = split_threshold(logits, config)
    if training and config.noise > 0:
        logits = logits + config.noise * torch.randn_like(logits)
    if config.is_topk_gate():
        top_k = config.top_k or config.num_experts
        weights, experts = ops.topk_gate(logits, top_k, config.renormalize(), config.temperature)
        if top_k == config.num_experts:
            return weights, None
        if config.granularity == "token":
            return weights, experts
        # A sparse gate needs one row per token. Gates of sequences and tasks become dense.
        return weights.new_zeros(logits.shape).scatter(1, experts.long(), weights), None
    scaled = logits / config.temperature
    scores = _scores(scaled, config)
    if tau is not None:
        scores = scores - tau
    selection_scores, sampled = scores, None
    if config.balance_rate is not None:
        biased = logits.detach() + router.balance.bias.to(logits)
        selection_scores = _scores(biased / config.temperature, config)
    if config.select == "sampling":
        sampled = _sampled(scaled.detach(), config.top_k)
        keep = torch.zeros_like(scores, dtype=torch.bool).scatter(1, sampled, True)
    else:
        keep = _selected(selection_scores, config)
    if config.balance_rate is not None and training:
        router.balance.count(keep)
    if config.entropy_threshold is not None:
        uncertain = normalized_entropy(scaled.detach(), config.entropy_index)
        keep = keep | (uncertain > config.entropy_threshold)[:, None]
    if config.normalize == "softmax":
        weights = torch.where(keep, scores, -torch.inf).softmax(dim=1).nan_to_num(0.0)
    elif config.normalize == "one":
        weights = torch.ones_like(scores)
    else:
        weights = torch.where(keep, scores, 0)
    if config.normalize == "sum":
        # If no expert passes the threshold, the gate is 0 and not 0 / 0. If the kept scores are
        # exactly 0, the gradient is finite.
        total = weights.sum(dim=1, keepdim=True)
        weights = weights / torch.where(total > 0, total, 1)
    # The weights of the experts that are not kept become 0 after they are normalized. With `where`
    # their gradient is 0 too. With a product, a gradient that is NaN would stay NaN.
    weights = torch.where(keep, weights, 0)
    if sampled is not None and config.granularity == "token":
        return weights.gather(1, sampled), sampled.to(torch.int32)
    return weights, None


def _sampled(logits: Tensor, top_k: int) -> Tensor:
    """Sample K distinct experts per row from softmax(logits), without replacement: [G, K] int64.

    They are the K largest of logits - log q with q ~ Exp(1) from torch's generator. The
    distribution is that of torch.multinomial, but the host does not wait for the device, and
    probabilities too small for a float still count.
    """
    q = torch.empty_like(logits).exponential_()
    return (logits - q.log()).topk(top_k, dim=1).indices


def _scores(scaled: Tensor, config: MoeLoraConfig) -> Tensor:
    """Return the scores [G, E] of logits / temperature."""
    return {
        "softmax": lambda: scaled.softmax(dim=1),
        "sigmoid": scaled.sigmoid,
        "identity": lambda: scaled,
        "abs": scaled.abs,
    }[config.score]()


def split_threshold(logits: Tensor, config: MoeLoraConfig) -> tuple[Tensor, Tensor | None]:
    """Split off the learned threshold: logits [G, E], and tau [G, 1] or None.

    tau = max_threshold * sigmoid(last column)        max_threshold is 1 / E by default
    """
    if config.select != "learned_threshold":
        return logits, None
    limit = 1 / config.num_experts if config.max_threshold is None else config.max_threshold
    return logits[:, :-1], limit * logits[:, -1:].sigmoid()


def normalized_entropy(logits: Tensor, index: float) -> Tensor:
    """Return H(p) / max H of p = softmax(logits): 0 if one expert is certain, 1 if all are equal.

        H(p) = (1 - sum_e p_e^q) / (q - 1)        for q = 1: - sum_e p_e log p_e

    Args:
        logits: [G, E].
        index: q.

    Returns:
        [G].

    Source: the Tsallis entropy of DynMoLE (arXiv 2504.00661).
    """
    # The clamp makes an expert with logit -inf add 0, not 0 * inf.
    log_p = logits.log_softmax(dim=1).clamp_min(torch.finfo(logits.dtype).min)
    experts = logits.shape[1]
    if index == 1.0:
        return -(log_p.exp() * log_p).sum(dim=1) / math.log(experts)
    return (1 - (index * log_p).exp().sum(dim=1)) / (1 - experts ** (1 - index))


def _selected(scores: Tensor, config: MoeLoraConfig) -> Tensor:
    """Return which experts the gate keeps, [G, E] bool."""
    if config.select == "all":
        return torch.ones_like(scores, dtype=torch.bool)
    if config.select == "learned_threshold":
        return scores >= 0
    if config.select == "threshold" and config.keep_min is None:
        return scores >= config.threshold
    order = scores.detach().sort(dim=1, descending=True, stable=True)
    position = order.indices.argsort(dim=1)
    if config.select == "topk":
        return position < config.top_k
    least = position < (config.keep_min or 0)
    if config.select == "threshold":
        return (scores >= config.threshold) | least
    needed_total = config.top_p * order.values.sum(dim=1, keepdim=True)
    # An expert is still needed if the experts before it do not add up to the total.
    still_needed = order.values.cumsum(dim=1) - order.values < needed_total
    return still_needed.gather(1, position) | least


def gate_from(
    config: MoeLoraConfig,
    logits: Tensor | None = None,
    external: ExternalGates | None = None,
    *,
    router: nn.Module | None = None,
    training: bool = False,
    device: torch.device | None = None,
) -> Gate:
    """Return the gate of a layer, from logits, from external gates, or from neither.

        router=None        weights 1 for every expert, one row for all tokens
        router="external"  weights = external
        any other router   weights = normalize(select(score(logits / temperature)))

    The shared expert, if there is one, is the last column or slot.

    Args:
        config: the options of the layer.
        logits: [G, E] ([G, E + 1] with a learned threshold) from a router, or None.
        external: [..., E], or weights [..., K] and indices [..., K], for router="external".
        router: the layer's router; see `gate_of_logits`.
        training: whether noise is added and the selection is counted.
        device: the device of x, and of the gate if there is no router.

    Returns:
        Gate without rows: weights [T, K] and experts [T, K] if each token selects K < E experts,
        else weights [G, E] with experts None; and the logits. Sparse external gates have weights
        and experts [G, K]. A shared expert adds one slot, [T, K + 1], or one column, [G, E + 1].

    Raises:
        ValueError, TypeError: external gates are missing, have the wrong shape or dtype, have no
            values, or sparse ones are on another device.
    """
    experts = None
    if config.router is None:
        weights = torch.ones((1, config.num_experts), dtype=torch.float32, device=device)
    elif config.router == "external" and isinstance(external, tuple):
        weights, experts = external_slots(external, config.num_experts)
        if device is not None and weights.device != device:
            raise ValueError(
                f"gates: expected weights and indices on {device} like x, got {weights.device}"
            )
    elif config.router == "external":
        weights = external_gates(external, config.num_experts)
        if weights.is_meta and device is not None and device.type != "meta":
            raise ValueError(f"gates: expected a tensor on {device}, got one on the meta device")
    else:
        weights, experts = gate_of_logits(logits, config, training, router)
    if config.shared_expert != "none":
        weights, experts = _add_shared_expert(weights, experts, config)
    return Gate(weights, experts, None, logits)


def _add_shared_expert(
    weights: Tensor, experts: Tensor | None, config: MoeLoraConfig
) -> tuple[Tensor, Tensor | None]:
    """Append the shared expert's weight: 1, or 1 - max(weights) for shared_expert="complement"."""
    shared = torch.ones_like(weights[:, :1])
    if config.shared_expert == "complement":
        shared = shared - weights.amax(dim=1, keepdim=True)
    weights = torch.cat([weights, shared], dim=1)
    if experts is not None:
        last = torch.full_like(experts[:, :1], config.num_experts)
        experts = torch.cat([experts, last], dim=1)
    return weights, experts


def concat_gates(gates: Sequence[Gate]) -> Gate:
    """Return the gates of n siblings side by side, without rows."""
    if len(gates) == 1:
        return gates[0]
    weights, experts, _, logits = zip(*gates, strict=True)
    return Gate(
        torch.cat(weights, dim=1),
        None if experts[0] is None else torch.cat(experts, dim=1),
        None,
        None if logits[0] is None else torch.cat(logits, dim=1),
    )


def row_of_tokens(
    weights: Tensor,
    x_shape: Sequence[int],
    device: torch.device,
    name: str,
    config: MoeLoraConfig,
    samples: Samples | str | None = None,
) -> Tensor | None:
    """Return the gate row of each token, [T] int32, if there is one gate row per sample.

    Returns None for one row per token and for one row for all tokens, like `moe_lora_linear`.

    Args:
        weights: [G, ...], the rows of the gate.
        x_shape: [B, L, I], or [L, B, I] with batch_dim=1; also [T, I].
        device: device of the result.
        name: the argument that the error names: "gates" or "set_tasks".
        config: the options of the layer.
        samples: which sample each token belongs to; see `set_samples`.

    Raises:
        ValueError: G is neither 1, nor T, nor the number of samples. The gates of tasks and of
            sequences have one row per sample, also if there are T of them by chance.
    """
    count = weights.shape[0]
    per_sample = config.router == "task" or config.granularity == "sequence"
    if isinstance(samples, Samples):
        # Gates that the user passes are gates of samples if there is one for each of them.
        per_sample = per_sample or (config.router == "external" and count == samples.count)
    elif count == 1:
        return None
    if count == math.prod(x_shape[:-1]) and not per_sample:
        return None
    return sample_of_tokens(x_shape, count, config.batch_dim, samples, device, name)


def slots_of_tokens(
    gate: Gate,
    rows: Tensor | None,
    x_shape: Sequence[int],
    batch_dim: int,
    samples: Samples | str | None,
) -> Gate:
    """Return a sparse gate with one row per token, [T, K]; the logits are unchanged.

    Args:
        gate: weights [G, K] and experts [G, K].
        rows: [T], the result of `row_of_tokens` for these weights.
        x_shape, batch_dim, samples: as in `row_of_tokens`.
    """
    weights, experts = gate.weights, gate.experts
    tokens = math.prod(x_shape[:-1])
    if rows is not None and isinstance(samples, Samples):
        experts = torch.where(rows[:, None] < 0, -1, experts[rows.clamp_min(0).long()])
        return Gate(_rows_of_tokens(weights, rows), experts, logits=gate.logits)
    steps = x_shape[0] if batch_dim == 1 and len(x_shape) > 2 else 1
    weights, experts = (_expand_rows(t, tokens, steps) for t in (weights, experts))
    # Not _replace: Dynamo of torch 2.11 cannot return its result from a frame behind a graph break.
    return Gate(weights, experts, logits=gate.logits)


def _rows_of_tokens(weights: Tensor, rows: Tensor) -> Tensor:
    """Return weights[rows], [T, K]; zero for rows below 0.

    A sum instead of an index, whose backward has no fixed order on a GPU.
    """
    samples = torch.arange(weights.shape[0], device=weights.device)
    is_row = (rows[:, None] == samples)[:, :, None]  # [T, G, 1]
    return torch.where(is_row, weights, 0).sum(dim=1)


def _expand_rows(rows: Tensor, tokens: int, steps: int) -> Tensor:
    """Return one row per token, [T, K], from one row per token, per sequence, or for all tokens.

    steps: 1 if the tokens of a sequence are contiguous; the sequence length L for x [L, B, I].
    """
    count, slots = rows.shape
    if count == tokens:
        return rows
    inner = tokens // max(steps * count, 1)
    return rows[None, :, None].expand(steps, count, inner, slots).reshape(tokens, slots)
