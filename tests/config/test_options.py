"""MoeLoraConfig: what it refuses, what it implies, and that every combination it takes works."""

import copy
import dataclasses
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from moelora_kernels import MoeLoraConfig, MoeLoraLinear, set_tasks
from moelora_kernels.presets import PRESETS

EXPERTS, IN, OUT = 4, 6, 5

BAD = [
    ("num_experts", dict(num_experts=0)),
    ("num_experts", dict(num_experts=2.0)),
    ("num_experts", dict(num_experts=True)),
    ("rank", dict(rank=0)),
    ("rank", dict(rank=-1)),
    ("rank", dict(rank=1.5)),
    ("rank", dict(num_experts=3, rank=(2, 2))),
    ("rank", dict(num_experts=2, rank=(2, 0))),
    ("rank", dict(num_experts=2, rank=(2, 4), share="A")),
    ("scaling", dict(scaling="alpha*r")),
    ("scaling", dict(num_experts=2, scaling=(1.0, 2.0, 3.0))),
    # The shared expert has a factor too.
    ("scaling", dict(num_experts=2, scaling=(1.0, 2.0), shared_expert="always")),
    ("alpha", dict(alpha="32")),
    ("alpha", dict(alpha=math.nan)),
    ("scaling", dict(scaling=math.inf)),
    ("share", dict(share="B")),
    ("shared_expert", dict(shared_expert="yes")),
    ("shared_rank", dict(shared_expert="always", shared_rank=0)),
    ("shared_rank", dict(shared_expert="always", shared_rank=-2)),
    ("shared_rank", dict(shared_expert="always", shared_rank=1.5)),
    ("init", dict(init="zeros")),
    ("adapter_dtype", dict(adapter_dtype="int8")),
    ("router", dict(router="nearest")),
    ("router", dict(router=nn.Linear)),
    ("router_hidden", dict(router="mlp", router_hidden=0)),
    ("num_tasks", dict(router="task")),
    ("num_tasks", dict(router="task", num_tasks=0)),
    ("task_embedding_dim", dict(router="task", num_tasks=2, task_embedding_dim=0)),
    ("granularity", dict(granularity="batch")),
    ("granularity", dict(granularity="task")),
    ("granularity", dict(router="task", num_tasks=2, granularity="token")),
    ("score", dict(score="relu")),
    ("temperature", dict(temperature=0.0)),
    ("temperature", dict(temperature=-1.0)),
    ("temperature", dict(temperature=math.nan)),
    ("noise", dict(noise=-0.1)),
    ("noise", dict(noise=math.nan)),
    ("select", dict(select="best")),
    ("top_k", dict(select="topk")),
    ("top_k", dict(top_k=0)),
    ("top_k", dict(top_k=9)),
    ("top_k", dict(top_k=2.0)),
    ("top_k", dict(select="all", top_k=2)),
    ("top_p", dict(select="topp")),
    ("top_p", dict(select="topp", top_p=0.0)),
    ("top_p", dict(select="topp", top_p=1.1)),
    ("top_p", dict(top_p=0.5)),
    # A sum of raw logits that may be negative has no smallest prefix that reaches a share of it.
    ("top_p", dict(select="topp", top_p=0.5, score="identity", normalize="none")),
    ("threshold", dict(select="threshold")),
    ("threshold", dict(threshold=0.1)),
    ("threshold", dict(select="threshold", threshold=math.nan)),
    ("max_threshold", dict(select="learned_threshold", max_threshold=0.0)),
    ("max_threshold", dict(select="learned_threshold", max_threshold=math.inf)),
    ("max_threshold", dict(select="threshold", threshold=0.1, max_threshold=0.5)),
    ("threshold", dict(select="learned_threshold", threshold=0.1)),
    # A task has no x to learn a threshold from, and a softmax of differences has none in it.
    ("select", dict(select="learned_threshold", router="task", num_tasks=2)),
    ("select", dict(select="learned_threshold", router="external")),
    ("normalize", dict(select="learned_threshold", normalize="softmax")),
    ("keep_min", dict(select="topp", top_p=0.5, keep_min=0)),
    ("keep_min", dict(select="topp", top_p=0.5, keep_min=9)),
    ("keep_min", dict(top_k=2, keep_min=2)),
    ("keep_min", dict(select="learned_threshold", keep_min=2)),
    ("entropy_threshold", dict(top_k=2, entropy_threshold=1.0)),
    ("entropy_threshold", dict(top_k=2, entropy_threshold=-0.1)),
    ("entropy_threshold", dict(top_k=2, entropy_threshold=math.nan)),
    ("entropy_threshold", dict(entropy_threshold=0.9)),
    ("entropy_threshold", dict(select="learned_threshold", entropy_threshold=0.9)),
    ("entropy_threshold", dict(num_experts=1, top_k=1, entropy_threshold=0.9)),
    ("entropy_index", dict(top_k=2, entropy_threshold=0.9, entropy_index=0.0)),
    ("entropy_index", dict(entropy_index=1.1)),
    ("aux", dict(num_experts=1, aux="entropy")),
    ("aux", dict(router="external", aux="entropy")),
    ("svd_rho", dict(svd_rho=10.0)),
    ("svd_rho", dict(init="svd_segments", svd_rho=0.0)),
    ("init", dict(init="svd_segments", share="A")),
    # Segments are taken out of the base by the mean gate, which only gates that sum to 1 have.
    ("init", dict(init="svd_segments", router="external")),
    ("init", dict(init="svd_segments", score="sigmoid", normalize="none")),
    ("init", dict(init="svd_segments", top_k=2, normalize="none")),
    ("scaling", dict(init="svd_segments", scaling=0.0)),
    ("scaling", dict(init="svd_segments", alpha=-1.0)),
    ("alpha", dict(scaling="sqrt(3*alpha*I/r)", alpha=-1.0)),
    ("normalize", dict(normalize="max")),
    ("normalize", dict(score="identity", normalize="sum")),
    # Gates that are given are used as given: to select among them would silently do nothing.
    ("select", dict(router="external", top_k=2)),
    ("select", dict(router=None, top_k=1)),
    ("dropout", dict(dropout=1.0)),
    ("dropout", dict(dropout=-0.1)),
    ("dropout", dict(dropout=math.nan)),
    ("dropout_mask", dict(dropout_mask="each")),
    ("dropout_mask", dict(share="A", dropout=0.1, dropout_mask="per_expert")),
    ("aux", dict(aux="balance")),
    ("aux", dict(aux={"load_balance": 0.1})),
    ("aux", dict(aux={"z": "much"})),
    ("aux", dict(router="external", aux="z")),
    ("aux", dict(router=None, aux="z")),
    ("impl", dict(impl="fast")),
    # Experts on their own tokens, where every token uses all of them, or all use one A.
    ("impl", dict(impl="grouped")),
    ("impl", dict(impl="grouped", top_k=8)),
    ("impl", dict(impl="grouped", top_k=2, share="A")),
    ("impl", dict(impl="grouped", router=None)),
    ("impl", dict(impl="grouped", router="external")),
    ("impl", dict(impl="grouped", router="task", num_tasks=2, top_k=2)),
    ("impl", dict(impl="grouped", granularity="sequence", top_k=2)),
    ("impl", dict(impl="grouped", select="topp", top_p=0.5)),
    ("impl", dict(impl="grouped", top_k=2, entropy_threshold=0.9)),
    ("impl", dict(impl="grouped", top_k=2, score="sigmoid")),
]


