"""Sparse external gates: a tuple (weights, indices) equals the dense gates that it stands for."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moelora_kernels import (
    MoeLoraAdapter,
    MoeLoraConfig,
    MoeLoraGroup,
    functional,
    record_routing,
    routing_report,
    set_samples,
    set_tasks,
    warmup,
)
from moelora_kernels.nn import count_routing
from moelora_kernels.peft import MoeLoraPeftConfig
from support import siblings
from support.copies import each_copier
from support.ffns import HIDDEN, make_ffn
from support.linears import IN, OUT, make_layer, randomise
from support.peft_models import EXTERNAL, TARGETS, inputs, new_adapter

B, L, E, K = 3, 4, 4, 2
SHAPES = {"one": (1, K), "sample": (B, K), "token": (B, L, K), "flat": (B * L, K)}


def sparse_gates(shape, experts=E, seed=0):
    """Return weights and indices. Some slots are not routed, and some experts are repeated."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.rand(shape, dtype=torch.float64, generator=generator)
    indices = torch.randint(-1, experts + 1, shape, generator=generator)
    indices[0] = 1
    return weights.requires_grad_(), indices


def dense(gates, experts=E):
    """Return the dense gates [..., E] of sparse ones, by a loop over the experts."""
    weights, indices = gates
    columns = [torch.where(indices == e, weights, 0).sum(dim=-1) for e in range(experts)]
    return torch.stack(columns, dim=-1)


def adapter():
    torch.manual_seed(0)
    mlp = nn.Linear(HIDDEN, HIDDEN, dtype=torch.float64).requires_grad_(False)
    config = MoeLoraConfig(num_experts=E, rank=2, router="external", rank_activation="gelu")
    return randomise(MoeLoraAdapter(mlp, HIDDEN, config))


LAYERS = {
    "wide": lambda: make_layer(router="external", impl="wide"),
    "grouped": lambda: make_layer(router="external", impl="grouped"),
    "reference": lambda: make_layer(router="external", impl="reference"),
    "shared": lambda: make_layer(router="external", shared_expert="always"),
    "called base": lambda: make_layer(
        base=nn.utils.parametrizations.weight_norm(nn.Linear(IN, OUT, dtype=torch.float64)),
        router="external",
    ),
    "ffn": lambda: make_ffn(router="external", top_k=None),
    "adapter": adapter,
}


def random_x(layer, *shape):
    return torch.randn(*shape, layer.input_like()[0], dtype=torch.float64)


def step(layer, x, gates, weights):
    """Return y, and the gradients of the gate weights, x, A and B."""
    leaf = x.clone().requires_grad_()
    y = layer(leaf, gates)
    dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    parameters = [p for p in layer.parameters() if p.requires_grad]
    return [y, *torch.autograd.grad(y, [weights, leaf, *parameters], dy)]


def dense_layer(layer):
    """Return the layer that takes dense gates: the grouped form takes none."""
    other = copy.deepcopy(layer)
    if other.config.impl == "grouped":
        other.config = other.config.replace(impl="wide")
    return other


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("rows", SHAPES)
@pytest.mark.parametrize("name", LAYERS)
def test_they_equal_dense_gates(name, rows):
    """One row for all, one per sample or per token; y and the gradients, by argument and set."""
    layer = LAYERS[name]()
    x = random_x(layer, B, L)
    weights, indices = sparse_gates(SHAPES[rows])
    expected = step(dense_layer(layer), x, dense((weights, indices)), weights)
    actual = step(layer, x, (weights, indices), weights)
    close(actual, expected)
    set_tasks(layer, (weights, indices.to(torch.int16)))
    close(step(layer, x, None, weights), expected)
    with torch.no_grad():
        close(layer.eval()(x), expected[0])
    if layer.config.impl != "grouped":
        # Dense gates replace them.
        set_tasks(layer, dense((weights, indices)))
        close(step(layer, x, None, weights), expected)


