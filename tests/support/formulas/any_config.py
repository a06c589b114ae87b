"""Any config's layer in float64, token by token and expert by expert, from the options alone."""

from __future__ import annotations

import math

import torch

from moelora_kernels import reference
from moelora_kernels.nn import MlpRouter
from moelora_kernels.nn.routers import BalancedRouter, ThresholdRouter


def mixture(layer, x, *, tasks=None, gates=None, seed=None):
    """y of a layer on x [T, I], [B, S, I] or, with batch_dim=1, [S, B, I].

    Draws what a forward draws, in its order: noise, then the experts of select="sampling". seed is
    that of the dropout mask. tasks and gates are what set_tasks and layer(x, gates) take.
    """
    config = layer.config
    tokens = x.reshape(-1, x.shape[-1])
    sequence, count = sequence_of_tokens(x, config.batch_dim)
    row_of, rows = _gate_rows(layer, x, tokens, sequence, count, tasks, gates)
    gate = [rows[row_of[t]] for t in range(len(tokens))]
    outputs = []
    for t in range(len(tokens)):
        y = layer.base_layer(tokens[t])
        for e, (a, b, scale) in enumerate(experts(layer)):
            seen = tokens[t]
            if seed is not None:
                stream = e if config.dropout_mask == "per_expert" else 0
                seen = reference.dropout(tokens, config.dropout, seed, stream)[t]
            if config.grad_gate == "sqrt":
                # What A, B and x see of the gate, and what is left of it for the router.
                held = gate[t][e].detach().sqrt()
                part = b @ (a @ seen)
                y = y + scale * (held * part + (gate[t][e] - held) * part.detach())
            else:
                y = y + scale * gate[t][e] * (b @ (a @ seen))
        outputs.append(y)
    y = torch.stack(outputs) if outputs else tokens.new_zeros(0, layer.out_features)
    return y.view(*x.shape[:-1], layer.out_features)


def sequence_of_tokens(x, batch_dim):
    """The sequence of each token in the order of x, and how many there are."""
    if x.dim() == 2:
        return [*range(x.shape[0])], x.shape[0]
    first, second = x.shape[:2]
    if batch_dim == 1:
        return [b for _ in range(first) for b in range(second)], second
    return [b for b in range(first) for _ in range(second)], first


def experts(layer):
    """A [r, I], B [O, r] and the factor of every expert, from `rank`, `alpha` and `scaling`."""
    config, features = layer.config, layer.in_features
    ranks = [config.rank] * config.num_experts if isinstance(config.rank, int) else [*config.rank]
    if config.shared_expert != "none":
        ranks.append(config.shared_rank or ranks[0])
    found, start = [], 0
    for e, rank in enumerate(ranks):
        scale = {
            "alpha/r": lambda r: config.alpha / r,
            "alpha/R": lambda r: config.alpha / sum(ranks),
            "alpha/sqrt(r)": lambda r: config.alpha / math.sqrt(r),
            "sqrt(3*alpha*I/r)": lambda r: math.sqrt(3 * config.alpha * features / r),
        }.get(config.scaling, lambda r, e=e: _explicit(config.scaling, e))(rank)
        a = layer.lora_A if config.share == "A" else layer.lora_A[start : start + rank]
        found.append((a, layer.lora_B[:, start : start + rank], scale))
        start += rank
    return found


def _explicit(scaling, e):
    return scaling[e] if isinstance(scaling, tuple) else scaling


def _gate_rows(layer, x, tokens, sequence, count, tasks, gates):
    """Which gate row each token has, and the rows [E] (the shared expert last)."""
    config, experts = layer.config, layer.config.num_experts
    every = [*range(len(tokens))]
    if config.router is None:
        row_of, rows = [0] * len(tokens), [tokens.new_ones(experts)]
    elif config.router == "external":
        given = gates.double()
        row_of = every if len(given) == len(tokens) else sequence
        row_of = [0] * len(tokens) if len(given) == 1 else row_of
        rows = [*given]
    else:
        row_of, logits = _logits(layer, x, tokens, sequence, count, tasks)
        rows = _rows_of_logits(layer, logits)
    if config.shared_expert != "none":
        always = config.shared_expert == "always"
        rows = [
            torch.cat([row, row.new_ones(1) if always else 1 - row.max()[None]]) for row in rows
        ]
    return row_of, rows


