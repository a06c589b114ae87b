"""The expert loops of presets whose gate differs from token to token, and what all loops share."""

from __future__ import annotations

import torch


def blocks_of(p, experts):
    """A_e [r, I] and B_e [O, r] of every expert, cut from the stacked parameters."""
    return zip(p["lora_A"].chunk(experts), p["lora_B"].chunk(experts, dim=1), strict=True)


def frozen(x, p):
    """The base: W x + b."""
    y = x @ p["base_layer.weight"].t()
    return y + p["base_layer.bias"] if "base_layer.bias" in p else y


def first_largest(row, k):
    """The k largest entries of a row, the earlier of two equals first."""
    values = row.tolist()
    return sorted(range(len(values)), key=lambda e: (-values[e], e))[:k]


def _by_token(x, p, c, xs, gate_of_token):
    """y = W x + sum_e g_e alpha/r B_e A_e x_e over the (expert, gate) pairs of each token."""
    experts = list(blocks_of(p, c.num_experts))
    tokens = x.reshape(-1, x.shape[-1])
    own = [tokens if xs is None else xs[e].reshape(tokens.shape) for e in range(c.num_experts)]
    out = []
    for t in range(tokens.shape[0]):
        y = frozen(tokens[t], p)
        for e, gate in gate_of_token(tokens[t]):
            a, b = experts[e]
            y = y + c.alpha / c.rank * gate * (b @ (a @ own[e][t]))
        out.append(y)
    return torch.stack(out).view(*x.shape[:-1], -1)


def adamole_margins(x, p, c):
    """p - tau of one token or many: softmax(W_g x) - tau_max sigmoid(w x + b)."""
    probabilities = (x @ p["router.gate.weight"].t()).softmax(dim=-1)
    limit = 1 / c.num_experts if c.max_threshold is None else c.max_threshold
    logit = x @ p["router.threshold.weight"].t() + p["router.threshold.bias"]
    return probabilities - limit / (1 + torch.exp(-logit))


def loop_adamole(x, p, c, _tasks, xs=None):
    """y = W x + sum_e relu(p_e - tau) / sum relu(p - tau) alpha/r B_e A_e x (2405.00361)."""

    def gate_of_token(token):
        margins = adamole_margins(token, p, c)
        kept = [e for e in range(c.num_experts) if margins[e] >= 0]
        total = sum(margins[e] for e in kept)
        return [(e, margins[e] / total) for e in kept]

    return _by_token(x, p, c, xs, gate_of_token)


def tsallis(p, q):
    """(1 - sum p^q) / (q - 1) over its value for equal p."""
    maximum = (1 - len(p) * len(p) ** -q) / (q - 1)
    return (1 - sum(value**q for value in p)) / (q - 1) / maximum


def dynmole_kept(probabilities, c):
    """The experts of one token, and which rule decided: top-p, keep_min or the entropy."""
    if tsallis(probabilities.tolist(), c.entropy_index) > c.entropy_threshold:
        return list(range(c.num_experts)), "entropy"
    order, total, kept = first_largest(probabilities, c.num_experts), 0.0, []
    for e in order:
        if total >= c.top_p:
            break
        kept.append(e)
        total += probabilities[e].item()
    if len(kept) < c.keep_min:
        return order[: c.keep_min], "keep_min"
    return kept, "top_p"


def loop_dynmole(x, p, c, _tasks, xs=None):
    """y = W x + sum_{e kept} softmax(W_g x)_e alpha/r B_e A_e x (2504.00661)."""

    def gate_of_token(token):
        probabilities = (token @ p["router.weight"].t()).softmax(dim=-1)
        kept, _ = dynmole_kept(probabilities.detach(), c)
        return [(e, probabilities[e]) for e in kept]

    return _by_token(x, p, c, xs, gate_of_token)


def loop_mocle(x, p, c, clusters, xs=None):
    """y = W x + g_e alpha/r B_e A_e x + (1 - g_e) alpha/r B_u A_u x, e = argmax g of the cluster.

    g = softmax(W_g emb[cluster] / temperature); u is the universal expert, the last block.
    """
    *experts, (a_u, b_u) = blocks_of(p, c.num_experts + 1)
    out = []
    for sequence, cluster in zip(x, clusters.tolist(), strict=True):
        logits = p["router.gate.weight"] @ p["router.embedding.weight"][cluster]
        gate = (logits / c.temperature).softmax(dim=0)
        (e,) = first_largest(gate, 1)
        a, b = experts[e]
        own = gate[e] * (sequence @ a.t()) @ b.t()
        universal = (1 - gate[e]) * (sequence @ a_u.t()) @ b_u.t()
        out.append(frozen(sequence, p) + c.alpha / c.rank * (own + universal))
    return torch.stack(out)
