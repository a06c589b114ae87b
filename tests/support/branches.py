"""A model whose forwards call the layers that the caller names."""

from __future__ import annotations

import torch
from torch import nn

from moelora_kernels import MoeLoraConfig, collect_aux_loss, replace_linears
from moelora_kernels.nn.layer import mixture_layers

AUX = dict(num_experts=4, rank=2, top_k=2, aux={"load_balance": 1.0, "z": 0.1})


class Branches(nn.Module):
    """Layers a, b and c. A forward calls the layers whose names are in `path`, in that order."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(6, 6, dtype=torch.float64) for _ in range(3))

    def forward(self, x, path="abc"):
        for name in path:
            x = getattr(self, name)(x)
        return x


def branches(**options):
    torch.manual_seed(0)
    model = Branches()
    replace_linears(model, MoeLoraConfig(**(AUX | options)), ["a", "b", "c"])
    for layer in mixture_layers(model):
        nn.init.normal_(layer.lora_B)
    return model


class Outer(nn.Module):
    """A model around another one, which it calls `count` times."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.head = inner, branches().a

    def forward(self, x, path="a", count=1):
        for _ in range(count):
            x = self.inner(x, path)
        return self.head(x)


def tokens(count=5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 6, dtype=torch.float64, generator=generator)


def loss_of(model, *inputs):
    """Return the sum of the auxiliary losses of single layers; inputs: pairs (name, x)."""
    total = torch.zeros((), dtype=torch.float64)
    for name, x in inputs:
        layer = getattr(model, name)
        layer(x)
        total = total + collect_aux_loss(layer)
    return total
