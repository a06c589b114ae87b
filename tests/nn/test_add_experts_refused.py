"""add_experts: the layers and numbers that it refuses. Nothing changes before the error."""

from __future__ import annotations

import pytest
from torch import nn

from moelora_kernels import MoeLoraFFN, add_experts, count_routing, merge_adapter
from support.linears import IN, make_layer

REFUSED = {
    "init": dict(init="svd_segments", rank=1),
    "freeze='AB'": dict(freeze="AB"),
    "module that you passed": dict(router=nn.Linear(IN, 4).double()),
    "rank: ": dict(rank=(1, 2, 3, 4)),
    "scaling: ": dict(scaling=(1.0, 2.0, 3.0, 4.0)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_layers_that_cannot_get_experts_are_named_and_nothing_changes(message):
    model = nn.Sequential(make_layer(), make_layer(**REFUSED[message]))
    before = [*model.parameters()]
    with pytest.raises(ValueError, match=rf"^model: 1: .*{message}"):
        add_experts(model, 1)
    assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
    assert model[0].config.num_experts == 4


@pytest.mark.parametrize("n", (0, -1, True, 1.0, "2", None))
def test_bad_numbers(n):
    layer = make_layer()
    with pytest.raises(ValueError, match=r"^n: "):
        add_experts(layer, n)
    with pytest.raises(ValueError, match=r"^rank: " if n is not None else r"^n: "):
        add_experts(layer, 1 if n is not None else 0, rank=n)


def test_other_models_that_are_refused():
    with pytest.raises(ValueError, match=r"model: .*got none"):
        add_experts(nn.Linear(2, 2), 1)
    merged = make_layer(router=None)
    merge_adapter(merged)
    with pytest.raises(ValueError, match="merged"):
        add_experts(merged, 1)
    parametrized = make_layer()
    nn.utils.parametrizations.weight_norm(parametrized, "lora_A")
    with pytest.raises(ValueError, match="lora_A is computed"):
        add_experts(parametrized, 1)
    pruned = make_layer()
    nn.utils.parametrizations.weight_norm(pruned.router, "weight")
    with pytest.raises(ValueError, match="router"):
        add_experts(pruned, 1)
    layer = make_layer()
    with count_routing(layer), pytest.raises(ValueError, match="count_routing"):
        add_experts(layer, 1)
    wrapped = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapped)
    wrapped.module = make_layer()
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        add_experts(wrapped, 1)
    with pytest.raises(ValueError, match="router: None"):
        add_experts(MoeLoraFFN(6, 10, num_experts=1, rank=2, router=None), 1)