@pytest.mark.parametrize("shape", ((L, B), (L, B, 2)), ids=str)
@pytest.mark.parametrize("name", ("linear", "ffn"))
def test_samples_in_the_second_dimension(name, shape):
    make = make_layer if name == "linear" else make_ffn
    layer = make(router="external", batch_dim=1, top_k=None)
    x, (weights, indices) = random_x(layer, *shape), sparse_gates((B, K))
    expected = step(layer, x, dense((weights, indices)), weights)
    close(step(layer, x, (weights, indices), weights), expected)


@pytest.mark.parametrize("name", ("wide", "grouped", "ffn"))
def test_samples_of_tokens(name):
    """Packed samples, with padding that belongs to no sample, and a flattened batch."""
    layer = LAYERS[name]()
    other = dense_layer(layer)
    x, (weights, indices) = random_x(layer, 1, 7), sparse_gates((B, K))
    for each in (layer, other):
        set_samples(each, [1, 1, 0, 2, -1, 2, 0])
    for count in (B, 1):
        gates = weights[:count], indices[:count]
        expected = step(other, x, dense(gates), weights)
        close(step(layer, x, gates, weights), expected)
    if name == "grouped":
        # NaN in the experts of other samples does not reach a sample.
        with torch.no_grad():
            layer.lora_B[:, 6:9] = torch.nan
            y = layer(x, (torch.ones(B, 1), torch.tensor([[2], [0], [1]])))
        assert y.isnan().any(-1).tolist() == [[0, 0, 1, 0, 0, 0, 1]]
    for each in (layer, other):
        set_samples(each, "flat")
    x = random_x(layer, B * L)
    close(layer(x, (weights, indices)), other(x, dense((weights, indices))))


def test_the_remaining_weight_of_a_shared_expert():
    """1 - max over the routed slots. An index of E is not the shared expert."""
    layer = make_layer(router="external", shared_expert="complement", num_experts=3)
    x = random_x(layer, 2)
    weights, indices = torch.tensor([[0.25, 0.5], [0.4, 0.7]]), torch.tensor([[2, 0], [1, 3]])
    with record_routing(layer):
        y = layer(x, (weights, indices))
        assert layer.record.indices.tolist() == [[2, 0, 3], [1, -1, 3]]
        close(layer.record.weights, torch.tensor([[0.25, 0.5, 0.5], [0.4, 0.0, 0.6]]))
    close(y, layer(x, torch.tensor([[0.5, 0.0, 0.25], [0.0, 0.4, 0.0]])))


@pytest.mark.parametrize(("slots", "expected"), ((1, "grouped"), (3, "wide"), (8, "wide")))
def test_auto_depends_on_the_slots(slots, expected, monkeypatch):
    """The class "cpu" is grouped if R > 32 K: with R = 64 it is for K = 1."""
    chosen, run = [], functional.run
    monkeypatch.setattr("moelora_kernels.dispatch._missing_ops", lambda device: None)
    layer = make_layer(router="external", num_experts=8, rank=8)
    monkeypatch.setattr(
        functional, "run", lambda f, impl, *a: chosen.append(impl) or run(f, impl, *a)
    )
    layer(random_x(layer, B, L), sparse_gates((B, slots), 8))
    layer(random_x(layer, B, L), torch.rand(B, 8))
    assert chosen == [expected, "wide"]


def test_a_result_of_topk_is_sparse_gates():
    layer = make_layer(router="external")
    x, gates = random_x(layer, B, L), torch.rand(B, E, dtype=torch.float64)
    expected = layer(x, torch.where(gates >= gates.topk(2).values[:, 1:], gates, 0))
    close(layer(x, gates.topk(2)), expected)
    set_tasks(layer, gates.topk(2))
    close(layer(x), expected)


