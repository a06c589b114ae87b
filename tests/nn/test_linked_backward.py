"""Backward of linked siblings: every gradient is that of unlinked layers."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moelora_kernels import collect_aux_loss, set_tasks
from support.siblings import NAMES, pair, random_x


def gradients(model, losses):
    """Run backward for the losses one by one; return the gradients of all parameters."""
    model.zero_grad()
    for loss in losses:
        loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dims", (2, 3))
@pytest.mark.parametrize("impl", ("wide", "grouped"))
def test_backward_of_one_output_after_another(dims, impl):
    plain, linked = pair(top_k=2, impl=impl)
    x = random_x(*(2, 5)[: dims - 1])
    for order in (NAMES, NAMES[::-1]):
        expected, actual = (
            gradients(m, [y.sin().sum() for y in [getattr(m, n)(x) for n in order]])
            for m in (plain, linked)
        )
        assert actual.keys() == expected.keys()
        for name, grad in expected.items():
            torch.testing.assert_close(actual[name], grad, msg=name)


def test_backward_twice_from_one_output():
    plain, linked = pair(top_k=2)
    x = random_x(2, 5)
    q, k, _ = [getattr(linked, name)(x) for name in NAMES]
    q.sum().backward(retain_graph=True)
    q.sum().backward()
    k.sum().backward()
    with torch.no_grad():
        linked.k_proj.lora_B.mul_(2)
    q, k = linked.q_proj(x), linked.k_proj(x)
    q.sum().backward()
    with torch.no_grad():
        linked.k_proj.lora_B.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place between the backwards"):
        k.sum().backward()
    y = plain.q_proj(x)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="Trying to backward through the graph a second time"):
        y.sum().backward()


def test_backward_one_by_one_of_routers_with_a_graph():
    _, linked = pair(router="mlp", top_k=2)
    x = random_x(2, 5)
    q, k, _ = [getattr(linked, name)(x) for name in NAMES]
    q.sum().backward()
    with pytest.raises(RuntimeError, match=r"siblings have one graph.*retain_graph=True"):
        k.sum().backward()


def test_a_sibling_that_is_not_called_gets_no_gradient():
    plain, linked = pair(top_k=2)
    x = random_x(2, 5)
    expected, actual = (
        gradients(m, [m.q_proj(x).sum(), m.v_proj(x).sum()]) for m in (plain, linked)
    )
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, msg=name)


# Forms whose gate is not computed by the op, and the reference.
FORMS = {
    "wide": dict(top_k=2),
    "dense": dict(),
    "mlp": dict(router="mlp", top_k=2),
    "mlp of all": dict(router="mlp"),
    "shared expert": dict(top_k=2, shared_expert="complement"),
    "threshold": dict(select="learned_threshold"),
    "top-p": dict(select="topp", top_p=0.6),
    "sqrt": dict(top_k=2, grad_gate="sqrt"),
    "task": dict(router="task", num_tasks=4, task_gate="per_layer"),
    "sequence": dict(granularity="sequence", top_k=2),
    "share A": dict(share="A", router="mlp"),
    "aux": dict(router="mlp", top_k=2, aux={"z": 1.0, "load_balance": 1.0}),
    "external": dict(router="external"),
}


@pytest.mark.parametrize("impl", ("auto", "reference"))
@pytest.mark.parametrize("form", FORMS)
def test_a_sibling_that_is_not_called_gets_no_gradient_in_any_form(form, impl):
    """Weight decay would change a parameter that has a gradient of zeros."""
    plain, linked = pair(impl=impl, **FORMS[form])
    x = random_x(2, 5)

    def step(model):
        if form == "task":
            set_tasks(model, [1, 3])
        if form == "external":
            set_tasks(model, torch.tensor([[0.3, 0.2, 0.5], [1.0, 0.0, 2.0]]))
        loss = (model.q_proj(x).sin() * model.v_proj(x).sum()).sum()
        return gradients(model, [loss + collect_aux_loss(model) if form == "aux" else loss])

    expected, actual = step(plain), step(linked)
    assert not any(name.startswith("k_proj") for name in expected)
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, msg=name)


@pytest.mark.parametrize("options", (dict(top_k=2), dict(router="mlp"), dict(impl="reference")))
@pytest.mark.parametrize("retain_graph", (False, True))
def test_a_call_after_backward(retain_graph, options):
    """A stored output whose graph is freed is computed again."""
    plain, linked = pair(**options)
    x = random_x(2, 5)
    for model in (plain, linked):
        model.q_proj(x).sum().backward(retain_graph=retain_graph)
        model.k_proj(x).sum().backward()
    for (name, p), q in zip(plain.named_parameters(), linked.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        torch.testing.assert_close(q.grad, p.grad, msg=name)


@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpointing_of_one_sibling(reentrant):
    plain, linked = pair(top_k=2)
    x = random_x(2, 5).requires_grad_()

    def step(model, run):
        x.grad = None
        ys = [run(model.q_proj, x), model.k_proj(x), model.v_proj(x)]
        grads = gradients(model, [sum(y.sin().sum() for y in ys)])
        return {**grads, "x": x.grad}

    expected = step(plain, lambda layer, x: layer(x))
    actual = step(linked, lambda layer, x: checkpoint(layer, x, use_reentrant=reentrant))
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, msg=name)


def test_a_teacher_without_grad():
    plain, linked = pair(top_k=2)
    x = random_x(2, 5).requires_grad_()
    for model in (plain, linked):
        q = model.q_proj(x)
        with torch.no_grad():
            k = model.k_proj(x)
        assert q.requires_grad
        assert not k.requires_grad
        detached = model.v_proj(x).detach()
        torch.testing.assert_close(detached, plain.v_proj(x))


@pytest.mark.parametrize(
    "options", (dict(top_k=2), dict(impl="grouped", top_k=2), dict(router=None))
)
def test_a_sibling_whose_output_is_not_used_gets_no_gradient(options):
    """Weight decay would change a parameter that has a gradient of zeros."""
    plain, linked = pair(**options)
    x = random_x(2, 5)

    def step(model):
        q, k, _ = (getattr(model, name)(x) for name in NAMES)
        return gradients(model, [(q.sin() * k.sum()).sum()])

    expected, actual = step(plain), step(linked)
    assert not any(name.startswith("v_proj") for name in expected)
    assert actual.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, msg=name)
