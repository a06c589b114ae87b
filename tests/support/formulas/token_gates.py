"""The expert loops of AdaMoLE, DynMoLE and MoCLE, and helpers of all loops."""

from __future__ import annotations

import torch


def blocks_of(p, experts):
    """Yield A_e [r, I] and B_e [O, r] of every expert, slices of the stacked parameters."""
    return zip(p["lora_A"].chunk(experts), p["lora_B"].chunk(experts, dim=1), strict=True)


def frozen(x, p):
    """Return the base's output W x + b."""
    y = x @ p["base_layer.weight"].t()
    return y + p["base_layer.bias"] if "base_layer.bias" in p else y


def first_largest(row, k):
    """Return the indices of the k largest entries of a row; of equal ones the first."""
    values = row.tolist()
    return sorted(range(len(values)), key=lambda e: (-values[e], e))[:k]


def by_token(x, p, c, gate_of_token, xs=None, scale=None):
    """Return y = W x + sum_e g_e scale B_e A_e x_e.

    gate_of_token: token -> the pairs (expert, gate) of a token.
    xs: the x_e of every expert (dropout), or None for x.
    scale: by default alpha / r.
    """
    scale = c.alpha / c.rank if scale is None else scale
    experts = list(blocks_of(p, c.num_experts))
    tokens = x.reshape(-1, x.shape[-1])
    inputs = [tokens if xs is None else xs[e].reshape(tokens.shape) for e in range(c.num_experts)]
    out = []
    for t in range(tokens.shape[0]):
        y = frozen(tokens[t], p)
        for e, gate in gate_of_token(tokens[t]):
            a, b = experts[e]
            y = y + scale * gate * (b @ (a @ inputs[e][t]))
        out.append(y)
    return torch.stack(out).view(*x.shape[:-1], -1)


def adamole_margins(x, p, c):
    """Return p - tau = softmax(W_g x) - tau_max sigmoid(w x + b), for one or more tokens."""
    probabilities = (x @ p["router.gate.weight"].t()).softmax(dim=-1)
    limit = 1 / c.num_experts if c.max_threshold is None else c.max_threshold
    logit = x @ p["router.threshold.weight"].t() + p["router.threshold.bias"]
    return probabilities - limit / (1 + torch.exp(-logit))


def loop_adamole(x, p, c, _tasks, xs=None):
    """Return y = W x + sum_e relu(p_e - tau) / sum relu(p - tau) alpha/r B_e A_e x (2405.00361)."""

    def gate_of_token(token):
        margins = adamole_margins(token, p, c)
        selected = [e for e in range(c.num_experts) if margins[e] >= 0]
        total = sum(margins[e] for e in selected)
        return [(e, margins[e] / total) for e in selected]

    return by_token(x, p, c, gate_of_token, xs)


def tsallis(p, q):
    """Return (1 - sum p^q) / (q - 1), divided by its value for equal p."""
    maximum = (1 - len(p) * len(p) ** -q) / (q - 1)
    return (1 - sum(value**q for value in p)) / (q - 1) / maximum


def dynmole_experts(probabilities, c):
    """Return the experts of one token, and the rule that selected them.

    The rule is "top_p", "keep_min" or "entropy".
    """
    if tsallis(probabilities.tolist(), c.entropy_index) > c.entropy_threshold:
        return list(range(c.num_experts)), "entropy"
    order, total, selected = first_largest(probabilities, c.num_experts), 0.0, []
    for e in order:
        if total >= c.top_p:
            break
        selected.append(e)
        total += probabilities[e].item()
    if len(selected) < c.keep_min:
        return order[: c.keep_min], "keep_min"
    return selected, "top_p"


def loop_dynmole(x, p, c, _tasks, xs=None):
    """Return y = W x + sum_{e selected} softmax(W_g x)_e alpha/r B_e A_e x (2504.00661)."""

    def gate_of_token(token):
        probabilities = (token @ p["router.weight"].t()).softmax(dim=-1)
        selected, _ = dynmole_experts(probabilities.detach(), c)
        return [(e, probabilities[e]) for e in selected]

    return by_token(x, p, c, gate_of_token, xs)


def loop_mocle(x, p, c, clusters, xs=None):
    """Return y = W x + g_e alpha/r B_e A_e x + (1 - g_e) alpha/r B_u A_u x, with e = argmax g.

    g = softmax(W_g emb[cluster] / temperature). u is the universal expert, the last block.
    """
    *experts, (a_u, b_u) = blocks_of(p, c.num_experts + 1)
    out = []
    for sequence, cluster in zip(x, clusters.tolist(), strict=True):
        logits = p["router.gate.weight"] @ p["router.embedding.weight"][cluster]
        gate = (logits / c.temperature).softmax(dim=0)
        (e,) = first_largest(gate, 1)
        a, b = experts[e]
        routed = gate[e] * (sequence @ a.t()) @ b.t()
        universal = (1 - gate[e]) * (sequence @ a_u.t()) @ b_u.t()
        out.append(frozen(sequence, p) + c.alpha / c.rank * (routed + universal))
    return torch.stack(out)
