"""Small MoeLoraFFN layers for the tests, and the expert loop they must equal."""

from __future__ import annotations

import copy

import torch
from torch import nn

from moelora_kernels import MoeLoraFFN
from moelora_kernels.testing import assert_within_budget
from support.linears import step

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
    """What `step` returns, from the loop in float64; gate: (x, parameters, layer) -> [T, E]."""
    p = {
        n: q.detach().double().requires_grad_(q.requires_grad) for n, q in layer.named_parameters()
    }
    leaf = x.detach().double().requires_grad_()
    y = loop(leaf, p, layer, gate(leaf, p, layer))
    trained = {n: q for n, q in p.items() if q.requires_grad}
    grads = torch.autograd.grad(
        y, (leaf, *trained.values()), dy.double(), allow_unused=True, materialize_grads=True
    )
    return {"y": y.detach(), "dx": grads[0], **dict(zip(trained, grads[1:], strict=True))}


def check(layer, x, dy, gate=topk_gate):
    """The layer against the loop: to 1e-10 in float64, within the budget below that."""
    truth, found = step_of_loop(layer, x, dy, gate), step(layer, x, dy)
    assert found.keys() == truth.keys()
    if x.dtype == torch.float64:
        for name in truth:
            # Sums of at most a few hundred terms of size 1, in another order.
            torch.testing.assert_close(found[name], truth[name], rtol=1e-10, atol=1e-10, msg=name)
        return
    twin = copy.deepcopy(layer)
    twin.config = layer.config.replace(impl="reference")
    assert_within_budget(found, truth, step(twin, x, dy), x.dtype)
