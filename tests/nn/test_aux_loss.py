"""collect_aux_loss: the published formulas, on every granularity, with and without recompute."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from moelora_kernels import (
    MoeLoraGroup,
    collect_aux_loss,
    record_routing,
    set_tasks,
)
from support.compare import assert_same, backward_step
from support.formulas.aux_loss import switch_loss, z_loss
from support.linears import IN, MING, OUT, make_layer

EXPERTS = MING["num_experts"]
# float64 sums of a few dozen terms, in another order.
TIGHT = dict(rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("top_k", (1, 2, 4))
@pytest.mark.parametrize("masked", (False, True))
def test_values(top_k, masked):
    """Both losses with their weights, padding left out where a mask says so."""
    layer = make_layer(top_k=top_k, aux={"load_balance": 0.3, "z": 0.7})
    x = torch.randn(3, 7, IN, dtype=torch.float64)
    mask = torch.rand(3, 7) > 0.4 if masked else None
    layer(x)
    found = collect_aux_loss(layer, mask)
    logits = layer.router(x).view(21, EXPERTS).detach()
    expected = 0.3 * switch_loss(logits, top_k, mask) + 0.7 * z_loss(logits, mask)
    torch.testing.assert_close(found, expected, **TIGHT)
    assert found.dim() == 0


@pytest.mark.parametrize("weight", (1.0, 0.01))
@pytest.mark.parametrize("top_k", (1, 2))
def test_balanced_routing_is_exactly_the_weight(top_k, weight):
    """The minimum does not depend on K or E: a loss normalised over T instead would give K."""
    layer = make_layer(torch.float32, router_bias=False, top_k=top_k, aux={"load_balance": weight})
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[:, :EXPERTS] = torch.eye(EXPERTS)
    x = torch.zeros(EXPERTS, IN)
    for t in range(EXPERTS):
        x[t, t], x[t, (t + 1) % EXPERTS] = 2.0, 1.0
    layer(x)
    # Power-of-two sizes: nothing but the softmax rounds.
    torch.testing.assert_close(collect_aux_loss(layer), torch.tensor(weight), rtol=3e-7, atol=0)


def test_collapsed_routing_costs_the_most():
    """All tokens on one expert with certainty: f and P are 1 there, the loss is E."""
    layer = make_layer(top_k=1, aux={"load_balance": 1.0})
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.bias.copy_(torch.tensor([0.0, 100.0, 0.0, 0.0]))
    layer(torch.randn(5, IN, dtype=torch.float64))
    torch.testing.assert_close(collect_aux_loss(layer).item(), float(EXPERTS), rtol=1e-12, atol=0)


AXES = {
    "fused": dict(router_bias=False),
    "bias": {},
    "mlp": dict(router="mlp"),
    "unnormalized": dict(normalize="none"),
    "shared expert": dict(shared_expert="always"),
    "shared A": dict(share="A"),
    "sigmoid": dict(score="sigmoid"),
    "reference": dict(impl="reference"),
    "grouped": dict(impl="grouped"),
    "grouped, mlp, shared expert": dict(impl="grouped", router="mlp", shared_expert="always"),
}


@pytest.mark.parametrize("name", AXES)
def test_the_gradient_is_that_of_the_formula(name):
    """Through the fused router (dlogits) and beside it: router and x, y's own loss included."""
    layer = make_layer(aux={"load_balance": 0.5, "z": 0.1}, **AXES[name])
    x = torch.randn(9, IN, dtype=torch.float64, requires_grad=True)
    params = [x, *layer.router.parameters()]
    y = layer(x)
    total = y.square().sum() + collect_aux_loss(layer)
    found = torch.autograd.grad(total, params)
    of_y = torch.autograd.grad(layer(x).square().sum(), params)
    logits = layer.router(x)
    of_aux = torch.autograd.grad(0.5 * switch_loss(logits, 2) + 0.1 * z_loss(logits), params)
    for g, a, b in zip(found, of_y, of_aux, strict=True):
        torch.testing.assert_close(g, a + b, **TIGHT)
        assert b.abs().max() > 1e-4


def test_the_loss_alone_trains_the_router():
    """Only the auxiliary loss is backpropagated: y and the adapters get no gradient from it."""
    layer = make_layer(aux="z")
    layer(torch.randn(4, IN, dtype=torch.float64))
    collect_aux_loss(layer).backward()
    assert layer.router.weight.grad.abs().max() > 0
    for q in (layer.lora_A, layer.lora_B):
        assert q.grad is None or not q.grad.any()


def test_top_k_one_renormalised_still_balances():
    """Its weight is the constant 1, so the balance is the only thing that trains the router."""
    layer = make_layer(top_k=1, aux={"load_balance": 1.0})
    x = torch.randn(6, IN, dtype=torch.float64)
    layer(x)
    (found,) = torch.autograd.grad(collect_aux_loss(layer), layer.router.weight)
    (expected,) = torch.autograd.grad(switch_loss(layer.router(x), 1), layer.router.weight)
    torch.testing.assert_close(found, expected, **TIGHT)


@pytest.mark.parametrize("select", (dict(top_k=2), dict(select="topp", top_p=0.5, top_k=None)))
def test_sequence_gates_balance_sequences(select):
    """One gate per sequence: the losses count sequences, and so does the mask."""
    options = dict(granularity="sequence", aux={"load_balance": 1.0, "z": 1.0})
    layer = make_layer(**options, **select)
    x = torch.randn(5, 3, IN, dtype=torch.float64)
    layer(x)
    logits = layer.router(x.mean(1))
    found = collect_aux_loss(layer)
    if select.get("top_k"):
        torch.testing.assert_close(found, switch_loss(logits, 2) + z_loss(logits), **TIGHT)
    mask = torch.tensor([True, False, True, True, False])
    layer(x)
    masked = collect_aux_loss(layer, mask)
    layer(x[mask])
    torch.testing.assert_close(masked, collect_aux_loss(layer), **TIGHT)


@pytest.mark.parametrize("shape", ((5, 3), (5, 2, 3)), ids=str)
@pytest.mark.parametrize("router", ("linear", "task"))
def test_a_sequence_counts_if_any_of_its_tokens_does(router, shape):
    """The trainer has one mask [batch, sequence] for layers of every granularity."""
    options = dict(router="task", num_tasks=5) if router == "task" else dict(granularity="sequence")
    layer = make_layer(aux={"load_balance": 1.0, "z": 1.0}, **options)
    if router == "task":
        set_tasks(layer, [1, 2, 3, 4, 5])
    x = torch.randn(*shape, IN, dtype=torch.float64)
    mask = torch.ones(shape, dtype=torch.bool)
    mask[1], mask[2, :-1], mask[4] = False, False, False
    layer(x)
    found = collect_aux_loss(layer, mask.long())
    layer(x)
    by_sequence = torch.tensor([True, False, True, True, False])
    torch.testing.assert_close(found, collect_aux_loss(layer, by_sequence), **TIGHT)
    layer(x)
    with pytest.raises(ValueError, match=r"mask: expected one entry for each of 5 gate rows, or"):
        collect_aux_loss(layer, mask[:4])


@pytest.mark.parametrize("tokens", (0, 2))
def test_one_task_for_all_sequences_counts_with_any_token(tokens):
    layer = make_layer(router="task", num_tasks=3, aux={"z": 1.0})
    set_tasks(layer, [2])
    layer(torch.randn(4, 3, IN, dtype=torch.float64))
    expected = z_loss(layer.router()) if tokens else torch.zeros((), dtype=torch.float64)
    mask = torch.zeros(4, 3, dtype=torch.bool)
    mask[0, :tokens] = True
    torch.testing.assert_close(collect_aux_loss(layer, mask), expected, **TIGHT)


def test_one_sequence_has_one_row_of_logits():
    layer = make_layer(granularity="sequence", aux={"load_balance": 1.0})
    x = torch.randn(1, 7, IN, dtype=torch.float64)
    layer(x)
    expected = switch_loss(layer.router(x.mean(dim=1)), 2)
    torch.testing.assert_close(collect_aux_loss(layer), expected, **TIGHT)
    layer(x)
    torch.testing.assert_close(
        collect_aux_loss(layer, torch.tensor([False] * 6 + [True])), expected, **TIGHT
    )


def test_task_gates_have_losses_too():
    layer = make_layer(router="task", num_tasks=3, aux={"load_balance": 1.0, "z": 1.0})
    set_tasks(layer, [1, 3])
    layer(torch.randn(2, 4, IN, dtype=torch.float64))
    logits = layer.router()
    expected = switch_loss(logits, 2) + z_loss(logits)
    torch.testing.assert_close(collect_aux_loss(layer), expected, **TIGHT)


def test_layers_and_groups_add_up():
    """The sum over all layers, siblings of a group and layers without a loss among them."""
    config = dict(aux={"load_balance": 0.2, "z": 0.1})
    siblings = {n: make_layer(seed=i, **config) for i, n in enumerate(("q", "k"))}
    model = nn.ModuleDict(
        {
            "group": MoeLoraGroup(**siblings),
            "one": make_layer(seed=3, **config),
            "none": make_layer(),
        }
    )
    x = torch.randn(8, IN, dtype=torch.float64)
    for module in model.values():
        module(x)
    found = collect_aux_loss(model)
    expected = sum(
        0.2 * switch_loss(logits, 2) + 0.1 * z_loss(logits)
        for logits in (layer.router(x).detach() for layer in (*siblings.values(), model["one"]))
    )
    torch.testing.assert_close(found, expected, **TIGHT)


def test_no_aux_no_loss():
    """A training loop can add it always: zero, and nothing to backpropagate into."""
    layer = make_layer()
    layer(torch.randn(3, IN, dtype=torch.float64))
    assert collect_aux_loss(layer).item() == 0.0
    assert collect_aux_loss(nn.Linear(2, 2)).item() == 0.0
    assert collect_aux_loss(nn.ReLU()).item() == 0.0


