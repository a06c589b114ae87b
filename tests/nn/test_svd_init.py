"""init="svd_segments": GOAT's layers start from segments of the singular values of W."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from moelora_kernels import (
    MoeLoraConfig,
    MoeLoraLinear,
    load_adapter,
    replace_linears,
    save_adapter,
    set_tasks,
)
from support.formulas.presets import check, make_layer

IN, OUT, EXPERTS = 20, 16, 4
# Sums of a few dozen float64 terms of size 1, and the SVD of a small matrix.
TIGHT = dict(rtol=1e-10, atol=1e-12)
GOAT = dict(num_experts=EXPERTS, rank=3, dropout=0.0)


def linear(dtype=torch.float64, seed=0, **sizes):
    torch.manual_seed(seed)
    return nn.Linear(sizes.get("inputs", IN), sizes.get("outputs", OUT), dtype=dtype)


def goat(base, **options):
    return MoeLoraLinear.from_linear(base, MoeLoraConfig.preset("goat", **{**GOAT, **options}))


def deltas_of(layer):
    """Return s_e B_e A_e [O, I] of every expert."""
    blocks = zip(
        layer.lora_A.detach().chunk(EXPERTS),
        layer.lora_B.detach().chunk(EXPERTS, dim=1),
        strict=True,
    )
    scales = layer.config.scales(layer.in_features)
    return [s * b @ a for s, (a, b) in zip(scales, blocks, strict=True)]


@pytest.mark.parametrize("rho", (None, 2.5))
@pytest.mark.parametrize("outputs", (16, 23))
def test_experts_are_segments_of_the_singular_values(outputs, rho):
    """Expert e has r singular values from e min(I, O) / E on, divided by rho.

    The base weight is reduced by the mean of the experts.
    """
    base = linear(outputs=outputs)
    original = base.weight.detach().clone()
    layer = goat(base, svd_rho=rho)
    left, values, right = torch.linalg.svd(original, full_matrices=False)
    total = torch.zeros_like(original)
    for e, delta in enumerate(deltas_of(layer)):
        at = range(e * (min(IN, outputs) // 4), e * (min(IN, outputs) // 4) + 3)
        expected = sum(values[i] * torch.outer(left[:, i], right[i]) for i in at) / (rho or 10)
        torch.testing.assert_close(delta, expected, **TIGHT)
        total += delta / EXPERTS
    torch.testing.assert_close(layer.weight, original - total, **TIGHT)
    # A and B both have the singular values sqrt(sigma / (s rho)).
    gram_a, gram_b = layer.lora_A @ layer.lora_A.t(), layer.lora_B.t() @ layer.lora_B
    torch.testing.assert_close(gram_a, gram_b, **TIGHT)
    assert layer.lora_B.abs().min() > 0


def test_the_scale_of_goat():
    """scale = sqrt(3 alpha I / r) for each expert. The initial delta does not depend on it."""
    config = MoeLoraConfig.preset("goat", num_experts=2, rank=(1, 4), alpha=0.5)
    expected = (math.sqrt(3 * 0.5 * 48), math.sqrt(3 * 0.5 * 12))
    assert config.scales(48) == pytest.approx(expected, rel=1e-15)
    with pytest.raises(ValueError, match=r"scaling: .* pass in_features"):
        config.scales()
    first, second = goat(linear()), goat(linear(), alpha=0.03)
    torch.testing.assert_close(sum(deltas_of(first)), sum(deltas_of(second)), **TIGHT)
    assert (first.lora_A - second.lora_A).abs().max() > 0.01


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
def test_equal_gates_start_as_the_base(dtype):
    """With all gates 1/E, the new layer is its base, up to rounding."""
    base = linear(dtype)
    x = torch.randn(9, IN, dtype=dtype)
    expected = base(x).double()
    layer = goat(base, top_k=None, select="all", aux=(), svd_rho=1.0)
    with torch.no_grad():
        layer.router.weight.zero_()
        actual = layer(x).double()
    # The reduced weight, A and B are rounded to dtype once, and so is y.
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(actual, expected, rtol=4 * eps, atol=4 * eps)
    # The reduced base alone gives another output.
    with torch.no_grad():
        assert (layer.base_layer(x).double() - expected).abs().max() > 10 * eps


@pytest.mark.parametrize("top_k", (1, 2, 3))
def test_the_mean_over_all_choices_of_experts_starts_as_the_base(top_k):
    """y differs from the base for one choice of K experts; the mean over all choices does not."""
    base = linear()
    x = torch.randn(5, IN, dtype=torch.float64)
    expected = base(x)
    layer = goat(base, top_k=top_k)
    total, routings = 0.0, list(itertools.combinations(range(EXPERTS), top_k))
    for routing in routings:
        layer.router = _constant_router(routing)
        y = layer(x)
        gates = torch.zeros(EXPERTS, dtype=torch.float64)
        gates[list(routing)] = 1 / top_k
        routing_delta = sum(
            (g - 1 / EXPERTS) * d for g, d in zip(gates, deltas_of(layer), strict=True)
        )
        torch.testing.assert_close(y, expected + x @ routing_delta.t(), **TIGHT)
        assert (y - expected).abs().max() > 1e-3
        total = total + y / len(routings)
    torch.testing.assert_close(total, expected, **TIGHT)


def _constant_router(experts):
    router = nn.Linear(IN, EXPERTS, dtype=torch.float64)
    with torch.no_grad():
        router.weight.zero_()
        router.bias.fill_(-1e3)
        router.bias[list(experts)] = 0.0
    return router


def test_one_expert_without_a_router_starts_as_its_base():
    """The gate is 1, so the expert has the part of W that the base lost, like in PiSSA."""
    base = linear()
    x = torch.randn(5, IN, dtype=torch.float64)
    expected = base(x)
    options = dict(num_experts=1, rank=3, init="svd_segments", router=None, svd_rho=1.0)
    layer = MoeLoraLinear.from_linear(base, **options)
    torch.testing.assert_close(layer(x), expected, **TIGHT)
    _, values, _ = torch.linalg.svd(layer.weight)
    assert values[-3:].abs().max() < 1e-12


@pytest.mark.parametrize("rank", (1, 3, (1, 4, 2, 3)))
def test_goat_matches_its_formula_over_the_reduced_base(rank):
    """The gradients of A and B are not zero at the start."""
    layer = goat(linear(), rank=rank).eval()
    if isinstance(rank, int):
        assert layer.lora_A.shape == (EXPERTS * rank, IN)
    y = layer(torch.randn(4, IN, dtype=torch.float64))
    for g in torch.autograd.grad(y.square().sum(), [layer.lora_A, layer.lora_B]):
        assert g.abs().max() > 1e-3
    small = make_layer("goat", torch.float64, num_experts=5, rank=2)
    check("goat", small, torch.randn(2, 3, 12, dtype=torch.float64))


def test_a_shared_expert_has_no_segment():
    base = linear()
    original = base.weight.detach().clone()
    layer = goat(base, shared_expert="always", shared_rank=2)
    assert layer.lora_B.shape == (OUT, 14)
    assert not layer.lora_B[:, 12:].any()
    assert 0 < layer.lora_A[12:].abs().max() <= IN**-0.5
    plain = goat(linear())
    assert torch.equal(base.weight, original)
    torch.testing.assert_close(layer.weight, plain.weight, **TIGHT)


def test_only_the_weight_of_the_layer_changes():
    """The original linear and the embedding tied to it keep their weight."""
    model = nn.ModuleDict({"embed": nn.Embedding(OUT, IN), "head": nn.Linear(IN, OUT)})
    model["head"].weight = model["embed"].weight
    original_linear = model["head"]
    original = original_linear.weight.detach().clone()
    replace_linears(model, MoeLoraConfig.preset("goat", **GOAT), ["head"])
    assert torch.equal(model["embed"].weight, original)
    assert torch.equal(original_linear.weight, original)
    assert not torch.equal(model["head"].weight, original)
    assert model["head"].bias is original_linear.bias
    assert not any(q.requires_grad for q in model["head"].base_layer.parameters())
    # A second layer over the same linear starts from the original, too.
    assert torch.equal(goat(original_linear).weight, goat(original_linear).weight)


def test_a_linear_under_two_names_is_reduced_once():
    shared = linear()
    model = nn.ModuleDict({"a": shared, "b": shared, "c": linear(seed=1)})
    replace_linears(model, MoeLoraConfig.preset("goat", **GOAT), ["a", "b", "c"])
    assert model["a"] is model["b"]
    assert model["a"] is not model["c"]
    torch.testing.assert_close(model["a"].weight, goat(shared).weight, **TIGHT)


def test_an_adapter_loads_into_a_new_layer_over_the_original(tmp_path):
    """The file has A, B and the router. The reduced base comes from the original weight."""
    trained = goat(linear())
    with torch.no_grad():
        for q in (trained.lora_A, trained.lora_B, trained.router.weight):
            q.add_(torch.randn_like(q))
    save_adapter(trained, tmp_path / "adapter")
    loaded = goat(linear())
    assert not torch.equal(loaded.lora_A, trained.lora_A)
    load_adapter(loaded, tmp_path / "adapter")
    x = torch.randn(6, IN, dtype=torch.float64)
    torch.testing.assert_close(loaded(x), trained(x), **TIGHT)


def test_a_state_dict_loads_into_a_layer_over_any_base():
    """The state dict has the reduced weight, which is not reduced again."""
    trained, other = goat(linear()), goat(linear(seed=3))
    other.load_state_dict(trained.state_dict())
    x = torch.randn(6, IN, dtype=torch.float64)
    assert torch.equal(other(x), trained(x))
    assert torch.equal(copy.deepcopy(trained)(x), trained(x))


def test_a_base_is_reduced_once():
    layer = goat(linear())
    for call in (layer.reset_parameters, lambda: goat(layer.base_layer)):
        with pytest.raises(RuntimeError, match="init: 'svd_segments' has reduced this base"):
            call()


def test_a_layer_on_the_meta_device_starts_when_the_base_has_values():
    """A layer is built on meta, gets the base's values, and then its initial A and B."""
    base = linear()
    with torch.device("meta"):
        layer = goat(nn.Linear(IN, OUT, dtype=torch.float64))
    assert layer.lora_A.is_meta
    assert layer.weight.is_meta
    layer.to_empty(device="cpu")
    layer.base_layer.load_state_dict(base.state_dict())
    layer.reset_parameters()
    expected = goat(base)
    torch.testing.assert_close(layer.weight, expected.weight, **TIGHT)
    torch.testing.assert_close(sum(deltas_of(layer)), sum(deltas_of(expected)), **TIGHT)


