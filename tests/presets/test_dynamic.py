"""Presets whose gate selects a different number of experts per token or sequence."""

import copy
import math

import pytest
import torch
from torch import nn

from moelora_kernels import (
    MoeLoraConfig,
    MoeLoraGroup,
    MoeLoraLinear,
    adapter_parameters,
    adapter_state_dict,
    collect_aux_loss,
    load_adapter,
    record_routing,
    replace_linears,
    save_adapter,
    set_tasks,
)
from moelora_kernels.nn.gates import normalized_entropy
from support.compare import formula_step, training_step
from support.formulas.presets import IN, OUT, check, formula_of, make_layer
from support.formulas.token_gates import adamole_margins, dynmole_experts, tsallis

# float64 sums of a few dozen terms, in another order.
TIGHT = dict(rtol=1e-11, atol=1e-12)


def sharp_layer(preset, dtype=torch.float64, factor=4.0, **options):
    """Return a layer with a sharp router, so that tokens use different numbers of experts."""
    layer = make_layer(preset, dtype, **options)
    with torch.no_grad():
        for q in layer.router.parameters():
            q.mul_(factor)
    return layer


def certain_to_uncertain(tokens, dtype=torch.float64):
    """Return tokens from large to nearly zero, whose routing goes from certain to undecided."""
    return (torch.randn(tokens, IN) * torch.linspace(1.0, 0.02, tokens)[:, None]).to(dtype)


def parameters_of(layer):
    return {n: q.detach() for n, q in layer.named_parameters()}


@pytest.mark.parametrize("max_threshold", (None, 0.4))
def test_adamole_selects_the_experts_above_the_threshold(max_threshold):
    """The gate is p - tau, divided by its sum. The threshold's parameters have gradients."""
    layer = sharp_layer("adamole", max_threshold=max_threshold)
    x = torch.randn(40, IN, dtype=torch.float64)
    counts = (adamole_margins(x, parameters_of(layer), layer.config) >= 0).sum(dim=1)
    x = x[counts > 0]
    assert len(counts[counts > 0].unique()) >= 3
    check("adamole", layer, x)
    grads = training_step(layer, x, torch.randn(len(x), OUT, dtype=torch.float64))
    assert grads["router.threshold.weight"].abs().max() > 1e-3
    assert grads["router.threshold.bias"].abs().max() > 1e-3


def test_a_token_without_an_expert_gets_the_base():
    """The gate of a token without experts is 0, not 0 / 0. Other tokens do not change."""
    layer = sharp_layer("adamole", max_threshold=0.95)
    x = torch.randn(40, IN, dtype=torch.float64)
    unrouted = (adamole_margins(x, parameters_of(layer), layer.config) < 0).all(dim=1)
    assert 0 < unrouted.sum() < 40
    check("adamole", layer, x[~unrouted])
    dy = torch.randn(40, OUT, dtype=torch.float64)
    actual = training_step(layer, x[unrouted], dy[unrouted])
    assert torch.equal(actual.pop("y"), layer.base_layer(x[unrouted]))
    torch.testing.assert_close(actual.pop("dx"), dy[unrouted] @ layer.weight, **TIGHT)
    assert all(not g.any() for g in actual.values())
    together, others = (
        training_step(layer, x, dy),
        training_step(layer, x[~unrouted], dy[~unrouted]),
    )
    for name in actual:
        torch.testing.assert_close(together[name], others[name], **TIGHT)


def test_the_default_threshold_is_at_most_one_over_e():
    """The default of max_threshold is 1/E, also if num_experts is changed."""
    for experts in (4, 8):
        layer = make_layer("adamole", torch.float64, num_experts=experts)
        with torch.no_grad():
            layer.router.gate.weight.zero_()
            layer.router.threshold.weight.zero_()
            layer.router.threshold.bias.fill_(1.0)
        x = torch.randn(3, IN, dtype=torch.float64)
        layer.config = layer.config.replace(normalize="none")
        with record_routing(layer):
            layer(x)
            expected = (1 - 1 / (1 + math.exp(-1.0))) / experts
            torch.testing.assert_close(
                layer.record.weights, torch.full_like(layer.record.weights, expected), **TIGHT
            )


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
def test_a_threshold_met_exactly_has_finite_gradients(dtype):
    """p = tau = 1/E for every expert: all are selected, and their weights sum to 0."""
    layer = make_layer("adamole", dtype)
    with torch.no_grad():
        layer.router.gate.weight.zero_()
        layer.router.threshold.weight.zero_()
        layer.router.threshold.bias.fill_(1e4)
    x = torch.randn(6, IN, dtype=dtype)
    actual = training_step(layer, x, torch.randn(6, OUT, dtype=dtype))
    torch.testing.assert_close(actual["y"], layer.base_layer(x), rtol=1e-5, atol=1e-5)
    for name, g in actual.items():
        # A division by the smallest float would give 1e38.
        assert g.abs().max() < 1e4, name


