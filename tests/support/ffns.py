"""Small MoeLoraFFN layers for the tests, and the expert loop they must equal."""

from __future__ import annotations

import torch
from torch import nn

from moelora_kernels import MoeLoraFFN
from support.compare import check_formula, formula_step

HIDDEN, INNER = 6, 10
MIXLORA = dict(num_experts=4, rank=(1, 2, 3, 2), alpha=3.0, top_k=2)


def make_ffn(dtype=torch.float64, mlp=None, seed=0, bias=True, activation="silu", **options):
    """A layer whose B is not zero, so that its experts differ."""
    torch.manual_seed(seed)
    options = {**MIXLORA, **options}
    if options["top_k"] is None:
        options.pop("top_k")
    if mlp is None:
        layer = MoeLoraFFN(HIDDEN, INNER, bias, activation=activation, dtype=dtype, **options)
    else:
        layer = MoeLoraFFN.from_mlp(mlp, **options)
    with torch.no_grad():
        for name, parameter in layer.named_parameters(recurse=False):
            if name.endswith("lora_B"):
                parameter.normal_(std=0.3)
    return layer


def inputs(*shape, dtype=torch.float64):
    """x and dy whose values every dtype holds."""
    x, dy = (torch.randn(*shape, HIDDEN).bfloat16().to(dtype) for _ in range(2))
    return x, dy


def expert_blocks(p, layer, linear):
    """s, A_e [r, in] and B_e [out, r] of every expert of one of the three linears."""
    ranks = list(layer.config.ranks())
    a = p[f"{linear}_lora_A"].split(ranks)
    return zip(layer.config.scales(), a, p[f"{linear}_lora_B"].split(ranks, dim=1), strict=True)


def loop(x, p, layer, gate):
    """The original: for every expert a whole FFN of its own, frozen products and biases included.

        y = sum_e gate_e (Wd a_e + bd + s Bd_e Ad_e a_e)        gate [T, E], 0 where not routed

    Frozen products on the rows of an expert only, its output added with index_add.
    """
    tokens = x.reshape(-1, x.shape[-1])
    y = torch.zeros_like(tokens)
    blocks = {name: list(expert_blocks(p, layer, name)) for name in ("gate", "up", "down")}

    def linear(name, e, rows):
        scale, a, b = blocks[name][e]
        bias = p.get(f"{name}_proj.bias")
        frozen = nn.functional.linear(rows, p[f"{name}_proj.weight"], bias)
        return frozen + scale * (rows @ a.t()) @ b.t()

    for e in range(gate.shape[1]):
        routed = gate[:, e].detach().nonzero()[:, 0]
        rows = tokens[routed]
        a = layer.act_fn(linear("gate", e, rows)) * linear("up", e, rows)
        y = y.index_add(0, routed, gate[routed, e : e + 1] * linear("down", e, a))
    return y.view(x.shape)


def topk_gate(x, p, layer):
    """softmax, the K largest, divided by their sum, [T, E]; written out per token."""
    tokens = x.reshape(-1, x.shape[-1])
    logits = nn.functional.linear(tokens, p["router.weight"], p.get("router.bias"))
    out = []
    for row in logits.softmax(dim=1):
        values = row.tolist()
        chosen = sorted(range(len(values)), key=lambda e: (-values[e], e))[: layer.config.top_k]
        keep = torch.zeros(len(values), dtype=torch.bool)
        keep[chosen] = True
        kept = torch.where(keep, row, 0)
        out.append(kept / kept.sum() if layer.config.normalize == "sum" else kept)
    return torch.stack(out) if out else logits


def step_of_loop(layer, x, dy, gate=topk_gate):
    """Return the step of the loop in float64; gate: (x, parameters, layer) -> [T, E]."""
    return formula_step(lambda leaf, p: loop(leaf, p, layer, gate(leaf, p, layer)), layer, x, dy)


def check(layer, x, dy, gate=topk_gate):
    """Assert that the layer computes the loop."""
    check_formula(lambda leaf, p: loop(leaf, p, layer, gate(leaf, p, layer)), layer, x, dy)
