"""Presets of relatives, each against its original's formula written out in plain PyTorch."""

import copy
import re
from pathlib import Path

import pytest
import torch
from op_cases import KERNEL_DEVICE, Case, Inputs, compare, forward_of
from preset_loops import blocks_of, first_largest, frozen
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from moelora_kernels import (
    MoeLoraAdapter,
    MoeLoraConfig,
    MoeLoraFFN,
    MoeLoraGroup,
    MoeLoraLinear,
    adapter_parameters,
    adapter_state_dict,
    collect_aux_loss,
    load_adapter_state_dict,
    record_routing,
    reference,
    replace_linears,
    set_prototypes,
    set_tasks,
    update_balance,
    warmup,
)
from moelora_kernels.nn import (
    BalancedRouter,
    PrototypeRouter,
    SequenceGate,
    TokenTaskRouter,
    lora_prototypes,
)
from moelora_kernels.testing import assert_within_budget

IN, OUT, TASK = 12, 10, 7
# Sums of at most a few hundred terms of size 1, in another order.
TIGHT = dict(rtol=1e-10, atol=1e-10)
LORAS = ((2, 8.0), (5, 4.0), (3, 6.0), (2, 1.0))


def ffn(dtype=torch.float32):
    return nn.Sequential(
        nn.Linear(IN, 16, dtype=dtype), nn.SiLU(), nn.Linear(16, IN, dtype=dtype)
    ).requires_grad_(False)


class Model(nn.Module):
    """One layer of a preset, and beside it what the method takes its gate from."""

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
            own = str(dtype).removeprefix("torch.")
            self.layer = MoeLoraAdapter(ffn(dtype), IN, config, adapter_dtype=own)
        else:
            if preset == "hmora":
                config = config.replace(task_embedding_dim=TASK)
            self.layer = MoeLoraLinear.from_linear(linear, config)
        with torch.no_grad():
            for q in adapter_parameters(self.layer):
                if q.requires_grad or preset == "flylora":
                    q.normal_(std=0.5)
            for name, buffer in self.layer.named_buffers():
                if name.endswith("balance_bias"):
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


def by_token(x, p, gate_of_token, scale):
    """y = W x + sum_e g_e scale B_e A_e x over the (expert, gate) pairs of each token."""
    tokens = x.reshape(-1, x.shape[-1])
    out = []
    for t, token in enumerate(tokens):
        y = frozen(token, p)
        for e, gate in gate_of_token(t, token):
            a, b = p["lora_A"][e : e + 1], p["lora_B"][:, e : e + 1]
            y = y + scale * gate * (b @ (a @ token))
        out.append(y)
    return torch.stack(out).view(*x.shape[:-1], -1)


def loop_octavius(x, p, m, extra):
    """out = sum_e g_e B_e A_e x, unscaled; g: the two largest of softmax(mean_s W s), to sum 1."""
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
    """w = (1 - s) softmax(token(x)) + s softmax(task(t)); softmax of its two largest; rsLoRA."""

    def mlp(value, name):
        w1, b1 = p[f"router.{name}.fc1.weight"], p[f"router.{name}.fc1.bias"]
        w2, b2 = p[f"router.{name}.fc2.weight"], p[f"router.{name}.fc2.bias"]
        return (w2 @ (w1 @ value + b1).clamp_min(0) + b2).softmax(dim=0)

    c, share = m.layer.config, 1 / (1 + torch.exp(-p["router.share"]))
    out = []
    for b, sequence in enumerate(x):
        for token in sequence:
            w = (1 - share) * mlp(token, "token") + share * mlp(extra["vectors"][b], "task")
            kept = first_largest(w, 2)
            gate = torch.stack([w[e] for e in kept]).softmax(dim=0)
            y = frozen(token, p)
            for g, e in zip(gate, kept, strict=True):
                b_e = p["lora_B"].chunk(c.num_experts, dim=1)[e]
                a_e = p["lora_A"] if c.share == "A" else p["lora_A"].chunk(c.num_experts)[e]
                y = y + c.alpha / c.rank**0.5 * g * (b_e @ (a_e @ token))
            out.append(y)
    return torch.stack(out).view(*x.shape[:-1], -1)


def experts_of_loras(p):
    start = 0
    for rank, alpha in LORAS:
        own = slice(start, start + rank)
        start += rank
        yield p["lora_A"][own], p["lora_B"][:, own], alpha / rank


def loop_xlora(x, p, m, extra):
    """y = W x + sum_e alpha_e / r_e B_e A_e (g_e x), g = softmax of a classifier elsewhere."""
    logits = m.hidden.double() @ extra["classifier.weight"].t() + extra["classifier.bias"]
    gates = logits.softmax(dim=-1)
    y = frozen(x, p)
    for e, (a, b, scale) in enumerate(experts_of_loras(p)):
        y = y + ((x * gates[..., e : e + 1]) @ a.t()) @ b.t() * scale
    return y


