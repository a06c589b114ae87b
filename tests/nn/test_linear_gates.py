"""MoeLoraLinear with each kind of gate: external, any router, per sequence, shared expert."""

import pytest
import torch
from torch import nn

from moelora_kernels import record_routing, set_tasks
from moelora_kernels.nn import MlpRouter
from support.compare import assert_same, training_step
from support.linears import IN, OUT, Prototype, make_layer


@pytest.mark.parametrize("rows", ("one", "sequence", "token"))
def test_external_gates_by_argument_and_by_set_tasks(rows):
    """The gate has one row for all tokens, per sequence or per token, and a gradient."""
    layer = make_layer(router="external")
    x = torch.randn(3, 4, IN, dtype=torch.float64)
    shape = {"one": (1, 4), "sequence": (3, 4), "token": (3, 4, 4)}[rows]
    gates = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(3, 4, OUT, dtype=torch.float64)
    y = layer(x, gates)
    (actual,) = torch.autograd.grad(y, gates, dy)

    by_token = {"one": gates[0], "sequence": gates[:, None], "token": gates}[rows]
    expected = layer.base_layer(x)
    for e in range(4):
        columns = slice(3 * e, 3 * e + 3)
        delta = (x @ layer.lora_A[columns].t()) @ layer.lora_B[:, columns].t()
        expected = expected + 2.0 * by_token.expand(3, 4, 4)[..., e : e + 1] * delta
    (expected_grad,) = torch.autograd.grad(expected, gates, dy)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(actual, expected_grad, rtol=1e-12, atol=1e-12)

    set_tasks(layer, gates.detach())
    assert torch.equal(layer(x), y)
    # The argument replaces the gates of set_tasks for one forward.
    other = torch.rand(1, 4, dtype=torch.float64)
    assert not torch.equal(layer(x, other), y)
    assert torch.equal(layer(x), y)


def test_a_gate_of_zero_has_a_gradient():
    """A gate of exactly zero adds nothing to y, and dy/dgate = s B A x."""
    layer = make_layer(router="external")
    x = torch.randn(5, IN, dtype=torch.float64)
    gates = torch.zeros(5, 4, dtype=torch.float64, requires_grad=True)
    layer(x, gates).sum().backward()
    for e in range(4):
        columns = slice(3 * e, 3 * e + 3)
        delta = 2.0 * (x @ layer.lora_A[columns].t()) @ layer.lora_B[:, columns].t()
        torch.testing.assert_close(gates.grad[:, e], delta.sum(dim=1), rtol=1e-12, atol=1e-12)


def test_gates_of_a_wrong_shape_raise():
    layer = make_layer(router="external")
    x = torch.randn(3, 4, IN, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"gates: router='external' needs them"):
        layer(x)
    for gates in (torch.rand(3, 5), torch.rand(4), torch.ones(3, 4, dtype=torch.long)):
        with pytest.raises(ValueError, match=r"gates: expected floats \[\.\.\., 4\]"):
            layer(x, gates)
    with pytest.raises(ValueError, match=r"gates: 5 gate rows for x \[3, 4, 12\]"):
        layer(x, torch.rand(5, 4))
    with pytest.raises(ValueError, match=r"gates: 3 gate rows for x \[12, 12\]"):
        layer(x.reshape(12, IN), torch.rand(3, 4))
    with pytest.raises(ValueError, match=r"gates: only router='external'"):
        make_layer()(x, torch.rand(3, 4))


def test_tasks_of_another_batch_raise():
    layer = make_layer(router="task", num_tasks=7)
    set_tasks(layer, [1, 2, 3, 4, 5, 6])
    with pytest.raises(ValueError, match=r"set_tasks: 6 gate rows for x \[2, 3, 12\]"):
        layer(torch.randn(2, 3, IN, dtype=torch.float64))
    layer(torch.randn(6, 1, IN, dtype=torch.float64))


def test_any_module_can_be_the_router():
    """y and all gradients equal those of the formula in plain PyTorch."""
    layer = make_layer(router=Prototype(4), router_bias=False, normalize="none", top_k=2)
    x = torch.randn(2, 3, IN, dtype=torch.float64)

    def plain(leaf):
        p = layer.router(leaf.reshape(-1, IN)).softmax(dim=1).view(2, 3, 4)
        kept = torch.zeros_like(p).scatter(2, p.topk(2).indices, 1.0)
        y = layer.base_layer(leaf)
        for e in range(4):
            columns = slice(3 * e, 3 * e + 3)
            delta = (leaf @ layer.lora_A[columns].t()) @ layer.lora_B[:, columns].t()
            y = y + 2.0 * (p * kept)[..., e : e + 1] * delta
        return y

    actual = training_step(layer, x)
    assert actual["router.prototypes"].abs().max() > 0
    assert_same(actual, training_step(layer, x, forward=plain), rtol=1e-11, atol=1e-11)


