"""The formula of a layer with any config, in loops over tokens and experts.

The options of the config and the parameters of the layer are the only inputs from the package.
"""

from __future__ import annotations

import math

import torch

from moelora_kernels import reference
from moelora_kernels.nn import MlpRouter
from moelora_kernels.nn.routers import BalancedRouter, ThresholdRouter


def mixture(layer, x, *, tasks=None, gates=None, seed=None):
    """Return y of a layer in float64.

    It draws random numbers in the order of a forward: noise, then those of select="sampling".

    x: [T, I], [B, L, I], or [L, B, I] with batch_dim=1.
    tasks: the argument of set_tasks, or None.
    gates: the gates of router="external", or None.
    seed: the seed of the dropout masks; None for no dropout.
    """
    config = layer.config
    tokens = x.reshape(-1, x.shape[-1])
    sequences, num_sequences = sequence_of_tokens(x, config.batch_dim)
    if config.router is None:
        rows, gate = [0] * len(tokens), [tokens.new_ones(config.num_experts)]
    elif config.router == "external":
        rows, gate = external_gate(gates.double(), tokens, sequences)
    else:
        rows, logits = router_logits(layer, x, tokens, sequences, num_sequences, tasks)
        gate = gate_of_logits(layer, logits)
    if config.shared_expert == "always":
        gate = [torch.cat([row, row.new_ones(1)]) for row in gate]
    elif config.shared_expert == "complement":
        gate = [torch.cat([row, 1 - row.max()[None]]) for row in gate]
    outputs = []
    for t, token in enumerate(tokens):
        y = layer.base_layer(token)
        for e, (a, b, scale) in enumerate(experts(layer)):
            token_e = token
            if seed is not None:
                stream = e if config.dropout_mask == "per_expert" else 0
                token_e = reference.dropout(tokens, config.dropout, seed, stream)[t]
            weight = gate[rows[t]][e]
            if config.grad_gate == "sqrt":
                # A, B and x get a gradient through the root alone, the router through the rest.
                root = weight.detach().sqrt()
                output = b @ (a @ token_e)
                y = y + scale * (root * output + (weight - root) * output.detach())
            else:
                y = y + scale * weight * (b @ (a @ token_e))
        outputs.append(y)
    y = torch.stack(outputs) if outputs else tokens.new_zeros(0, layer.out_features)
    return y.view(*x.shape[:-1], layer.out_features)


def sequence_of_tokens(x, batch_dim):
    """Return the sequence of each token, in the order of x, and the number of sequences."""
    if x.dim() == 2:
        return [*range(x.shape[0])], x.shape[0]
    first, second = x.shape[:2]
    if batch_dim == 1:
        return [b for _ in range(first) for b in range(second)], second
    return [b for b in range(first) for _ in range(second)], first


def experts(layer):
    """Return A [r, I], B [O, r] and the scale of every expert, from `rank`, `alpha`, `scaling`."""
    config, features = layer.config, layer.in_features
    ranks = [config.rank] * config.num_experts if isinstance(config.rank, int) else [*config.rank]
    if config.shared_expert != "none":
        ranks.append(config.shared_rank or ranks[0])
    result, start = [], 0
    for e, rank in enumerate(ranks):
        if config.scaling == "alpha/r":
            scale = config.alpha / rank
        elif config.scaling == "alpha/R":
            scale = config.alpha / sum(ranks)
        elif config.scaling == "alpha/sqrt(r)":
            scale = config.alpha / math.sqrt(rank)
        elif config.scaling == "sqrt(3*alpha*I/r)":
            scale = math.sqrt(3 * config.alpha * features / rank)
        else:
            scale = config.scaling[e] if isinstance(config.scaling, tuple) else config.scaling
        a = layer.lora_A if config.share == "A" else layer.lora_A[start : start + rank]
        result.append((a, layer.lora_B[:, start : start + rank], scale))
        start += rank
    return result


def external_gate(gates, tokens, sequences):
    """Return the gate row of each token, and the rows: one for all, per token or per sequence."""
    if len(gates) == 1:
        rows = [0] * len(tokens)
    elif len(gates) == len(tokens):
        rows = [*range(len(tokens))]
    else:
        rows = sequences
    return rows, [*gates]


