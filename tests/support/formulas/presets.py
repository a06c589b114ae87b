"""The expert loops of the presets, and the check of a layer against its loop."""

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
# Whole-FFN experts are in ffn.py, relatives in family.py.
ELSEWHERE = (
    *FFN_PRESETS, "octavius", "hmora", "xlora", "arrow", "smora", "flylora", "riemannian", "pesc",
)  # fmt: skip


def loop_lora(x, p, c, _tasks, xs=None):
    """y = W x + b + alpha/r B A x"""
    return frozen(x, p) + c.alpha / c.rank * (x @ p["lora_A"].t()) @ p["lora_B"].t()


def loop_moelora(x, p, c, tasks, xs=None):
    """y = W x + b + sum_e alpha/r_total w_e B_e A_e dropout_e(x), w = softmax(W_g emb[task])."""
    w = (p["router.embedding.weight"][tasks] @ p["router.gate.weight"].t()).softmax(dim=-1)
    y = frozen(x, p)
    for e, (a, b) in enumerate(blocks_of(p, c.num_experts)):
        weights_e = w[:, e].reshape(-1, *[1] * (x.dim() - 1))
        x_e = x if xs is None else xs[e]
        y = y + c.alpha / (c.rank * c.num_experts) * weights_e * ((x_e @ a.t()) @ b.t())
    return y


def loop_ming(x, p, c, _tasks, xs=None):
    """g = W_s x + b_s; idx = topk(g); y = W x + b + sum_j softmax(g[idx])_j alpha/r B_j A_j x."""
    tokens = x.reshape(-1, x.shape[-1])
    experts = list(blocks_of(p, c.num_experts))
    logits = tokens @ p["router.weight"].t() + p["router.bias"]
    out = []
    for t in range(tokens.shape[0]):
        chosen = first_largest(logits[t], c.top_k)
        w = torch.stack([logits[t, e] for e in chosen]).softmax(dim=0)
        delta = sum(
            w[j] * (experts[e][1] @ (experts[e][0] @ tokens[t])) for j, e in enumerate(chosen)
        )
        out.append(frozen(tokens[t], p) + c.alpha / c.rank * delta)
    return torch.stack(out).view(*x.shape[:-1], -1)


def loop_loramoe(x, p, c, _tasks, xs=None):
    """y = W x + sum_e softmax(W_g x)_e alpha/r B_e A_e x"""
    w = (x @ p["router.weight"].t()).softmax(dim=-1)
    y = frozen(x, p)
    for e, (a, b) in enumerate(blocks_of(p, c.num_experts)):
        x_e = x if xs is None else xs[e]
        y = y + c.alpha / c.rank * w[..., e : e + 1] * ((x_e @ a.t()) @ b.t())
    return y


def loop_hydralora(x, p, c, _tasks, xs=None):
    """y = W x + sum_e softmax(W_g x)_e alpha/r B_e A x, one A for all heads."""
    w = (x @ p["router.weight"].t()).softmax(dim=-1)
    y = frozen(x, p)
    for e, b in enumerate(p["lora_B"].chunk(c.num_experts, dim=1)):
        y = y + c.alpha / c.rank * w[..., e : e + 1] * ((x @ p["lora_A"].t()) @ b.t())
    return y


def loop_mola(x, p, c, _tasks, xs=None, scale=None):
    """p = softmax(W_g x); idx = topk(p); y = W x + sum_j p_j / (sum p[idx]) alpha/r B_j A_j x."""
    scale = c.alpha / c.rank if scale is None else scale
    tokens = x.reshape(-1, x.shape[-1])
    probabilities = (tokens @ p["router.weight"].t()).softmax(dim=-1)
    y = frozen(tokens, p)
    chosen = [first_largest(row, c.top_k) for row in probabilities]
    for e, (a, b) in enumerate(blocks_of(p, c.num_experts)):
        routed = [t for t, experts in enumerate(chosen) if e in experts]
        if not routed:
            continue
        kept = torch.stack([probabilities[t, chosen[t]].sum() for t in routed])
        w = probabilities[routed, e] / kept
        delta = scale * w[:, None] * ((tokens[routed] @ a.t()) @ b.t())
        y = y.index_add(0, torch.tensor(routed), delta)
    return y.view(*x.shape[:-1], -1)


def loop_goat(x, p, c, _tasks, xs=None):
    """y = W_reduced x + sum_j p_j / (sum p[idx]) sqrt(3 eta I / r) B_j A_j x, MoLA's gate."""
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
    """A layer in eval mode with random parameters, so that no term of the formula is zero."""
    torch.manual_seed(seed)
    # Eight segments of the ten singular values of a weight [10, 12] have a rank of 1.
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
    """Weight and bias of a threshold as one: the single number of the bias may happen to cancel."""
    parts = [name for name in tensors if name.startswith("router.threshold.")]
    if not parts:
        return tensors
    rest = {name: tensor for name, tensor in tensors.items() if name not in parts}
    return rest | {"router.threshold": torch.cat([tensors[name].flatten() for name in parts])}


def tasks_of(preset, batch):
    return torch.arange(batch) % 3 + 1 if preset in ("moelora", "mocle") else None
