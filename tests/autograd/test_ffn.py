"""The Function of whole-FFN experts: its gradients, what it saves, and what would break it."""

import pytest
import torch
from torch import nn

from moelora_kernels import dispatch, ops, reference
from moelora_kernels.autograd import ffn as autograd_ffn
from moelora_kernels.autograd.ffn import ffn_experts
from moelora_kernels.autograd.ffn_inputs import activation_name
from moelora_kernels.autograd.router import RouterLogits
from moelora_kernels.nn import ffn as nn_ffn
from moelora_kernels.testing import draw_experts
from moelora_kernels.types import Dropout, FfnMixture, FfnTensors, Gate
from support.backends import needs_library
from support.compare import assert_same, training_step
from support.ffns import HIDDEN, INNER, GatedMlp, check, inputs, make_ffn

RANKS, SCALING = (1, 3, 2), (0.5, 2.0, 1.0)
# Out of range on both sides, the first id past the end, and an expert in two slots of a token.
ADVERSARIAL = [[0, 2], [-1, 1], [1, 3], [2, 2], [-7, 2**31 - 1], [1, 0]]


def draw(tokens, slots):
    """x, gate, up, weights and adapters of three experts in float64."""
    total = sum(RANKS)
    shapes = [(tokens, HIDDEN), (tokens, INNER), (tokens, INNER), (tokens, slots)]
    shapes += [(total, HIDDEN), (INNER, total)] * 2 + [(total, INNER), (HIDDEN, total)]
    x, gate, up, weights, *adapters = [torch.randn(*s, dtype=torch.float64) for s in shapes]
    return [x, gate, up, weights.abs(), *adapters]


def run(name, experts, tensors, impl, activation=nn.functional.silu):
    """`ffn_experts` of a mixture of MIXTURES."""
    mixture, p, per_expert = MIXTURES[name]
    x, gate_out, up_out, weights, *adapters = tensors
    dropouts = [Dropout(p, per_expert, torch.tensor([s]) if p else None) for s in (5, 7)]
    gate, adapters = Gate(weights, experts), FfnTensors(*adapters)
    return ffn_experts(mixture, activation, x, gate_out, up_out, gate, adapters, *dropouts, impl)


# name -> mixture, probability of dropout, whether each expert has a mask
MIXTURES = {
    "plain": (FfnMixture(RANKS, SCALING), 0.0, False),
    "recompute": (FfnMixture(RANKS, SCALING, recompute=True), 0.0, False),
    "dropout": (FfnMixture(RANKS, SCALING), 0.3, False),
    "per_expert": (FfnMixture(RANKS, SCALING, recompute=True), 0.3, True),
}


# The mixtures of each formulation.
FORMS = [("grouped", name) for name in MIXTURES]
FORMS += [("fused", name) for name in ("plain", "dropout", "per_expert")]
each_form = pytest.mark.parametrize(("impl", "mixture"), FORMS)
each_impl = pytest.mark.parametrize("impl", ("grouped", "fused"))


# --- the Function -------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", (nn.functional.silu, nn.GELU("tanh")), ids=("silu", "gelu"))
@each_form
def test_gradcheck(impl, mixture, activation):
    """Every input by numbers: x, the frozen products, the weights, six adapters."""
    tensors = [t.requires_grad_() for t in draw(len(ADVERSARIAL), 2)]
    indices = torch.tensor(ADVERSARIAL)

    def experts(*tensors):
        return run(mixture, indices, tensors, impl, activation)

    assert torch.autograd.gradcheck(experts, tensors, fast_mode=mixture != "plain")


def test_gradcheck_of_the_router():
    tensors = [torch.randn(*s, dtype=torch.float64) for s in ((5, 4), (3, 4), (3,))]
    assert torch.autograd.gradcheck(RouterLogits.apply, [t.requires_grad_() for t in tensors])


ROUTINGS = ("uniform", "zipf", "one", "empty", "adversarial", "nothing")


