"""Modules on a GPU for the `gpu` tests: their training steps on fixed buffers, and comparisons."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn

from moelora_kernels import MoeLoraGroup, MoeLoraLinear, moe_lora_linear, set_tasks
from moelora_kernels.testing import assert_within_budget
from support.backends import HALF

DEVICE = torch.device("cuda")
each_half = pytest.mark.parametrize("dtype", HALF.values(), ids=HALF)


class Step:
    """Forward and backward of a layer on buffers that keep their addresses.

    buffers: name -> tensor that `redraw` fills anew; forward: their outputs; trained: what
    `backward` differentiates.
    """

    def __init__(
        self,
        forward: Callable[[], Sequence[Tensor]],
        buffers: dict[str, Tensor],
        module: nn.Module | None = None,
        limits: dict[str, tuple[int, int]] | None = None,
    ) -> None:
        self.forward, self.buffers, self.limits = forward, buffers, limits or {}
        self.trained = [t for name, t in buffers.items() if t.requires_grad]
        if module is not None:
            self.trained += [p for p in module.parameters() if p.requires_grad]

    def redraw(self, seed: int) -> None:
        """New values for every buffer, in place."""
        torch.manual_seed(seed)
        with torch.no_grad():
            for name, buffer in self.buffers.items():
                if buffer.is_floating_point():
                    buffer.normal_()
                else:
                    buffer.random_(*self.limits[name])

    def infer(self) -> list[Tensor]:
        with torch.no_grad():
            return [*self.forward()]

    def train(self) -> list[Tensor]:
        """Outputs, then the gradients of `trained`."""
        outputs = [*self.forward()]
        dy = [self.buffers[f"dy{i}"] for i in range(len(outputs))]
        return [*(y.detach() for y in outputs), *torch.autograd.grad(outputs, self.trained, dy)]


def make_layer(
    features: int = 512, outputs: int = 768, dtype: torch.dtype = torch.bfloat16, **options
) -> MoeLoraLinear:
    """A layer on the GPU whose B is not zero; eight experts of rank 16 unless `options` differ."""
    options = {"num_experts": 8, "rank": 16, **options}
    layer = MoeLoraLinear(features, outputs, device=DEVICE, dtype=dtype, **options)
    nn.init.normal_(layer.lora_B, std=0.3)
    return layer


def _of_module(module, x, *arguments, **buffers) -> Step:
    width = [m.out_features for m in module.modules() if isinstance(m, MoeLoraLinear)]
    limits = buffers.pop("limits", None)
    dy = {f"dy{i}": x.new_zeros(*x.shape[:-1], o) for i, o in enumerate(width)}

    def forward() -> Sequence[Tensor]:
        y = module(x, *arguments)
        return [y] if isinstance(y, Tensor) else y

    return Step(forward, {"x": x, **buffers, **dy}, module, limits)


def _router(tokens: int) -> Step:
    return _of_module(make_layer(top_k=2), _x(tokens))


def _mlp_router(tokens: int) -> Step:
    return _of_module(make_layer(router="mlp", top_k=2), _x(tokens))


def _external(tokens: int) -> Step:
    gates = torch.zeros(tokens, 8, device=DEVICE, requires_grad=True)
    return _of_module(make_layer(router="external"), _x(tokens), gates, gates=gates)


def _sparse(tokens: int) -> Step:
    """Weights and indices from outside, some of them "not routed": the functional form."""
    layer, x = make_layer(router="external"), _x(tokens)
    weights = torch.zeros(tokens, 2, device=DEVICE, requires_grad=True)
    indices = torch.zeros(tokens, 2, device=DEVICE, dtype=torch.int32)

    def forward() -> list[Tensor]:
        return [
            moe_lora_linear(
                x, layer.weight, layer.bias, layer.lora_A, layer.lora_B, weights, indices,
                ranks=16, scaling=2.0,
            )
        ]  # fmt: skip

    buffers = {"x": x, "weights": weights, "indices": indices, "dy0": x.new_zeros(tokens, 768)}
    return Step(forward, buffers, layer, {"indices": (-1, 9)})


def _task(tokens: int) -> Step:
    layer = make_layer(router="task", num_tasks=5)
    set_tasks(layer, torch.ones(2, dtype=torch.int64, device=DEVICE))
    ids = layer.router.task_ids
    x = _x(tokens).detach().view(2, tokens // 2, 512).requires_grad_()
    return _of_module(layer, x, ids=ids, limits={"ids": (1, 6)})


def _group(tokens: int) -> Step:
    layers = {name: make_layer(outputs=o, top_k=2) for name, o in dict(q=512, k=128, v=128).items()}
    return _of_module(MoeLoraGroup(**layers), _x(tokens))


def _grouped(tokens: int) -> Step:
    """Experts of two ranks, whose columns stand in a table on the device."""
    layer = make_layer(num_experts=16, rank=(16, 24) * 8, top_k=2, impl="grouped")
    return _of_module(layer, _x(tokens))


def _grouped_group(tokens: int) -> Step:
    sizes = dict(q=512, k=128, v=128).items()
    layers = {name: make_layer(outputs=o, top_k=2, impl="grouped") for name, o in sizes}
    return _of_module(MoeLoraGroup(**layers), _x(tokens))


def _x(tokens: int) -> Tensor:
    x = torch.zeros(tokens, 512, device=DEVICE, dtype=torch.bfloat16)
    return x.requires_grad_()


# name -> Step of so many tokens, for every form a gate takes.
STEPS: dict[str, Callable[[int], Step]] = {
    "router": _router,
    "mlp_router": _mlp_router,
    "external": _external,
    "sparse": _sparse,
    "task": _task,
    "group": _group,
    "grouped": _grouped,
    "grouped_group": _grouped_group,
}
each_step = pytest.mark.parametrize("form", STEPS)


def assert_equal(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Bit by bit, tensor by tensor, and no NaN among them."""
    for i, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.isfinite(one).all(), f"tensor {i}: non-finite values"
        assert torch.equal(one, other), f"tensor {i} of {len(expected)} differs"


def module_step(
    layer: MoeLoraLinear, x: Tensor, backward: Callable[[Tensor], object]
) -> dict[str, Tensor]:
    """y, dx and the gradient of every parameter that trains; x keeps its strides."""
    leaf = x.detach().requires_grad_()
    layer.zero_grad()
    y = layer(leaf)
    backward(y)
    found = {"y": y.detach(), "dx": leaf.grad}
    return found | {n: p.grad for n, p in layer.named_parameters() if p.requires_grad}


def assert_module_within_budget(
    layer: MoeLoraLinear,
    x: Tensor,
    backward: Callable[[Tensor], object],
    dtype: torch.dtype,
    autocast: bool = False,
) -> None:
    """The layer against itself with impl="reference": in float64, and in its own dtype."""
    plain = copy.deepcopy(layer)
    plain.config = dataclasses.replace(layer.config, impl="reference")
    with torch.autocast(DEVICE.type, dtype, enabled=autocast):
        found = module_step(layer, x, backward)
        yardstick = module_step(plain, x, backward)
    truth = module_step(plain.double(), x.double(), backward)
    assert_within_budget(found, truth, yardstick, dtype)


@contextmanager
def unpoisoned() -> Iterator[None]:
    """Allocations as they come, without the kernels that fill them."""
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled
