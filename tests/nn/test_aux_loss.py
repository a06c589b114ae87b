"""collect_aux_loss returns the published losses: for every granularity, mask and checkpointing."""

import numpy as np
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
    """Both losses with their weights, with and without a mask of the padding."""
    layer = make_layer(top_k=top_k, aux={"load_balance": 0.3, "z": 0.7})
    x = torch.randn(3, 7, IN, dtype=torch.float64)
    mask = torch.rand(3, 7) > 0.4 if masked else None
    layer(x)
    actual = collect_aux_loss(layer, mask)
    logits = layer.router(x).view(21, EXPERTS).detach()
    expected = 0.3 * switch_loss(logits, top_k, mask) + 0.7 * z_loss(logits, mask)
    torch.testing.assert_close(actual, expected, **TIGHT)
    assert actual.dim() == 0


@pytest.mark.parametrize("weight", (1.0, 0.01))
@pytest.mark.parametrize("top_k", (1, 2))
def test_balanced_routing_is_exactly_the_weight(top_k, weight):
    """The minimum does not depend on K or E. A loss divided by T instead would have minimum K."""
    layer = make_layer(torch.float32, router_bias=False, top_k=top_k, aux={"load_balance": weight})
    with torch.no_grad():
        layer.router.weight.zero_()
        layer.router.weight[:, :EXPERTS] = torch.eye(EXPERTS)
    x = torch.zeros(EXPERTS, IN)
    for t in range(EXPERTS):
        x[t, t], x[t, (t + 1) % EXPERTS] = 2.0, 1.0
    layer(x)
    # All sizes are powers of two, so only the softmax rounds.
    torch.testing.assert_close(collect_aux_loss(layer), torch.tensor(weight), rtol=3e-7, atol=0)


def test_collapsed_routing_costs_the_most():
    """All tokens use one expert with probability 1: f = P = 1 for it, and the loss is E."""
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
def test_gradients_match_the_formula(name):
    """Gradients of the router and of x, of a loss on y plus the auxiliary loss."""
    layer = make_layer(aux={"load_balance": 0.5, "z": 0.1}, **AXES[name])
    x = torch.randn(9, IN, dtype=torch.float64, requires_grad=True)
    params = [x, *layer.router.parameters()]
    y = layer(x)
    total = y.square().sum() + collect_aux_loss(layer)
    actual = torch.autograd.grad(total, params)
    y_grads = torch.autograd.grad(layer(x).square().sum(), params)
    logits = layer.router(x)
    aux_grads = torch.autograd.grad(0.5 * switch_loss(logits, 2) + 0.1 * z_loss(logits), params)
    for g, a, b in zip(actual, y_grads, aux_grads, strict=True):
        torch.testing.assert_close(g, a + b, **TIGHT)
        assert b.abs().max() > 1e-4


def test_the_loss_alone_trains_the_router():
    """The adapters get no gradient from the auxiliary loss."""
    layer = make_layer(aux="z")
    layer(torch.randn(4, IN, dtype=torch.float64))
    collect_aux_loss(layer).backward()
    assert layer.router.weight.grad.abs().max() > 0
    for q in (layer.lora_A, layer.lora_B):
        assert q.grad is None or not q.grad.any()


def test_top_k_one_renormalised_still_balances():
    """The gate weight is the constant 1, so only the auxiliary loss trains the router."""
    layer = make_layer(top_k=1, aux={"load_balance": 1.0})
    x = torch.randn(6, IN, dtype=torch.float64)
    layer(x)
    (actual,) = torch.autograd.grad(collect_aux_loss(layer), layer.router.weight)
    (expected,) = torch.autograd.grad(switch_loss(layer.router(x), 1), layer.router.weight)
    torch.testing.assert_close(actual, expected, **TIGHT)


@pytest.mark.parametrize("select", (dict(top_k=2), dict(select="topp", top_p=0.5, top_k=None)))
def test_sequence_gates_balance_sequences(select):
    """With one gate per sequence, the losses and the mask count sequences."""
    options = dict(granularity="sequence", aux={"load_balance": 1.0, "z": 1.0})
    layer = make_layer(**options, **select)
    x = torch.randn(5, 3, IN, dtype=torch.float64)
    layer(x)
    logits = layer.router(x.mean(1))
    actual = collect_aux_loss(layer)
    if select.get("top_k"):
        torch.testing.assert_close(actual, switch_loss(logits, 2) + z_loss(logits), **TIGHT)
    mask = torch.tensor([True, False, True, True, False])
    layer(x)
    masked = collect_aux_loss(layer, mask)
    layer(x[mask])
    torch.testing.assert_close(masked, collect_aux_loss(layer), **TIGHT)