@pytest.mark.parametrize("options", (dict(router="mlp"), dict(granularity="sequence")), ids=str)
def test_learned_thresholds_over_other_routers(options):
    """Any router can be the gate under a threshold. Both read the same input."""
    layer = sharp_layer("adamole", **options)
    x = torch.randn(4, 3, IN, dtype=torch.float64)
    with record_routing(layer):
        layer(x)
        actual = layer.record.weights
    seen = x.mean(1) if "granularity" in options else x.view(12, IN)
    router = layer.router
    tau = router.threshold(seen).sigmoid() / 8
    kept = ((router.gate(seen)).softmax(1) - tau).clamp_min(0)
    torch.testing.assert_close(actual, kept / kept.sum(1, keepdim=True), **TIGHT)
    assert len((actual > 0).sum(1).unique()) > 1


def test_layers_can_share_a_router_but_not_its_threshold():
    router = nn.Linear(IN, 8, dtype=torch.float64)
    first, second = (make_layer("adamole", torch.float64, router=router) for _ in range(2))
    assert first.router.gate is second.router.gate is router
    assert first.router.threshold is not second.router.threshold
    assert len(adapter_parameters(nn.ModuleList([first, second]))) == 2 * 4 + 2


def test_the_threshold_is_saved_copied_and_trained(tmp_path):
    """The threshold is in adapter files and copies, and it trains."""
    source, target = sharp_layer("adamole"), sharp_layer("adamole", seed=1)
    x = torch.randn(9, IN, dtype=torch.float64)
    assert (source(x) - target(x)).abs().max() > 0.1
    target.base_layer.load_state_dict(source.base_layer.state_dict())
    assert {k for k in adapter_state_dict(source) if "threshold" in k} == {
        "router.threshold.weight",
        "router.threshold.bias",
    }
    save_adapter(source, tmp_path / "adapter")
    load_adapter(target, tmp_path / "adapter")
    assert torch.equal(target(x), source(x))
    assert torch.equal(copy.deepcopy(source)(x), source(x))
    listed = {id(q) for q in adapter_parameters(source)}
    assert {id(q) for q in source.router.parameters()} <= listed
    assert all(q.requires_grad for q in source.router.parameters())


@pytest.mark.parametrize("preset", ("adamole", "dynmole"))
def test_siblings_of_a_group_keep_their_own_gates(preset):
    siblings = {n: sharp_layer(preset, seed=i) for i, n in enumerate(("q", "k", "v"))}
    x = torch.randn(7, IN, dtype=torch.float64)
    alone = [layer(x) for layer in siblings.values()]
    group = MoeLoraGroup(**siblings)
    for actual, expected in zip(group(x), alone, strict=True):
        torch.testing.assert_close(actual, expected, **TIGHT)
    group_loss = collect_aux_loss(group)
    for layer in siblings.values():
        layer(x)
    torch.testing.assert_close(group_loss, collect_aux_loss(group), **TIGHT)


