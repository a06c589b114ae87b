"""The expert loops of the presets of linears, and the check of a layer against its loop.

A loop takes x, the parameters p by name, the config c, the tasks, and xs, the x_e of every expert
with dropout, or None. It returns y.
"""

import torch

from moelora_kernels import MoeLoraConfig, MoeLoraLinear, set_tasks
from moelora_kernels.presets import FFN_PRESETS
from support.compare import check_formula
from support.formulas.token_gates import (
    blocks_of,
    first_largest,
    frozen,
    loop_adamole,
    loop_dynmole,
    loop_mocle,
)

IN, OUT = 12, 10
# The loops of whole-FFN experts are in presets/test_ffn.py, the others in formulas/family.py.
ELSEWHERE = (
    *FFN_PRESETS, "octavius", "hmora", "xlora", "arrow", "smora", "flylora", "riemannian", "pesc",
)  # fmt: skip


def loop_lora(x, p, c, _tasks, xs=None):
    """Return y = W x + b + alpha/r B A x."""
    return frozen(x, p) + c.alpha / c.rank * (x @ p["lora_A"].t()) @ p["lora_B"].t()


def loop_moelora(x, p, c, tasks, xs=None):
    """Return y = W x + b + sum_e alpha/r_total w_e B_e A_e x_e, w = softmax(W_g emb[task])."""
    w = (p["router.embedding.weight"][tasks] @ p["router.gate.weight"].t()).softmax(dim=-1)
    y = frozen(x, p)
    for e, (a, b) in enumerate(blocks_of(p, c.num_experts)):
        weights_e = w[:, e].reshape(-1, *[1] * (x.dim() - 1))
        x_e = x if xs is None else xs[e]
        y = y + c.alpha / (c.rank * c.num_experts) * weights_e * ((x_e @ a.t()) @ b.t())
    return y


def loop_ming(x, p, c, _tasks, xs=None):
    """Return y = W x + b + sum_j softmax(g[idx])_j alpha/r B_j A_j x.

    g = W_s x + b_s; idx = topk(g).
    """
    tokens = x.reshape(-1, x.shape[-1])
    experts = list(blocks_of(p, c.num_experts))
    logits = tokens @ p["router.weight"].t() + p["router.bias"]
    out = []
    for t in range(tokens.shape[0]):
        selected = first_largest(logits[t], c.top_k)
        w = torch.stack([logits[t, e] for e in selected]).softmax(dim=0)
        delta = sum(
            w[j] * (experts[e][1] @ (experts[e][0] @ tokens[t])) for j, e in enumerate(selected)
        )
        out.append(frozen(tokens[t], p) + c.alpha / c.rank * delta)
    return torch.stack(out).view(*x.shape[:-1], -1)


def loop_loramoe(x, p, c, _tasks, xs=None):
    """Return y = W x + sum_e softmax(W_g x)_e alpha/r B_e A_e x_e."""
    w = (x @ p["router.weight"].t()).softmax(dim=-1)
    y = frozen(x, p)
    for e, (a, b) in enumerate(blocks_of(p, c.num_experts)):
        x_e = x if xs is None else xs[e]
        y = y + c.alpha / c.rank * w[..., e : e + 1] * ((x_e @ a.t()) @ b.t())
    return y


def loop_hydralora(x, p, c, _tasks, xs=None):
    """Return y = W x + sum_e softmax(W_g x)_e alpha/r B_e A x, with one A for all heads."""
    w = (x @ p["router.weight"].t()).softmax(dim=-1)
    y = frozen(x, p)
    for e, b in enumerate(p["lora_B"].chunk(c.num_experts, dim=1)):
        y = y + c.alpha / c.rank * w[..., e : e + 1] * ((x @ p["lora_A"].t()) @ b.t())
    return y


def loop_mola(x, p, c, _tasks, xs=None, scale=None):
    """Return y = W x + sum_j p_j / (sum p[idx]) alpha/r B_j A_j x.

    p = softmax(W_g x); idx = topk(p).
    """
    scale = c.alpha / c.rank if scale is None else scale
    tokens = x.reshape(-1, x.shape[-1])
    probabilities = (tokens @ p["router.weight"].t()).softmax(dim=-1)
    y = frozen(tokens, p)
    selected = [first_largest(row, c.top_k) for row in probabilities]
    for e, (a, b) in enumerate(blocks_of(p, c.num_experts)):
        routed = [t for t, experts in enumerate(selected) if e in experts]
        if not routed:
            continue
        totals = torch.stack([probabilities[t, selected[t]].sum() for t in routed])
        w = probabilities[routed, e] / totals
        delta = scale * w[:, None] * ((tokens[routed] @ a.t()) @ b.t())
        y = y.index_add(0, torch.tensor(routed), delta)
    return y.view(*x.shape[:-1], -1)


def loop_goat(x, p, c, _tasks, xs=None):
    """Return y = W_reduced x + sum_j p_j / (sum p[idx]) sqrt(3 alpha I / r) B_j A_j x.

    The gate is that of MoLA.
    """
    return loop_mola(x, p, c, _tasks, xs, scale=(3 * c.alpha * x.shape[-1] / c.rank) ** 0.5)


LOOPS = {
    "lora": loop_lora,
    "moelora": loop_moelora,
    "ming": loop_ming,
    "loramoe": loop_loramoe,
    "hydralora": loop_hydralora,
    "mola": loop_mola,
    "mole": loop_mola,
    "adamole": loop_adamole,
    "dynmole": loop_dynmole,
    "goat": loop_goat,
    "mocle": loop_mocle,
}


def make_layer(preset, dtype, seed=0, **options):
    """Return a layer in evaluation with random A and B, so that no term of its formula is zero."""
    torch.manual_seed(seed)
    # A weight [10, 12] has ten singular values, so each of eight segments has rank 1.
    options = {"rank": 1, **options} if preset == "goat" else options
    config = MoeLoraConfig.preset(preset, **options)
    layer = MoeLoraLinear(IN, OUT, bias=preset != "ming", config=config, dtype=dtype).eval()
    with torch.no_grad():
        layer.lora_A.normal_(std=0.3)
        layer.lora_B.normal_(std=0.3)
    return layer


def formula_of(preset, layer, tasks=None, mask=None):
    """Return (x, parameters) -> y of the method's loop; mask: x -> x_e of every expert."""

    def formula(x, p):
        return LOOPS[preset](x, p, layer.config, tasks, None if mask is None else mask(x))

    return formula


def check(preset, layer, x, tasks=None):
    """Assert that the layer computes its method's loop."""
    if tasks is not None:
        set_tasks(layer, tasks)
    dy = torch.randn(*x.shape[:-1], OUT, dtype=x.dtype)
    check_formula(formula_of(preset, layer, tasks), layer, x, dy, threshold_joined)


def threshold_joined(tensors):
    """Join weight and bias of a threshold: the bias is one number, which may cancel by chance."""
    parts = [name for name in tensors if name.startswith("router.threshold.")]
    if not parts:
        return tensors
    rest = {name: tensor for name, tensor in tensors.items() if name not in parts}
    return rest | {"router.threshold": torch.cat([tensors[name].flatten() for name in parts])}


def tasks_of(preset, batch):
    """Return task ids of a batch, or None if the preset has no tasks."""
    return torch.arange(batch) % 3 + 1 if preset in ("moelora", "mocle") else None