def loop_arrow(x, p, m, extra):
    """sim_e = |x v_e|, v_e from the whole of B_e A_e; softmax of the three largest."""
    experts = list(experts_of_loras(p))
    v = torch.stack([torch.linalg.svd(b @ a).Vh[0] for a, b, _ in experts])
    out = []
    for token in x.reshape(-1, IN):
        similarity = (v @ token).abs()
        kept = first_largest(similarity, 3)
        gate = torch.stack([similarity[e] for e in kept]).softmax(dim=0)
        y = frozen(token, p)
        for g, e in zip(gate, kept, strict=True):
            a, b, scale = experts[e]
            y = y + g * scale * (b @ (a @ token))
        out.append(y)
    return torch.stack(out).view(*x.shape[:-1], -1)


def loop_smora(x, p, m, extra):
    """Every rank is an expert: the largest of W x + b, weighed by the softmax of their W x."""
    c = m.layer.config

    def gate_of_token(_, token):
        logits = p["router.gate.weight"] @ token
        kept = first_largest(logits + p["router.balance_bias"], c.top_k)
        gate = torch.stack([logits[e] for e in kept]).softmax(dim=0)
        return zip(kept, gate, strict=True)

    return by_token(x, p, gate_of_token, c.alpha / c.num_experts)


def loop_flylora(x, p, m, extra):
    """h = A x; y = W x + alpha / R B (mask h), mask: the largest of |h + d|."""
    c = m.layer.config
    h = x @ p["lora_A"].t()
    biased = (h + p["router.balance_bias"]).abs().reshape(-1, c.num_experts)
    mask = torch.zeros_like(biased)
    for t, row in enumerate(biased):
        mask[t, first_largest(row, c.top_k)] = 1
    return frozen(x, p) + c.alpha / c.num_experts * (h * mask.view_as(h)) @ p["lora_B"].t()


def loop_riemannian(x, p, m, extra):
    """sqrt(g) and what is missing to g beside a constant copy of the expert's output."""
    c = m.layer.config
    g = (x @ p["router.weight"].t()).softmax(dim=-1).reshape(-1, c.num_experts)
    chosen = torch.zeros_like(g)
    for t, row in enumerate(g):
        chosen[t, first_largest(row, c.top_k)] = 1
    g = g * chosen
    g = (g / g.sum(dim=-1, keepdim=True)).view(*x.shape[:-1], -1)
    y = frozen(x, p)
    for e, (a, b) in enumerate(blocks_of(p, c.num_experts)):
        output, gate = c.alpha / c.rank * (x @ a.t()) @ b.t(), g[..., e : e + 1]
        root = (gate**0.5).detach()
        y = y + root * output + (gate - root) * output.detach()
    return y


def loop_pesc(x, p, m, extra):
    """sum_j w_j (out + up_j(gelu(down_j(out)))), w = softmax of the 2 largest of W x."""
    c = m.layer.config
    experts = list(blocks_of(p, c.num_experts))
    out = []
    for token in x.reshape(-1, IN):
        hidden = p["base_layer.0.weight"] @ token + p["base_layer.0.bias"]
        hidden = hidden * hidden.sigmoid()
        z = p["base_layer.2.weight"] @ hidden + p["base_layer.2.bias"]
        logits = p["router.weight"] @ token
        kept = first_largest(logits, 2)
        gate = torch.stack([logits[e] for e in kept]).softmax(dim=0)
        y = 0
        for g, e in zip(gate, kept, strict=True):
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


def gradients(y, x, parameters, dy):
    """y, dx and the gradient of all that trains, by name; zero where no way leads to it."""
    trained = {n: q for n, q in parameters if q.requires_grad}
    grads = torch.autograd.grad(
        y, (x, *trained.values()), dy, allow_unused=True, materialize_grads=True
    )
    return {"y": y.detach(), "dx": grads[0], **dict(zip(trained, grads[1:], strict=True))}


def step(model, x, dy):
    leaf = x.detach().clone().requires_grad_()
    return gradients(model(leaf), leaf, model.named_parameters(), dy)


def draw(preset, shape, dtype):
    """x and dy."""
    out = IN if preset == "pesc" else OUT
    return (torch.randn(*shape, size, dtype=dtype) for size in (IN, out))


