"""replace_ffns and replace_linears over modules that are wrapped one by one."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointWrapper,
    checkpoint_wrapper,
)

from moelora_kernels import MoeLoraConfig, MoeLoraFFN, MoeLoraLinear, replace_ffns, replace_linears

MIXLORA = MoeLoraConfig.preset("mixlora", num_experts=3, rank=2)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, 16), nn.Linear(8, 16)
        self.down_proj, self.act_fn = nn.Linear(16, 8), nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def make_model(wrap):
    return nn.ModuleDict({"mlp": wrap(Mlp())})


@pytest.mark.parametrize("depth", (1, 2))
def test_an_mlp_is_replaced_inside_its_checkpointing(depth):
    wraps = [checkpoint_wrapper] * depth
    model = make_model(lambda mlp: functools.reduce(lambda m, wrap: wrap(m), wraps, mlp))
    x = torch.randn(3, 8, requires_grad=True)
    expected = model["mlp"](x)
    assert replace_ffns(model, MIXLORA, ["mlp"]) == ["mlp"]
    assert isinstance(model["mlp"], CheckpointWrapper)
    assert sum(isinstance(module, MoeLoraFFN) for module in model.modules()) == 1
    calls = []
    layer = next(module for module in model.modules() if isinstance(module, MoeLoraFFN))
    layer.register_forward_pre_hook(lambda *_: calls.append(1))
    y = model["mlp"](x)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    # Backward repeats the forward.
    assert len(calls) > 1


@pytest.mark.parametrize(
    "wrap", (lambda m: torch.compile(m, backend="eager"), nn.DataParallel), ids=("compile", "dp")
)
def test_an_mlp_in_another_wrapper_is_refused(wrap):
    model = make_model(wrap)
    with pytest.raises(TypeError, match=r"mlp: it is inside a \w+; replace the MLPs first, then"):
        replace_ffns(model, MIXLORA, ["mlp"])
    assert not any(isinstance(module, MoeLoraFFN) for module in model.modules())


def test_a_linear_keeps_its_checkpointing():
    model = nn.Sequential(checkpoint_wrapper(nn.Linear(8, 8)))
    replace_linears(model, MoeLoraConfig(num_experts=2, rank=2), ["0"])
    assert isinstance(model[0], MoeLoraLinear)
    assert isinstance(model[0].base_layer, CheckpointWrapper)