@each_form
@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_function_is_the_reference(routing, impl, mixture):
    """More pairs than a tile holds; an expert without tokens has gradients of exactly zero."""
    if routing == "adversarial":
        indices = torch.tensor(ADVERSARIAL * 12)
    elif routing == "nothing":
        indices = torch.full((70, 2), -1)
    else:
        indices = draw_experts(routing, 70, 3, 2, torch.Generator().manual_seed(1))
    tensors = [t.requires_grad_() for t in draw(indices.shape[0], 2)]
    results = []
    for form in (impl, "reference"):
        outputs = run(mixture, indices, tensors, form)
        dy = [torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view(o.shape) for o in outputs]
        results.append([*outputs, *torch.autograd.grad(outputs, tensors, dy)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)
    if routing == "nothing":
        assert not any(t.any() for t in results[0])
    if routing == "empty":
        gate_a, gate_b = results[0][6:8]
        assert gate_a[:4].any()
        assert not gate_a[4:].any()
        assert not gate_b[:, 4:].any()


@each_impl
@pytest.mark.parametrize("trains", ("x", "gate", "weights", "gate_b", "up_a", "down_a", "down_b"))
def test_only_what_is_asked_for(trains, impl):
    """One input that trains and all others frozen: its gradient is what it is among all."""
    names = ["x", "gate", "up", "weights", *FfnTensors._fields]
    tensors, indices = draw(6, 2), torch.tensor(ADVERSARIAL)
    everything = [t.clone().requires_grad_() for t in tensors]
    own = names.index(trains)
    tensors[own].requires_grad_()
    for output in (0, 1, None):
        grads = []
        for given in (everything, tensors):
            outputs = run("plain", indices, given, impl)
            y = sum(o.sum() for o in outputs) if output is None else outputs[output].sum()
            # An output that nothing came back for is a gradient of zeros.
            grads.append(torch.autograd.grad(y, given[own])[0])
        assert torch.equal(*grads)


@each_impl
def test_the_ops_get_rows_that_lie_dense(impl, monkeypatch):
    """dy of a sum or a transpose is a view with strides that no kernel should have to take."""
    options = dict(impl="grouped") if impl == "grouped" else {}
    layer, (x, dy) = make_ffn(**options), inputs(4)
    original, strides = ops.grouped_shrink_backward, []

    def watched(dy, *args):
        strides.extend(g.stride() for g in dy)
        return original(dy, *args)

    monkeypatch.setattr(ops, "grouped_shrink_backward", watched)
    for given in (dy[:1].expand(4, HIDDEN), dy.t().contiguous().t()):
        assert_same(training_step(layer, x, given), training_step(layer, x, given.contiguous()))
    assert set(strides) == ({(HIDDEN, 1), (INNER, 1)} if impl == "grouped" else {(HIDDEN, 1)})


# --- would the tests notice ---------------------------------------------------------------------


def forget_last_slot(monkeypatch, layer):
    whole = autograd_ffn._weighted_sum

    def without(rows, weights):
        kept = weights.clone()
        kept[:, -1] = 0
        return whole(rows, kept)

    monkeypatch.setattr(autograd_ffn, "_weighted_sum", without)


def swap_gate_and_up(monkeypatch, layer):
    own = layer.ffn_tensors()
    swapped = FfnTensors(own.up_a, own.up_b, own.gate_a, own.gate_b, own.down_a, own.down_b)
    monkeypatch.setattr(layer, "ffn_tensors", lambda: swapped)


def drop_the_bias_correction(monkeypatch, layer):
    monkeypatch.setattr(nn_ffn, "_bias_correction", lambda down, weights: None)


def wrong_result(op, position):
    """An op one of whose results is off by one percent."""

    def break_it(monkeypatch, layer):
        original = getattr(ops, op)

        def broken(*args, **options):
            results = original(*args, **options)
            if isinstance(results, torch.Tensor):
                return results * 1.01
            changed = list(results)
            one = changed[position]
            changed[position] = [1.01 * one[0]] if isinstance(one, list) else 1.01 * one
            return type(results)(*changed) if hasattr(results, "_fields") else changed

        monkeypatch.setattr(ops, op, broken)

    break_it.__name__ = f"{op}[{position}]"
    return break_it


BROKEN = [
    forget_last_slot,
    swap_gate_and_up,
    drop_the_bias_correction,
    wrong_result("grouped_shrink", 0),
    wrong_result("grouped_shrink", 1),
    wrong_result("grouped_expand", 0),
    wrong_result("grouped_shrink_backward", 0),
    wrong_result("grouped_shrink_backward", 1),
    wrong_result("grouped_shrink_backward", 2),
    wrong_result("grouped_weight_grad", 0),
    wrong_result("grouped_weight_grad", 1),
    wrong_result("router_logits", 0),
    wrong_result("router_grad", 0),
]


BROKEN_FUSED = [
    *(wrong_result("ffn_inner", n) for n in range(3)),
    *(wrong_result("ffn_inner_backward", n) for n in range(8)),
    wrong_result("grouped_weight_grad", 0),
    wrong_result("grouped_weight_grad", 1),
    wrong_result("grouped_expand", 0),
]


def check_that_a_test_notices(layer, break_it, monkeypatch):
    x, dy = inputs(3, 4)
    check(layer, x, dy)
    break_it(monkeypatch, layer)
    with pytest.raises(AssertionError):
        check(layer, x, dy)


@pytest.mark.parametrize("break_it", BROKEN, ids=lambda b: b.__name__)
def test_a_broken_layer_does_not_pass(break_it, monkeypatch):
    layer = make_ffn(normalize="none", impl="grouped")
    check_that_a_test_notices(layer, break_it, monkeypatch)


@needs_library
@pytest.mark.parametrize("break_it", BROKEN_FUSED, ids=lambda b: b.__name__)
def test_a_broken_fused_layer_does_not_pass(break_it, monkeypatch):
    check_that_a_test_notices(make_ffn(normalize="none"), break_it, monkeypatch)


# --- which form runs ----------------------------------------------------------------------------


def counted_calls(layer, monkeypatch):
    """Return how often a forward calls the op of the fused form."""
    calls, original = [], ops.ffn_inner
    monkeypatch.setattr(ops, "ffn_inner", lambda *args: calls.append(1) or original(*args))
    layer(inputs(3)[0])
    return len(calls)


class Act(nn.SiLU):
    """An activation that the fused form does not know."""


def with_hook():
    activation = nn.SiLU()
    activation.register_forward_hook(lambda module, args, output: None)
    return activation


ACTIVATIONS = {
    "silu": ("silu", 1),
    "gelu": ("gelu", 1),
    "gelu_tanh": ("gelu_tanh", 1),
    "relu": ("relu", 1),
    "function": (nn.functional.silu, 1),
    "other": (nn.Mish(), 0),
    "subclass": (Act(), 0),
    "lambda": (lambda z: nn.functional.silu(z), 0),
    "hook": (with_hook(), 0),
}


@needs_library
@pytest.mark.parametrize("tokens", (0, 1, 2, 31, 127, 257))
@pytest.mark.parametrize("features", (1, 127, 131))
def test_numbers_of_tokens_and_features(features, tokens):
    """Ends of blocks of tokens and of strips of features."""
    layer = make_ffn(mlp=GatedMlp(HIDDEN, features).double())
    check(layer, *inputs(tokens))


@needs_library
@pytest.mark.parametrize(("activation", "expected"), ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_activations_that_run_fused(activation, expected, monkeypatch):
    layer = make_ffn(activation=activation)
    check(layer, *inputs(3, 4))
    assert counted_calls(layer, monkeypatch) == expected


def patched():
    activation = nn.SiLU()
    activation.forward = nn.functional.relu
    return activation


def test_names_of_activations():
    """The classes of transformers that compute one of the four, and callables that do not."""
    transformers = pytest.importorskip("transformers.activations")
    expected = {
        "silu": "silu",
        "swish": "silu",
        "gelu": "gelu",
        "gelu_python": "gelu",
        "gelu_new": "gelu_tanh",
        "gelu_pytorch_tanh": "gelu_tanh",
        "gelu_python_tanh": "gelu_tanh",
        "relu": "relu",
        "gelu_10": None,
        "quick_gelu": None,
        "relu2": None,
        "mish": None,
        "linear": None,
    }
    names = {
        name: activation_name(transformers.ACT2FN[name])
        for name in expected
        if name in transformers.ACT2FN
    }
    assert names == {name: expected[name] for name in names}
    assert {"silu", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu"} <= set(names)
    z = torch.linspace(-12, 12, 1001, dtype=torch.float64)
    for name, activation in names.items():
        if activation is not None:
            actual = reference.ffn_activation(z, activation)
            torch.testing.assert_close(actual, transformers.ACT2FN[name](z), rtol=1e-9, atol=1e-9)
    not_hashable = type("Unhashable", (), {"__call__": lambda self, z: z, "__hash__": None})()
    assert activation_name(not_hashable) is None
    assert activation_name(patched()) is None


@needs_library
def test_many_ranks_run_grouped(monkeypatch):
    limit = dispatch.THRESHOLDS["cpu"].ffn_rank
    assert counted_calls(make_ffn(rank=(limit - 3, 1, 1, 1)), monkeypatch) == 1
    assert counted_calls(make_ffn(rank=(limit - 2, 1, 1, 1)), monkeypatch) == 0
    assert counted_calls(make_ffn(impl="grouped"), monkeypatch) == 0