class Quantised(nn.Module):
    """A quantised linear with int8 rows."""

    def __init__(self):
        super().__init__()
        self.in_features, self.out_features = IN, OUT
        self.weight = nn.Parameter(torch.ones(OUT, IN, dtype=torch.int8), requires_grad=False)


class Subclass(nn.Linear):
    """A subclass of nn.Linear, whose forward may differ."""


def with_hook():
    base = linear()
    base.register_forward_hook(lambda *_: None)
    return base


def float8():
    base = linear()
    base.weight = nn.Parameter(base.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    return base


@pytest.mark.parametrize("base", (Quantised, float8, lambda: Subclass(IN, OUT), with_hook))
def test_a_base_that_cannot_be_reduced_is_refused(base):
    """A delta cannot be subtracted from quantised codes."""
    with pytest.raises(ValueError, match=r"^init: 'svd_segments' .* plain nn.Linear"):
        goat(base())


@pytest.mark.parametrize("device", ("cpu", "meta"))
def test_a_base_that_is_too_small_is_refused(device):
    with pytest.raises(ValueError, match=r"^rank: .* = 4 singular values .* got rank 5"):
        goat(linear().to(device), rank=5)


def test_cluster_gates_start_from_segments_too():
    """Task gates sum to 1, too: with equal gates the layer starts as its base."""
    base = linear()
    options = dict(router="task", num_tasks=3, top_k=None, select="all", aux=())
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    expected = base(x)
    layer = goat(base, **options)
    with torch.no_grad():
        layer.router.gate.weight.zero_()
    set_tasks(layer, [1, 3])
    torch.testing.assert_close(layer(x), expected, **TIGHT)
