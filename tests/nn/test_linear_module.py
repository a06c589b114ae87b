"""MoeLoraLinear as a module: copies, state dicts, dtypes, meta, freezing, checkpointing."""

import copy
import io
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moelora_kernels import MoeLoraFFN, MoeLoraLinear, set_tasks
from support.compare import assert_same, backward_step, training_step
from support.linears import IN, OUT, Prototype, make_layer

LIVES = [
    {},
    dict(router="mlp"),
    dict(router="task", num_tasks=3, dropout=0.1),
    dict(router="external"),
    dict(share="A", shared_expert="always"),
]


def ready(layer):
    if layer.config.router == "task":
        set_tasks(layer, [2, 1])
    elif layer.config.router == "external":
        set_tasks(layer, torch.full((2, 4), 0.25, dtype=torch.float64))
    return layer.eval()


@pytest.mark.parametrize("copier", ("deepcopy", "pickle", "torch.save"))
@pytest.mark.parametrize("options", LIVES, ids=str)
def test_copies_compute_the_same(options, copier):
    """deepcopy for EMA and for references, pickle for worker processes; also after a forward."""
    layer = ready(make_layer(**options))
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    y = layer(x)
    if copier == "deepcopy":
        twin = copy.deepcopy(layer)
    elif copier == "pickle":
        twin = pickle.loads(pickle.dumps(layer))
    else:
        buffer = io.BytesIO()
        torch.save(layer, buffer)
        buffer.seek(0)
        twin = torch.load(buffer, weights_only=False)
    assert torch.equal(twin(x), y)
    assert twin.config == layer.config
    with torch.no_grad():
        twin.lora_A.zero_()
    assert torch.equal(layer(x), y)


TOKEN_TASK = dict(router="token_task", score="identity", normalize="softmax", task_embedding_dim=4)
HOLDERS = [
    make_layer(router="external"),
    make_layer(**TOKEN_TASK),
    MoeLoraFFN(IN, OUT, num_experts=4, rank=3, router="external", dtype=torch.float64),
]


@pytest.mark.parametrize("layer", HOLDERS, ids=("gates", "vectors", "ffn"))
def test_copies_of_layers_that_hold_a_graph(layer):
    """An average of the weights is copied in mid-training, after tasks of an encoder were set."""
    encoder = torch.rand(2, 4, dtype=torch.float64, requires_grad=True)
    set_tasks(layer, encoder * 0.5)
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    y = layer(x)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), y)
        (found,) = torch.autograd.grad(twin(x).sum(), encoder, allow_unused=True)
        assert found is None
    # The layer itself keeps the graph.
    (found,) = torch.autograd.grad(y.sum(), encoder)
    assert found.shape == encoder.shape


@pytest.mark.parametrize("options", LIVES, ids=str)
def test_state_dict_round_trip(options):
    """Strict, and without anything that is set per batch."""
    layer, other = ready(make_layer(**options)), ready(make_layer(seed=1, **options))
    assert not any("task_ids" in key or "gates" in key for key in layer.state_dict())
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    assert not torch.equal(layer(x), other(x))
    other.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(layer(x), other(x))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("options", LIVES, ids=str)
def test_to_dtype(options, dtype):
    """`model.to(dtype)` after the swap is what people write: ids stay integers, gates follow."""
    layer = ready(make_layer(**options)).to(dtype)
    y = layer(torch.randn(2, 3, IN, dtype=dtype))
    assert y.dtype == dtype
    assert {q.dtype for q in layer.parameters()} == {dtype}


@pytest.mark.parametrize("options", LIVES, ids=str)
def test_meta_device(options):
    """Large models are built on meta: no values, only shapes; then to_empty and load."""
    source = ready(make_layer(**options))
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
    assert torch.equal(ready(layer)(x), source(x))


def test_repr_tells_layers_apart():
    text = repr(make_layer())
    for part in ("in_features=12", "out_features=10", "num_experts=4", "rank=3", "top_k=2"):
        assert part in text
    assert "router=Prototype" in repr(make_layer(router=Prototype(4), router_bias=False))


def test_reset_parameters_starts_anew():
    layer = make_layer()
    x = torch.randn(3, IN, dtype=torch.float64)
    layer.reset_parameters()
    torch.testing.assert_close(layer(x), layer.base_layer(x), rtol=1e-12, atol=1e-12)
    assert layer.lora_A.requires_grad


def test_frozen_adapters_and_an_unfrozen_base():
    """Staged training: only the router; or the base as well, whose gradients are a linear's."""
    layer = make_layer()
    x = torch.randn(4, IN, dtype=torch.float64)
    everything = training_step(layer, x)
    layer.lora_A.requires_grad_(False)
    layer.lora_B.requires_grad_(False)
    only_router = training_step(layer, x)
    assert set(only_router) == {"y", "dx", "router.weight", "router.bias"}
    for name, value in only_router.items():
        torch.testing.assert_close(value, everything[name], rtol=1e-12, atol=1e-12)
    layer.base_layer.requires_grad_(True)
    found = training_step(layer, x)
    dy = torch.linspace(-1, 1, 4 * OUT, dtype=torch.float64).view(4, OUT)
    torch.testing.assert_close(found["base_layer.weight"], dy.t() @ x, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found["base_layer.bias"], dy.sum(0), rtol=1e-12, atol=1e-12)


# --- activation checkpointing -------------------------------------------------------------------

DROPPING = [
    dict(dropout=0.4),
    dict(dropout=0.4, dropout_mask="per_expert"),
    dict(dropout=0.4, noise=0.5),
    dict(router="task", num_tasks=3, dropout=0.4),
    dict(impl="grouped"),
    dict(impl="grouped", dropout=0.4, dropout_mask="per_expert"),
]


@pytest.mark.parametrize("use_reentrant", (True, False))
@pytest.mark.parametrize("options", DROPPING, ids=str)
def test_checkpointing_gives_the_same_bits(options, use_reentrant):
    """The recomputed forward must draw the mask, and the noise, of the first one."""
    layer = make_layer(**options)
    if layer.config.router == "task":
        set_tasks(layer, [3, 1])
    x = torch.randn(2, 35, IN, dtype=torch.float64)
    recomputed = backward_step(
        layer, x, forward=lambda leaf: checkpoint(layer, leaf, use_reentrant=use_reentrant)
    )
    assert_same(recomputed, backward_step(layer, x))


def test_dropout_follows_torch_manual_seed():
    """Reproducible where the seed is set, different from step to step where it is not."""
    layer = make_layer(dropout=0.5)
    x = torch.randn(4, IN, dtype=torch.float64)
    torch.manual_seed(1)
    first, second = layer(x), layer(x)
    torch.manual_seed(1)
    assert torch.equal(layer(x), first)
    assert not torch.equal(first, second)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
