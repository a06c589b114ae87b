"""Layers with impl="grouped": what a layer adds to the Function, and the ops' contract."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moelora_kernels import MoeLoraGroup, collect_aux_loss, ops
from moelora_kernels.autograd.linear import siblings_of
from moelora_kernels.testing import assert_within_budget
from moelora_kernels.types import (
    CHUNK,
    NO_DROPOUT,
    NO_GATE,
    TILE,
    Gate,
    Needs,
    RouterTensors,
    Routing,
)
from support.compare import assert_same, training_step
from support.layers import make_case
from support.linears import IN, make_layer
from support.op_cases import opcheck

GATES = {
    # name -> options
    "linear": dict(router_bias=False),
    "linear with bias": {},
    "softmax before top-k": dict(normalize="none", temperature=0.7),
    "raw logits": dict(score="identity", normalize="softmax"),
    "mlp": dict(router="mlp"),
    "shared expert": dict(shared_expert="always", shared_rank=5),
    "shared expert with the rest": dict(shared_expert="complement"),
    "ranks that differ": dict(rank=(1, 3, 2, 7)),
    "rank 1": dict(rank=1, top_k=3),
    "dropout": dict(dropout=0.3),
    "dropout per expert": dict(dropout=0.3, dropout_mask="per_expert", router="mlp"),
}
FORMS = {
    # name -> dtype of x and base, dtype of the adapters, autocast
    "fp32": (torch.float32, None, False),
    "bf16": (torch.bfloat16, None, False),
    "fp16": (torch.float16, None, False),
    "bf16, adapters fp32": (torch.bfloat16, "float32", False),
    "autocast": (torch.float32, None, True),
}


def twin_of(layer):
    """The same layer, computed by the reference."""
    twin = copy.deepcopy(layer)
    for module in (twin, *twin.modules()):
        if hasattr(module, "config"):
            module.config = module.config.replace(impl="reference")
    return twin


def keep_apart(layer, x, least=0.05):
    """x without tokens whose choice of experts hangs on the last bits of a 16-bit router."""
    with torch.no_grad():
        logits = copy.deepcopy(layer).double().router(x.double())
    gaps = logits.sort(dim=1).values.diff(dim=1).amin(dim=1)
    clear = x[gaps > least]
    assert len(clear) > 20
    return clear


def assert_layer(layer, x, dtype, autocast=False):
    """Outputs and gradients against the float64 reference, within the budget of `dtype`."""
    x, plain = keep_apart(layer, x), twin_of(layer)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found, yardstick = training_step(layer, x), training_step(plain, x)
    truth = training_step(plain.double(), x.double())
    low = torch.bfloat16 if autocast else dtype
    assert_within_budget(found, truth, yardstick, low)


def draw(dtype, tokens=80):
    return torch.randn(tokens, IN).bfloat16().to(dtype)


def layer_in(form, **options):
    """A layer whose parameters fit bfloat16, so that no cast of a weight is an error of its own."""
    dtype, adapters, _ = FORMS[form]
    options = dict(options, impl="grouped")
    layer = make_layer(torch.bfloat16, **options).to(dtype)
    if adapters is not None:
        base = layer.base_layer
        layer = layer.float()
        layer.base_layer = base.to(dtype)
    return layer


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", GATES)
def test_every_gate_is_the_reference(name, form):
    layer = layer_in(form, **GATES[name])
    assert_layer(layer, draw(FORMS[form][0]), FORMS[form][0], FORMS[form][2])


@pytest.mark.parametrize("form", FORMS)
def test_a_called_base(form):
    """A hooked base is called: its output is where the experts' sum starts."""
    layer = layer_in(form)
    calls = []
    layer.base_layer.register_forward_hook(lambda *arguments: calls.append(1))
    assert_layer(layer, draw(FORMS[form][0]), FORMS[form][0], FORMS[form][2])
    assert calls


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_three_siblings_of_different_widths(dtype, bias):
    """Each sibling routes for itself; together they are what they are alone."""
    layers = {}
    for seed, (name, width) in enumerate({"q": 10, "k": 3, "v": 17}.items()):
        base = torch.nn.Linear(IN, width, bias=bias, dtype=dtype)
        layers[name] = make_layer(base=base, seed=seed, impl="grouped")
    group, x = MoeLoraGroup(**layers), draw(dtype)
    together = training_step(group, x, forward=lambda leaf: torch.cat(group(leaf), dim=1))
    plain = twin_of(group)
    truth = copy.deepcopy(plain).double()
    for layer in layers.values():
        x = keep_apart(layer, x, 0.01)
    steps = [
        training_step(g, x.to(d), forward=lambda leaf, g=g: torch.cat(g(leaf), dim=1))
        for g, d in ((group, dtype), (truth, torch.float64), (plain, dtype))
    ]
    assert_within_budget(*steps, dtype)
    assert together["y"].shape == (80, 30)