@pytest.mark.parametrize(("name", "options"), BAD, ids=[str(options) for _, options in BAD])
def test_a_bad_option_is_named(name, options):
    """An option that is ignored or that fails in the first forward costs a training run."""
    with pytest.raises((ValueError, TypeError), match=rf"^{name}\b"):
        MoeLoraConfig(**options)


def test_the_message_gives_what_was_given_and_what_is_expected():
    with pytest.raises(ValueError, match=r"^top_k: .* from 1 to num_experts = 8, got 9$"):
        MoeLoraConfig(top_k=9)


def test_an_unknown_option_is_named():
    with pytest.raises(TypeError, match="num_expert"):
        MoeLoraConfig(num_expert=4)
    with pytest.raises(ValueError, match="num_expert"):
        MoeLoraConfig.from_dict({"num_expert": 4})


def test_implied_values():
    """select and granularity follow from top_k and router, so that two options need not agree."""
    plain = MoeLoraConfig()
    assert (plain.select, plain.granularity) == ("all", "token")
    assert MoeLoraConfig(top_k=2).select == "topk"
    assert MoeLoraConfig(router="task", num_tasks=3).granularity == "task"
    assert MoeLoraConfig(aux="z").aux == (("z", 0.001),)
    assert MoeLoraConfig(top_k=2, aux=("load_balance", "z")).aux == (
        ("load_balance", 0.01),
        ("z", 0.001),
    )
    assert MoeLoraConfig(num_experts=2, rank=[1, 3]).ranks() == (1, 3)
    assert MoeLoraConfig(num_experts=2, rank=3, shared_expert="always").ranks() == (3, 3, 3)
    shared = MoeLoraConfig(num_experts=2, rank=3, shared_expert="complement", shared_rank=1)
    assert shared.ranks() == (3, 3, 1)


