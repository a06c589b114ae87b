"""Presets of related methods equal the formulas of their papers in plain PyTorch."""

import copy

import pytest
import torch
from torch import nn

from moelora_kernels import (
    MoeLoraConfig,
    MoeLoraFFN,
    MoeLoraGroup,
    MoeLoraLinear,
    adapter_parameters,
    adapter_state_dict,
    load_adapter_state_dict,
    replace_linears,
    set_prototypes,
    set_tasks,
    update_balance,
)
from moelora_kernels.nn import (
    SequenceGate,
    TokenTaskRouter,
)
from moelora_kernels.testing import assert_within_budget
from support.compare import training_step
from support.formulas.family import (
    IN,
    LINEARS,
    LOOPS,
    OUT,
    TASK,
    TIGHT,
    Model,
    random_step,
    step_of_loop,
)

SHAPES = [(1, 5), (4, 3), (6, 1), (3, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("preset", LOOPS)
def test_preset_matches_its_formula(preset, shape):
    model = Model(preset, shape, torch.float64)
    x, dy = random_step(preset, shape, torch.float64)
    actual = training_step(model, x, dy, unused_as_zero=True)
    truth = step_of_loop(preset, model, x, dy)
    assert actual.keys() == truth.keys()
    for name in truth:
        torch.testing.assert_close(actual[name], truth[name], **TIGHT, msg=name)
        # A gradient of zero would test nothing.
        assert truth[name].abs().max() > 1e-6, name


@pytest.mark.parametrize("impl", ("wide", "grouped", "reference"))
@pytest.mark.parametrize("preset", ("hmora", "arrow", "riemannian"))
def test_sparse_gates_in_every_formulation(preset, impl):
    """Each formulation computes the same gates, the root of the gate included."""
    options = {"share": "none"} if preset == "hmora" else {}
    model = Model(preset, (2, 4), torch.float64, impl=impl, **options)
    x, dy = random_step(preset, (2, 4), torch.float64)
    truth = step_of_loop(preset, model, x, dy)
    for name, value in training_step(model, x, dy, unused_as_zero=True).items():
        torch.testing.assert_close(value, truth[name], **TIGHT, msg=name)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("preset", LOOPS)
def test_preset_in_low_precision(preset, dtype):
    """The error is within the budget, which the reference in the dtype sets."""
    model = Model(preset, (4, 6), dtype)
    by_reference = copy.deepcopy(model)
    x, dy = random_step(preset, (4, 6), dtype)
    actual = training_step(model, x, dy, unused_as_zero=True)
    truth = step_of_loop(preset, model, x, dy)
    if preset == "pesc":
        # The only reference of a MoeLoraAdapter is the formula.
        baseline = step_of_loop(preset, model, x, dy, dtype)
    else:
        by_reference.layer.config = model.layer.config.replace(impl="reference")
        baseline = training_step(by_reference, x, dy, unused_as_zero=True)
    for name in [n for n in truth if truth[n].numel() == 1]:
        # A single number may cancel by chance. The float64 test compares it.
        for values in (actual, truth, baseline):
            values.pop(name)
    assert_within_budget(actual, truth, baseline, dtype)


def test_octavius_does_not_scale():
    """Octavius does not multiply by alpha / r. With the rank of the preset, alpha / r is 1."""
    assert MoeLoraConfig.preset("octavius", rank=4).scales() == (1.0,) * 4


def test_every_preset_has_a_formula():
    """Every preset is compared with a formula."""
    from moelora_kernels.presets import FFN_PRESETS, PRESETS
    from support.formulas.presets import ELSEWHERE
    from support.formulas.presets import LOOPS as OTHERS

    assert {*PRESETS} == {*OTHERS, *LOOPS, *FFN_PRESETS}
    assert {*ELSEWHERE} == {*LOOPS, *FFN_PRESETS}


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
def test_a_model_trains_and_its_adapter_is_restored(preset):
    """The adapter has buffers, too: prototypes, the selection bias, a frozen A."""
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
    expected_keys = {"arrow": "0.router.prototypes", "smora": "0.router.balance.bias"}
    assert expected_keys.get(preset, "0.lora_A") in state
    for base, prefix in ((0, "0."), (2, "2.")):
        other[base].base_layer.load_state_dict(model[base].base_layer.state_dict())
        assert any(key.startswith(prefix) for key in state)
    load_adapter_state_dict(other, {k: v.detach().clone() for k, v in state.items()})
    torch.manual_seed(5)
    prepared = {"octavius", "xlora", "hmora"}
    if preset in prepared:
        for m in (model, other):
            torch.manual_seed(5)
            prepare(m, preset)
    assert torch.equal(other(x), model(x))


@pytest.mark.parametrize("preset", LINEARS)
def test_siblings_equal_single_layers(preset):
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
    actual = torch.autograd.grad(compiled(x).sum(), x)[0]
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_a_sequence_gate_can_ignore_padding():
    torch.manual_seed(0)
    gate = SequenceGate(IN, 5, top_k=2)
    embeddings = torch.randn(2, 4, IN)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    actual = gate(embeddings, mask)
    assert torch.allclose(actual[:1], gate(embeddings[:1]))
    assert torch.allclose(actual[1:], gate(embeddings[1:, :2]))
    assert ((actual != 0).sum(dim=1) == 2).all()
    assert torch.allclose(actual.sum(dim=1), torch.ones(2))
    with pytest.raises(ValueError, match=r"^mask: expected"):
        gate(embeddings, mask[:1])


def test_token_task_router_shared_by_siblings():
    """Siblings share one router, like in the original, and it is saved once."""
    router = TokenTaskRouter(IN, TASK, 8, share=-2.0)
    model = nn.ModuleDict({n: nn.Linear(IN, OUT) for n in ("q_proj", "k_proj")})
    replace_linears(model, MoeLoraConfig.preset("hmora", router=router), ["q_proj", "k_proj"])
    assert model["q_proj"].router is model["k_proj"].router
    x = torch.randn(2, 3, IN)
    with pytest.raises(RuntimeError, match="set_tasks"):
        model["q_proj"](x)
    set_tasks(model, torch.randn(2, TASK))
    model["q_proj"](x)
    assert sum("router.mixture.share" in key for key in adapter_state_dict(model)) == 1


def test_task_vectors_of_a_wrong_shape_are_named():
    layer = MoeLoraLinear(IN, OUT, config=MoeLoraConfig.preset("hmora", task_embedding_dim=TASK))
    with pytest.raises(ValueError, match=rf"^tasks: expected vectors \[batch, {TASK}\]"):
        set_tasks(layer, torch.randn(2, TASK + 1))
    set_tasks(layer, torch.randn(4, TASK))
    with pytest.raises(ValueError, match=r"^tasks: 4 task vectors"):
        layer(torch.randn(3, IN))
    # Four vectors do not fit two sequences, although 4 divides the number of tokens.
    with pytest.raises(ValueError, match=r"^tasks: 4 task vectors for x \[2, 4, 12\]"):
        layer(torch.randn(2, 4, IN))
    assert layer(torch.randn(4, 2, IN)).shape == (4, 2, OUT)
    balanced = MoeLoraLinear.from_linear(layer.base_layer, layer.config, balance_rate=0.1)
    set_tasks(balanced, torch.randn(4, TASK))
    with pytest.raises(ValueError, match=r"^tasks: 4 task vectors for x \[2, 4, 12\]"):
        balanced(torch.randn(2, 4, IN))
    both = nn.ModuleList([layer, MoeLoraLinear(IN, OUT, router="external")])
    with pytest.raises(ValueError, match=r"^model: it uses both gates and task vectors"):
        set_tasks(both, torch.randn(2, TASK))


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
    ("select", MIXED | dict(select="sampling")),
    ("batch_dim", MIXED | dict(batch_dim=1)),
    ("entropy_threshold", MIXED | dict(entropy_threshold=0.5)),
]


@pytest.mark.parametrize(("name", "options"), BAD, ids=[str(options) for _, options in BAD])
def test_a_bad_option_is_named(name, options):
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
def test_an_option_that_ffns_do_not_support_is_named(name, options):
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        MoeLoraFFN(IN, 16, **options)
