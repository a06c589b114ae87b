"""warmup runs every layer like the model does, and changes no state."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moelora_kernels import (
    MoeLoraGroup,
    MoeLoraLinear,
    link_siblings,
    ops,
    record_routing,
    replace_linears,
    set_tasks,
    warmup,
)
from moelora_kernels.config import MoeLoraConfig
from support.linears import IN, make_layer


@pytest.fixture
def runs(monkeypatch):
    """Return two lists: (tokens, siblings) of every forward, and of every backward."""
    forward, backward = [], []
    originals = ops.wide, ops.wide_backward

    def wide(x, tensors, *rest):
        forward.append((x.shape[0], len(tensors.lora_a)))
        return originals[0](x, tensors, *rest)

    def wide_backward(dy, x, *rest):
        backward.append((x.shape[0], len(dy)))
        return originals[1](dy, x, *rest)

    monkeypatch.setattr(ops, "wide", wide)
    monkeypatch.setattr(ops, "wide_backward", wide_backward)
    return forward, backward


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, 8) for _ in range(3))
        self.o_proj = nn.Linear(8, 8)


def test_siblings_run_together_and_every_layer_runs(runs):
    model = nn.ModuleDict(
        {
            "group": MoeLoraGroup(a=make_layer(torch.float32), b=make_layer(torch.float32)),
            "single": make_layer(torch.float32),
            "attention": Attention(),
        }
    )
    config = MoeLoraConfig.preset("ming", rank=2)
    replace_linears(model["attention"], config, r".*_proj")
    link_siblings(model["attention"])
    warmup(model, tokens=(1, 5), batch=2)
    assert sorted(runs[0]) == sorted([(t, n) for t in (2, 10) for n in (2, 1, 3, 1)])
    assert sorted(runs[1]) == sorted(runs[0])


def test_warmup_changes_no_state():
    model = make_layer(torch.float32, dropout=0.5)
    with record_routing(model):
        model(torch.randn(4, IN))
        weights, state = model.record.weights.clone(), torch.get_rng_state()
        warmup(model)
        assert torch.equal(model.record.weights, weights)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters())


def test_task_gates_use_the_current_tasks(runs):
    model = nn.Sequential(nn.Linear(8, 8))
    replace_linears(model, MoeLoraConfig.preset("moelora", rank=8, num_tasks=3), ["0"])
    with pytest.raises(RuntimeError, match="set_tasks"):
        warmup(model)
    set_tasks(model, [1, 3])
    warmup(model, tokens=(4,), batch=2)
    assert runs[0] == [(8, 1)]


@pytest.mark.parametrize(
    ("arguments", "named"),
    (
        (dict(model=nn.Linear(2, 2)), "model"),
        (dict(model=make_layer(torch.float32), tokens=()), "tokens"),
        (dict(model=make_layer(torch.float32), tokens=(0,)), "tokens"),
        (dict(model=make_layer(torch.float32), batch=0), "batch"),
    ),
)
def test_bad_arguments_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        warmup(**arguments)


def test_sequence_first_layers_run_with_the_batch_size(runs):
    """With batch_dim=1, x is [tokens, batch, I] and there is one gate row per sequence."""
    task = MoeLoraLinear(8, 8, num_experts=3, rank=2, router="task", num_tasks=2, batch_dim=1)
    set_tasks(task, [1, 2, 1])
    warmup(task, tokens=(5,), batch=3)
    assert runs[0] == [(15, 1)]