def test_scaling_rules():
    """alpha/r takes the rank of each expert, alpha/R the total: MOELoRA and MING differ in this."""
    ranks = dict(num_experts=2, rank=(2, 8), alpha=16.0)
    assert MoeLoraConfig(**ranks).scales() == (8.0, 2.0)
    assert MoeLoraConfig(**ranks, scaling="alpha/R").scales() == (1.6, 1.6)
    by_root = MoeLoraConfig(**ranks, scaling="alpha/sqrt(r)").scales()
    assert by_root == pytest.approx((16 / 2**0.5, 16 / 8**0.5), rel=1e-15)
    assert MoeLoraConfig(**ranks, scaling=3).scales() == (3.0, 3.0)
    assert MoeLoraConfig(**ranks, scaling=[1, 0.5]).scales() == (1.0, 0.5)


def test_a_config_cannot_change_under_its_layer():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MoeLoraConfig().top_k = 3


def test_replace_settles_implied_values_anew():
    """What was implied by the old options must not contradict the new ones."""
    plain = MoeLoraConfig()
    assert plain.replace(top_k=2) == MoeLoraConfig(top_k=2)
    assert plain.replace(top_k=2).replace(top_k=None) == plain
    assert plain.replace(router="task", num_tasks=4).granularity == "task"
    assert plain.replace(router="task", num_tasks=4).replace(router="mlp").granularity == "token"
    # The limit of a learned threshold is 1/E of the E there are, whatever they were before.
    learned = MoeLoraConfig(num_experts=8, select="learned_threshold").replace(num_experts=4)
    assert learned == MoeLoraConfig(num_experts=4, select="learned_threshold")
    assert MoeLoraConfig.preset("adamole", select=None, top_k=2).select == "topk"
    sequence = MoeLoraConfig(granularity="sequence")
    assert sequence.replace(top_k=2).granularity == "sequence"
    layer = MoeLoraLinear(IN, OUT, config=plain, top_k=3)
    assert (layer.config.select, layer.config.top_k) == ("topk", 3)


CONFIGS = [MoeLoraConfig.preset(name) for name in PRESETS] + [
    MoeLoraConfig(num_experts=2, rank=[1, 3], scaling=[0.5, 1.0], aux=()),
    MoeLoraConfig(select="topp", top_p=0.7, aux={"z": 0.2, "load_balance": 0.1}),
    MoeLoraConfig(select="threshold", threshold=0.1, score="sigmoid", noise=0.3, temperature=2.0),
    MoeLoraConfig(router="external", shared_expert="complement", shared_rank=2),
    MoeLoraConfig(select="learned_threshold", max_threshold=0.3),
    MoeLoraConfig(top_k=1, entropy_threshold=0.5, entropy_index=2.0, aux="entropy"),
    MoeLoraConfig(init="svd_segments", svd_rho=3.0, select="topp", top_p=0.5, keep_min=2),
]


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_round_trip_through_json(config):
    """Configs live in adapter_config.json: what comes back is equal, hash included."""
    back = MoeLoraConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert back == config
    assert hash(back) == hash(config)
    assert config.replace() == config
    assert copy.deepcopy(config) == config


def test_a_module_as_router_does_not_pretend_to_be_json():
    with pytest.raises(TypeError, match="router"):
        MoeLoraConfig(router=nn.Linear(4, 8)).to_dict()


