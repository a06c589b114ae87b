"""check_trainable sees whether the output of each layer reaches the loss."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moelora_kernels import MoeLoraGroup, MoeLoraLinear, check_trainable, link_siblings
from support.linears import randomise, small_config


def siblings() -> nn.ModuleDict:
    torch.manual_seed(0)
    return nn.ModuleDict({name: MoeLoraLinear(8, 8, config=small_config()) for name in "qkv"})


class Linked(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = siblings()
        link_siblings(self.layers, [("q", "k", "v")])

    def forward(self, x):
        q, k, _ = (layer(x) for layer in self.layers.values())
        return q + k


class Grouped(Linked):
    def __init__(self):
        super().__init__()
        self.layers = MoeLoraGroup(**siblings())

    def forward(self, x):
        q, k, _ = self.layers(x)
        return q + k


@pytest.mark.parametrize("kind", (Linked, Grouped))
def test_siblings_are_told_apart(kind) -> None:
    report = check_trainable(kind(), torch.randn(6, 8))
    assert set(report.unreached) == {"layers.v"}
    assert {n.rpartition(".")[0] for n in report.expected} >= {"layers.q", "layers.k"}


@pytest.mark.parametrize("is_linked", (False, True))
@pytest.mark.parametrize("layout", ("tokens", "batch", "sequence first", "slice"))
def test_an_output_that_is_written_in_place_reaches_the_loss(layout, is_linked) -> None:
    """As the attention of Longformer divides its queries."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.unused = siblings().values()
            if is_linked:
                link_siblings(self, [("q", "k", "unused")])

        def forward(self, x):
            x = x.transpose(0, 1) if layout == "sequence first" else x
            q, k, other = self.q(x), self.k(x), self.unused(x)
            q /= 2
            other += 1
            if layout == "slice":
                k[..., :4] = 0
            return q * k

    x = torch.randn(6, 8) if layout == "tokens" else torch.randn(2, 3, 8)
    report = check_trainable(randomise(Model()), x)
    assert set(report.unreached) == {"unused"}, report


class DirectCaller(nn.Module):
    """Calls `forward` itself, so that no hook sees the output of the layer."""

    def __init__(self, is_used: bool):
        super().__init__()
        self.q, self.k = (MoeLoraLinear(8, 8, config=small_config()) for _ in range(2))
        self.is_used = is_used

    def forward(self, x):
        y = self.q.forward(x)
        return self.k(x) + (y if self.is_used else 0)


def test_a_forward_that_is_called_directly() -> None:
    x = torch.randn(6, 8)
    assert check_trainable(DirectCaller(True), x).ok
    assert "never reached the loss" in check_trainable(DirectCaller(False), x).unreached["q"]