@pytest.mark.parametrize("shape", ((5, 3), (5, 2, 3)), ids=str)
@pytest.mark.parametrize("router", ("linear", "task"))
def test_a_sequence_counts_if_one_of_its_tokens_counts(router, shape):
    """The trainer passes one mask [batch, sequence] to layers of every granularity."""
    options = dict(router="task", num_tasks=5) if router == "task" else dict(granularity="sequence")
    layer = make_layer(aux={"load_balance": 1.0, "z": 1.0}, **options)
    if router == "task":
        set_tasks(layer, [1, 2, 3, 4, 5])
    x = torch.randn(*shape, IN, dtype=torch.float64)
    mask = torch.ones(shape, dtype=torch.bool)
    mask[1], mask[2, :-1], mask[4] = False, False, False
    layer(x)
    actual = collect_aux_loss(layer, mask.long())
    layer(x)
    by_sequence = torch.tensor([True, False, True, True, False])
    torch.testing.assert_close(actual, collect_aux_loss(layer, by_sequence), **TIGHT)
    layer(x)
    with pytest.raises(ValueError, match=r"mask: expected one entry for each of 5 gate rows, or"):
        collect_aux_loss(layer, mask[:4])


@pytest.mark.parametrize("tokens", (0, 2))
def test_one_task_for_all_sequences_counts_if_one_token_counts(tokens):
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
    """The sum over all layers; some are siblings of a group, one has no loss."""
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
    actual = collect_aux_loss(model)
    expected = sum(
        0.2 * switch_loss(logits, 2) + 0.1 * z_loss(logits)
        for logits in (layer.router(x).detach() for layer in (*siblings.values(), model["one"]))
    )
    torch.testing.assert_close(actual, expected, **TIGHT)


def test_without_auxiliary_losses_the_sum_is_zero():
    """A training loop can add it for every preset."""
    layer = make_layer()
    assert collect_aux_loss(layer).item() == 0.0
    layer(torch.randn(3, IN, dtype=torch.float64))
    assert collect_aux_loss(layer).item() == 0.0


@pytest.mark.parametrize("model", (nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2)), nn.ReLU()))
def test_a_model_without_layers_is_named(model):
    """The call of replace_linears was forgotten."""
    with pytest.raises(ValueError, match=r"^model: expected .* mixture layers, got none; call"):
        collect_aux_loss(model)


def test_the_loss_without_counted_tokens_is_zero():
    """The loss is zero without tokens, and if all tokens are padding."""
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
    """The recomputed forward does not change the loss or its gradient."""
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
    """The first forward has no graph, so the loss would have no gradient."""
    layer = make_layer(aux="z")
    x = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    y = checkpoint(layer, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        collect_aux_loss(layer)
    assert y.requires_grad


def test_evaluation_without_a_graph():
    """Under no_grad the loss has its value, for logging."""
    layer = make_layer(aux="z").eval()
    x = torch.randn(3, IN, dtype=torch.float64)
    with torch.no_grad():
        layer(x)
        torch.testing.assert_close(
            collect_aux_loss(layer), 0.001 * z_loss(layer.router(x)), **TIGHT
        )


def test_without_a_forward_it_raises():
    """A loss can be collected once per forward."""
    layer = make_layer(aux="z")
    with pytest.raises(RuntimeError, match="run a forward first"):
        collect_aux_loss(layer)
    layer(torch.randn(3, IN, dtype=torch.float64))
    collect_aux_loss(layer)
    with pytest.raises(RuntimeError, match="run a forward first"):
        collect_aux_loss(layer)


def test_the_loss_of_a_frozen_router():
    """With a frozen router the loss has a value, and no parameter gets a gradient from it."""
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


@pytest.mark.parametrize("mask", ([[1, 1, 0]], np.ones((1, 3)), "1"), ids=type)
def test_a_mask_that_is_not_a_tensor_is_named(mask):
    layer = make_layer(aux="z")
    layer(torch.randn(1, 3, IN, dtype=torch.float64))
    with pytest.raises(TypeError, match=r"^mask: expected a tensor \[batch, sequence\].* got <"):
        collect_aux_loss(layer, mask)
    collect_aux_loss(layer, torch.tensor([[1, 1, 0]]))


def test_the_loss_is_float32_under_autocast():
    """A trainer runs its step under autocast. The sums of the loss must stay in float32."""
    layer = make_layer(torch.float32, aux={"load_balance": 1.0, "z": 1.0})
    x = torch.randn(64, IN).bfloat16().float()
    layer(x)
    expected = collect_aux_loss(layer)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
        actual = collect_aux_loss(layer)
    assert actual.dtype == torch.float32
    # The same float32 sums of the same bfloat16 values, in another order.
    torch.testing.assert_close(actual, expected, rtol=2e-6, atol=0)


def test_aux_loss_under_compile():
    """A compiled layer has no graph break and the loss of the eager layer."""
    layer = make_layer(aux={"load_balance": 1.0})
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(5, IN, dtype=torch.float64)
    compiled(x)
    actual = collect_aux_loss(layer)
    layer(x)
    expected = collect_aux_loss(layer)
    torch.testing.assert_close(actual, expected, **TIGHT)
    (a,) = torch.autograd.grad(actual, layer.router.weight)
    (b,) = torch.autograd.grad(expected, layer.router.weight)
    torch.testing.assert_close(a, b, **TIGHT)


def test_record_keeps_only_the_last_forward():
    layer = make_layer()
    with record_routing(layer):
        for tokens in (3, 5):
            layer(torch.randn(tokens, IN, dtype=torch.float64))
        assert layer.record.weights.shape == (5, 2)