def test_nothing_routed_is_no_nan():
    """No tokens, or all of them padding: zero, so that one empty rank does not stop a run."""
    layer = make_layer(aux={"load_balance": 1.0, "z": 1.0})
    layer(torch.randn(0, IN, dtype=torch.float64))
    assert collect_aux_loss(layer).item() == 0.0
    layer(torch.randn(3, IN, dtype=torch.float64))
    loss = collect_aux_loss(layer, torch.zeros(3, dtype=torch.bool))
    assert loss.item() == 0.0
    loss.backward()
    assert not layer.router.weight.grad.any()


@pytest.mark.parametrize("checkpointed", (False, True))
def test_nonreentrant_checkpointing_counts_once(checkpointed):
    """The recomputed forward neither adds to the loss nor takes its gradient away."""
    model = nn.Sequential(
        make_layer(aux={"load_balance": 0.5, "z": 0.5}, dropout=0.3),
        nn.Linear(OUT, IN, dtype=torch.float64),
        make_layer(seed=1, aux={"load_balance": 0.5, "z": 0.5}, dropout=0.3),
    )

    def loss(x, recompute):
        for module in model:
            x = checkpoint(module, x, use_reentrant=False) if recompute else module(x)
        return x.square().sum() + collect_aux_loss(model)

    def step(recompute):
        x = torch.linspace(-1, 1, 8 * IN, dtype=torch.float64).view(8, IN)
        dy = torch.ones((), dtype=torch.float64)
        return backward_step(model, x, dy, forward=lambda leaf: loss(leaf, recompute))

    expected = step(False)
    assert_same(step(checkpointed), expected)
    # The recompute in backward is not a forward whose loss can be collected.
    with pytest.raises(RuntimeError, match="run a forward first"):
        collect_aux_loss(model)
    # A second step after the recompute of the first one gives the same.
    assert_same(step(checkpointed), expected)


def test_reentrant_checkpointing_raises():
    """Its first forward has no graph: the loss would be a constant that trains nothing."""
    layer = make_layer(aux="z")
    x = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    y = checkpoint(layer, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        collect_aux_loss(layer)
    assert y.requires_grad


def test_evaluation_without_a_graph():
    """Under no_grad the value can be logged."""
    layer = make_layer(aux="z").eval()
    x = torch.randn(3, IN, dtype=torch.float64)
    with torch.no_grad():
        layer(x)
        torch.testing.assert_close(
            collect_aux_loss(layer), 0.001 * z_loss(layer.router(x)), **TIGHT
        )


def test_without_a_forward_it_raises():
    """Nothing to make a loss of, and a loss already collected is not collected again."""
    layer = make_layer(aux="z")
    with pytest.raises(RuntimeError, match="run a forward first"):
        collect_aux_loss(layer)
    layer(torch.randn(3, IN, dtype=torch.float64))
    collect_aux_loss(layer)
    with pytest.raises(RuntimeError, match="run a forward first"):
        collect_aux_loss(layer)


def test_a_frozen_router_does_not_raise():
    """Adapters train over a frozen router: the loss is a number that moves nothing."""
    layer = make_layer(aux="z")
    layer.router.requires_grad_(False)
    y = layer(torch.randn(3, IN, dtype=torch.float64))
    loss = collect_aux_loss(layer)
    assert loss > 0
    (y.sum() * 0.0 + loss).backward()
    assert not layer.lora_A.grad.any()
    assert not layer.lora_B.grad.any()
    assert layer.router.weight.grad is None


@pytest.mark.parametrize("entries", (20, 22))
def test_a_mask_of_another_size_is_named(entries):
    layer = make_layer(aux="z")
    layer(torch.randn(3, 7, IN, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"mask: expected one entry for each of 21 tokens"):
        collect_aux_loss(layer, torch.ones(entries, dtype=torch.bool))


def test_the_loss_is_float32_under_autocast():
    """The trainer's whole step runs under autocast: the sums must not be taken in bfloat16."""
    layer = make_layer(torch.float32, aux={"load_balance": 1.0, "z": 1.0})
    x = torch.randn(64, IN).bfloat16().float()
    layer(x)
    expected = collect_aux_loss(layer)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
        found = collect_aux_loss(layer)
    assert found.dtype == torch.float32
    # The same float32 arithmetic on the same bfloat16 values, the logits in another order.
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=0)


def test_aux_loss_under_compile():
    """Recording the routing neither breaks the graph nor loses the loss."""
    layer = make_layer(aux={"load_balance": 1.0})
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, IN, dtype=torch.float64)
    compiled(x)
    found = collect_aux_loss(layer)
    layer(x)
    expected = collect_aux_loss(layer)
    torch.testing.assert_close(found, expected, **TIGHT)
    (a,) = torch.autograd.grad(found, layer.router.weight)
    (b,) = torch.autograd.grad(expected, layer.router.weight)
    torch.testing.assert_close(a, b, **TIGHT)


def test_record_keeps_only_the_last_forward():
    layer = make_layer()
    with record_routing(layer):
        for tokens in (3, 5):
            layer(torch.randn(tokens, IN, dtype=torch.float64))
        assert layer.record.weights.shape == (5, 2)
