"""The formulas of presets of related methods, and models with the inputs of their gates."""

import torch
from torch import nn

from moelora_kernels import (
    MoeLoraAdapter,
    MoeLoraConfig,
    MoeLoraLinear,
    adapter_parameters,
    set_tasks,
)
from moelora_kernels.nn import (
    SequenceGate,
)
from support.compare import formula_step
from support.formulas.token_gates import blocks_of, by_token, first_largest, frozen

IN, OUT, TASK = 12, 10, 7
# Sums of at most a few hundred terms of size 1, in another order.
TIGHT = dict(rtol=1e-10, atol=1e-10)
LORAS = ((2, 8.0), (5, 4.0), (3, 6.0), (2, 1.0))


def ffn(dtype=torch.float32):
    return nn.Sequential(
        nn.Linear(IN, 16, dtype=dtype), nn.SiLU(), nn.Linear(16, IN, dtype=dtype)
    ).requires_grad_(False)


class Model(nn.Module):
    """One layer of a preset, and the modules and inputs that its gate is computed from."""

    def __init__(self, preset, shape, dtype, **options):
        super().__init__()
        torch.manual_seed(0)
        config = MoeLoraConfig.preset(preset, **options)
        linear = nn.Linear(IN, OUT, dtype=dtype)
        if preset in ("xlora", "arrow"):
            loras = [
                (torch.randn(r, IN) * 0.3, torch.randn(OUT, r) * 0.3, alpha) for r, alpha in LORAS
            ]
            self.layer = MoeLoraLinear.from_loras(linear, loras, config)
        elif preset == "pesc":
            name = str(dtype).removeprefix("torch.")
            self.layer = MoeLoraAdapter(ffn(dtype), IN, config, adapter_dtype=name)
        else:
            if preset == "hmora":
                config = config.replace(task_embedding_dim=TASK)
            self.layer = MoeLoraLinear.from_linear(linear, config)
        with torch.no_grad():
            for q in adapter_parameters(self.layer):
                if q.requires_grad or preset == "flylora":
                    q.normal_(std=0.5)
            for name, buffer in self.layer.named_buffers():
                if name.endswith("balance.bias"):
                    buffer.normal_(std=0.5)
        experts = self.layer.config.num_experts
        if preset == "octavius":
            self.gate = SequenceGate(IN, experts, dtype=dtype)
            self.embeddings = torch.randn(shape[0], 4, IN, dtype=dtype)
        elif preset == "hmora":
            self.vectors = nn.Parameter(torch.randn(shape[0], TASK, dtype=dtype))
        elif preset == "xlora":
            self.classifier = nn.Linear(IN, experts, dtype=dtype)
            self.hidden = torch.randn(*shape, IN, dtype=dtype)
        self.eval()

    def forward(self, x):
        if hasattr(self, "gate"):
            set_tasks(self, self.gate(self.embeddings))
        elif hasattr(self, "vectors"):
            set_tasks(self, self.vectors)
        elif hasattr(self, "classifier"):
            return self.layer(x, self.classifier(self.hidden).softmax(dim=-1))
        return self.layer(x)


def loop_octavius(x, p, m, extra):
    """Return y = W x + sum_e g_e B_e A_e x, with g the two largest of softmax(mean_s W s).

    g is divided by its sum. There is no scale.
    """
    raw = torch.einsum("bnd,ed->bne", m.embeddings.double(), extra["gate.linear.weight"])
    raw = raw.mean(dim=1).softmax(dim=-1)
    y = []
    for b, sequence in enumerate(x):
        first, second = first_largest(raw[b], 2)
        total = raw[b, first] + raw[b, second]
        delta = 0
        for e, (a_e, b_e) in enumerate(blocks_of(p, 4)):
            if e in (first, second):
                delta = delta + raw[b, e] / total * (sequence @ a_e.t()) @ b_e.t()
        y.append(frozen(sequence, p) + delta)
    return torch.stack(y)


def loop_hmora(x, p, m, extra):
    """Return y with the gate softmax(the two largest of w) and the scale alpha / sqrt(r).

    w = (1 - s) softmax(token(x)) + s softmax(task(t)).
    """

    def mlp(value, name):
        w1, b1 = p[f"router.{name}.fc1.weight"], p[f"router.{name}.fc1.bias"]
        w2, b2 = p[f"router.{name}.fc2.weight"], p[f"router.{name}.fc2.bias"]
        return (w2 @ (w1 @ value + b1).clamp_min(0) + b2).softmax(dim=0)

    c, share = m.layer.config, 1 / (1 + torch.exp(-p["router.mixture.share"]))
    out = []
    for b, sequence in enumerate(x):
        for token in sequence:
            w = (1 - share) * mlp(token, "token") + share * mlp(extra["vectors"][b], "task")
            selected = first_largest(w, 2)
            gate = torch.stack([w[e] for e in selected]).softmax(dim=0)
            y = frozen(token, p)
            for g, e in zip(gate, selected, strict=True):
                b_e = p["lora_B"].chunk(c.num_experts, dim=1)[e]
                a_e = p["lora_A"] if c.share == "A" else p["lora_A"].chunk(c.num_experts)[e]
                y = y + c.alpha / c.rank**0.5 * g * (b_e @ (a_e @ token))
            out.append(y)
    return torch.stack(out).view(*x.shape[:-1], -1)


def experts_of_loras(p):
    """Yield A_e, B_e and the scale of every expert of LORAS."""
    start = 0
    for rank, alpha in LORAS:
        columns = slice(start, start + rank)
        start += rank
        yield p["lora_A"][columns], p["lora_B"][:, columns], alpha / rank


