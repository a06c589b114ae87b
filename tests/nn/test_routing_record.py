"""A routing record belongs to one forward of the model."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moelora_kernels import (
    MoeLoraConfig,
    MoeLoraLinear,
    collect_aux_loss,
    record_routing,
    replace_linears,
)
from moelora_kernels.nn.check import selected_experts
from moelora_kernels.nn.recorded_forwards import all_forwards
from support.branches import AUX, Branches, branches, loss_of, tokens


def test_a_layer_that_the_forward_does_not_reach_adds_nothing():
    model, x = branches(), tokens()
    model(x, "a")
    torch.testing.assert_close(collect_aux_loss(model), loss_of(model, ("a", x)))


def test_a_layer_that_only_an_earlier_forward_reached_adds_nothing():
    model, x = branches(), tokens()
    model(x, "abc")
    model(x, "a")
    loss = collect_aux_loss(model)
    loss.backward()
    assert model.a.router.weight.grad.any()
    assert model.b.router.weight.grad is None
    torch.testing.assert_close(loss, loss_of(model, ("a", x)))


def test_a_forward_that_reaches_no_layer_has_no_loss():
    model = branches()
    model(tokens(), "")
    assert collect_aux_loss(model).item() == 0.0
    with pytest.raises(RuntimeError, match="run a forward first"):
        collect_aux_loss(model)


def test_several_calls_in_one_forward_count_by_their_tokens():
    """Like one call with all tokens: not the mean of two losses, and not the last one."""
    model = branches(rank=1)

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x, y):
            return self.inner.a(x), self.inner.a(y)

    outer, x, y = Twice(), tokens(3), tokens(9, seed=2)
    with record_routing(outer):
        outer(x, y)
        assert [call.shape for call in model.a.record.last] == [(3,), (9,)]
        assert model.a.record.weights.shape == (12, 2)
    collect_aux_loss(outer) if model.a.record.last else None
    outer(x, y)
    expected = loss_of(model, ("a", torch.cat([x, y])))
    outer(x, y)
    torch.testing.assert_close(collect_aux_loss(outer), expected)


def test_evaluation_between_forward_and_loss_changes_nothing():
    model, x = branches(), tokens()
    model(x)
    expected = collect_aux_loss(model)
    model(x)
    with torch.no_grad():
        model(tokens(seed=5), "a")
    torch.testing.assert_close(collect_aux_loss(model), expected)


def test_without_autograd_the_loss_is_of_the_forward_without_autograd():
    model, x, other = branches(), tokens(), tokens(seed=5)
    model(x)
    with torch.no_grad():
        model(other, "a")
        torch.testing.assert_close(collect_aux_loss(model), loss_of(model, ("a", other)))


def test_a_forward_that_raised_leaves_nothing_behind():
    model, x = branches(), tokens()
    with pytest.raises(AttributeError):
        model(x, "abz")
    model(x, "c")
    torch.testing.assert_close(collect_aux_loss(model), loss_of(model, ("c", x)))


def test_a_part_of_the_model_is_a_forward_only_on_its_own():
    """Adapters were put into a part, which the whole model calls twice."""
    inner = branches()

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            self.inner(x, "a")
            return self.inner(x, "b")

    outer, x = Outer(), tokens()
    outer(x)
    # The part's hooks know two forwards, but not that the whole model called them.
    with pytest.raises(RuntimeError, match=r"^inner\.a: its calls cannot be assigned"):
        collect_aux_loss(outer)
    # `collect_aux_loss` has seen the whole: its forward reaches both.
    outer(x)
    torch.testing.assert_close(collect_aux_loss(outer), loss_of(inner, ("a", x), ("b", x)))
    inner(x, "c")
    torch.testing.assert_close(collect_aux_loss(outer), loss_of(inner, ("c", x)))


@pytest.mark.parametrize("whole", (False, True), ids=("layers", "model"))
def test_activation_checkpointing_counts_once(whole):
    model, x = branches(), tokens().requires_grad_()

    def forward(x):
        if whole:
            return checkpoint(model, x, use_reentrant=False)
        for layer in (model.a, model.b, model.c):
            x = checkpoint(layer, x, use_reentrant=False)
        return x

    model(x)
    expected = collect_aux_loss(model).detach()
    for _ in range(2):
        y = forward(x)
        loss = collect_aux_loss(model)
        torch.testing.assert_close(loss.detach(), expected)
        (y.sum() + loss).backward()


@pytest.mark.parametrize("copied", (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))))
def test_a_copy_has_its_own_records(copied):
    model, x = branches(), tokens()
    model(x)
    clone = copied(model)
    with pytest.raises(RuntimeError, match="run a forward first"):
        collect_aux_loss(clone)
    clone(x)
    clone(x, "a")
    torch.testing.assert_close(collect_aux_loss(clone), loss_of(clone, ("a", x)))
    assert [call.shape for call in model.b.record.last] == [(5,)]


def test_a_compiled_model_drops_the_earlier_forward():
    model, x = branches(), tokens()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    compiled(x, "abc")
    compiled(x, "a")
    torch.testing.assert_close(collect_aux_loss(compiled), loss_of(model, ("a", x)))


def test_a_model_built_by_hand_is_known_after_the_first_loss():
    options = dict(config=MoeLoraConfig(**AUX), dtype=torch.float64)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = MoeLoraLinear(6, 6, **options), MoeLoraLinear(6, 6, **options)

        def forward(self, x, both=True):
            return self.b(self.a(x)) if both else self.a(x)

    model, x = Two(), tokens()
    model(x)
    collect_aux_loss(model)
    model(x)
    model(x, both=False)
    torch.testing.assert_close(collect_aux_loss(model), loss_of(model, ("a", x)))


def test_records_cost_no_hook_in_models_without_losses():
    model = branches(aux=())
    assert not model._forward_pre_hooks
    with record_routing(model):
        model(tokens())
        assert model.b.record.weights.shape == (5, 2)
    assert model.b.record.weights is None


def test_counting_an_evaluation_in_between_keeps_the_pending_loss():
    model, x = branches(), tokens()
    model(x)
    expected = collect_aux_loss(model)
    model(x)
    with torch.no_grad(), record_routing(model):
        model(tokens(seed=5))
    torch.testing.assert_close(collect_aux_loss(model), expected)


def test_a_forward_inside_a_forward_of_the_same_model_belongs_to_it():
    class Recycling(Branches):
        def forward(self, x, depth=1):
            x = self.a(x) if depth else self.b(x)
            return self.forward_again(x) if depth else x

        def forward_again(self, x):
            return self.c(self(x, 0))

    torch.manual_seed(0)
    model = Recycling()
    replace_linears(model, MoeLoraConfig(**AUX), ["a", "b", "c"])
    x = tokens()
    model(x)
    y = model.a(x).detach()
    model(x)
    z = model.b(y).detach()
    model(x)
    actual = collect_aux_loss(model)
    torch.testing.assert_close(actual, loss_of(model, ("a", x), ("b", y), ("c", z)))


def test_a_loss_of_two_forwards_counts_both():
    model, x, other = branches(), tokens(3), tokens(9, seed=2)
    with all_forwards(model):
        model(x, "a")
        with torch.no_grad():
            model(tokens(seed=5))
        model(other, "a")
    torch.testing.assert_close(
        collect_aux_loss(model), loss_of(model, ("a", torch.cat([x, other])))
    )


def test_selected_experts_of_sparse_and_dense_gates() -> None:
    weights = torch.tensor([[0.5, 0.0, 0.5]])
    assert selected_experts(weights, None, 2).tolist() == [True, False]
    experts = torch.tensor([[0, 3], [2, 3]], dtype=torch.int32)
    assert selected_experts(torch.ones(2, 2), experts, 3).tolist() == [True, False, True]