def test_a_router_with_the_wrong_shape_is_named():
    """A linear router raises at construction, another module in the forward."""
    with pytest.raises(ValueError, match=r"router: expected a weight \[4, 12\], got \[3, 12\]"):
        make_layer(router=nn.Linear(IN, 3))
    layer = make_layer(router=Prototype(3), router_bias=False)
    with pytest.raises(ValueError, match=r"router: expected logits \[5, 4\], got \[5, 3\]"):
        layer(torch.randn(5, IN, dtype=torch.float64))


def test_a_router_with_a_hook_is_called():
    """A router with a hook is called, so the hook can read and change the logits."""
    layer = make_layer()
    shapes = []
    layer.router.register_forward_hook(lambda m, args, out: shapes.append(out.shape))
    layer(torch.randn(2, 3, IN, dtype=torch.float64))
    assert shapes == [(6, 4)]


@pytest.mark.parametrize("shape", ((1, 5), (2, 5), (2, 3, 5)), ids=str)
def test_a_sequence_gate_reads_the_mean_of_its_sequence(shape):
    """The first dimension of x is the batch."""
    layer = make_layer(granularity="sequence")
    x = torch.randn(*shape, IN, dtype=torch.float64)
    batch = x.flatten(1, -2)
    means = batch.mean(dim=1)
    with record_routing(layer):
        y = layer(x)
        logits = layer.record.logits
    torch.testing.assert_close(logits, layer.router(means), rtol=1e-12, atol=1e-12)
    external = make_layer(router="external")
    external.load_state_dict({k: v for k, v in layer.state_dict().items() if "router" not in k})
    values, experts = logits.detach().topk(2)
    gates = torch.zeros_like(logits).scatter(1, experts, values.softmax(dim=1))
    torch.testing.assert_close(
        y.view(*batch.shape[:2], OUT), external(batch, gates), rtol=1e-12, atol=1e-12
    )


def test_an_mlp_router_trains():
    layer = make_layer(router="mlp", router_hidden=5)
    assert isinstance(layer.router, MlpRouter)
    assert layer.router.fc1.weight.shape == (5, IN)
    actual = training_step(layer, torch.randn(4, IN, dtype=torch.float64))
    for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
        assert actual[f"router.{name}"].abs().max() > 0, name


def test_noise_is_for_training_only():
    """Training forwards differ. Evaluation gives the output of a layer without noise."""
    layer = make_layer(noise=1.0)
    x = torch.randn(4, IN, dtype=torch.float64)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    noiseless = make_layer()
    assert torch.equal(layer(x), layer(x))
    torch.testing.assert_close(layer(x), noiseless.eval()(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shared_expert", ("always", "complement"))
@pytest.mark.parametrize("top_k", (None, 2))
def test_every_token_uses_the_shared_expert(shared_expert, top_k):
    """Its gate is 1, or 1 - max(gate) like in MoCLE, outside the softmax of the others."""
    layer = make_layer(
        shared_expert=shared_expert, shared_rank=2, top_k=top_k, normalize="none", alpha=4.0
    )
    assert layer.lora_A.shape == (4 * 3 + 2, IN)
    assert layer.config.scales()[-1] == 2.0
    x = torch.randn(5, IN, dtype=torch.float64)

    def plain(leaf):
        p = layer.router(leaf).softmax(dim=1)
        p = torch.zeros_like(p).scatter(1, p.topk(top_k or 4).indices, 1.0) * p
        shared = torch.ones(5, 1).double()
        if shared_expert == "complement":
            shared = 1 - p.max(dim=1, keepdim=True).values
        gate = torch.cat([p * 4.0 / 3.0, shared * 4.0 / 2.0], dim=1)
        gate = gate.repeat_interleave(torch.tensor([3, 3, 3, 3, 2]), dim=1)
        return layer.base_layer(leaf) + (gate * (leaf @ layer.lora_A.t())) @ layer.lora_B.t()

    assert_same(
        training_step(layer, x), training_step(layer, x, forward=plain), rtol=1e-11, atol=1e-11
    )


def test_record_routing_records_only_inside_the_context():
    """The record has the experts and weights of each token. After the context it is empty."""
    layer = make_layer()
    x = torch.randn(2, 3, IN, dtype=torch.float64)
    layer(x)
    assert layer.record.logits is None
    with record_routing(nn.Sequential(layer)):
        layer(x)
        record = layer.record
        values, experts = layer.router(x.reshape(6, IN)).topk(2)
        assert torch.equal(record.indices.long(), experts)
        torch.testing.assert_close(record.weights, values.softmax(1), rtol=1e-12, atol=1e-12)
        assert not record.weights.requires_grad
    assert (layer.record.weights, layer.record.logits, layer.record.is_on) == (
        None,
        None,
        False,
    )
