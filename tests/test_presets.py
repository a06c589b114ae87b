"""Every preset against its paper's expert loop, written out in plain PyTorch."""

import copy

import pytest
import torch
from preset_loops import blocks_of, first_largest, frozen, loop_adamole, loop_dynmole, loop_mocle
from torch import nn

from moelora_kernels import (
    MoeLoraConfig,
    MoeLoraLinear,
    adapter_parameters,
    reference,
    replace_linears,
    set_tasks,
)
from moelora_kernels.presets import OF_FFNS
from moelora_kernels.presets import PRESETS as ALL_PRESETS
from moelora_kernels.testing import assert_within_budget

IN, OUT = 12, 10
# Whole-FFN experts have a file of their own, and so have the relatives of test_presets_family.
ELSEWHERE = (
    *OF_FFNS, "octavius", "hmora", "xlora", "arrow", "smora", "flylora", "riemannian", "pesc",
)  # fmt: skip
PRESETS = [name for name in ALL_PRESETS if name not in ELSEWHERE]


def loop_lora(x, p, c, _tasks, xs=None):
    """y = W x + b + alpha/r B A x"""
    return frozen(x, p) + c.alpha / c.rank * (x @ p["lora_A"].t()) @ p["lora_B"].t()


def loop_moelora(x, p, c, tasks, xs=None):
    """y = W x + b + sum_e alpha/r_total w_e B_e A_e dropout_e(x), w = softmax(W_g emb[task])."""
    w = (p["router.embedding.weight"][tasks] @ p["router.gate.weight"].t()).softmax(dim=-1)
    y = frozen(x, p)
    for e, (a, b) in enumerate(blocks_of(p, c.num_experts)):
        of_batch = w[:, e].reshape(-1, *[1] * (x.dim() - 1))
        own = x if xs is None else xs[e]
        y = y + c.alpha / (c.rank * c.num_experts) * of_batch * ((own @ a.t()) @ b.t())
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
        own = x if xs is None else xs[e]
        y = y + c.alpha / c.rank * w[..., e : e + 1] * ((own @ a.t()) @ b.t())
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


def step(layer, x, dy):
    """y and the gradients of x and of all that trains, by name."""
    leaf = x.detach().clone().requires_grad_()
    y = layer(leaf)
    trained = {n: q for n, q in layer.named_parameters() if q.requires_grad}
    grads = torch.autograd.grad(y, (leaf, *trained.values()), dy)
    return {"y": y.detach(), "dx": grads[0], **dict(zip(trained, grads[1:], strict=True))}


def step_of_loop(preset, layer, x, dy, tasks=None, mask=None):
    """What `step` returns, from the method's loop in float64; mask: x -> x_e of every expert."""
    p = {
        n: q.detach().double().requires_grad_(q.requires_grad) for n, q in layer.named_parameters()
    }
    leaf = x.detach().double().requires_grad_()
    y = LOOPS[preset](leaf, p, layer.config, tasks, None if mask is None else mask(leaf))
    trained = {n: q for n, q in p.items() if q.requires_grad}
    # With K = 1 the renormalised gate is the constant 1: the router has no path to y.
    grads = torch.autograd.grad(
        y, (leaf, *trained.values()), dy.double(), allow_unused=True, materialize_grads=True
    )
    return {"y": y.detach(), "dx": grads[0], **dict(zip(trained, grads[1:], strict=True))}


def check(preset, layer, x, tasks=None):
    """The layer against its method's loop: to 1e-10 in float64, within the budget below that."""
    if tasks is not None:
        set_tasks(layer, tasks)
    dy = torch.randn(*x.shape[:-1], OUT, dtype=x.dtype)
    truth = step_of_loop(preset, layer, x, dy, tasks)
    found = step(layer, x, dy)
    assert found.keys() == truth.keys()
    if x.dtype == torch.float64:
        for name in truth:
            # Sums of at most a few hundred terms of size 1, in another order.
            torch.testing.assert_close(found[name], truth[name], rtol=1e-10, atol=1e-10, msg=name)
        return
    twin = copy.deepcopy(layer)
    twin.config = layer.config.replace(impl="reference")
    found, truth, yardstick = (threshold_joined(s) for s in (found, truth, step(twin, x, dy)))
    assert_within_budget(found, truth, yardstick, x.dtype)


def threshold_joined(tensors):
    """Weight and bias of a threshold as one: the single number of the bias may happen to cancel."""
    parts = [name for name in tensors if name.startswith("router.threshold.")]
    if not parts:
        return tensors
    rest = {name: tensor for name, tensor in tensors.items() if name not in parts}
    return rest | {"router.threshold": torch.cat([tensors[name].flatten() for name in parts])}