def test_leading_dimensions_and_no_tokens():
    layer = make_layer(impl="grouped")
    x = torch.randn(2, 3, 5, IN, dtype=torch.float64)
    torch.testing.assert_close(layer(x).view(30, -1), layer(x.view(30, IN)))
    assert layer(x[0, 0, 0]).shape == (10,)
    found = training_step(layer, x[:, :0])
    assert all(not t.any() for t in found.values())


@pytest.mark.parametrize("poison", ("A", "B"))
@pytest.mark.parametrize("value", (torch.nan, torch.inf))
@pytest.mark.parametrize("options", ({}, dict(normalize="none"), dict(router="mlp")), ids=str)
def test_an_unrouted_expert_that_is_not_finite(options, value, poison):
    """What holds of the wide form but for y and dx holds here of everything."""
    layer, columns = make_layer(impl="grouped", **options), slice(6, 9)
    last = layer.router.fc2 if options.get("router") == "mlp" else layer.router
    with torch.no_grad():
        last.bias[2] = -1e4
    broken = copy.deepcopy(layer)
    with torch.no_grad():
        block = broken.lora_A[columns] if poison == "A" else broken.lora_B[:, columns]
        block.fill_(value)
    x = torch.randn(2, 40, IN, dtype=torch.float64)
    expected, found = training_step(layer, x), training_step(broken, x)
    assert_same(found, expected)
    assert not found["lora_A"][columns].any()
    assert not found["lora_B"][:, columns].any()


