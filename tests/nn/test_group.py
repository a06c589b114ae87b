"""MoeLoraGroup: siblings give the same outputs and gradients together and one by one."""

import copy

import pytest
import torch
from torch import nn

from moelora_kernels import (
    MoeLoraConfig,
    MoeLoraGroup,
    MoeLoraLinear,
    record_routing,
    reference,
    set_tasks,
)
from moelora_kernels.nn import TaskRouter
from moelora_kernels.testing import assert_within_budget
from support.compare import training_step_of_siblings

IN = 12
# Grouped-query attention: k and v are narrower than q.
WIDTHS = {"q_proj": 10, "k_proj": 4, "v_proj": 5}

OPTIONS = {
    "top-k": dict(top_k=2, router_bias=True),
    "softmax": dict(normalize="none"),
    "unnormalized top-k": dict(top_k=2, normalize="none", temperature=0.5),
    "noise-free top-p": dict(select="topp", top_p=0.6),
    "mlp": dict(router="mlp", top_k=2),
    "no router": dict(router=None),
    "task": dict(router="task", num_tasks=5, task_embedding_dim=3),
    "external": dict(router="external"),
    "shared A": dict(share="A", normalize="none"),
    "shared expert": dict(top_k=2, shared_expert="complement", shared_rank=1),
    "ranks": dict(rank=(1, 2, 3, 1), top_k=2),
    "sequence": dict(granularity="sequence", top_k=2),
    "grouped": dict(top_k=2, router_bias=True, impl="grouped"),
}


def make_siblings(dtype=torch.float64, **options):
    torch.manual_seed(0)
    config = MoeLoraConfig(**{"num_experts": 4, "rank": 2, "alpha": 3.0, **options})
    siblings = {n: MoeLoraLinear(IN, o, config=config, dtype=dtype) for n, o in WIDTHS.items()}
    shared = siblings["q_proj"].router
    for layer in siblings.values():
        with torch.no_grad():
            layer.lora_B.normal_(std=0.4)
        if isinstance(shared, TaskRouter):
            layer.router = shared
    for layer in siblings.values():
        if config.router == "task":
            set_tasks(layer, [2, 5])
        elif config.router == "external":
            set_tasks(layer, torch.rand(2, 4, dtype=dtype))
    return siblings


def random_dy(x):
    return [torch.randn(*x.shape[:-1], o, dtype=x.dtype) for o in WIDTHS.values()]


@pytest.mark.parametrize("shape", ((2, 3), (2, 1), (2, 0)), ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_a_group_equals_its_siblings_alone(name, shape):
    """One pass over x does not mix the columns, experts or gates of siblings."""
    siblings = make_siblings(**OPTIONS[name])
    group = MoeLoraGroup(**siblings)
    x = torch.randn(*shape, IN, dtype=torch.float64)
    dys = random_dy(x)
    actual = training_step_of_siblings(group, group, x, dys)
    expected = training_step_of_siblings(
        lambda leaf: [layer(leaf) for layer in siblings.values()], group, x, dys
    )
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-11, atol=1e-11, msg=key)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", ("top-k", "unnormalized top-k", "task", "shared A", "sequence"))
def test_a_group_in_low_precision(name, dtype):
    """The error against float64 is within the budget, which the reference in the dtype sets."""
    siblings = make_siblings(dtype, **OPTIONS[name])
    group = MoeLoraGroup(**siblings)
    x = torch.randn(2, 5, IN, dtype=dtype)
    dys = random_dy(x)
    actual = training_step_of_siblings(group, group, x, dys)
    exact = copy.deepcopy(group).double()
    alone = list(exact.children())
    truth = training_step_of_siblings(
        lambda leaf: [layer(leaf) for layer in alone], exact, x.double(), [g.double() for g in dys]
    )
    by_reference = copy.deepcopy(group)
    for layer in by_reference.children():
        layer.config = layer.config.replace(impl="reference")
    assert_within_budget(
        actual, truth, training_step_of_siblings(by_reference, by_reference, x, dys), dtype
    )


