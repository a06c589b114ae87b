"""Options of MING's router besides top-k: sampling, scales, shared experts, load balance."""

import itertools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moelora_kernels import (
    MoeLoraConfig,
    collect_aux_loss,
    record_routing,
    replace_linears,
)
from moelora_kernels.nn.gates import gate_of_logits
from support.compare import assert_same, backward_step
from support.ffns import HIDDEN, make_ffn
from support.linears import IN, make_layer, randomise

SAMPLING = dict(
    num_experts=4, rank=3, alpha=6.0, router_bias=True, score="identity", normalize="softmax",
    select="sampling", top_k=2,
)  # fmt: skip


def test_the_preset_allows_sampling():
    config = MoeLoraConfig.preset("ming", select="sampling")
    assert (config.select, config.top_k, config.is_sparse()) == ("sampling", 2, True)
    with pytest.raises(
        ValueError, match=r"^top_k: expected a value with select='sampling', got None$"
    ):
        MoeLoraConfig(select="sampling")
    with pytest.raises(ValueError, match=r"^top_k: 2 works only with select='topk' or 'sampling'"):
        MoeLoraConfig(select="all", top_k=2)
    assert MoeLoraConfig.preset("ming", select="sampling").replace(top_k=1).select == "sampling"
    assert not MoeLoraConfig.preset("ming", select="sampling", top_k=8).is_sparse()


def test_experts_are_sampled_without_replacement_from_the_softmax():
    """P(i, then j) = p_i p_j / (1 - p_i) for each pair; weights = softmax of their logits."""
    logits = torch.tensor([1.0, 0.0, -1.0, 0.5], dtype=torch.float64)
    draws = 40_000
    config = MoeLoraConfig(**SAMPLING)
    weights, experts = gate_of_logits(logits.expand(draws, 4), config, training=True)
    assert experts.dtype == torch.int32
    torch.testing.assert_close(weights, logits[experts.long()].softmax(dim=1))
    p = logits.softmax(dim=0)
    for i, j in itertools.permutations(range(4), 2):
        expected = p[i] * p[j] / (1 - p[i])
        actual = ((experts[:, 0] == i) & (experts[:, 1] == j)).double().mean()
        # Five standard deviations of a share of that many draws.
        assert (actual - expected).abs() < 5 * (expected * (1 - expected) / draws) ** 0.5, (i, j)


def test_temperature_applies_to_sampling_and_weights():
    logits = torch.tensor([2.0, 0.0], dtype=torch.float64).expand(20_000, 2)
    config = MoeLoraConfig(**{**SAMPLING, "num_experts": 2, "top_k": 1, "temperature": 4.0})
    _, experts = gate_of_logits(logits, config, training=True)
    expected = torch.tensor(0.5).sigmoid()
    assert ((experts == 0).double().mean() - expected).abs() < 5 * (0.25 / 20_000) ** 0.5


def test_sampling_equals_torch_multinomial():
    """With the same seed the experts are those of torch.multinomial, which the original calls."""
    logits = torch.randn(50, 6)
    config = MoeLoraConfig(**{**SAMPLING, "num_experts": 6})
    torch.manual_seed(5)
    _, experts = gate_of_logits(logits, config, training=True)
    torch.manual_seed(5)
    expected = torch.multinomial(logits.softmax(dim=1), 2)
    assert torch.equal(experts.long(), expected)


def test_sampling_with_probabilities_of_zero():
    """torch.multinomial would raise if fewer than K probabilities are above zero."""
    logits = torch.tensor([[0.0, -500.0, -600.0, -float("inf")]])
    weights, experts = gate_of_logits(logits, MoeLoraConfig(**SAMPLING), training=True)
    assert experts.tolist() == [[0, 1]]
    assert weights.tolist() == [[1.0, 0.0]]


def sampled_step(layer, x, seed):
    torch.manual_seed(seed)
    leaf = x.clone().requires_grad_()
    with record_routing(layer):
        y = layer(leaf)
        experts = layer.record.indices
    trained = [q for q in layer.parameters() if q.requires_grad]
    return y.detach(), experts, torch.autograd.grad(y.square().sum(), (leaf, *trained))


@pytest.mark.parametrize("training", (True, False))
def test_outputs_and_gradients_match_the_sampled_experts(training):
    """y and gradients match the formula with the sampled experts. Evaluation samples as well."""
    layer = make_layer(**SAMPLING).train(training)
    x = torch.randn(3, 5, IN, dtype=torch.float64)
    y, experts, actual = sampled_step(layer, x, 1)
    repeated = sampled_step(layer, x, 1)
    assert torch.equal(y, repeated[0])
    assert not torch.equal(experts, sampled_step(layer, x, 2)[1])
    top = layer.router(x.reshape(-1, IN)).topk(2).indices
    assert (experts.long().sort().values != top.sort().values).any()

    leaf = x.clone().requires_grad_()
    out = []
    for token, selected in zip(leaf.reshape(-1, IN), experts.tolist(), strict=True):
        g = layer.router(token)
        w = torch.stack([g[e] for e in selected]).softmax(dim=0)
        total = layer.base_layer(token)
        for j, e in enumerate(selected):
            columns = slice(3 * e, 3 * e + 3)
            total = total + 2.0 * w[j] * (
                layer.lora_B[:, columns] @ (layer.lora_A[columns] @ token)
            )
        out.append(total)
    expected = torch.stack(out).view(3, 5, -1)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    trained = [q for q in layer.parameters() if q.requires_grad]
    expected_grads = torch.autograd.grad(expected.square().sum(), (leaf, *trained))
    for a, b in zip(actual, expected_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_sampling_compiles_once():
    """No graph break, the experts of eager, and one graph for all numbers of tokens."""
    layer = make_layer(**SAMPLING)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    compiled(torch.randn(2, 5, IN, dtype=torch.float64))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (3, 7):
            x = torch.randn(2, tokens, IN, dtype=torch.float64)
            torch.manual_seed(1)
            actual = compiled(x)
            torch.manual_seed(1)
            torch.testing.assert_close(actual, layer(x), rtol=1e-12, atol=1e-12)


def test_all_formulations_sample_the_same_experts():
    layers = [make_layer(**SAMPLING, impl=impl) for impl in ("wide", "grouped", "reference")]
    x = torch.randn(3, 5, IN, dtype=torch.float64)
    first, *others = [sampled_step(layer, x, 4) for layer in layers]
    for other in others:
        assert torch.equal(first[1], other[1])
        for a, b in zip((first[0], *first[2]), (other[0], *other[2]), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("use_reentrant", (True, False))
def test_checkpointing_samples_the_same_experts(use_reentrant):
    """The recompute in backward samples the experts of the forward."""
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6))
    replace_linears(model, MoeLoraConfig(**SAMPLING), ["0", "2"])
    randomise(model)

    x = torch.ones(3, 4, 6)
    recomputed = backward_step(
        model, x, forward=lambda leaf: checkpoint(model, leaf, use_reentrant=use_reentrant)
    )
    assert_same(recomputed, backward_step(model, x))


