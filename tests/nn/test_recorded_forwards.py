"""Which calls belong to the last forward: first steps, methods, shared layers, compiled parts.

Every case gives the right value or an error; none gives the value of other calls.
"""

import pytest
import torch
from torch import nn

from moelora_kernels import (
    MoeLoraConfig,
    MoeLoraLinear,
    adapter_parameters,
    collect_aux_loss,
    link_siblings,
    record_routing,
    replace_linears,
    routing_report,
    set_tasks,
)
from moelora_kernels.nn.layer import mixture_layers
from support.branches import AUX, Branches, Outer, branches, loss_of, tokens

UNKNOWN = "its calls cannot be assigned to one forward"


class ByHand(nn.Module):
    """A model of layers, without replace_linears. `path` as in Branches."""

    forward = Branches.forward

    def __init__(self):
        super().__init__()
        options = dict(config=MoeLoraConfig(**AUX), dtype=torch.float64)
        self.a, self.b, self.c = (MoeLoraLinear(6, 6, **options) for _ in range(3))


# A model that is built from layers.


def test_the_first_forward_of_a_model_built_by_hand_counts():
    model, x = ByHand(), tokens()
    model(x, "ab")
    actual = collect_aux_loss(model)
    y = model.a(x).detach()
    torch.testing.assert_close(actual, loss_of(model, ("a", x), ("b", y)))


@pytest.mark.parametrize("paths", (("aa",), ("ab", "a"), ("abc", "abc")))
def test_a_model_built_by_hand_does_not_guess_its_forwards(paths):
    model, x = ByHand(), tokens()
    for path in paths:
        model(x, path)
    with pytest.raises(RuntimeError, match=rf"^a: {UNKNOWN}.*adapter_parameters\(model\)"):
        collect_aux_loss(model)
    # The hooks know the model from now on.
    for path in paths:
        model(x, path)
    actual = collect_aux_loss(model)
    other = ByHand()
    other.load_state_dict(model.state_dict())
    adapter_parameters(other)
    for path in paths:
        other(x, path)
    torch.testing.assert_close(collect_aux_loss(other), actual)


@pytest.mark.parametrize("look", (adapter_parameters, record_routing, link_siblings))
def test_functions_before_the_first_forward_make_a_model_known(look):
    options = dict(config=MoeLoraConfig(**AUX), dtype=torch.float64)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (
                MoeLoraLinear(6, 6, **options) for _ in range(3)
            )

        def forward(self, x, both=True):
            return self.k_proj(self.q_proj(x)) if both else self.q_proj(x)

    model, x = Attention(), tokens()
    if look is record_routing:
        with record_routing(model):
            pass
    else:
        look(model)
    model(x)
    model(x, both=False)
    actual = collect_aux_loss(model)
    model.q_proj(x)
    torch.testing.assert_close(actual, collect_aux_loss(model.q_proj))


@pytest.mark.parametrize("is_known", (False, True))
def test_set_tasks_makes_a_model_known(is_known):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.task = MoeLoraLinear(6, 6, router="task", num_tasks=2, num_experts=4, rank=2)
            self.token = MoeLoraLinear(6, 6, **AUX)

        def forward(self, x):
            return self.token(self.token(self.task(x)))

    model, x = Two(), tokens(3)[None].float()
    # Without the layer that is called twice, this is a part of the model.
    set_tasks(model if is_known else model.task, [1])
    hidden = model.task(x).detach()
    both = torch.cat([hidden, model.token(hidden).detach()])
    collect_aux_loss(model.token)
    model(x)
    if is_known:
        actual = collect_aux_loss(model)
        model.token(both)
        torch.testing.assert_close(actual, collect_aux_loss(model.token))
    else:
        with pytest.raises(RuntimeError, match=f"^token: {UNKNOWN}"):
            collect_aux_loss(model)


# Forwards that are not forwards of the model.


class Encoder(Branches):
    def encode(self, x, path):
        return self.forward(x, path)


def encoder():
    model = Encoder()
    copied = branches()
    replace_linears(model, MoeLoraConfig(**AUX), ["a", "b", "c"])
    model.load_state_dict(copied.state_dict())
    return model


def test_a_method_that_is_not_forward_counts_what_it_calls():
    model, x = encoder(), tokens()
    model.encode(x, "b")
    torch.testing.assert_close(collect_aux_loss(model), loss_of(model, ("b", x)))
    # The other layers have no record of an earlier pass.
    model.encode(x, "a")
    torch.testing.assert_close(collect_aux_loss(model), loss_of(model, ("a", x)))


@pytest.mark.parametrize("first", ("forward", "encode"))
def test_a_pass_of_a_method_and_another_one_are_not_mixed(first):
    model, x = encoder(), tokens()
    getattr(model, first)(x, "abc")
    model.encode(x, "a")
    with pytest.raises(RuntimeError, match=f"^a: {UNKNOWN}.*no_grad"):
        collect_aux_loss(model)