ROUTERS = st.sampled_from(["linear", "mlp", "task"])
# Every gate rule; raw logits have no sum to divide by, and no share of a sum to reach.
GATES = [
    (score, select, normalize)
    for score in ("softmax", "sigmoid", "identity")
    for select in ("all", "topk", "topp", "threshold")
    for normalize in ("none", "sum", "softmax")
    if score != "identity" or (select != "topp" and normalize != "sum")
] + [
    (score, "learned_threshold", normalize)
    for score in ("softmax", "sigmoid", "identity")
    for normalize in ("none", "sum")
    if score != "identity" or normalize == "none"
]


@st.composite
def combinations(draw):
    """Options of the other axes, valid by the rules of the docstring and no stricter."""
    router = draw(ROUTERS)
    share = draw(st.sampled_from(["none", "A"]))
    options = dict(
        num_experts=EXPERTS,
        rank=2 if share == "A" else draw(st.sampled_from([1, 3, (1, 2, 3, 1)])),
        router=router,
        share=share,
        shared_expert=draw(st.sampled_from(["none", "always", "complement"])),
        temperature=draw(st.sampled_from([1.0, 0.5])),
        alpha=3.0,
    )
    if router == "task":
        options.update(num_tasks=5, task_embedding_dim=3)
    else:
        options["granularity"] = draw(st.sampled_from(["token", "sequence"]))
    if router == "linear":
        options["router_bias"] = draw(st.booleans())
    return options, draw(st.integers(0, 2**20))


def is_uncertain(scaled, c):
    """Whether the entropy of one token is above its threshold, of its largest value."""
    p, q = scaled.softmax(0).tolist(), c.entropy_index
    if q == 1:
        entropy, largest = -sum(v * math.log(v) for v in p), math.log(EXPERTS)
    else:
        entropy, largest = ((1 - sum(v**q for v in of)) / (q - 1) for of in (p, [0.25] * EXPERTS))
    return entropy > c.entropy_threshold * largest


def gate_of(logits, c):
    """The gate of one token from its logits, rule by rule as the docstring of the config has it."""
    if c.select == "learned_threshold":
        *_, of_threshold = logits
        logits = logits[:EXPERTS]
        tau = (c.max_threshold or 1 / EXPERTS) / (1 + (-of_threshold).exp())
    scaled = logits / c.temperature
    scores = {
        "softmax": lambda: scaled.softmax(0),
        "sigmoid": lambda: scaled.sigmoid(),
        "identity": lambda: scaled,
    }[c.score]()
    order = sorted(range(EXPERTS), key=lambda e: (-scores[e].item(), e))
    if c.select == "all":
        kept = order
    elif c.select == "topk":
        kept = order[: c.top_k]
    elif c.select == "threshold":
        kept = [e for e in order if scores[e] >= c.threshold]
    elif c.select == "learned_threshold":
        scores = scores - tau
        kept = [e for e in order if scores[e] >= 0]
    else:
        kept, total = [], 0.0
        while total < c.top_p * scores.sum().item() and len(kept) < EXPERTS:
            kept.append(order[len(kept)])
            total += scores[kept[-1]].item()
    kept = order[: max(len(kept), c.keep_min or 0)]
    if c.entropy_threshold is not None and is_uncertain(scaled, c):
        kept = order
    gate = torch.zeros(EXPERTS, dtype=logits.dtype)
    if kept:
        values = scores[kept]
        if c.normalize == "sum":
            values = values / values.sum()
        elif c.normalize == "softmax":
            values = values.softmax(0)
        gate = gate.index_put((torch.tensor(kept),), values)
    extra = {"none": [], "always": [torch.ones(())], "complement": [1 - gate.max()]}
    return torch.cat([gate, *[g.reshape(1).to(gate) for g in extra[c.shared_expert]]])


