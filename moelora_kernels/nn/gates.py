"""From logits to the gate: score, selection, normalisation; and gates that come from outside."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moelora_kernels import ops
from moelora_kernels.config import MoeLoraConfig
from moelora_kernels.nn.routers import wide_linear
from moelora_kernels.types import Gate


def external_gates(gates: Tensor | None, num_experts: int) -> Tensor:
    """The gates that came from outside as rows [G, E], or what is wrong with them."""
    if gates is None:
        raise ValueError(
            "gates: router='external' needs them: layer(x, gates) or set_tasks(model, gates)"
        )
    if gates.shape[-1] != num_experts or gates.dim() < 2 or not gates.is_floating_point():
        raise ValueError(
            f"gates: expected floats [..., {num_experts}], got {gates.dtype} {[*gates.shape]}"
        )
    return gates.reshape(-1, num_experts)


def gate_of_logits(
    logits: Tensor, config: MoeLoraConfig, training: bool, router: nn.Module | None = None
) -> tuple[Tensor, Tensor | None]:
    """gate = normalize(select(score(logits / temperature) - tau)), in float32.

    logits [N, E], or [N, E + 1] with that of a learned threshold; the router holds the bias of
    `balance_rate`, where there is one, and counts. Returns weights [N, K] with
    indices [N, K] for a top-k gate of tokens, else dense gates [N, E] with None.
    """
    logits = logits.float() if logits.dtype != torch.float64 else logits
    logits, tau = split_threshold(logits, config)
    if training and config.noise > 0:
        logits = logits + config.noise * torch.randn_like(logits)
    if config.is_topk_gate():
        top_k = config.top_k or config.num_experts
        weights, indices = ops.topk_gate(logits, top_k, config.renormalize(), config.temperature)
        if top_k == config.num_experts:
            return weights, None
        if config.granularity == "token":
            return weights, indices
        # Sparse weights have one row per token; few rows are as well dense.
        return weights.new_zeros(logits.shape).scatter(1, indices.long(), weights), None
    scaled = logits / config.temperature
    scores = _scores(scaled, config)
    if tau is not None:
        scores = scores - tau
    ranked, drawn = scores, None
    if config.balance_rate is not None:
        biased = logits.detach() + router.balance.bias.to(logits)
        ranked = _scores(biased / config.temperature, config)
    if config.select == "sampling":
        drawn = _drawn(scaled.detach(), config.top_k)
        keep = torch.zeros_like(scores, dtype=torch.bool).scatter(1, drawn, True)
    else:
        keep = _selected(ranked, config)
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
        # A token that no expert passes the threshold for has the gate 0, not 0 / 0; one that is
        # passed with nothing to spare has a finite gradient.
        total = weights.sum(dim=1, keepdim=True)
        weights = weights / torch.where(total > 0, total, 1)
    # A select last: backward multiplies the gradients of all weights, and that of an expert which
    # is not kept may be no number.
    weights = torch.where(keep, weights, 0)
    if drawn is not None and config.granularity == "token":
        return weights.gather(1, drawn), drawn.to(torch.int32)
    return weights, None


def _drawn(logits: Tensor, top_k: int) -> Tensor:
    """K distinct experts per row, drawn without replacement from softmax(logits): [N, K] int64.

    The K largest of logits - log q, q ~ Exp(1), from torch's generator. What torch.multinomial
    draws, without its wait for the device and where a probability is too small for a float.
    """
    q = torch.empty_like(logits).exponential_()
    return (logits - q.log()).topk(top_k, dim=1).indices


def _scores(scaled: Tensor, config: MoeLoraConfig) -> Tensor:
    """The scores of logits / temperature, [N, E]."""
    return {
        "softmax": lambda: scaled.softmax(dim=1),
        "sigmoid": scaled.sigmoid,
        "identity": lambda: scaled,
        "abs": scaled.abs,
    }[config.score]()


def split_threshold(logits: Tensor, config: MoeLoraConfig) -> tuple[Tensor, Tensor | None]:
    """Logits [N, E], and tau [N, 1] = max_threshold * sigmoid(last) where it is learned."""
    if config.select != "learned_threshold":
        return logits, None
    limit = 1 / config.num_experts if config.max_threshold is None else config.max_threshold
    return logits[:, :-1], limit * logits[:, -1:].sigmoid()


def normalized_entropy(logits: Tensor, index: float) -> Tensor:
    """H(p) / max H of p = softmax(logits): 0 for one certain expert, 1 for all alike.

        H(p) = (1 - sum_e p_e^q) / (q - 1)        - sum_e p_e log p_e for q = 1

    logits [N, E], index q -> [N]. The Tsallis entropy of DynMoLE (arXiv 2504.00661).
    """
    # An expert masked with -inf adds 0, not 0 * inf.
    log_p = logits.log_softmax(dim=1).clamp_min(torch.finfo(logits.dtype).min)
    experts = logits.shape[1]
    if index == 1.0:
        return -(log_p.exp() * log_p).sum(dim=1) / math.log(experts)
    return (1 - (index * log_p).exp().sum(dim=1)) / (1 - experts ** (1 - index))


def _selected(scores: Tensor, config: MoeLoraConfig) -> Tensor:
    """Which experts are kept, [N, E] bool."""
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
    reached = order.values.cumsum(dim=1) - order.values < config.top_p * order.values.sum(
        dim=1, keepdim=True
    )
    return reached.gather(1, position) | least


def gate_from(
    config: MoeLoraConfig,
    logits: Tensor | None = None,
    external: Tensor | None = None,
    *,
    router: nn.Module | None = None,
    training: bool = False,
    device: torch.device | None = None,
) -> Gate:
    """Return the gate that `config` makes of logits, of external gates, or of neither.

        router=None        weights 1 for every expert, one row for all tokens
        router="external"  weights = external
        any other router   weights = normalize(select(score(logits / temperature)))

    The shared expert, if there is one, is the last column or slot.

    Args:
        config: the options of the layer.
        logits: [G, E] ([G, E + 1] with a learned threshold), if a router made them.
        external: [..., E], for router="external".
        router: the layer's router, whose balance bias and counts selection uses.
        training: whether noise is added and the selection is counted.
        device: device of the gate if there is no router.

    Returns:
        Gate without rows: weights [T, K] and experts [T, K] if each token selects K < E experts,
        else weights [G, E] with experts None; and the logits.

    Raises:
        ValueError: external gates are missing, or have the wrong shape or dtype.
    """
    experts = None
    if config.router is None:
        weights = torch.ones((1, config.num_experts), dtype=torch.float32, device=device)
    elif config.router == "external":
        weights = external_gates(external, config.num_experts)
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


def gate_rows(
    weights: Tensor, x_shape: Sequence[int], device: torch.device, name: str, config: MoeLoraConfig
) -> Tensor | None:
    """The gate row of each token where x has one gate row per sequence; else None.

    x is [B, S, I], or [S, B, I] with batch_dim 1. A row for each token of several sequences may be
    passed in, but is none of a task's: as many tasks as tokens are those of another batch.

    None means what `moe_lora_linear` takes it for: a gate row per token, or one for all tokens.
    """
    tokens, inner = 1, 1
    for dim, size in enumerate(x_shape[:-1]):
        tokens *= size
        inner *= size if dim > config.batch_dim else 1
    count = weights.shape[0]
    sequences = x_shape[config.batch_dim] if len(x_shape) > 2 else tokens
    by_token = count == tokens and (config.router != "task" or count == sequences)
    if count == 1 or by_token:
        return None
    if count != sequences:
        one_per_token = "" if config.router == "task" else "one per token, "
        raise ValueError(
            f"{name}: {count} gate rows for x {[*x_shape]}; expected one for all, {one_per_token}"
            f"or one per sequence (dimension {config.batch_dim} of x: batch_dim="
            f"{config.batch_dim}); where generate makes n sequences of each prompt (beams, "
            "samples), set_tasks takes ids.repeat_interleave(n)"
        )
    return torch.arange(tokens, device=device, dtype=torch.int32) // inner % count


class SequenceGate(nn.Module):
    """gates = topk(softmax(W mean_s embeddings)) / sum        [B, S, I] -> [B, E], in float32

    The gate of Octavius (arXiv 2311.02684): one per sample for the whole model, from the input
    embeddings of its instruction. For layers with router="external":

        set_tasks(model, gate(model.get_input_embeddings()(instruction_ids), mask))

    Args:
        hidden_size: I.
        num_experts: E.
        top_k: experts of a sample.
    """

    def __init__(self, hidden_size, num_experts, top_k=2, *, device=None, dtype=None):
        super().__init__()
        self.config = MoeLoraConfig(
            num_experts=num_experts, granularity="sequence", top_k=top_k, normalize="sum"
        )
        self.linear = nn.Linear(hidden_size, num_experts, bias=False, device=device, dtype=dtype)

    def forward(self, embeddings: Tensor, mask: Tensor | None = None) -> Tensor:
        """embeddings [B, S, I] -> gates [B, E]; mask [B, S], True where a position counts.

        Without a mask padding counts, as in the original.
        """
        if mask is None:
            mean = embeddings.mean(dim=1)
        else:
            if mask.shape != embeddings.shape[:2]:
                raise ValueError(f"mask: expected {[*embeddings.shape[:2]]}, got {[*mask.shape]}")
            counts = (mask != 0).to(embeddings.dtype)[..., None]
            mean = (counts * embeddings).sum(dim=1) / counts.sum(dim=1).clamp_min(1)
        gates, _ = gate_of_logits(wide_linear(mean, self.linear), self.config, self.training)
        return gates
