"""check_trainable: it expects that frozen experts get no gradient."""

from __future__ import annotations

import torch
from torch import nn

from moelora_kernels import check_trainable, freeze_experts, set_tasks
from support.linears import IN, make_layer


class Stack(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.first, self.second = make_layer(**options), nn.Linear(10, 4).double()

    def forward(self, x):
        return self.second(self.first(x))


def test_check_trainable_expects_frozen_experts():
    x = torch.randn(8, IN, dtype=torch.float64)
    model = Stack()
    freeze_experts(model, [0, 1])
    assert check_trainable(model, x).ok
    freeze_experts(model, range(4))
    report = check_trainable(model, x)
    assert report.ok, report
    assert "all experts of the layer are frozen" in str(report)


def test_check_trainable_with_a_new_expert_beside_frozen_ones():
    """B of the only expert that trains is zero, so A has no gradient in the first step."""
    model = Stack()
    with torch.no_grad():
        model.first.lora_B[:, 9:] = 0.0
    freeze_experts(model, [0, 1, 2])
    report = check_trainable(model, torch.randn(40, IN, dtype=torch.float64))
    assert report.ok, report
    assert "B is zero" in report.expected["first.lora_A"]


def test_check_trainable_if_tokens_select_frozen_experts_only():
    model = Stack(router="external")
    gates = torch.tensor([[0.5, 0.5, 0.0, 0.0]], dtype=torch.float64)
    set_tasks(model, gates)
    freeze_experts(model, [0, 1])
    report = check_trainable(model, torch.randn(3, 4, IN, dtype=torch.float64))
    assert report.ok, report
    assert "selected frozen experts only" in str(report)