@pytest.mark.parametrize("masked", (False, True))
def test_the_load_balance_of_adamole(masked):
    """The loss is E sum_e f_e mean(p_e - tau), and the threshold has a gradient from it."""
    layer = sharp_layer("adamole", max_threshold=0.5, aux={"load_balance": 0.3})
    x = torch.randn(3, 7, IN, dtype=torch.float64)
    mask = torch.rand(3, 7) > 0.4 if masked else torch.ones(3, 7, dtype=torch.bool)
    layer(x)
    actual = collect_aux_loss(layer, mask if masked else None)
    p = dict(layer.named_parameters())
    margins = adamole_margins(x[mask], p, layer.config)
    counts = (margins > 0).double().sum(dim=0)
    assert 0 < counts.sum() < margins.numel()
    expected = 0.3 * 8 * (counts / counts.sum() * margins.mean(dim=0)).sum()
    torch.testing.assert_close(actual, expected, **TIGHT)
    router_parameters = list(layer.router.parameters())
    grads = (
        torch.autograd.grad(actual, router_parameters),
        torch.autograd.grad(expected, router_parameters),
    )
    for g, e in zip(*grads, strict=True):
        torch.testing.assert_close(g, e, **TIGHT)
        assert e.abs().max() > 1e-4


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
def test_dynmole_selects_for_each_token(dtype):
    """A batch has tokens of all three rules: top-p, keep_min, and all experts by entropy."""
    layer = sharp_layer("dynmole", dtype, factor=6.0)
    x = certain_to_uncertain(60, dtype)
    logits = x.double() @ layer.router.weight.detach().double().t()
    kept, rules = zip(*(dynmole_experts(p, layer.config) for p in logits.softmax(1)), strict=True)
    assert all(rules.count(rule) >= 4 for rule in ("top_p", "keep_min", "entropy"))
    assert {len(k) for k in kept} >= {2, 3, 6}
    check("dynmole", layer, x)


ENTROPIES = (1.0, 1.1, 0.5, 2.0)


@pytest.mark.parametrize("q", ENTROPIES)
def test_normalized_entropy(q):
    """The entropy is 0 for one certain expert and 1 for equal ones. Masked experts do not count."""
    logits = torch.randn(5, 6, dtype=torch.float64) * 2
    actual = normalized_entropy(logits, q)
    for value, p in zip(actual.tolist(), logits.softmax(1).tolist(), strict=True):
        shannon = -sum(v * math.log(v) for v in p) / math.log(6)
        assert value == pytest.approx(shannon if q == 1.0 else tsallis(p, q), rel=1e-11)
    certain = torch.tensor([[-math.inf, 0.0, -math.inf], [-900.0, 0.0, -800.0]]).requires_grad_()
    entropy = normalized_entropy(certain, q)
    torch.testing.assert_close(entropy, torch.zeros(2), rtol=0, atol=1e-6)
    assert torch.autograd.grad(entropy.sum(), certain)[0].isfinite().all()
    equal = normalized_entropy(torch.full((1, 7), 3.0, dtype=torch.float64), q)
    torch.testing.assert_close(equal, torch.ones(1, dtype=torch.float64), **TIGHT)


@pytest.mark.parametrize("q", ENTROPIES)
@pytest.mark.parametrize("masked", (False, True))
def test_entropy_loss(q, masked):
    """The loss is the mean entropy of the tokens in the mask; its gradient matches the formula."""
    layer = sharp_layer("dynmole", aux={"entropy": 0.7}, entropy_index=q, temperature=0.8)
    x = torch.randn(2, 6, IN, dtype=torch.float64)
    mask = torch.rand(2, 6) > 0.4 if masked else torch.ones(2, 6, dtype=torch.bool)
    layer(x)
    actual = collect_aux_loss(layer, mask if masked else None)
    p = (layer.router(x[mask]) / 0.8).softmax(dim=1)
    if q == 1.0:
        expected = -(p * p.log()).sum(dim=1) / math.log(6)
    else:
        expected = (1 - (p**q).sum(dim=1)) / (1 - 6 ** (1 - q))
    expected = 0.7 * expected.mean()
    torch.testing.assert_close(actual, expected, **TIGHT)
    (g,) = torch.autograd.grad(actual, layer.router.weight)
    (e,) = torch.autograd.grad(expected, layer.router.weight)
    torch.testing.assert_close(g, e, **TIGHT)
    assert e.abs().max() > 1e-3


def test_the_weights_of_dynmoles_losses():
    """loss = 0.01 * Tsallis entropy (q = 1.1) + 0.001 * load balance."""
    layer = sharp_layer("dynmole")
    x = torch.randn(20, IN, dtype=torch.float64)
    layer(x)
    actual = collect_aux_loss(layer)
    probabilities = layer.router(x).softmax(dim=1).detach()
    counts = torch.zeros(6, dtype=torch.float64)
    for p in probabilities:
        counts[dynmole_experts(p, layer.config)[0]] += 1
    entropy = sum(tsallis(p, 1.1) for p in probabilities.tolist()) / 20
    balance = 6 * (counts / counts.sum() * probabilities.mean(dim=0)).sum()
    torch.testing.assert_close(actual.detach(), 0.01 * entropy + 0.001 * balance, **TIGHT)


