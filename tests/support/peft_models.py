"""Tiny models for the tests of the PEFT method, and the formula of an adapter as a loop."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moelora_kernels import set_tasks
from support.models import language_model

MING = dict(preset="ming", num_experts=3, rank=2)
TASKS = dict(preset="moelora", num_experts=3, rank=2, num_tasks=4, dropout=0.0)
LORA = dict(preset="lora", rank=3)
EXTERNAL = dict(router="external", num_experts=3, rank=2)
# Gates of each kind; with routers that have no, one and two levels of parameters.
GATES = dict(
    ming=MING,
    tasks=TASKS,
    lora=LORA,
    external=EXTERNAL,
    mlp=dict(router="mlp", num_experts=3, rank=2),
    threshold=dict(preset="adamole", num_experts=3, rank=2, dropout=0.0),
    shared=dict(num_experts=2, rank=(1, 2), shared_expert="always", normalize="none"),
)


class Block(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.up = nn.Linear(6, 10, dtype=dtype)
        self.down = nn.Linear(10, 6, dtype=dtype)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """Two blocks and a head."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.layers = nn.ModuleList(Block(dtype) for _ in range(2))
        self.head = nn.Linear(6, 4, dtype=dtype)

    def forward(self, x):
        for block in self.layers:
            x = block(x)
        return self.head(x)


def net(dtype=torch.float64) -> Net:
    """The same weights at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return Net(dtype)


def inputs(batch=2, dtype=torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, 3, 6, dtype=torch.float64, generator=generator).to(dtype)


def llama(**options):
    """A Llama of two layers, the same weights at every call."""
    return language_model("Llama", seed=7, num_attention_heads=2, **options).train()


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Every adapter tensor away from its start, B included."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "moelora_" in name:
                drawn = torch.randn(tensor.shape, dtype=torch.float64, generator=generator)
                tensor.copy_(0.5 * drawn)
    return model


def give_gates(model: nn.Module, options: dict) -> nn.Module:
    """The tasks or gates of a batch of two, where the options ask for them."""
    if options is TASKS:
        set_tasks(model, [3, 1])
    elif options is EXTERNAL:
        set_tasks(model, torch.tensor([[0.2, 0.0, 1.5], [1.0, -0.5, 0.3]], dtype=torch.float64))
    return model


def delta_of_token(x: Tensor, a: Tensor, b: Tensor, gate, scale: float, rank: int) -> Tensor:
    """sum_e scale gate_e B_e A_e x of one token x [I]."""
    y = x.new_zeros(b.shape[0])
    for e, weight in enumerate(gate):
        rows = slice(e * rank, (e + 1) * rank)
        y = y + scale * weight * (b[:, rows] @ (a[rows] @ x))
    return y