@pytest.mark.parametrize("granularity", ("sequence", "task"))
def test_a_sequence_or_task_samples_once(granularity):
    """Sampled gates of sequences and tasks are dense."""
    options = {**SAMPLING, "granularity": granularity}
    if granularity == "task":
        options |= dict(router="task", num_tasks=3, task_embedding_dim=4, router_bias=False)
    logits = torch.randn(6, 4)
    weights, experts = gate_of_logits(logits, MoeLoraConfig(**options), training=True)
    assert experts is None
    assert ((weights > 0).sum(dim=1) == 2).all()
    kept = torch.where(weights > 0, logits, -torch.inf).softmax(dim=1)
    torch.testing.assert_close(weights, kept)


def test_all_experts_and_shared_experts_with_sampling():
    """K = E selects all experts. A shared expert is added to the sampled ones."""
    layer = make_layer(**{**SAMPLING, "top_k": 4})
    x = torch.randn(5, IN, dtype=torch.float64)
    clone = make_layer(**{**SAMPLING, "select": "all", "top_k": None})
    torch.testing.assert_close(layer(x), clone(x), rtol=1e-12, atol=1e-12)
    shared = make_layer(**SAMPLING, shared_expert="always")
    with record_routing(shared):
        shared(x)
        assert (shared.record.indices[:, -1] == 4).all()
        assert (shared.record.weights[:, -1] == 1).all()


def test_whole_ffn_experts_can_be_sampled():
    ffn = make_ffn(**SAMPLING, aux={"load_balance": 1.0})
    x = torch.randn(3, 4, HIDDEN, dtype=torch.float64)
    torch.manual_seed(1)
    y = ffn(x)
    assert collect_aux_loss(ffn) > 0
    torch.manual_seed(1)
    assert torch.equal(ffn(x), y)
    assert not torch.equal(ffn(x), y)


def test_rslora_and_the_scale_of_shared_experts():
    """alpha / sqrt(r); shared experts of rank n r with the routed experts' alpha / r."""
    assert MoeLoraConfig.preset("ming", scaling="alpha/sqrt(r)").scales() == (32.0 / 4,) * 8
    config = MoeLoraConfig.preset("ming", shared_expert="always", shared_rank=32)
    assert config.scales() == (2.0,) * 8 + (1.0,)
    assert config.replace(scaling=2.0).scales() == (2.0,) * 9
    assert config.replace(scaling=2.0).ranks() == (16,) * 8 + (32,)


def test_shared_experts_are_outside_the_softmax():
    """y = W x + s sum_j w_j B_j A_j x + s B_s A_s x with sum w = 1."""
    layer = make_layer(shared_expert="always", shared_rank=6, scaling=2.0)
    x = torch.randn(4, IN, dtype=torch.float64)
    with torch.no_grad():
        layer.lora_B[:, :12].zero_()
    a, b = layer.lora_A[12:], layer.lora_B[:, 12:]
    expected = layer.base_layer(x) + 2.0 * x @ a.t() @ b.t()
    torch.testing.assert_close(layer(x), expected, rtol=1e-12, atol=1e-12)


def test_the_load_balance_of_ming_is_a_weight_of_ours():
    """MING: c * mean over layers of E sum_e f_e p_e with sum f = K. Here: weight c K / layers."""
    coefficient, top_k = 0.01, 2
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)).double()
    config = MoeLoraConfig.preset(
        "ming", num_experts=4, rank=2, aux={"load_balance": coefficient * top_k / 3}
    )
    replace_linears(model, config, ["0", "1", "2"])
    randomise(model)
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    losses, h = [], x
    for layer in model:
        p = layer.router(h.reshape(-1, 6)).softmax(dim=1)
        selected = p.topk(top_k).indices
        f = torch.stack([(selected == e).sum() for e in range(4)]).double() / p.shape[0]
        losses.append(4 * (f * p.mean(dim=0)).sum())
        h = layer(h)
    expected = coefficient * sum(losses) / len(losses)
    model(x)
    actual = collect_aux_loss(model)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    # The loss of a later layer also has gradients through the layers before it.
    routers = [layer.router.weight for layer in model]
    gradients = (torch.autograd.grad(loss, routers) for loss in (actual, expected))
    for a, b in zip(*gradients, strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)
