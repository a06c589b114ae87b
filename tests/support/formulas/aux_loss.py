"""The auxiliary losses of the routing, as their papers write them."""

import torch


def switch_loss(logits, top_k, mask=None):
    """Return E sum_e f_e P_e, with the share f_e of routed pairs and the mean probability P_e.

    The loss is that of arXiv 2101.03961.
    """
    keep = range(len(logits)) if mask is None else mask.reshape(-1).nonzero()[:, 0].tolist()
    counts, mean = [0] * logits.shape[1], 0.0
    for t in keep:
        for e in logits[t].topk(top_k).indices.tolist():
            counts[e] += 1
        mean = mean + logits[t].softmax(0) / len(keep)
    f = torch.tensor(counts, dtype=logits.dtype) / sum(counts)
    return logits.shape[1] * (f * mean).sum()


def z_loss(logits, mask=None):
    """Return mean_t (log sum_e exp logits)^2, the loss of arXiv 2202.08906."""
    kept = logits if mask is None else logits[mask.reshape(-1)]
    return (kept.exp().sum(1).log() ** 2).mean()