@pytest.mark.parametrize("name", ("top-k", "task", "shared A"))
def test_an_output_without_a_loss(name):
    """With a loss on v only, the adapters of q and k get gradients of zero, not None."""
    siblings = make_siblings(**OPTIONS[name])
    group = MoeLoraGroup(**siblings)
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    dys = [None, None, random_dy(x)[2]]
    actual = training_step_of_siblings(group, group, x, dys)
    layer = siblings["v_proj"]
    expected = training_step_of_siblings(lambda leaf: [layer(leaf)], layer, x, dys[2:])
    torch.testing.assert_close(actual["dx"], expected["dx"], rtol=1e-11, atol=1e-11)
    for key in ("lora_A", "lora_B"):
        torch.testing.assert_close(
            actual[f"v_proj.{key}"], expected[key], rtol=1e-11, atol=1e-11, msg=key
        )
        assert not actual[f"q_proj.{key}"].any()
        assert not actual[f"k_proj.{key}"].any()


def test_external_gates_by_argument():
    """All siblings use one tensor of gates. Its gradient is the sum over the siblings."""
    siblings = make_siblings(router="external")
    group = MoeLoraGroup(**siblings)
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    gates = torch.rand(2, 4, dtype=torch.float64, requires_grad=True)
    dys = random_dy(x)
    (actual,) = torch.autograd.grad(group(x, gates), gates, dys)
    (expected,) = torch.autograd.grad([s(x, gates) for s in siblings.values()], gates, dys)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    with pytest.raises(ValueError, match="gates: only router='external'"):
        MoeLoraGroup(**make_siblings())(x, gates)


def test_external_gates_of_each_sibling():
    """set_tasks on one sibling changes no other sibling."""
    siblings = make_siblings(router="external")
    group = MoeLoraGroup(**siblings)
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    before = group(x)
    set_tasks(siblings["k_proj"], torch.rand(6, 4, dtype=torch.float64)[:2])
    after = group(x)
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1], after[1])
    torch.testing.assert_close(after[1], siblings["k_proj"](x), rtol=1e-11, atol=1e-11)


class Attention(nn.Module):
    def __init__(self, siblings):
        super().__init__()
        for name, layer in siblings.items():
            self.add_module(name, layer)


def test_the_state_dict_is_that_of_ungrouped_siblings():
    """A group and separate layers have the same state-dict keys."""
    group = MoeLoraGroup(**make_siblings(top_k=2))
    torch.manual_seed(5)
    other = Attention(make_siblings(top_k=2))
    assert list(group.state_dict()) == list(other.state_dict())
    with torch.no_grad():
        for q in other.parameters():
            q.normal_()
    group.load_state_dict(other.state_dict(), strict=True)
    x = torch.randn(3, IN, dtype=torch.float64)
    for y, layer in zip(group(x), other.children(), strict=True):
        torch.testing.assert_close(y, layer(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("mask", ("shared", "per_expert"))
def test_siblings_share_a_dropout_mask(mask):
    """A group has one dropout mask: that of each sibling alone with the same seed."""
    siblings = make_siblings(dropout=0.4, dropout_mask=mask, top_k=2)
    group = MoeLoraGroup(**siblings).train()
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    dys = random_dy(x)

    def alone(leaf):
        out = []
        for layer in siblings.values():
            torch.manual_seed(4)
            out.append(layer(leaf))
        return out

    expected = training_step_of_siblings(alone, group, x, dys)
    torch.manual_seed(4)
    actual = training_step_of_siblings(group, group, x, dys)
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-11, atol=1e-11, msg=key)
    torch.manual_seed(4)
    seed = torch.randint(0, 2**62, (1,))
    assert not torch.equal(reference.dropout(x.view(6, IN), 0.4, seed), x.view(6, IN))
    group.eval()
    assert torch.equal(group(x)[0], group(x)[0])


def test_a_called_base_among_read_ones():
    """A base with a hook is called; the weights of the other bases are read."""
    siblings = make_siblings(top_k=2)
    siblings["k_proj"].base_layer.register_forward_hook(lambda module, args, y: 2.0 * y)
    group = MoeLoraGroup(**siblings)
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    dys = random_dy(x)
    actual = training_step_of_siblings(group, group, x, dys)
    expected = training_step_of_siblings(
        lambda leaf: [layer(leaf) for layer in siblings.values()], group, x, dys
    )
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-11, atol=1e-11, msg=key)


