"""Small layers and launchers: tests count their host cost, `tools/host_cost.py` times it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moelora_kernels import MoeLoraConfig, MoeLoraFFN, MoeLoraGroup, MoeLoraLinear
from support.arguments import calls
from support.backends import op_launcher
from support.cases import GROUPED, Case
from support.inputs import Inputs
from support.op_checks import WIDE_OPS

SIZE = 16


def linear(impl: str) -> MoeLoraLinear:
    config = MoeLoraConfig.preset("ming", impl=impl)
    return MoeLoraLinear(SIZE, SIZE, config=config, dtype=torch.bfloat16)


def ffn() -> MoeLoraFFN:
    return MoeLoraFFN(SIZE, SIZE, config=MoeLoraConfig.preset("mixlora"), dtype=torch.bfloat16)


# Layers with a linear router. Their records are off.
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "wide": lambda: linear("wide"),
    "grouped": lambda: linear("grouped"),
    "siblings": lambda: MoeLoraGroup(q=linear("wide"), k=linear("wide"), v=linear("wide")),
    "ffn": ffn,
}


def layer_calls(name: str) -> dict[str, Callable]:
    """Return three calls of a layer on one token: without gradients, training, its backward."""
    layer = LAYERS[name]()
    x = torch.randn(1, SIZE, dtype=torch.bfloat16, requires_grad=True)
    trained = [x, *(p for p in layer.parameters() if p.requires_grad)]

    def forward() -> list[Tensor]:
        y = layer(x)
        return [y] if isinstance(y, Tensor) else [*y]

    ys = forward()
    dys = [torch.ones_like(y) for y in ys]

    def inference() -> None:
        with torch.no_grad():
            layer(x)

    def backward() -> None:
        torch.autograd.grad(ys, trained, dys, retain_graph=True, allow_unused=True)

    return {"inference": inference, "forward": forward, "backward": backward}


def launcher_call(op: str) -> Callable[[], object]:
    """Return a call of a launcher on 20 tokens: one tile. The widths need no padding."""
    widths = dict(I=64, O=48)
    case = Case(T=20, **widths) if op in WIDE_OPS else GROUPED["plain"]._replace(**widths)
    arguments = calls(op, Inputs(case, torch.bfloat16))[0]
    launch = op_launcher(op)
    return lambda: launch(*arguments)