def router_logits(layer, x, tokens, sequences, num_sequences, tasks):
    """Return the gate row of each token, and the logits of every row.

    Logits are [E], or [E + 1] with a learned threshold.
    """
    config = layer.config
    if config.router == "task":
        vectors = []
        for ids in tasks.reshape(len(tasks), -1).tolist():
            embeddings = [layer.router.embedding.weight[i] for i in ids if i != 0]
            vectors.append(sum(embeddings) / len(embeddings))
        rows = [0] * len(tokens) if len(vectors) == 1 else sequences
        return rows, [layer.router.gate.weight @ vector for vector in vectors]
    inputs, rows = [*tokens], [*range(len(tokens))]
    if config.granularity == "sequence":
        rows = sequences if x.dim() > 2 else [0] * len(tokens)
        inputs = []
        for s in range(num_sequences if x.dim() > 2 else 1):
            members = [token for token, row in zip(tokens, rows, strict=True) if row == s]
            mean = sum(members) / len(members) if members else tokens.new_zeros(x.shape[-1])
            inputs.append(mean)
    router, threshold = layer.router, None
    if isinstance(router, ThresholdRouter):
        threshold, router = router.threshold, router.gate
    if isinstance(router, BalancedRouter):
        router = router.gate
    result = []
    for i, vector in enumerate(inputs):
        if config.router == "self":
            logits = layer.lora_A.detach() @ vector.detach()
        elif config.router == "prototype":
            logits = (router.prototypes @ vector).abs()
        elif config.router == "token_task":
            task = tasks[i // (len(inputs) // len(tasks))]
            share = 1 / (1 + (-router.mixture["share"]).exp())
            logits = (1 - share) * network(router.token, vector).softmax(0)
            logits = logits + share * network(router.task, task).softmax(0)
        else:
            logits = network(router, vector)
        if threshold is not None:
            logits = torch.cat([logits, threshold.weight @ vector + threshold.bias])
        result.append(logits)
    return rows, result


def network(router, vector):
    """Return the output of a linear, or of two linears with an activation between them."""
    if not isinstance(router, MlpRouter):
        return router(vector)
    hidden = router.fc1.weight @ vector + router.fc1.bias
    return router.fc2.weight @ router.activation(hidden) + router.fc2.bias


def gate_of_logits(layer, logits):
    """Return gate = normalize(select(score(logits / temperature))) [E] of every row."""
    config, num_experts = layer.config, layer.config.num_experts
    if not logits:
        return []
    thresholds = [None] * len(logits)
    if config.select == "learned_threshold":
        limit = 1 / num_experts if config.max_threshold is None else config.max_threshold
        thresholds = [limit / (1 + (-row[-1]).exp()) for row in logits]
        logits = [row[:-1] for row in logits]
    if layer.training and config.noise > 0:
        noise = torch.randn(len(logits), num_experts, dtype=torch.float64)
        logits = [row + config.noise * n for row, n in zip(logits, noise, strict=True)]
    samples = [None] * len(logits)
    if config.select == "sampling":
        waits = torch.empty(len(logits), num_experts, dtype=torch.float64).exponential_()
        samples = [row / config.temperature - w.log() for row, w in zip(logits, waits, strict=True)]
    gate = []
    for row, threshold, sample in zip(logits, thresholds, samples, strict=True):
        scores = score(row / config.temperature, config.score)
        if threshold is not None:
            scores = scores - threshold
        rank_scores = scores
        if config.balance_rate is not None:
            bias = layer.router.balance.bias.double()
            rank_scores = score((row + bias) / config.temperature, config.score)
        order = sorted(range(num_experts), key=lambda e, values=rank_scores: -values[e].item())
        selected = select(config, scores, order, sample)
        if config.entropy_threshold is not None:
            p = (row.detach() / config.temperature).softmax(0)
            if relative_entropy(p, config.entropy_index) > config.entropy_threshold:
                selected = set(range(num_experts))
        gate.append(normalize(config, scores, selected))
    return gate


def score(scaled, name):
    """Return the scores [E] of logits / temperature [E]."""
    if name == "softmax":
        return scaled.exp() / scaled.exp().sum()
    if name == "sigmoid":
        return 1 / (1 + (-scaled).exp())
    return {"identity": scaled, "abs": scaled.abs()}[name]


def select(config, scores, order, sample):
    """Return the selected experts as a set.

    order: the experts, the highest score first.
    sample: the perturbed logits [E] of select="sampling".
    """
    if config.select == "all":
        return set(order)
    if config.select == "topk":
        return set(order[: config.top_k])
    if config.select == "sampling":
        return set(sorted(order, key=lambda e: -sample[e].item())[: config.top_k])
    if config.select == "learned_threshold":
        return {e for e in order if scores[e] >= 0}
    selected = set(order[: config.keep_min or 0])
    if config.select == "threshold":
        return selected | {e for e in order if scores[e] >= config.threshold}
    # "topp": the first experts in order whose scores reach a share of the sum.
    reached, total = 0.0, scores.sum().item()
    for e in order:
        if reached >= config.top_p * total:
            break
        selected.add(e)
        reached += scores[e].item()
    return selected


def relative_entropy(p, q):
    """Return the Tsallis entropy of p [E] divided by its maximum. Index q = 1 is Shannon's."""
    if q == 1:
        return float(-(p * p.log()).sum() / math.log(len(p)))
    return float((1 - (p**q).sum()) / (1 - len(p) ** (1 - q)))


def normalize(config, scores, selected):
    """Return the gate [E]: the normalised scores of the selected experts, and 0 for the others."""
    total = sum((scores[e] for e in selected), scores.new_zeros(()))
    gate = []
    for e, value in enumerate(scores):
        if e not in selected:
            gate.append(0 * value.detach())
        elif config.normalize == "sum":
            gate.append(value / total if total.item() > 0 else value)
        elif config.normalize == "softmax":
            gate.append(value.exp() / sum(scores[j].exp() for j in selected))
        else:
            gate.append({"none": value, "one": torch.ones_like(value)}[config.normalize])
    return torch.stack(gate)