@pytest.mark.parametrize("is_linked", (False, True), ids=("group", "linked"))
@pytest.mark.parametrize("by", ("argument", "set_tasks"))
def test_siblings(by, is_linked):
    """All siblings have the same gate. Its gradient is the sum over the siblings."""
    plain, linked = siblings.pair(router="external")
    group = MoeLoraGroup(**dict(copy.deepcopy(plain).named_children()))
    x = siblings.random_x(B, L)

    def outputs(model, gates):
        if by == "set_tasks":
            set_tasks(model, gates)
        passed = gates if by == "argument" else None
        if isinstance(model, MoeLoraGroup):
            return model(x, passed)
        return [layer(x, passed) for layer in model.children()]

    for shape in ((B, K), (B, L, 1), (B, 3)):
        weights, indices = sparse_gates(shape, 3)
        results = []
        for model in (plain, linked if is_linked else group):
            ys = outputs(model, (weights, indices))
            loss = sum(y.square().sum() for y in ys)
            results.append([*ys, *torch.autograd.grad(loss, weights)])
        close(results[1], results[0])
    # Gates of another kind, or with another K, on one sibling.
    for other in (sparse_gates((B, 1), 3), torch.rand(B, 3, dtype=torch.float64)):
        models = (plain, linked if is_linked else group)
        for model in models:
            set_tasks(model, sparse_gates((B, K), 3))
            set_tasks(model.k_proj, other)
        ys = [[layer(x) for layer in model.children()] for model in models]
        close(ys[1], ys[0])
        if not is_linked:
            close([*group(x)], ys[0])


def test_linked_siblings_keep_outputs_of_one_pair_of_tensors():
    """A tuple of the same tensors is the same gate, and a change of an index is seen."""
    plain, linked = siblings.pair(router="external")
    x, (weights, indices) = siblings.random_x(B, L), sparse_gates((B, K), 3)
    linked.q_proj(x, (weights, indices))
    stored = linked.q_proj.link.stored.last
    close(linked.k_proj(x, (weights, indices)), plain.k_proj(x, (weights, indices)))
    assert linked.q_proj.link.stored.last is stored
    indices[1] = 2
    close(linked.v_proj(x, (weights, indices)), plain.v_proj(x, (weights, indices)))
    set_tasks(linked, (weights, indices))
    set_tasks(plain, (weights, indices))
    linked.q_proj(x)
    linked.k_proj.external_experts[1] = 0
    plain.k_proj.external_experts[1] = 0
    close(linked.k_proj(x), plain.k_proj(x))


@pytest.mark.parametrize("name", ("wide", "grouped", "ffn"))
@pytest.mark.parametrize("use_reentrant", (False, True), ids=("not reentrant", "reentrant"))
def test_activation_checkpointing(name, use_reentrant):
    layer = LAYERS[name]()
    x, (weights, indices) = random_x(layer, B, L).requires_grad_(), sparse_gates((B, K))
    # A reentrant checkpoint sees no gates that it did not get as a tensor.
    weights = weights.detach() if use_reentrant else weights
    set_tasks(layer, (weights, indices))
    tensors = [x, *(p for p in layer.parameters() if p.requires_grad)]
    tensors += [weights] if weights.requires_grad else []
    expected = [layer(x), *torch.autograd.grad(layer(x).square().sum(), tensors)]
    y = checkpoint(layer, x, use_reentrant=use_reentrant)
    for tensor in tensors:
        tensor.grad = None
    y.square().sum().backward()
    assert torch.equal(y, expected[0])
    assert all(torch.equal(t.grad, g) for t, g in zip(tensors, expected[1:], strict=True))


@pytest.mark.parametrize("by", ("argument", "set_tasks"))
@pytest.mark.parametrize("impl", ("wide", "grouped"))
def test_compile_without_graph_breaks_or_recompiles(impl, by):
    torch._dynamo.reset()
    layer = make_layer(router="external", impl=impl).eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for i, sequence in enumerate((20, 12, 65)):
        x, (weights, indices) = random_x(layer, B, sequence), sparse_gates((B, K), seed=i)
        gates = (weights, indices)
        if by == "set_tasks":
            set_tasks(layer, gates)
            gates = None
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            actual = step(compiled, x, gates, weights)
        close(actual, step(layer, x, gates, weights))


