"""Small MoeLoraLinear layers for the tests of the module."""

from __future__ import annotations

import torch
from torch import nn

from moelora_kernels import MoeLoraConfig, MoeLoraLinear, adapter_parameters

IN, OUT = 12, 10
MING = dict(num_experts=4, rank=3, alpha=6.0, router_bias=True, top_k=2)


def layer_options(**options):
    """Return the options of `make_layer`: MING, with `options` on top."""
    options = {**MING, **options}
    if options.get("router", "linear") in ("external", None):
        options.pop("top_k")
    return options


def make_layer(dtype=torch.float64, base=None, seed=0, bias=True, **options):
    """Return a layer with the options MING and `options`, and a B that is not zero.

    base: the frozen linear; by default a new nn.Linear [OUT, IN].
    """
    torch.manual_seed(seed)
    base = nn.Linear(IN, OUT, bias, dtype=dtype) if base is None else base
    layer = MoeLoraLinear.from_linear(base, **layer_options(**options))
    with torch.no_grad():
        layer.lora_B.normal_(std=0.3)
    return layer


def small_config(**options):
    """Return the options of the preset ming with two experts of rank 2, and `options` on top."""
    return MoeLoraConfig.preset("ming", **{"num_experts": 2, "rank": 2, **options})


def formulations(cases):
    """Return pairs (impl, options): "wide" for every case, "grouped" if the gate is sparse."""
    sparse = [case for case in cases if MoeLoraConfig(**layer_options(**case)).is_sparse()]
    return [("wide", case) for case in cases] + [("grouped", case) for case in sparse]


class Prototype(nn.Module):
    """A router that a user wrote: the cosine of x to trainable prototypes."""

    def __init__(self, experts):
        super().__init__()
        self.prototypes = nn.Parameter(torch.randn(experts, IN, dtype=torch.float64))

    def forward(self, x):
        return nn.functional.normalize(x, dim=-1) @ nn.functional.normalize(self.prototypes).t()


class PackedLinear(nn.Module):
    """A stand-in for a quantised linear: int8 codes in `weight`, dequantised in forward."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        codes = (linear.weight.detach() / scale).round().to(torch.int8)
        # One row, like the packed weights of bitsandbytes: only forward knows the shape.
        self.weight = nn.Parameter(codes.reshape(1, -1), requires_grad=False)
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def dequantised(self):
        return self.weight.view(self.out_features, -1).to(self.scale.dtype) * self.scale

    def forward(self, x):
        return nn.functional.linear(x, self.dequantised().to(x.dtype), self.bias)


def randomise(model, seed=1):
    """Draw the adapters of a model, so that gates and tasks change the output. Return the model."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for q in adapter_parameters(model):
            q.normal_(std=0.5)
    return model


# Options of a layer with a gate for each of sixteen tasks.
TASKS = 16
TASK = dict(
    router="task", num_tasks=TASKS, task_embedding_dim=6, router_bias=False, top_k=None, rank=3
)


def task_layer(dtype=torch.float64, base=None, seed=0, **options):
    """Return a layer in evaluation whose sixteen task gates differ."""
    layer = make_layer(dtype, base, seed, **{**TASK, **options})
    with torch.no_grad():
        layer.router.gate.weight.normal_()
    return layer.eval()
