"""Tiny models with adapters of the PEFT method, and the formula of an adapter as a loop."""

from __future__ import annotations

import peft
import torch
from torch import Tensor, nn

from moelora_kernels import set_tasks
from moelora_kernels.peft import MoeLoraPeftConfig, MoeLoraTunerLinear
from support.models import language_model

TARGETS = ["up", "down"]
MING = dict(preset="ming", num_experts=3, rank=2)
TASKS = dict(preset="moelora", num_experts=3, rank=2, num_tasks=4, dropout=0.0)
LORA = dict(preset="lora", rank=3)
EXTERNAL = dict(router="external", num_experts=3, rank=2)
# One set of options for each kind of gate. The routers have zero, one or two levels of modules.
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
    """Two blocks, whose linears are "up" and "down", and a linear "head"."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.layers = nn.ModuleList(Block(dtype) for _ in range(2))
        self.head = nn.Linear(6, 4, dtype=dtype)

    def forward(self, x):
        for block in self.layers:
            x = block(x)
        return self.head(x)


def net(dtype=torch.float64) -> Net:
    """Return a Net, with the same weights at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return Net(dtype)


def inputs(batch=2, dtype=torch.float64) -> Tensor:
    """Return x [batch, 3, 6], the same values at every call."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(batch, 3, 6, dtype=torch.float64, generator=generator).to(dtype)


def llama(**options):
    """Return a Llama of two layers in training, with the same weights at every call."""
    return language_model("Llama", seed=7, num_attention_heads=2, **options).train()


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw every adapter tensor of a model, B included. Return the model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "moelora_" in name:
                values = torch.randn(tensor.shape, dtype=torch.float64, generator=generator)
                tensor.copy_(0.5 * values)
    return model


def give_gates(model: nn.Module, options: dict) -> nn.Module:
    """Set tasks or gates for a batch of two if the options need them. Return the model."""
    if options is TASKS:
        set_tasks(model, [3, 1])
    elif options is EXTERNAL:
        set_tasks(model, torch.tensor([[0.2, 0.0, 1.5], [1.0, -0.5, 0.3]], dtype=torch.float64))
    return model


def new_adapter(options: dict, base: nn.Module | None = None, **more) -> peft.PeftModel:
    """Return a PeftModel over `base` whose new adapter "default" has B = 0.

    base: by default net().
    more: further options; autocast_adapter_dtype is the argument of get_peft_model.
    """
    autocast = more.pop("autocast_adapter_dtype", True)
    config = MoeLoraPeftConfig(**{"target_modules": TARGETS, **options, **more})
    base = net() if base is None else base
    return peft.get_peft_model(base, config, autocast_adapter_dtype=autocast)


def adapted(options: dict = MING, base: nn.Module | None = None, **more) -> peft.PeftModel:
    """Return a PeftModel in evaluation whose adapter "default" is not zero, with tasks set."""
    return give_gates(randomise(new_adapter(options, base, **more)), options).eval()


def two_adapters(first: dict = MING, second: dict = LORA) -> peft.PeftModel:
    """Return a PeftModel with the adapters "default" and "other"; "default" is active."""
    model = adapted(first)
    model.add_adapter("other", MoeLoraPeftConfig(target_modules=TARGETS, **second))
    randomise(model, seed=1)
    return give_gates(model, first).eval()


def tuner_layers(model: nn.Module) -> list[MoeLoraTunerLinear]:
    """Return the layers of a model that have adapters."""
    return [m for m in model.modules() if isinstance(m, MoeLoraTunerLinear)]


def parameter_names(model: nn.Module, adapter: str) -> list[str]:
    """Return the names of an adapter's parameters."""
    return [n for n, _ in model.named_parameters() if f".{adapter}." in n]


def delta_of_token(x: Tensor, a: Tensor, b: Tensor, gate, scale: float, rank: int) -> Tensor:
    """Return sum_e scale gate_e B_e A_e x for one token x [I]."""
    y = x.new_zeros(b.shape[0])
    for e, weight in enumerate(gate):
        rows = slice(e * rank, (e + 1) * rank)
        y = y + scale * weight * (b[:, rows] @ (a[rows] @ x))
    return y