def _logits(layer, x, tokens, sequence, count, tasks):
    config = layer.config
    if config.router == "task":
        vectors = []
        for ids in tasks.reshape(len(tasks), -1).tolist():
            own = [layer.router.embedding.weight[i] for i in ids if i != 0]
            vectors.append(sum(own) / len(own))
        row_of = [0] * len(tokens) if len(vectors) == 1 else sequence
        return row_of, [layer.router.gate.weight @ v for v in vectors]
    read, row_of = [*tokens], [*range(len(tokens))]
    if config.granularity == "sequence":
        row_of = sequence if x.dim() > 2 else [0] * len(tokens)
        own = [[] for _ in range(count if x.dim() > 2 else 1)]
        for t, s in enumerate(row_of):
            own[s].append(tokens[t])
        read = [sum(part) / len(part) if part else tokens.new_zeros(x.shape[-1]) for part in own]
    gate = layer.router
    extra = None
    if isinstance(gate, ThresholdRouter):
        extra, gate = gate.threshold, gate.gate
    if isinstance(gate, BalancedRouter):
        gate = gate.gate
    found = []
    for i, v in enumerate(read):
        if config.router == "self":
            logits = layer.lora_A.detach() @ v.detach()
        elif config.router == "prototype":
            logits = (gate.prototypes @ v).abs()
        elif config.router == "token_task":
            vector = tasks[i // (len(read) // len(tasks))]
            share = 1 / (1 + (-gate.mixture["share"]).exp())
            logits = (1 - share) * _two(gate.token, v).softmax(0)
            logits = logits + share * _two(gate.task, vector).softmax(0)
        else:
            logits = _two(gate, v)
        if extra is not None:
            logits = torch.cat([logits, extra.weight @ v + extra.bias])
        found.append(logits)
    return row_of, found


def _two(gate, v):
    """A linear, or two with an activation between."""
    if not isinstance(gate, MlpRouter):
        return gate(v)
    hidden = gate.fc1.weight @ v + gate.fc1.bias
    return gate.fc2.weight @ gate.activation(hidden) + gate.fc2.bias


def _rows_of_logits(layer, logits):
    """gate = normalize(select(score(logits / temperature))) of every row, in loops."""
    config, experts = layer.config, layer.config.num_experts
    if not logits:
        return []
    taus = [None] * len(logits)
    if config.select == "learned_threshold":
        limit = 1 / experts if config.max_threshold is None else config.max_threshold
        taus = [limit / (1 + (-row[-1]).exp()) for row in logits]
        logits = [row[:-1] for row in logits]
    if layer.training and config.noise > 0:
        noise = torch.randn(len(logits), experts, dtype=torch.float64)
        logits = [row + config.noise * n for row, n in zip(logits, noise, strict=True)]
    drawn = None
    if config.select == "sampling":
        waits = torch.empty(len(logits), experts, dtype=torch.float64).exponential_()
        drawn = [row / config.temperature - w.log() for row, w in zip(logits, waits, strict=True)]
    rows = []
    for i, row in enumerate(logits):
        scores = _score(row / config.temperature, config.score)
        if taus[i] is not None:
            scores = scores - taus[i]
        ranked = scores
        if config.balance_rate is not None:
            bias = layer.router.balance.bias.double()
            ranked = _score((row + bias) / config.temperature, config.score)
        order = sorted(range(experts), key=lambda e: -ranked[e].item())
        kept = _kept(config, scores, order, None if drawn is None else drawn[i])
        if config.entropy_threshold is not None:
            p = (row.detach() / config.temperature).softmax(0)
            if _entropy(p, config.entropy_index) > config.entropy_threshold:
                kept = set(range(experts))
        rows.append(_normalised(config, scores, kept))
    return rows


def _score(scaled, score):
    return {
        "softmax": lambda: scaled.exp() / scaled.exp().sum(),
        "sigmoid": lambda: 1 / (1 + (-scaled).exp()),
        "identity": lambda: scaled,
        "abs": lambda: scaled.abs(),
    }[score]()


def _kept(config, scores, order, drawn):
    if config.select == "all":
        return set(order)
    if config.select == "topk":
        return set(order[: config.top_k])
    if config.select == "sampling":
        return set(sorted(order, key=lambda e: -drawn[e].item())[: config.top_k])
    if config.select == "learned_threshold":
        return {e for e in order if scores[e] >= 0}
    least = set(order[: config.keep_min or 0])
    if config.select == "threshold":
        return least | {e for e in order if scores[e] >= config.threshold}
    reached, total = 0.0, scores.sum().item()
    for e in order:
        if reached >= config.top_p * total:
            break
        least.add(e)
        reached += scores[e].item()
    return least


def _entropy(p, q):
    if q == 1:
        return float(-(p * p.log()).sum() / math.log(len(p)))
    return float((1 - (p**q).sum()) / (1 - len(p) ** (1 - q)))


def _normalised(config, scores, kept):
    total = sum((scores[e] for e in kept), scores.new_zeros(()))
    of = {
        "none": lambda e: scores[e],
        "sum": lambda e: scores[e] / total if total.item() > 0 else scores[e],
        "softmax": lambda e: scores[e].exp() / sum(scores[j].exp() for j in kept),
        "one": lambda e: torch.ones_like(scores[e]),
    }[config.normalize]
    return torch.stack([of(e) if e in kept else 0 * scores[e].detach() for e in range(len(scores))])