def loop_xlora(x, p, m, extra):
    """Return y = W x + sum_e alpha_e / r_e B_e A_e (g_e x), g = softmax(a classifier's logits)."""
    logits = m.hidden.double() @ extra["classifier.weight"].t() + extra["classifier.bias"]
    gates = logits.softmax(dim=-1)
    y = frozen(x, p)
    for e, (a, b, scale) in enumerate(experts_of_loras(p)):
        y = y + ((x * gates[..., e : e + 1]) @ a.t()) @ b.t() * scale
    return y


def loop_arrow(x, p, m, extra):
    """Return y with the gate softmax(the three largest |x v_e|); v_e comes from B_e A_e."""
    experts = list(experts_of_loras(p))
    v = torch.stack([torch.linalg.svd(b @ a).Vh[0] for a, b, _ in experts])
    out = []
    for token in x.reshape(-1, IN):
        similarity = (v @ token).abs()
        selected = first_largest(similarity, 3)
        gate = torch.stack([similarity[e] for e in selected]).softmax(dim=0)
        y = frozen(token, p)
        for g, e in zip(gate, selected, strict=True):
            a, b, scale = experts[e]
            y = y + g * scale * (b @ (a @ token))
        out.append(y)
    return torch.stack(out).view(*x.shape[:-1], -1)


def loop_smora(x, p, m, extra):
    """Return y with one rank per expert: those with the largest W x + b, gate softmax(W x)."""
    c = m.layer.config

    def gate_of_token(token):
        logits = p["router.gate.weight"] @ token
        selected = first_largest(logits + p["router.balance.bias"], c.top_k)
        gate = torch.stack([logits[e] for e in selected]).softmax(dim=0)
        return zip(selected, gate, strict=True)

    return by_token(x, p, c, gate_of_token, scale=c.alpha / c.num_experts)


def loop_flylora(x, p, m, extra):
    """Return y = W x + alpha / R B (mask h), with h = A x; mask: the largest of |h + d|."""
    c = m.layer.config
    h = x @ p["lora_A"].t()
    biased = (h + p["router.balance.bias"]).abs().reshape(-1, c.num_experts)
    mask = torch.zeros_like(biased)
    for t, row in enumerate(biased):
        mask[t, first_largest(row, c.top_k)] = 1
    return frozen(x, p) + c.alpha / c.num_experts * (h * mask.view_as(h)) @ p["lora_B"].t()


def loop_riemannian(x, p, m, extra):
    """Return y = W x + sum_e (sqrt(g_e) y_e + (g_e - sqrt(g_e)) y_e.detach()).

    sqrt(g_e) has no gradient: the experts see sqrt(g_e), the router sees g_e.
    """
    c = m.layer.config
    g = (x @ p["router.weight"].t()).softmax(dim=-1).reshape(-1, c.num_experts)
    mask = torch.zeros_like(g)
    for t, row in enumerate(g):
        mask[t, first_largest(row, c.top_k)] = 1
    g = g * mask
    g = (g / g.sum(dim=-1, keepdim=True)).view(*x.shape[:-1], -1)
    y = frozen(x, p)
    for e, (a, b) in enumerate(blocks_of(p, c.num_experts)):
        output, gate = c.alpha / c.rank * (x @ a.t()) @ b.t(), g[..., e : e + 1]
        root = (gate**0.5).detach()
        y = y + root * output + (gate - root) * output.detach()
    return y


def loop_pesc(x, p, m, extra):
    """Return sum_j w_j (z + up_j(gelu(down_j(z)))), w = softmax(the two largest of W x).

    z is the output of the frozen FFN.
    """
    c = m.layer.config
    experts = list(blocks_of(p, c.num_experts))
    out = []
    for token in x.reshape(-1, IN):
        hidden = p["base_layer.0.weight"] @ token + p["base_layer.0.bias"]
        hidden = hidden * hidden.sigmoid()
        z = p["base_layer.2.weight"] @ hidden + p["base_layer.2.bias"]
        logits = p["router.weight"] @ token
        selected = first_largest(logits, 2)
        gate = torch.stack([logits[e] for e in selected]).softmax(dim=0)
        y = 0
        for g, e in zip(gate, selected, strict=True):
            down, up = experts[e]
            h = down @ z
            y = y + g * (z + up @ (h * 0.5 * (1 + torch.erf(h / 2**0.5))))
        out.append(y)
    return torch.stack(out).view(x.shape)


LOOPS = {
    "octavius": loop_octavius,
    "hmora": loop_hmora,
    "xlora": loop_xlora,
    "arrow": loop_arrow,
    "smora": loop_smora,
    "flylora": loop_flylora,
    "riemannian": loop_riemannian,
    "pesc": loop_pesc,
}
LINEARS = [preset for preset in LOOPS if preset != "pesc"]


def random_step(preset, shape, dtype):
    """Return x and dy."""
    out = IN if preset == "pesc" else OUT
    return (torch.randn(*shape, size, dtype=dtype) for size in (IN, out))


def step_of_loop(preset, model, x, dy, dtype=torch.float64):
    """Return the step of the method's formula in dtype."""

    def formula(leaf, values):
        layer = {n.removeprefix("layer."): q for n, q in values.items() if n.startswith("layer.")}
        return LOOPS[preset](leaf, layer, model, values)

    return formula_step(formula, model, x, dy, dtype)


def balanced_layer(**options):
    """Return a layer whose router has a selection bias."""
    torch.manual_seed(0)
    options = dict(num_experts=6, rank=2, top_k=2, balance_rate=0.05, normalize="sum") | options
    layer = MoeLoraLinear(IN, OUT, dtype=torch.float64, **options)
    torch.nn.init.normal_(layer.lora_B)
    return layer
