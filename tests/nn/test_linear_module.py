"""MoeLoraLinear as a module: copies, state dicts, dtypes, meta, freezing, checkpointing."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint

from moelora_kernels import MoeLoraFFN, MoeLoraLinear, set_tasks
from support.compare import assert_same, backward_step, training_step
from support.copies import each_copier
from support.linears import IN, OUT, Prototype, make_layer

OPTIONS = [
    {},
    dict(router="mlp"),
    dict(router="task", num_tasks=3, dropout=0.1),
    dict(router="external"),
    dict(share="A", shared_expert="always"),
]


def with_tasks(layer):
    if layer.config.router == "task":
        set_tasks(layer, [2, 1])
    elif layer.config.router == "external":
        set_tasks(layer, torch.full((2, 4), 0.25, dtype=torch.float64))
    return layer.eval()


@each_copier
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_copies_compute_the_same(options, copier):
    """Copies after a forward, by deepcopy, pickle and torch.save."""
    layer = with_tasks(make_layer(**options))
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    y = layer(x)
    clone = copier(layer)
    assert torch.equal(clone(x), y)
    assert clone.config == layer.config
    with torch.no_grad():
        clone.lora_A.zero_()
    assert torch.equal(layer(x), y)


TOKEN_TASK = dict(router="token_task", score="identity", normalize="softmax", task_embedding_dim=4)
LAYERS_WITH_GATES = [
    make_layer(router="external"),
    make_layer(**TOKEN_TASK),
    MoeLoraFFN(IN, OUT, num_experts=4, rank=3, router="external", dtype=torch.float64),
]


@pytest.mark.parametrize("layer", LAYERS_WITH_GATES, ids=("gates", "vectors", "ffn"))
def test_copies_of_layers_whose_gates_have_a_graph(layer):
    """A layer is copied in training, and its gates have a graph. The copy has none."""
    encoder = torch.rand(2, 4, dtype=torch.float64, requires_grad=True)
    set_tasks(layer, encoder * 0.5)
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    y = layer(x)
    for clone in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(clone(x), y)
        (actual,) = torch.autograd.grad(clone(x).sum(), encoder, allow_unused=True)
        assert actual is None
    # The layer keeps its graph.
    (actual,) = torch.autograd.grad(y.sum(), encoder)
    assert actual.shape == encoder.shape


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_state_dict_round_trip(options):
    """Loading is strict. The state dict has no tasks and no gates."""
    layer, other = with_tasks(make_layer(**options)), with_tasks(make_layer(seed=1, **options))
    assert not any("task_ids" in key or "gates" in key for key in layer.state_dict())
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    assert not torch.equal(layer(x), other(x))
    other.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_to_dtype(options, dtype):
    """layer.to(dtype) casts parameters and gates, but not the task ids."""
    layer = with_tasks(make_layer(**options)).to(dtype)
    y = layer(torch.randn(2, 3, IN, dtype=dtype))
    assert y.dtype == dtype
    assert {q.dtype for q in layer.parameters()} == {dtype}


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_meta_device(options):
    """A layer is built on meta, then gets memory and a state dict."""
    source = with_tasks(make_layer(**options))
    with torch.device("meta"):
        layer = MoeLoraLinear(IN, OUT, config=source.config, dtype=torch.float64)
    if not isinstance(source.config.router, str) or source.config.router not in (
        "task",
        "external",
    ):
        assert layer(torch.randn(2, 3, IN, device="meta", dtype=torch.float64)).shape == (2, 3, OUT)
    assert {q.device.type for q in layer.parameters()} == {"meta"}
    layer.to_empty(device="cpu").load_state_dict(source.state_dict())
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    assert torch.equal(with_tasks(layer)(x), source(x))


def test_repr_names_the_options():
    text = repr(make_layer())
    for part in ("in_features=12", "out_features=10", "num_experts=4", "rank=3", "top_k=2"):
        assert part in text
    assert "router=Prototype" in repr(make_layer(router=Prototype(4), router_bias=False))


def test_reset_parameters():
    layer = make_layer()
    x = torch.randn(3, IN, dtype=torch.float64)
    layer.reset_parameters()
    torch.testing.assert_close(layer(x), layer.base_layer(x), rtol=1e-12, atol=1e-12)
    assert layer.lora_A.requires_grad


def test_a_forward_computes_a_parametrized_adapter_once():
    """Each computation of a spectral norm is one more power iteration."""

    class Counted(nn.Module):
        calls = 0

        def forward(self, values):
            Counted.calls += 1
            return 2 * values

    layer = make_layer()
    for name in ("lora_A", "lora_B"):
        parametrize.register_parametrization(layer, name, Counted())
    Counted.calls = 0
    layer(torch.randn(3, IN, dtype=torch.float64))
    assert Counted.calls == 2


def test_frozen_adapters_and_an_unfrozen_base():
    """Only the router trains; or the base as well, with the gradients of nn.Linear."""
    layer = make_layer()
    x = torch.randn(4, IN, dtype=torch.float64)
    all_grads = training_step(layer, x)
    layer.lora_A.requires_grad_(False)
    layer.lora_B.requires_grad_(False)
    only_router = training_step(layer, x)
    assert set(only_router) == {"y", "dx", "router.weight", "router.bias"}
    for name, value in only_router.items():
        torch.testing.assert_close(value, all_grads[name], rtol=1e-12, atol=1e-12)
    layer.base_layer.requires_grad_(True)
    actual = training_step(layer, x)
    dy = torch.linspace(-1, 1, 4 * OUT, dtype=torch.float64).view(4, OUT)
    torch.testing.assert_close(actual["base_layer.weight"], dy.t() @ x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(actual["base_layer.bias"], dy.sum(0), rtol=1e-12, atol=1e-12)


CHECKPOINTED = [
    dict(dropout=0.4),
    dict(dropout=0.4, dropout_mask="per_expert"),
    dict(dropout=0.4, noise=0.5),
    dict(router="task", num_tasks=3, dropout=0.4),
    dict(impl="grouped"),
    dict(impl="grouped", dropout=0.4, dropout_mask="per_expert"),
]


@pytest.mark.parametrize("use_reentrant", (True, False))
@pytest.mark.parametrize("options", CHECKPOINTED, ids=str)
def test_checkpointing_gives_the_same_bits(options, use_reentrant):
    """The recomputed forward draws the same dropout mask and noise as the first one."""
    layer = make_layer(**options)
    if layer.config.router == "task":
        set_tasks(layer, [3, 1])
    x = torch.randn(2, 35, IN, dtype=torch.float64)
    recomputed = backward_step(
        layer, x, forward=lambda leaf: checkpoint(layer, leaf, use_reentrant=use_reentrant)
    )
    assert_same(recomputed, backward_step(layer, x))


def test_dropout_follows_torch_manual_seed():
    """The same seed gives the same mask. Without it two forwards have different masks."""
    layer = make_layer(dropout=0.5)
    x = torch.randn(4, IN, dtype=torch.float64)
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_another_config_counts_from_the_next_call_on():
    torch.manual_seed(1)
    layer = make_layer(top_k=2)
    other = copy.deepcopy(layer)
    other.config = layer.config.replace(top_k=1, temperature=0.5)
    fresh = make_layer(top_k=1, temperature=0.5)
    fresh.load_state_dict(layer.state_dict())
    x = torch.randn(5, layer.in_features, dtype=layer.lora_A.dtype)
    assert torch.equal(other(x), fresh(x))
    assert not torch.equal(other(x), layer(x))


@pytest.mark.parametrize(
    "options", ({"num_experts": 3}, {"rank": 1}, {"router": "mlp"}, {"aux": "load_balance"})
)
def test_a_config_that_needs_another_layer_is_refused(options):
    layer = make_layer(top_k=2)
    before = layer.config
    with pytest.raises(ValueError, match="another layer"):
        layer.config = before.replace(**options)
    assert layer.config is before