def test_inference_mode_and_autocast():
    layer = make_layer(torch.float32, router="external").eval()
    x = random_x(layer, B, L).float()
    with torch.inference_mode():
        weights, indices = torch.rand(B, K), torch.randint(0, E, (B, K))
        set_tasks(layer, (weights, indices))
        y = layer(x)
    torch.testing.assert_close(layer(x), y)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), layer(x, (weights.clone(), indices.clone())))


@each_copier
def test_copies_keep_them(copier):
    layer = make_layer(router="external")
    x, (weights, indices) = random_x(layer, B, L), sparse_gates((B, K))
    set_tasks(layer, (weights * 2, indices))
    assert torch.equal(copier(layer)(x), layer(x))


def test_a_merged_layer_compares_them_with_its_gate():
    layer = make_layer(router="external").eval()
    layer.merge(torch.tensor([0.0, 0.5, 0.0, 0.25]))
    set_tasks(layer, (torch.tensor([[0.25, 0.5], [0.5, 0.25]]), torch.tensor([[3, 1], [1, 3]])))
    with pytest.raises(ValueError, match=r"^tasks: the layer is merged"):
        set_tasks(layer, (torch.tensor([[0.25, 0.5]]), torch.tensor([[3, 2]])))


def test_routing_report_counts_routed_slots():
    layer = make_layer(router="external")
    with count_routing(layer):
        layer(random_x(layer, B, L), (torch.ones(B, K), torch.tensor([[0, 4], [0, 1], [-1, 1]])))
        (report,) = routing_report(layer).layers.values()
    close(torch.as_tensor(report.load).double(), torch.tensor([0.5, 0.5, 0, 0]).double())
    assert report.unused == (2, 3)


def test_peft():
    """set_tasks on a PeftModel, warmup, and a merge of gates that are the same for all samples."""
    model = randomise(new_adapter(EXTERNAL))
    x, (weights, indices) = inputs(), sparse_gates((2, K), 3)
    set_tasks(model, dense((weights, indices), 3))
    expected = model(x)
    set_tasks(model, (weights, indices))
    y = model(x)
    close(y, expected)
    (gradient,) = torch.autograd.grad(y.square().sum(), weights)
    close(gradient, torch.autograd.grad(expected.square().sum(), weights)[0])
    warmup(model, (1, 3), batch=2)
    with pytest.raises(RuntimeError, match="a merge needs one task"):
        model.merge_adapter()
    set_tasks(model, (torch.tensor([[0.5, 1.0], [1.0, 0.5]]), torch.tensor([[2, 0], [0, 2]])))
    expected = model.eval()(x)
    model.merge_adapter()
    close(model(x), expected)
    with pytest.raises(ValueError, match=r"^tasks: adapter 'default' is merged"):
        set_tasks(model, (weights, indices))
    model.unmerge_adapter()
    # An inactive adapter with fewer experts than slots.
    model.add_adapter(
        "one", MoeLoraPeftConfig(target_modules=TARGETS, **{**EXTERNAL, "num_experts": 1})
    )
    set_tasks(model, (weights, indices))
    close(model(x), y)


def test_gates_of_another_batch_raise():
    layer = make_layer(router="external")
    x = random_x(layer, B, L)
    with pytest.raises(ValueError, match=r"^gates: 5 gate rows for x \[3, 4, 12\]"):
        layer(x, sparse_gates((5, K)))
    set_tasks(layer, sparse_gates((5, K)))
    with pytest.raises(ValueError, match=r"^set_tasks: 5 gate rows for x \[3, 4, 12\]"):
        layer(x)
    with pytest.raises(ValueError, match=r"^gates: only router='external'"):
        make_layer()(x, sparse_gates((B, K)))
    with pytest.raises(ValueError, match=r"^model: no layer with router='external'"):
        set_tasks(make_layer(), sparse_gates((B, K)))
    empty = random_x(layer, 0)
    assert layer(empty, (torch.rand(0, K), torch.zeros(0, K).int())).shape == (0, OUT)