def test_a_hook_on_a_router_is_called():
    """The routers of the siblings are fused only if all of them are plain linears."""
    siblings = make_siblings(top_k=2)
    calls = []
    siblings["v_proj"].router.register_forward_hook(lambda m, args, out: calls.append(1))
    MoeLoraGroup(**siblings)(torch.randn(3, IN, dtype=torch.float64))
    assert calls == [1]


def test_routing_is_recorded_for_each_sibling():
    siblings = make_siblings(top_k=2)
    group = MoeLoraGroup(**siblings)
    x = torch.randn(5, IN, dtype=torch.float64)
    with record_routing(group):
        group(x)
        for layer in siblings.values():
            logits = layer.router(x)
            torch.testing.assert_close(layer.record.logits, logits, rtol=1e-11, atol=1e-11)
            assert torch.equal(layer.record.indices.long(), logits.topk(2).indices)


def test_group_compiles_without_graph_breaks():
    siblings = make_siblings(top_k=2)
    group = MoeLoraGroup(**siblings)
    compiled = torch.compile(group, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    dys = random_dy(x)
    expected = training_step_of_siblings(group, group, x, dys)
    actual = training_step_of_siblings(compiled, group, x, dys)
    for key, value in expected.items():
        torch.testing.assert_close(actual[key], value, rtol=1e-11, atol=1e-11, msg=key)


def test_siblings_that_do_not_match_are_named():
    """Each message names the sibling."""
    good = make_siblings(top_k=2)
    with pytest.raises(ValueError, match="siblings: expected at least one"):
        MoeLoraGroup()
    with pytest.raises(TypeError, match="k_proj: expected a MoeLoraLinear"):
        MoeLoraGroup(q_proj=good["q_proj"], k_proj=nn.Linear(IN, 4))
    config = good["q_proj"].config
    with pytest.raises(ValueError, match=r"k_proj: expected in_features 12.*got 11"):
        MoeLoraGroup(q_proj=good["q_proj"], k_proj=MoeLoraLinear(11, 4, config=config))
    for change in (dict(top_k=1), dict(rank=3), dict(alpha=1.0), dict(dropout=0.1)):
        other = MoeLoraLinear(IN, 4, config=config.replace(**change), dtype=torch.float64)
        with pytest.raises(ValueError, match="k_proj: expected the options of q_proj"):
            MoeLoraGroup(q_proj=good["q_proj"], k_proj=other)
    with pytest.raises(ValueError, match=r"k_proj: expected adapters of torch\.float64"):
        MoeLoraGroup(q_proj=good["q_proj"], k_proj=MoeLoraLinear(IN, 4, config=config))


def test_one_sibling_and_one_sibling_twice():
    """A group of one equals the layer. The same layer under two names gives two outputs."""
    layer = make_siblings(top_k=2)["q_proj"]
    x = torch.randn(3, IN, dtype=torch.float64)
    (y,) = MoeLoraGroup(q_proj=layer)(x)
    torch.testing.assert_close(y, layer(x), rtol=1e-11, atol=1e-11)
    twice = MoeLoraGroup(q_proj=layer, k_proj=layer)(x)
    assert len(twice) == 2
    assert torch.equal(twice[0], twice[1])
