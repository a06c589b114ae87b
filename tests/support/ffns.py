"""Small MLPs, MoeLoraFFN layers over them, and the expert loop that these layers must equal."""

from __future__ import annotations

import torch
from torch import nn

from moelora_kernels import MoeLoraConfig, MoeLoraFFN
from support.compare import check_formula, formula_step

HIDDEN, INNER = 6, 10
MIXLORA = dict(num_experts=4, rank=(1, 2, 3, 2), alpha=3.0, top_k=2)


class GatedMlp(nn.Module):
    """An MLP like that of Llama: down(silu(gate(x)) * up(x))."""

    def __init__(self, hidden=HIDDEN, inner=INNER, bias=True):
        super().__init__()
        self.gate_proj = nn.Linear(hidden, inner, bias)
        self.up_proj = nn.Linear(hidden, inner, bias)
        self.down_proj = nn.Linear(inner, hidden, bias)
        self.act_fn = nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def make_ffn(
    dtype=torch.float64, mlp=None, seed=0, bias=True, activation="silu", preset=None, **options
):
    """Return a MoeLoraFFN whose B is not zero, so that its experts differ.

    mlp: the frozen MLP; by default a new one [HIDDEN, INNER].
    preset: the name of the preset whose options are the defaults; by default MIXLORA.
    """
    torch.manual_seed(seed)
    if preset is not None:
        options = {"config": MoeLoraConfig.preset(preset, **options)}
    else:
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
    """Return x and dy [*shape, HIDDEN] with values that bfloat16 represents exactly."""
    x, dy = (torch.randn(*shape, HIDDEN).bfloat16().to(dtype) for _ in range(2))
    return x, dy


def expert_blocks(p, layer, linear):
    """Yield scale, A_e [r, in] and B_e [out, r] of each expert of one of the three linears."""
    ranks = list(layer.config.ranks())
    a = p[f"{linear}_lora_A"].split(ranks)
    return zip(layer.config.scales(), a, p[f"{linear}_lora_B"].split(ranks, dim=1), strict=True)


def loop(x, p, layer, gate):
    """Return y of the original loop: every expert computes a whole FFN, frozen products included.

        y = sum_e gate_e (Wd a_e + bd + s Bd_e Ad_e a_e)

    An expert computes only the tokens that are routed to it. Their outputs are added to y.

    gate: [T, E], 0 if the token is not routed to the expert.
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
    """Return the gate [T, E]: softmax, the K largest of each token, divided by their sum.

    With normalize="none" they are not divided.
    """
    tokens = x.reshape(-1, x.shape[-1])
    logits = nn.functional.linear(tokens, p["router.weight"], p.get("router.bias"))
    out = []
    for row in logits.softmax(dim=1):
        values = row.tolist()
        experts = sorted(range(len(values)), key=lambda e: (-values[e], e))[: layer.config.top_k]
        keep = torch.zeros(len(values), dtype=torch.bool)
        keep[experts] = True
        kept = torch.where(keep, row, 0)
        out.append(kept / kept.sum() if layer.config.normalize == "sum" else kept)
    return torch.stack(out) if out else logits


def step_of_loop(layer, x, dy, gate=topk_gate):
    """Return the step of the loop in float64; gate: (x, parameters, layer) -> [T, E]."""
    return formula_step(lambda leaf, p: loop(leaf, p, layer, gate(leaf, p, layer)), layer, x, dy)


def check(layer, x, dy, gate=topk_gate):
    """Assert that the layer computes the loop."""
    check_formula(lambda leaf, p: loop(leaf, p, layer, gate(leaf, p, layer)), layer, x, dy)