def logits_of(layer, x):
    """Router logits [B, S, E], from the router's parameters alone."""
    c, router, beside = layer.config, layer.router, []
    source = x.mean(dim=1, keepdim=True).expand_as(x) if c.granularity == "sequence" else x
    if c.select == "learned_threshold":
        beside = [source @ router.threshold.weight.t() + router.threshold.bias]
        router = router.gate
    if c.router == "linear":
        logits = source @ router.weight.t()
        logits = logits if router.bias is None else logits + router.bias
        return torch.cat([logits, *beside], dim=-1)
    if c.router == "mlp":
        hidden = source @ router.fc1.weight.t() + router.fc1.bias
        logits = (hidden * hidden.sigmoid()) @ router.fc2.weight.t() + router.fc2.bias
        return torch.cat([logits, *beside], dim=-1)
    of_task = router.embedding.weight[router.task_ids] @ router.gate.weight.t()
    return of_task[:, None].expand(*x.shape[:2], -1)


def plain_forward(layer, x):
    """y, token by token and expert by expert."""
    c, logits = layer.config, logits_of(layer, x)
    ends = torch.tensor(c.ranks()).cumsum(0).tolist()
    out = []
    for b in range(x.shape[0]):
        for s in range(x.shape[1]):
            y = layer.base_layer(x[b, s])
            for e, g in enumerate(gate_of(logits[b, s], c)):
                own = slice(ends[e] - c.ranks()[e], ends[e])
                a = layer.lora_A if c.share == "A" else layer.lora_A[own]
                y = y + c.scales()[e] * g * (layer.lora_B[:, own] @ (a @ x[b, s]))
            out.append(y)
    return torch.stack(out).view(*x.shape[:2], -1)


def outputs_and_gradients(layer, x, dy, forward):
    leaf = x.clone().requires_grad_()
    y = forward(leaf)
    trained = {n: q for n, q in layer.named_parameters() if q.requires_grad}
    grads = torch.autograd.grad(
        y, (leaf, *trained.values()), dy, allow_unused=True, materialize_grads=True
    )
    return {"y": y.detach(), "dx": grads[0], **dict(zip(trained, grads[1:], strict=True))}


# A threshold of 0.9 is one that no expert of a token, or only some, pass.
LIMITS = {
    "all": [{}],
    "topk": [
        dict(top_k=1),
        dict(top_k=2),
        dict(top_k=EXPERTS),
        dict(top_k=1, entropy_threshold=0.5),
    ],
    "topp": [
        dict(top_p=0.3),
        dict(top_p=0.8),
        dict(top_p=1.0),
        dict(top_p=0.3, keep_min=2, entropy_threshold=0.5, entropy_index=1.7),
    ],
    "threshold": [
        dict(threshold=0.2),
        dict(threshold=0.9),
        dict(threshold=0.9, keep_min=1, entropy_threshold=0.4),
    ],
    "learned_threshold": [{}, dict(max_threshold=0.9)],
}
RULES = [(*gate, limit) for gate in GATES for limit in LIMITS[gate[1]]]


@pytest.mark.parametrize(("score", "select", "normalize", "limit"), RULES, ids=str)
@settings(max_examples=2, deadline=None, derandomize=True, database=None)
@given(combination=combinations())
def test_any_combination_of_axes_is_its_formula(score, select, normalize, limit, combination):
    """The axes are meant to be orthogonal: no pair of options may meet in an untested branch."""
    options, seed = combination
    if select == "learned_threshold" and options["router"] == "task":
        # A task has no x to learn a threshold from.
        options = {k: v for k, v in options.items() if "task" not in k} | {"router": "mlp"}
    options = dict(options, score=score, select=select, normalize=normalize, **limit)
    torch.manual_seed(seed)
    layer = MoeLoraLinear(IN, OUT, config=MoeLoraConfig(**options), dtype=torch.float64)
    with torch.no_grad():
        layer.lora_B.normal_()
        for q in layer.router.parameters():
            q.normal_()
    x, dy = torch.randn(2, 3, IN).double(), torch.randn(2, 3, OUT).double()
    if layer.config.router == "task":
        set_tasks(layer, [4, 1])
    found = outputs_and_gradients(layer, x, dy, layer)
    twin = copy.deepcopy(layer)
    twin.config = twin.config.replace(impl="reference")
    assert twin.config.impl == "reference"
    truths = (
        outputs_and_gradients(twin, x, dy, twin),
        outputs_and_gradients(layer, x, dy, lambda leaf: plain_forward(layer, leaf)),
    )
    for truth in truths:
        for name, expected in truth.items():
            assert torch.isfinite(found[name]).all(), name
            torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-9, msg=name)