def tasks_of(preset, batch):
    return torch.arange(batch) % 3 + 1 if preset in ("moelora", "mocle") else None


# Prefill of one and of many, decode with N = 1 for one and for many (MING asserts on both of its
# batch 1 and batch > 1 corners), and batch == sequence, where MOELoRA mixes up the samples.
SHAPES = [(1, 5), (4, 3), (1, 1), (6, 1), (3, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_preset_is_its_papers_formula(preset, shape):
    layer = make_layer(preset, torch.float64)
    x = torch.randn(*shape, IN, dtype=torch.float64)
    check(preset, layer, x, tasks_of(preset, shape[0]))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("preset", PRESETS)
def test_preset_in_the_dtypes_people_train_in(preset, dtype):
    """Low precision may cost what the reference in that dtype costs, twice, and not more."""
    layer = make_layer(preset, dtype)
    check(preset, layer, torch.randn(4, 6, IN, dtype=dtype), tasks_of(preset, 4))


@pytest.mark.parametrize("preset", PRESETS)
def test_float32_adapters_under_a_bfloat16_base(preset):
    """PEFT keeps adapters in float32: the gradients are float32, no worse than bfloat16."""
    layer = make_layer(preset, torch.bfloat16, adapter_dtype="float32")
    x = torch.randn(4, 6, IN, dtype=torch.bfloat16)
    check(preset, layer, x, tasks_of(preset, 4))
    assert all(q.dtype == torch.float32 for q in adapter_parameters(layer))


@pytest.mark.parametrize("top_k", (1, 8), ids=["K=1", "K=E"])
@pytest.mark.parametrize("preset", ("ming", "mola"))
def test_ends_of_top_k(preset, top_k):
    """K = 1 has weight 1 and a router without gradient; K = E takes another path: no indices."""
    options = {"top_k": top_k} | ({"aux": ()} if preset == "mola" else {})
    layer = make_layer(preset, torch.float64, **options)
    x = torch.randn(3, 4, IN, dtype=torch.float64)
    check(preset, layer, x)
    if top_k == 1:
        grads = step(layer, x, torch.randn(3, 4, OUT, dtype=torch.float64))
        assert grads["router.weight"].abs().max() < 1e-12


@pytest.mark.parametrize("top_k", (1, 2, 3))
@pytest.mark.parametrize("preset", ("ming", "mola"))
def test_ties_go_to_the_lower_expert(preset, top_k):
    """Experts cloned from one LoRA, or a zero router, tie exactly: the choice must be defined."""
    layer = make_layer(preset, torch.float64, top_k=top_k)
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[5] = layer.router.weight[6] = torch.randn(IN)
        if layer.router.bias is not None:
            layer.router.bias.zero_()
    check(preset, layer, torch.randn(2, 5, IN, dtype=torch.float64))


@pytest.mark.parametrize("rank", (1, 3))
@pytest.mark.parametrize("preset", PRESETS)
def test_rank_one_and_odd_ranks(preset, rank):
    """GOAT and MOELoRA train experts of rank 1 and 2: a scale taken from R and r mixed up shows."""
    experts = {"lora": 1, "goat": 3}.get(preset, 5)
    layer = make_layer(preset, torch.float64, rank=rank, num_experts=experts)
    check(preset, layer, torch.randn(2, 3, IN, dtype=torch.float64), tasks_of(preset, 2))


@pytest.mark.parametrize("preset", ("moelora", "loramoe", "adamole"))
def test_active_dropout_draws_one_mask_per_expert(preset):
    """The original calls dropout inside the loop; the masks here are streams of one seed."""
    layer = make_layer(preset, torch.float64, dropout=0.4).train()
    shape = (3, 4, IN)
    x, dy = torch.randn(shape, dtype=torch.float64), torch.randn(3, 4, OUT, dtype=torch.float64)
    tasks = tasks_of(preset, 3)
    if tasks is not None:
        set_tasks(layer, tasks)
    torch.manual_seed(11)
    seed = torch.randint(0, 2**62, (1,))
    ones = torch.ones(3 * 4, IN, dtype=torch.float64)
    masks = [reference.dropout(ones, 0.4, seed, stream=e).view(shape) for e in range(8)]
    assert not torch.equal(masks[0], masks[1])
    truth = step_of_loop(preset, layer, x, dy, tasks, lambda leaf: [leaf * m for m in masks])
    torch.manual_seed(11)
    found = step(layer, x, dy)
    for name in truth:
        torch.testing.assert_close(found[name], truth[name], rtol=1e-10, atol=1e-10, msg=name)


def test_hydralora_draws_one_mask_for_all_heads():
    """The heads read one A, so they share its mask; a mask per head is a documented difference."""
    layer = make_layer("hydralora", torch.float64, dropout=0.4).train()
    x = torch.randn(6, IN, dtype=torch.float64)
    torch.manual_seed(11)
    seed = torch.randint(0, 2**62, (1,))
    mask = reference.dropout(torch.ones_like(x), 0.4, seed)
    torch.manual_seed(11)
    found = layer(x)
    c, w = layer.config, (x @ layer.router.weight.t()).softmax(dim=-1)
    expected = layer.base_layer(x)
    for e, b in enumerate(layer.lora_B.chunk(c.num_experts, dim=1)):
        h = (x * mask) @ layer.lora_A.t()
        expected = expected + c.alpha / c.rank * w[:, e : e + 1] * (h @ b.t())
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("batch", (1, 3, 4))
def test_task_gates_follow_the_sequence_not_the_position(batch):
    """Permuting the batch with its tasks permutes y: false where the gate broadcasts over dim 1."""
    layer = make_layer("moelora", torch.float64)
    x = torch.randn(batch, batch, IN, dtype=torch.float64)
    tasks = torch.arange(batch) + 1
    set_tasks(layer, tasks)
    y = layer(x)
    order = torch.arange(batch).flip(0)
    set_tasks(layer, tasks[order])
    torch.testing.assert_close(layer(x[order]), y[order], rtol=1e-12, atol=1e-12)
    for i in range(batch):
        set_tasks(layer, [i + 1])
        torch.testing.assert_close(layer(x[i : i + 1]), y[i : i + 1], rtol=1e-12, atol=1e-12)


def test_parameters_of_moelora_on_chatglm_6b():
    """The paper's count: as many as a plain LoRA of rank 16, and one gate for the model."""
    with torch.device("meta"):
        blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "query_key_value": nn.Linear(4096, 12288),
                    "dense": nn.Linear(4096, 4096),
                    "dense_h_to_4h": nn.Linear(4096, 16384),
                    "dense_4h_to_h": nn.Linear(16384, 4096),
                }
            )
            for _ in range(28)
        )
    names = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    replaced = replace_linears(blocks, MoeLoraConfig.preset("moelora"), names)
    assert len(replaced) == 28 * 4
    trained = {n: q for n, q in blocks.named_parameters() if q.requires_grad}
    assert sum(q.numel() for n, q in trained.items() if "lora_" in n) == 29_360_128
    assert sum(q.numel() for n, q in trained.items() if "lora_" not in n) == 1_600
    assert sum(q.numel() for q in adapter_parameters(blocks)) == 29_360_128 + 1_600