def test_mocle_has_noise_in_training_only():
    """gate = softmax((W emb[cluster] + 0.1 N(0, 1)) / temperature), one per sequence."""
    layer = make_layer("mocle", torch.float64, temperature=0.5)
    clusters = torch.tensor([3, 64, 3, 1])
    x = torch.randn(4, 3, IN, dtype=torch.float64)
    set_tasks(layer, clusters)
    with record_routing(layer):
        layer(x)
        weights_without_noise = layer.record.weights
    layer.train()
    torch.manual_seed(5)
    noise = torch.randn(4, 4, dtype=torch.float64)
    assert noise.std() > 0.5
    torch.manual_seed(5)
    with record_routing(layer):
        actual = layer(x)
        weights = layer.record.weights
    logits = layer.router.embedding.weight[clusters] @ layer.router.gate.weight.t()
    gate = ((logits + 0.1 * noise) / 0.5).softmax(1)
    best = gate.amax(1)
    torch.testing.assert_close(weights.amax(1)[best > 0.5], best[best > 0.5], **TIGHT)
    torch.testing.assert_close(weights[:, 4], 1 - best, **TIGHT)
    assert ((weights[:, :4] > 0).sum(1) == 1).all()
    assert torch.equal(weights_without_noise[0], weights_without_noise[2])
    assert not torch.equal(weights[0], weights[2])
    p = parameters_of(layer)
    blocks = [layer.lora_B[:, 8 * e : 8 * e + 8] @ p["lora_A"][8 * e : 8 * e + 8] for e in range(5)]
    expected = layer.base_layer(x) + 2.0 * torch.stack(
        [xb @ sum(g * m for g, m in zip(w, blocks, strict=True)).t()
         for xb, w in zip(x, weights, strict=True)]
    )  # fmt: skip
    torch.testing.assert_close(actual, expected, **TIGHT)


def test_one_cluster_gate_serves_a_model():
    model = nn.Sequential(nn.Linear(IN, OUT), nn.ReLU(), nn.Linear(OUT, IN))
    replace_linears(model, MoeLoraConfig.preset("mocle"), ["0", "2"])
    assert model[0].router is model[2].router
    set_tasks(model, [64, 2])
    with pytest.raises(ValueError, match=r"ids: expected 1 to 64"):
        set_tasks(model, [0])
    assert model(torch.randn(2, 3, IN)).shape == (2, 3, IN)


PUBLISHED_SIZES = {
    "mole": (8, 32, 16 / 4),
    "adamole": (8, 32, 16 / 4),
    "dynmole": (6, 144, 48 / 24),
    "goat": (8, 32, (3 * 4096 / 4) ** 0.5),
    "mocle": (4, 40, 16 / 8),
}


@pytest.mark.parametrize("preset", PUBLISHED_SIZES)
def test_sizes_of_the_presets(preset):
    """num_experts, total rank and scale at in_features = 4096, as published."""
    config = MoeLoraConfig.preset(preset)
    scales = config.scales(4096)
    assert (config.num_experts, sum(config.ranks()), scales[0]) == PUBLISHED_SIZES[preset]
    assert len(set(scales)) == 1


@pytest.mark.parametrize("preset", ("adamole", "dynmole"))
def test_compiles_without_graph_breaks(preset):
    """The selection has no host synchronisation, so the graph has no break."""
    layer = sharp_layer(preset)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, IN, dtype=torch.float64)
    torch.testing.assert_close(compiled(x), layer(x), **TIGHT)


def test_a_broken_gate_differs_from_the_loop():
    """A gate without one of the rules gives another y, so `check` tests every rule."""
    layer = sharp_layer("dynmole", factor=6.0)
    x = certain_to_uncertain(30)
    dy = torch.randn(30, OUT, dtype=torch.float64)
    truth = formula_step(formula_of("dynmole", layer), layer, x, dy)["y"]
    for options in (dict(keep_min=1), dict(entropy_threshold=0.999), dict(top_p=0.5)):
        broken = copy.deepcopy(layer)
        broken.config = layer.config.replace(**options)
        assert (broken(x) - truth).abs().max() > 1e-3, options


def test_a_router_of_the_wrong_width_is_named():
    layer = MoeLoraLinear(IN, OUT, config=MoeLoraConfig.preset("adamole", router=nn.Identity()))
    with pytest.raises(ValueError, match=r"router: expected logits \[2, 9\], got \[2, 13\]"):
        layer(torch.randn(2, IN))