def step_of_loop(preset, model, x, dy, dtype=torch.float64):
    """What `step` returns, from the method's formula in float64."""
    values = {n: q.detach().to(dtype) for n, q in model.state_dict().items()}
    for name, q in model.named_parameters():
        values[name].requires_grad_(q.requires_grad)
    own = {n.removeprefix("layer."): q for n, q in values.items() if n.startswith("layer.")}
    leaf = x.detach().to(dtype).requires_grad_()
    y = LOOPS[preset](leaf, own, model, values)
    return gradients(y, leaf, values.items(), dy.to(dtype))


SHAPES = [(1, 5), (4, 3), (6, 1), (3, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("preset", LOOPS)
def test_preset_is_its_originals_formula(preset, shape):
    model = Model(preset, shape, torch.float64)
    x, dy = draw(preset, shape, torch.float64)
    found, truth = step(model, x, dy), step_of_loop(preset, model, x, dy)
    assert found.keys() == truth.keys()
    for name in truth:
        torch.testing.assert_close(found[name], truth[name], **TIGHT, msg=name)
        # No gradient of this formula is zero by accident of the test.
        assert truth[name].abs().max() > 1e-6, name


@pytest.mark.parametrize("impl", ("wide", "grouped", "reference"))
@pytest.mark.parametrize("preset", ("hmora", "arrow", "riemannian"))
def test_sparse_gates_in_every_formulation(preset, impl):
    """The root of the gate belongs to the Function, not to one of its formulations."""
    options = {"share": "none"} if preset == "hmora" else {}
    model = Model(preset, (2, 4), torch.float64, impl=impl, **options)
    x, dy = draw(preset, (2, 4), torch.float64)
    truth = step_of_loop(preset, model, x, dy)
    for name, value in step(model, x, dy).items():
        torch.testing.assert_close(value, truth[name], **TIGHT, msg=name)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("preset", LOOPS)
def test_preset_in_low_precision(preset, dtype):
    """It may cost what the reference in that dtype costs, twice, and not more."""
    model = Model(preset, (4, 6), dtype)
    twin = copy.deepcopy(model)
    x, dy = draw(preset, (4, 6), dtype)
    found, truth = step(model, x, dy), step_of_loop(preset, model, x, dy)
    if preset == "pesc":
        # An adapter has no reference but its formula.
        yardstick = step_of_loop(preset, model, x, dy, dtype)
    else:
        twin.layer.config = model.layer.config.replace(impl="reference")
        yardstick = step(twin, x, dy)
    for name in [n for n in truth if truth[n].numel() == 1]:
        # A single number may happen to cancel; its parity is that of float64.
        for values in (found, truth, yardstick):
            values.pop(name)
    assert_within_budget(found, truth, yardstick, dtype)


def test_every_preset_has_a_formula():
    """A preset that no test compares with anything is a claim."""
    from test_presets import ELSEWHERE
    from test_presets import LOOPS as OTHERS

    from moelora_kernels.presets import OF_FFNS, PRESETS

    assert {*PRESETS} == {*OTHERS, *LOOPS, *OF_FFNS}
    assert {*ELSEWHERE} == {*LOOPS, *OF_FFNS}


# --- A whole model -------------------------------------------------------------------------------


def tiny_model(preset, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(IN, OUT), nn.Tanh(), nn.Linear(OUT, IN))
    config = MoeLoraConfig.preset(preset, dropout=0.0)
    replace_linears(model, config, ["0", "2"])
    with torch.no_grad():
        for q in adapter_parameters(model):
            q.normal_(std=0.3)
    return prepare(model, preset)


def prepare(model, preset, batch=2):
    if preset in ("octavius", "xlora"):
        set_tasks(model, torch.rand(batch, 4))
    elif preset == "hmora":
        set_tasks(model, torch.randn(batch, 64))
    elif preset == "arrow":
        set_prototypes(model)
    return model


@pytest.mark.parametrize("preset", LINEARS)
def test_a_model_trains_and_its_adapter_comes_back(preset):
    """Also what is no parameter: prototypes, the bias of the selection, a frozen A."""
    model, other = tiny_model(preset), tiny_model(preset, seed=1)
    if preset in ("smora", "flylora"):
        model(torch.randn(2, 3, IN))
        update_balance(model)
    x = torch.randn(2, 3, IN, requires_grad=True)
    model(x).square().sum().backward()
    config = model[0].config
    for layer in (model[0], model[2]):
        assert (layer.lora_A.grad is not None) == (config.freeze == "none")
        assert (layer.lora_B.grad is not None) == (config.freeze != "AB")
    state = adapter_state_dict(model)
    has = {"arrow": "0.router.prototypes", "smora": "0.router.balance_bias"}
    assert has.get(preset, "0.lora_A") in state
    for base, own in ((0, "0."), (2, "2.")):
        other[base].base_layer.load_state_dict(model[base].base_layer.state_dict())
        assert any(key.startswith(own) for key in state)
    load_adapter_state_dict(other, {k: v.detach().clone() for k, v in state.items()})
    torch.manual_seed(5)
    prepare_of = {"octavius", "xlora", "hmora"}
    if preset in prepare_of:
        for m in (model, other):
            torch.manual_seed(5)
            prepare(m, preset)
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("preset", LINEARS)
def test_siblings_are_themselves_alone(preset):
    torch.manual_seed(0)
    config = MoeLoraConfig.preset(preset, dropout=0.0)
    layers = [MoeLoraLinear(IN, o, config=config) for o in (5, 8)]
    with torch.no_grad():
        for layer in layers:
            for q in adapter_parameters(layer):
                q.normal_(std=0.3)
    group = prepare(MoeLoraGroup(q=layers[0], k=layers[1]), preset)
    x = torch.randn(2, 3, IN)
    alone = [layer(x) for layer in layers]
    for y, expected in zip(group(x), alone, strict=True):
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("preset", LINEARS)
def test_on_the_meta_device(preset):
    with torch.device("meta"):
        layer = MoeLoraLinear(IN, OUT, config=MoeLoraConfig.preset(preset))
        x = torch.randn(2, 3, IN)
        if preset == "hmora":
            set_tasks(layer, torch.randn(2, 64))
        gates = torch.rand(2, 4) if preset in ("octavius", "xlora") else None
        assert layer(x, gates).shape == (2, 3, OUT)


@pytest.mark.parametrize("preset", ("riemannian", "smora", "flylora", "arrow"))
def test_compiles_without_graph_breaks(preset):
    model = tiny_model(preset)
    x = torch.randn(2, 3, IN, requires_grad=True)
    expected = torch.autograd.grad(model(x).sum(), x)[0]
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(x).sum(), x)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# --- Adapters with an activation -----------------------------------------------------------------


PESC = MoeLoraConfig.preset("pesc")


def test_an_adapter_starts_as_its_base_and_leaves_it_as_it_is():
    """PESC trains plain LoRA inside the FFN beside its adapters."""
    base = ffn().train()
    base[2] = MoeLoraLinear.from_linear(base[2], MoeLoraConfig.preset("lora"))
    layer = MoeLoraAdapter(base, IN, MoeLoraConfig.preset("pesc"))
    x = torch.randn(2, 3, IN)
    assert torch.equal(layer(x), base(x))
    trained = {n for n, q in layer.named_parameters() if q.requires_grad}
    assert trained == {
        "lora_A", "lora_B", "router.weight", "base_layer.2.lora_A", "base_layer.2.lora_B",
    }  # fmt: skip


def test_an_adapter_saves_what_every_layer_saves():
    layer = MoeLoraAdapter(ffn(), IN, MoeLoraConfig.preset("pesc", num_experts=3, rank=2))
    assert set(adapter_state_dict(layer)) == {"lora_A", "lora_B", "router.weight"}
    layer(torch.randn(2, 3, IN))
    loss = collect_aux_loss(layer)
    loss.backward()
    assert loss > 0
    assert layer.router.weight.grad.abs().max() > 0


def test_warmup_runs_adapters_and_leaves_loads_alone():
    model = nn.ModuleList([balanced_layer().float(), MoeLoraAdapter(ffn(torch.bfloat16), IN, PESC)])
    model[0](torch.randn(5, IN))
    load = model[0].router.load.clone()
    warmup(model, tokens=(2,))
    assert torch.equal(model[0].router.load, load)


def test_an_adapter_keeps_rank_space_only():
    """Beside what the FFN returns nothing of the size T x I, and nothing of T x K x I."""
    layer = MoeLoraAdapter(nn.Identity(), 400, MoeLoraConfig.preset("pesc", num_experts=4, rank=2))
    x, sizes = torch.randn(50, 400, requires_grad=True), {}

    def keep(tensor):
        sizes[tensor.untyped_storage().data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x)
    own = {q.untyped_storage().data_ptr() for q in (x, *layer.parameters())}
    others = [size for pointer, size in sizes.items() if pointer not in own]
    assert max(others) <= 50 * 8


def test_a_nan_in_an_adapter_nobody_chose_stays_there():
    layer = MoeLoraAdapter(ffn(), IN, MoeLoraConfig.preset("pesc", num_experts=3, rank=2))
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.lora_A[4:] = torch.nan
    assert layer(torch.randn(3, IN)).isfinite().all()


@pytest.mark.parametrize(
    ("name", "options"),
    (
        ("rank_activation", dict(rank_activation=None)),
        ("router", dict(router=None, top_k=None, aux=())),
        ("router", dict(router="task", num_tasks=2)),
        ("share", dict(share="A")),
        ("grad_gate", dict(grad_gate="sqrt")),
        ("dropout", dict(dropout=0.1)),
        ("impl", dict(impl="grouped")),
        ("init", dict(init="svd_segments")),
    ),
    ids=str,
)
def test_what_an_adapter_has_not_is_named(name, options):
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        MoeLoraAdapter(ffn(), IN, MoeLoraConfig.preset("pesc", **options))


def test_an_activation_belongs_to_adapters():
    config = MoeLoraConfig.preset("pesc")
    for make in (MoeLoraLinear, MoeLoraFFN):
        with pytest.raises(ValueError, match=r"^rank_activation\b"):
            make(IN, IN, config=config)
    with pytest.raises(ValueError, match=r"^rank_activation\b"):
        MoeLoraConfig(rank_activation="tanh")
    layer = MoeLoraAdapter(ffn(), IN, config)
    with pytest.raises(ValueError, match=r"^siblings: a MoeLoraAdapter runs alone"):
        MoeLoraGroup(a=layer)(torch.randn(2, IN))
    with pytest.raises(ValueError, match=r"^base: expected an output"):
        MoeLoraAdapter(nn.Linear(IN, OUT), IN, config)(torch.randn(2, IN))


# --- Frozen experts ------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """The ops that run, by name, with their arguments."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append((func.name(), args))
        return func(*args, **(kwargs or {}))


def test_frozen_experts_cost_no_gradient_of_theirs():
    """dx and the classifier's gradient without dA and dB, and no state of an optimizer."""
    model = Model("xlora", (2, 3), torch.float32)
    x = torch.randn(2, 3, IN, requires_grad=True)
    optimizer = torch.optim.AdamW(model.parameters())
    y = model(x)
    with Calls() as calls:
        y.sum().backward()
    backward = [args for name, args in calls.seen if name.endswith("::wide_backward")]
    assert [args[-1] for args in backward] == [False]
    optimizer.step()
    assert {id(q) for q in optimizer.state} == {id(q) for q in model.classifier.parameters()}
    assert x.grad.abs().max() > 0


def test_octavius_does_not_scale():
    """Its forward leaves out alpha / r, which happens to be 1 for the preset's own rank."""
    assert MoeLoraConfig.preset("octavius", rank=4).scales() == (1.0,) * 4


def test_what_trains():
    """FlyLoRA draws A and leaves it; X-LoRA and Arrow leave both, and Arrow has nothing else."""

    def trained(layer):
        return {n for n, q in layer.named_parameters() if q.requires_grad}

    assert trained(MoeLoraLinear(IN, OUT, freeze="A", top_k=2)) == {"lora_B", "router.weight"}
    for preset, expected in (("flylora", {"lora_B"}), ("xlora", set()), ("arrow", set())):
        assert trained(MoeLoraLinear(IN, OUT, config=MoeLoraConfig.preset(preset))) == expected


def test_from_loras_is_the_sum_of_peft_loras():
    """alpha / r and alpha / sqrt(r) of each; gates of 1 add them all up."""
    torch.manual_seed(0)
    linear = nn.Linear(IN, OUT)
    loras = [(torch.randn(r, IN), torch.randn(OUT, r), alpha) for r, alpha in LORAS]
    x = torch.randn(4, IN)
    for scaling, power in (("alpha/r", 1.0), ("alpha/sqrt(r)", 0.5)):
        layer = MoeLoraLinear.from_loras(linear, loras, router=None, scaling=scaling)
        expected = linear(x) + sum(
            alpha / len(a) ** power * (x @ a.t()) @ b.t() for a, b, alpha in loras
        )
        torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
        assert layer.config.num_experts == len(loras)


BAD_LORAS = [
    ("loras", [], {}),
    ("loras", [(torch.zeros(2, IN + 1), torch.zeros(OUT, 2), 1.0)], {}),
    ("loras", [(torch.zeros(2, IN), torch.zeros(OUT, 3), 1.0)], {}),
    ("loras", [(torch.zeros(0, IN), torch.zeros(OUT, 0), 1.0)], {}),
    ("loras", [(torch.zeros(IN), torch.zeros(OUT, 1), 1.0)], {}),
    ("scaling", [(torch.zeros(2, IN), torch.zeros(OUT, 2), 1.0)], dict(scaling="alpha/R")),
    ("share", [(torch.zeros(2, IN), torch.zeros(OUT, 2), 1.0)], dict(share="A")),
    (
        "shared_expert",
        [(torch.zeros(2, IN), torch.zeros(OUT, 2), 1.0)],
        dict(shared_expert="always"),
    ),
    ("init", [(torch.zeros(2, IN), torch.zeros(OUT, 2), 1.0)], dict(init="svd_segments")),
    ("top_k", [(torch.zeros(2, IN), torch.zeros(OUT, 2), 1.0)], dict(top_k=3)),
]


@pytest.mark.parametrize(("name", "loras", "options"), BAD_LORAS, ids=range(len(BAD_LORAS)))
def test_loras_that_do_not_fit_are_named(name, loras, options):
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        MoeLoraLinear.from_loras(nn.Linear(IN, OUT), loras, **options)


def test_the_example_in_readme_runs():
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    examples = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    (example,) = [text for text in examples if "from_loras" in text]
    loras = [(torch.randn(r, IN), torch.randn(OUT, r), alpha) for r, alpha in LORAS]
    names = {"linear": nn.Linear(IN, OUT), "loras": loras, "x": torch.randn(2, 3, IN)}
    names["gates"] = torch.rand(2, 3, len(LORAS))
    exec(compile(example, "README.md", "exec"), names)
    assert names["y"].shape == (2, 3, OUT)


# --- Prototypes ----------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", ((2, 5, 3), (1,), (20, 4)), ids=str)
def test_prototypes_are_the_first_right_singular_vectors(ranks):
    """Up to their sign, from r x r only, also where r is above I and O."""
    torch.manual_seed(0)
    a, b = torch.randn(sum(ranks), IN), torch.randn(OUT, sum(ranks))
    found = lora_prototypes(a, b, ranks)
    start = 0
    for v, rank in zip(found, ranks, strict=True):
        own = slice(start, start + rank)
        start += rank
        truth = torch.linalg.svd(b[:, own].double() @ a[own].double()).Vh[0]
        # float32 rounds each of 12 components.
        assert abs(float(v.double() @ truth)) == pytest.approx(1.0, abs=1e-6)
    assert found.dtype == a.dtype


def test_a_new_expert_has_no_direction():
    """B = 0: no direction, rather than one that the decomposition happens to give."""
    assert not lora_prototypes(torch.randn(4, IN), torch.zeros(OUT, 4), (2, 2)).any()
    layer = MoeLoraLinear(IN, OUT, config=MoeLoraConfig.preset("arrow"))
    x = torch.randn(3, IN)
    assert torch.equal(layer(x), layer.base_layer(x))


def test_prototypes_follow_the_experts_when_told_to():
    model = Model("arrow", (2, 3), torch.float64)
    before = model.layer.router.prototypes.clone()
    with torch.no_grad():
        model.layer.lora_A.normal_()
    assert torch.equal(model.layer.router.prototypes, before)
    set_prototypes(model)
    assert not torch.equal(model.layer.router.prototypes, before)
    with pytest.raises(ValueError, match=r"^model: no layer with router='prototype'"):
        set_prototypes(nn.Linear(2, 2))


def test_a_prototype_router_under_a_selection_bias():
    layer = MoeLoraLinear(IN, OUT, router="prototype", num_experts=4, top_k=2, balance_rate=0.1)
    torch.nn.init.normal_(layer.lora_B)
    set_prototypes(layer)
    assert isinstance(layer.router.gate, PrototypeRouter)
    assert layer.router.gate.prototypes.any()


# --- Loss-free balancing -------------------------------------------------------------------------


def balanced_layer(**options):
    torch.manual_seed(0)
    options = dict(num_experts=6, rank=2, top_k=2, balance_rate=0.05, normalize="sum") | options
    layer = MoeLoraLinear(IN, OUT, dtype=torch.float64, **options)
    torch.nn.init.normal_(layer.lora_B)
    return layer


def selected(layer, x):
    with record_routing(layer), torch.no_grad():
        layer(x)
        return layer.record.weights != 0


def test_the_bias_moves_against_the_load_of_all_forwards_since():
    """+-rate by the sign of what is missing to the mean; two micro-batches count as one step."""
    layer = balanced_layer()
    torch.manual_seed(0)
    x = torch.randn(2, 7, IN, dtype=torch.float64)
    loads = [selected(layer.eval(), part).sum(dim=0).double() for part in x]
    load = sum(loads)
    # Neither of the two alone would move the bias like this.
    assert all(not torch.equal((n.mean() - n).sign(), (load.mean() - load).sign()) for n in loads)
    assert layer.router.load is None
    layer.train()
    for part in x:
        layer(part)
    update_balance(layer)
    expected = 0.05 * (load.mean() - load).sign()
    torch.testing.assert_close(layer.router.balance_bias.double(), expected, rtol=1e-6, atol=0)
    assert expected.unique().numel() > 1
    with pytest.raises(RuntimeError, match="run a training forward first"):
        update_balance(layer)


def test_the_bias_selects_and_does_not_weigh():
    layer = balanced_layer().eval()
    x = torch.randn(5, IN, dtype=torch.float64)
    layer.router.balance_bias[:] = torch.tensor([9.0, 0, 0, 9.0, 0, 0])
    with record_routing(layer):
        layer(x)
        weights = layer.record.weights
    p = (x @ layer.router.gate.weight.t()).softmax(dim=1)[:, [0, 3]]
    torch.testing.assert_close(weights[:, [0, 3]], p / p.sum(dim=1, keepdim=True), **TIGHT)
    assert (weights != 0).sum() == 10


@pytest.mark.parametrize("score", ("softmax", "sigmoid", "identity", "abs"))
def test_the_bias_is_added_before_the_score(score):
    """|logit + d| of FlyLoRA: a bias after the magnitude would select others."""
    layer = balanced_layer(score=score, normalize="one").eval()
    with torch.no_grad():
        layer.router.balance_bias.normal_()
    x = torch.randn(40, IN, dtype=torch.float64)
    biased = x @ layer.router.gate.weight.t() + layer.router.balance_bias
    biased = biased.abs() if score == "abs" else biased
    kept = torch.zeros(40, 6, dtype=torch.bool).scatter(1, biased.topk(2, dim=1).indices, True)
    assert torch.equal(selected(layer, x), kept)


def test_a_repeated_forward_counts_once():
    """Activation checkpointing runs it a second time in backward."""
    layer = balanced_layer()
    x = torch.randn(7, IN, dtype=torch.float64, requires_grad=True)
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert layer.router.load.sum() == 7 * 2


def test_balancing_balances():
    """A router that prefers two experts for all tokens ends up with every expert in use."""
    layer = balanced_layer(balance_rate=0.02)
    with torch.no_grad():
        layer.router.gate.weight.mul_(0.3)
        layer.router.gate.weight[:2] += 1.0
    x = torch.randn(64, IN, dtype=torch.float64) + 0.5
    before = selected(layer, x).sum(dim=0)
    for _ in range(500):
        with torch.no_grad():
            layer(x)
        update_balance(layer)
    after = selected(layer, x).sum(dim=0)
    assert before.min() == 0
    # 64 tokens x 2 slots over 6 experts are 21 for each.
    assert after.min() > 10


def test_whole_ffn_experts_balance_too():
    ffn = MoeLoraFFN(IN, 16, num_experts=4, rank=2, top_k=2, balance_rate=0.1)
    ffn(torch.randn(5, IN))
    assert ffn.router.load.sum() == 10
    update_balance(ffn)
    assert ffn.router.balance_bias.any()


def test_nothing_to_balance_is_an_error():
    with pytest.raises(ValueError, match=r"^model: no layer has a balance_rate"):
        update_balance(MoeLoraLinear(IN, OUT))
    assert isinstance(balanced_layer().router, BalancedRouter)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
def test_gates_of_single_ranks_on_kernels(dtype):
    """64 experts of rank 1 under a dense gate, in Triton's interpreter where there is no GPU."""
    pytest.importorskip("triton")
    from moelora_kernels.kernels import shrink_gate, shrink_gate_backward

    inputs = Inputs(Case(T=31, ranks=(1,) * 64, gate="dense"), dtype).to(KERNEL_DEVICE)
    compare(
        "h u weights indices logits",
        shrink_gate.launch,
        reference.shrink_gate,
        inputs.shrink(),
        dtype,
    )
    compare(
        "dh u dgate",
        shrink_gate_backward.launch,
        reference.shrink_gate_backward,
        inputs.backward(forward_of(inputs)),
        dtype,
    )


def test_sparse_random_a():
    """K/E of every row, of standard deviation 1/R; the rest zero, and B zero."""
    torch.manual_seed(0)
    layer = MoeLoraLinear(1000, 8, config=MoeLoraConfig.preset("flylora"))
    kept = layer.lora_A != 0
    assert torch.equal(kept.sum(dim=1), torch.full((32,), 250))
    assert layer.lora_A[kept].std().item() == pytest.approx(1 / 32, rel=0.03)
    assert not torch.equal(kept[0], kept[1])
    assert not layer.lora_B.any()


# --- Gates beside the model ----------------------------------------------------------------------


def test_sequence_gate_leaves_padding_out_if_told_to():
    torch.manual_seed(0)
    gate = SequenceGate(IN, 5, top_k=2)
    embeddings = torch.randn(2, 4, IN)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    found = gate(embeddings, mask)
    assert torch.allclose(found[:1], gate(embeddings[:1]))
    assert torch.allclose(found[1:], gate(embeddings[1:, :2]))
    assert ((found != 0).sum(dim=1) == 2).all()
    assert torch.allclose(found.sum(dim=1), torch.ones(2))
    with pytest.raises(ValueError, match=r"^mask: expected"):
        gate(embeddings, mask[:1])


def test_token_task_router_shared_by_siblings():
    """One instance for q, k, v, as the original shares it, and saved once."""
    router = TokenTaskRouter(IN, TASK, 8, share=-2.0)
    model = nn.ModuleDict({n: nn.Linear(IN, OUT) for n in ("q_proj", "k_proj")})
    replace_linears(model, MoeLoraConfig.preset("hmora", router=router), ["q_proj", "k_proj"])
    assert model["q_proj"].router is model["k_proj"].router
    x = torch.randn(2, 3, IN)
    with pytest.raises(RuntimeError, match="set_tasks"):
        model["q_proj"](x)
    set_tasks(model, torch.randn(2, TASK))
    model["q_proj"](x)
    assert sum("router.share" in key for key in adapter_state_dict(model)) == 1


def test_task_vectors_that_do_not_fit_are_named():
    layer = MoeLoraLinear(IN, OUT, config=MoeLoraConfig.preset("hmora", task_embedding_dim=TASK))
    with pytest.raises(ValueError, match=rf"^tasks: expected vectors \[batch, {TASK}\]"):
        set_tasks(layer, torch.randn(2, TASK + 1))
    set_tasks(layer, torch.randn(4, TASK))
    with pytest.raises(ValueError, match=r"^tasks: 4 task vectors"):
        layer(torch.randn(3, IN))
    both = nn.ModuleList([layer, MoeLoraLinear(IN, OUT, router="external")])
    with pytest.raises(ValueError, match=r"^model: it takes gates and task vectors"):
        set_tasks(both, torch.randn(2, TASK))


# --- Options without meaning ---------------------------------------------------------------------

SELF = dict(router="self", num_experts=4, rank=1, score="abs", normalize="one", top_k=2)
MIXED = dict(router="token_task", score="identity", normalize="softmax", top_k=2)
BAD = [
    ("freeze", dict(freeze="B")),
    ("freeze", dict(freeze=True)),
    ("grad_gate", dict(grad_gate="cube")),
    ("grad_gate", dict(grad_gate="sqrt", router="external")),
    ("grad_gate", dict(grad_gate="sqrt", router=None)),
    ("grad_gate", dict(grad_gate="sqrt", freeze="AB")),
    ("grad_gate", dict(grad_gate="sqrt", score="identity", normalize="none")),
    ("grad_gate", dict(grad_gate="sqrt", top_k=2, normalize="one")),
    ("grad_gate", dict(grad_gate="sqrt", shared_expert="always")),
    ("init", dict(init="sparse")),
    ("normalize", dict(normalize="one")),
    ("shared_expert", dict(top_k=2, normalize="one", shared_expert="complement")),
    ("balance_rate", dict(balance_rate=0.1)),
    ("balance_rate", dict(balance_rate=0.1, top_k=8)),
    ("balance_rate", dict(balance_rate=0.0, top_k=2)),
    ("balance_rate", dict(balance_rate=0.1, router="task", num_tasks=2, top_k=2)),
    ("impl", dict(balance_rate=0.1, top_k=2, impl="grouped")),
    ("rank", SELF | dict(rank=2)),
    ("rank", SELF | dict(rank=(1, 1, 1, 2))),
    ("share", SELF | dict(share="A")),
    ("shared_expert", SELF | dict(shared_expert="always")),
    ("granularity", SELF | dict(granularity="sequence")),
    ("aux", SELF | dict(aux="z")),
    ("select", SELF | dict(top_k=None, select="learned_threshold", normalize="none")),
    ("aux", dict(router="prototype", top_k=2, aux="load_balance")),
    ("score", MIXED | dict(score="softmax")),
    ("aux", MIXED | dict(aux="load_balance")),
    ("noise", MIXED | dict(noise=0.1)),
    ("entropy_threshold", MIXED | dict(entropy_threshold=0.5)),
]


@pytest.mark.parametrize(("name", "options"), BAD, ids=[str(options) for _, options in BAD])
def test_an_option_without_meaning_is_named(name, options):
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        MoeLoraConfig(**options)


@pytest.mark.parametrize(
    ("name", "options"),
    (
        ("router", dict(router="prototype")),
        ("router", SELF),
        ("freeze", dict(freeze="AB")),
        ("grad_gate", dict(grad_gate="sqrt")),
    ),
    ids=str,
)
def test_what_whole_ffn_experts_have_not_is_named(name, options):
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        MoeLoraFFN(IN, 16, **options)
