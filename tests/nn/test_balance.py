"""Loss-free balancing of experts and of single ranks."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moelora_kernels import (
    MoeLoraConfig,
    MoeLoraFFN,
    MoeLoraLinear,
    record_routing,
    update_balance,
)
from moelora_kernels.nn import (
    BalancedRouter,
)
from support.backends import TRITON
from support.cases import Case
from support.formulas.family import (
    IN,
    OUT,
    TIGHT,
    balanced_layer,
)
from support.op_checks import check


def selected(layer, x):
    with record_routing(layer), torch.no_grad():
        layer(x)
        return layer.record.weights != 0


def test_the_bias_follows_the_load_of_all_forwards():
    """bias += rate * sign(mean load - load), over all forwards since the last update."""
    layer = balanced_layer()
    torch.manual_seed(0)
    x = torch.randn(2, 7, IN, dtype=torch.float64)
    loads = [selected(layer.eval(), part).sum(dim=0).double() for part in x]
    load = sum(loads)
    # The loads of a single forward would give another update.
    assert all(not torch.equal((n.mean() - n).sign(), (load.mean() - load).sign()) for n in loads)
    assert layer.router.balance.load is None
    layer.train()
    for part in x:
        layer(part)
    update_balance(layer)
    expected = 0.05 * (load.mean() - load).sign()
    torch.testing.assert_close(layer.router.balance.bias.double(), expected, rtol=1e-6, atol=0)
    assert expected.unique().numel() > 1
    with pytest.raises(RuntimeError, match="run a training forward first"):
        update_balance(layer)


def test_the_bias_changes_the_selection_but_not_the_weights():
    layer = balanced_layer().eval()
    x = torch.randn(5, IN, dtype=torch.float64)
    layer.router.balance.bias[:] = torch.tensor([9.0, 0, 0, 9.0, 0, 0])
    with record_routing(layer):
        layer(x)
        weights = layer.record.weights
    p = (x @ layer.router.gate.weight.t()).softmax(dim=1)[:, [0, 3]]
    torch.testing.assert_close(weights[:, [0, 3]], p / p.sum(dim=1, keepdim=True), **TIGHT)
    assert (weights != 0).sum() == 10


@pytest.mark.parametrize("score", ("softmax", "sigmoid", "identity", "abs"))
def test_the_bias_is_added_before_the_score(score):
    """FlyLoRA selects by |logit + bias|. A bias after the magnitude would select others."""
    layer = balanced_layer(score=score, normalize="one").eval()
    with torch.no_grad():
        layer.router.balance.bias.normal_()
    x = torch.randn(40, IN, dtype=torch.float64)
    biased = x @ layer.router.gate.weight.t() + layer.router.balance.bias
    biased = biased.abs() if score == "abs" else biased
    kept = torch.zeros(40, 6, dtype=torch.bool).scatter(1, biased.topk(2, dim=1).indices, True)
    assert torch.equal(selected(layer, x), kept)


def test_a_repeated_forward_counts_once():
    """Activation checkpointing runs the forward a second time."""
    layer = balanced_layer()
    x = torch.randn(7, IN, dtype=torch.float64, requires_grad=True)
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert layer.router.balance.load.sum() == 7 * 2


def test_balancing_balances():
    """A router prefers two experts for all tokens; after 500 updates every expert is used."""
    layer = balanced_layer(balance_rate=0.02)
    with torch.no_grad():
        layer.router.gate.weight.mul_(0.3)
        layer.router.gate.weight[:2] += 1.0
    x = torch.randn(64, IN, dtype=torch.float64) + 0.5
    before = selected(layer, x).sum(dim=0)
    for _ in range(500):
        with torch.no_grad():
            layer(x)
        update_balance(layer)
    after = selected(layer, x).sum(dim=0)
    assert before.min() == 0
    # 64 tokens x 2 slots over 6 experts: 21 on average.
    assert after.min() > 10


def test_whole_ffn_experts_balance_too():
    ffn = MoeLoraFFN(IN, 16, num_experts=4, rank=2, top_k=2, balance_rate=0.1)
    ffn(torch.randn(5, IN))
    assert ffn.router.balance.load.sum() == 10
    update_balance(ffn)
    assert ffn.router.balance.bias.any()


def test_a_model_without_balance_rate_raises():
    with pytest.raises(ValueError, match=r"^model: no layer has a balance_rate"):
        update_balance(MoeLoraLinear(IN, OUT))
    assert isinstance(balanced_layer().router, BalancedRouter)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
def test_gates_of_single_ranks_on_kernels(dtype):
    """64 experts of rank 1 with a dense gate; in Triton's interpreter if there is no GPU."""
    pytest.importorskip("triton")
    case = Case(T=31, ranks=(1,) * 64, gate="dense")
    for op in ("shrink_gate", "shrink_gate_backward"):
        check(op, TRITON.implementation(op), TRITON.inputs(case, dtype))


def test_sparse_random_a():
    """K/E entries of each row of A have standard deviation 1/R; the others and B are zero."""
    torch.manual_seed(0)
    layer = MoeLoraLinear(1000, 8, config=MoeLoraConfig.preset("flylora"))
    kept = layer.lora_A != 0
    assert torch.equal(kept.sum(dim=1), torch.full((32,), 250))
    assert layer.lora_A[kept].std().item() == pytest.approx(1 / 32, rel=0.03)
    assert not torch.equal(kept[0], kept[1])
    assert not layer.lora_B.any()