def test_a_layer_that_a_method_calls_twice_is_an_error():
    model, x = encoder(), tokens()
    model.encode(x, "aa")
    with pytest.raises(RuntimeError, match=f"^a: {UNKNOWN}"):
        collect_aux_loss(model)
    # Calls before a forward do not count.
    model(x, "a")
    torch.testing.assert_close(collect_aux_loss(model), loss_of(model, ("a", x)))


def test_losses_after_each_pass_of_a_method():
    model, x, other = encoder(), tokens(), tokens(7, seed=2)
    total = 0.0
    for batch in (x, other):
        model.encode(batch, "a")
        total = total + collect_aux_loss(model)
    torch.testing.assert_close(total, loss_of(model, ("a", x), ("a", other)))


def test_passes_of_a_method_without_autograd_do_not_count():
    model, x = encoder(), tokens()
    with torch.no_grad():
        model.encode(tokens(seed=3), "aabc")
    model(x, "a")
    with torch.no_grad():
        model.encode(tokens(seed=4), "abca")
    torch.testing.assert_close(collect_aux_loss(model), loss_of(model, ("a", x)))


def test_a_forward_that_takes_the_result_of_a_pass_is_an_error():
    """Like `model(encoder_outputs=model.encoder(x))`: the pass of the encoder is not left out."""
    model, x = encoder(), tokens()
    y = model.encode(x, "a")
    model(y, "b")
    with pytest.raises(RuntimeError, match=f"^a: {UNKNOWN}.*after each pass"):
        collect_aux_loss(model)
    model.encode(x, "a")
    loss = collect_aux_loss(model)
    model(y, "b")
    loss = loss + collect_aux_loss(model)
    torch.testing.assert_close(loss, loss_of(model, ("a", x), ("b", y.detach())))


def test_passes_before_a_forward_that_calls_the_same_layers_do_not_count():
    model, x = encoder(), tokens()
    model.encode(tokens(seed=3), "ab")
    model(x, "ab")
    actual = collect_aux_loss(model)
    y = model.a(x).detach()
    collect_aux_loss(model)
    torch.testing.assert_close(actual, loss_of(model, ("a", x), ("b", y)))


def test_a_report_of_unknown_calls_is_an_error():
    model, x = encoder(), tokens()
    model.encode(x, "aa")
    with pytest.raises(RuntimeError, match=f"^a: {UNKNOWN}"):
        routing_report(model)


def test_two_models_that_share_a_part_have_their_own_forwards():
    shared, x, y = branches(), tokens(), tokens(8, seed=2)
    first, second = Outer(shared), Outer(shared)
    for model in (first, second):
        adapter_parameters(model)
    for order in ((first, second), (second, first)):
        first(x, "a")
        second(y, "b")
        actual = {model: collect_aux_loss(model) for model in order}
        for model, batch, name in ((first, x, "a"), (second, y, "b")):
            hidden = getattr(shared, name)(batch).detach()
            expected = loss_of(shared, (name, batch)) + loss_of(model, ("head", hidden))
            torch.testing.assert_close(actual[model], expected)


def test_a_recorded_forward_keeps_the_pending_loss_of_another_model():
    shared, x = branches(), tokens()
    first, second = Outer(shared), Outer(shared)
    for model in (first, second):
        adapter_parameters(model)
    first(x)
    expected = collect_aux_loss(first)
    first(x)
    with record_routing(second):
        second(tokens(8, seed=2))
    torch.testing.assert_close(collect_aux_loss(first), expected)


def test_the_loss_of_a_part_is_of_the_last_forward_of_the_part():
    inner, x, y = branches(), tokens(), tokens(8, seed=2)
    outer = Outer(inner)
    adapter_parameters(outer)
    outer(x, "a")
    torch.testing.assert_close(collect_aux_loss(inner), loss_of(inner, ("a", x)))
    collect_aux_loss(outer)
    outer(x, "a")
    inner(y, "b")
    torch.testing.assert_close(collect_aux_loss(inner), loss_of(inner, ("b", y)))
    collect_aux_loss(outer)
    outer(x, "a")
    inner(y, "b")
    with pytest.raises(RuntimeError, match=f"^inner.a: {UNKNOWN}|^inner.b: {UNKNOWN}"):
        collect_aux_loss(outer)


# Compiled parts.


@pytest.mark.parametrize("whole", (False, True), ids=("layers", "model"))
def test_compiled_parts(whole):
    model, x = branches(), tokens()
    with torch.compiler.set_stance("default"):
        if whole:
            model.compile(backend="aot_eager")
        else:
            for layer in mixture_layers(model):
                layer.compile(backend="aot_eager")
        for path in ("abc", "a", "ab", "a"):
            model(x, path)
        actual = collect_aux_loss(model)
    torch.testing.assert_close(actual, loss_of(branches(), ("a", x)))