def test_parameters_of_ming_on_qwen_7b():
    """185.6 M in the experts and 4.9 M in the routers, biases included."""
    with torch.device("meta"):
        blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "gate_proj": nn.Linear(4096, 11008, bias=False),
                    "up_proj": nn.Linear(4096, 11008, bias=False),
                    "down_proj": nn.Linear(11008, 4096, bias=False),
                }
            )
            for _ in range(32)
        )
    replace_linears(blocks, MoeLoraConfig.preset("ming"), r"\d+\.(gate|up|down)_proj")
    trained = {n: q for n, q in blocks.named_parameters() if q.requires_grad}
    assert sum(q.numel() for n, q in trained.items() if "lora_" in n) == 185_597_952
    assert sum(q.numel() for n, q in trained.items() if ".router." in n) == 4_915_968


@pytest.mark.parametrize("preset", [p for p in PRESETS if p != "goat"])
def test_initialisation(preset):
    """B = 0 and A as published: normal(0, 0.01) for MOELoRA, kaiming_uniform(sqrt 5) elsewhere."""
    torch.manual_seed(0)
    layer = MoeLoraLinear(400, 8, config=MoeLoraConfig.preset(preset))
    assert layer.lora_B.abs().max() == 0
    if preset == "moelora":
        assert 0.0095 < layer.lora_A.std().item() < 0.0105
        assert abs(layer.router.embedding.weight.std().item() - 1.0) < 0.1
    else:
        bound = 1 / 400**0.5
        assert 0.98 * bound < layer.lora_A.abs().max().item() <= bound
        assert abs(layer.lora_A.std().item() - bound / 3**0.5) < 0.03 * bound


def test_an_unknown_preset_raises():
    with pytest.raises(ValueError, match=r"preset: expected one of .*ming.*'mingmoe'"):
        MoeLoraConfig.preset("mingmoe")