@pytest.mark.parametrize("options", ({}, dict(router="mlp", shared_expert="always")), ids=str)
def test_losses_and_record_of_the_router(options):
    layer = make_layer(impl="grouped", aux={"load_balance": 0.3, "z": 0.1}, **options)
    plain, x = twin_of(layer), torch.randn(70, IN, dtype=torch.float64)
    grads = []
    for each in (layer, plain):
        y = each(x)
        loss = collect_aux_loss(each)
        trained = [*each.router.parameters()]
        grads.append((loss.detach(), *torch.autograd.grad(y.sum() + loss, trained)))
    for found, expected in zip(*grads, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        assert expected.abs().max() > 0


@pytest.mark.parametrize("options", ({}, dict(dropout=0.4, dropout_mask="per_expert")), ids=str)
def test_activation_checkpointing_gives_the_same_bits(options):
    layer, x = make_layer(impl="grouped", **options), torch.randn(70, IN, dtype=torch.float64)
    again = training_step(
        layer, x, forward=lambda leaf: checkpoint(layer, leaf, use_reentrant=False)
    )
    assert_same(again, training_step(layer, x))


@pytest.mark.parametrize(
    "options",
    (
        {},
        dict(router="mlp", shared_expert="always", bias=False),
        dict(dropout=0.3, normalize="none"),
    ),
    ids=str,
)
def test_compiles_whole_and_once_for_every_number_of_tokens(options):
    torch._dynamo.reset()
    options = dict(options)
    bias = options.pop("bias", True)
    base = torch.nn.Linear(IN, 10, bias=bias, dtype=torch.float64)
    layer = make_layer(base=base, impl="grouped", **options).eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (40, 23, 129, 300):
        x = torch.randn(tokens, IN, dtype=torch.float64)
        with torch._dynamo.config.patch(error_on_recompile=tokens != 40):
            found = training_step(layer, x, forward=compiled)
        assert_same(found, training_step(layer, x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("impl", ("wide", "grouped"))
def test_a_frozen_layer_compiles(impl):
    """Nothing needs a gradient, and autograd is on: what evaluation without no_grad is."""
    layer = make_layer(impl=impl).requires_grad_(False)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(9, IN, dtype=torch.float64)
    torch.testing.assert_close(compiled(x), layer(x))


# --- ops ----------------------------------------------------------------------------------------

OPCHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)
OP_CASES = {
    "router, siblings": dict(out_features=(13, 5), renormalize=False),
    "sparse": dict(gate="sparse", ranks=(1, 4, 3, 2)),
    "dropout": dict(gate="sparse", dropout=0.3, dropout_per_expert=True),
}


def op_calls(case):
    """Every grouped op with the arguments that a step of `case` gives it."""
    x, mixture, dropout, n = case.x, case.mixture, case.dropout, len(case.linears)
    ranks, scaling = mixture.ranks, mixture.scaling
    tensors = siblings_of(case.linears)
    bias, a, b = tensors.bias, tensors.lora_a, tensors.lora_b
    arguments = [x, tensors, case.gate or Gate(*NO_GATE), mixture, dropout]
    yield "grouped", arguments
    result = ops.grouped(*arguments)
    gate, routing = case.gate, Routing(*result[5:])
    if gate is None:
        gate = mixture.router_gate(*result[2:5])
        yield "router_logits", [x, RouterTensors(tensors.router_weight, tensors.router_bias)]
        yield "router_grad", [torch.randn_like(gate.logits), x, torch.float32]
    yield "route", [gate.experts, len(ranks), n, TILE, CHUNK]
    yield "grouped_shrink", [x, a, gate.weights, routing, ranks, scaling, dropout]
    backward = [case.dy, b, result.h, gate.weights, routing, ranks, scaling]
    yield "grouped_shrink_backward", backward
    dh, u, _ = ops.grouped_shrink_backward(*backward)
    T = len(x)
    for start in (None, bias[0], case.dy[0]):
        yield "grouped_expand", [u, b[:1], start, routing, ranks, NO_DROPOUT, T, 0, False]
    back = [m.t() for m in a]
    yield "grouped_expand", [dh, back, None, routing, ranks, dropout, T, 0, False]
    if n == 1:
        yield "grouped_expand", [u, b, bias[0], routing, ranks, NO_DROPOUT, T, 0, True]
    yield "grouped_weight_grad", [x, dh, case.dy, u, routing, ranks, dropout, torch.float32]
    for needs in ((True, True), (True, False), (False, True)):
        yield (
            "grouped_backward",
            [case.dy, x, tensors, result.h, gate, None, routing, mixture, dropout, Needs(*needs)],
        )


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", OP_CASES)
def test_opcheck_of_every_op(name, dtype):
    case = make_case(tokens=9, **OP_CASES[name]).to(dtype)
    for op, arguments in op_calls(case):
        opcheck(op, arguments, test_utils=OPCHECKS)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("name", ("linear", "mlp", "ranks that differ", "softmax before top-k"))
def test_every_gate_on_a_gpu(name, dtype):
    """Forward and backward against float64; graphs and syncs are with the other GPU tests."""
    from support.gpu_cases import assert_module_within_budget, make_layer

    layer = make_layer(dtype=dtype, impl="grouped", **{"top_k": 2, "rank": 16, **widths(name)})
    x = torch.randn(300, 512, device="cuda").to(dtype)
    dy = torch.randn(300, 768, device="cuda").to(dtype)
    assert_module_within_budget(layer, x, lambda y: y.backward(dy), dtype)


def widths(name):
    """The options of a gate of GATES for eight experts."""
    options = dict(GATES[name])
    return options | ({"rank": (16, 4) * 4} if "rank" in options else {})
