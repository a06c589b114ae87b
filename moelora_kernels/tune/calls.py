"""The calls of the kernels that a layer makes in one forward and backward, with random tensors."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moelora_kernels import reference
from moelora_kernels.testing import clear_routing, draw_experts
from moelora_kernels.types import (
    CHUNK,
    NO_DROPOUT,
    NO_GATE,
    NO_ROUTER,
    TILE,
    Dropout,
    Gate,
    Mixture,
    RouterTensors,
)

# Ops whose launcher is not `launch` of the module with their name -> (module, function).
_LAUNCHERS = {
    "router_logits": ("router", "launch_logits"),
    "grouped_dx": ("grouped_expand", "launch_dx"),
    "router_grad": ("router", "launch_grad"),
    "topk_gate_backward": ("topk_gate", "launch_backward"),
}


def op_launcher(op: str) -> Callable:
    """Return the function that launches the Triton kernel of an op."""
    module, function = _LAUNCHERS.get(op, (op, "launch"))
    return getattr(importlib.import_module(f"moelora_kernels.kernels.{module}"), function)


class Layer(NamedTuple):
    """The sizes of a layer of one linear, and its form: "wide" or "grouped"."""

    form: str
    tokens: int
    in_features: int
    out_features: int
    experts: int
    rank: int
    top_k: int
    dtype: torch.dtype

    @property
    def ranks(self) -> tuple[int, ...]:
        return (self.rank,) * self.experts

    @property
    def name(self) -> str:
        return f"{self.form} {self.in_features}x{self.out_features} T={self.tokens}"


class Call(NamedTuple):
    """One call of an op's launcher. options: its keyword arguments."""

    op: str
    arguments: list[Any]
    options: dict[str, Any]


def draw_calls(layer: Layer, device: torch.device, variant: str = "plain") -> Iterator[Call]:
    """Yield one call of every op of the layer whose launcher takes a tile of the table.

    variant: "plain" or "split". The calls of "split" take the other branches of the kernels: in the
    wide form a dense gate, dropout and sums in two parts, in the grouped form dropout and several
    chunks for each expert.
    """
    draw = _Tensors(layer, device)
    calls = _wide_calls if layer.form == "wide" else _grouped_calls
    return calls(layer, draw, variant == "split")


class _Tensors:
    """The random tensors of a layer."""

    def __init__(self, layer: Layer, device: torch.device) -> None:
        self.generator = torch.Generator(device).manual_seed(0)
        self.device, self.dtype = device, layer.dtype
        T, I, O = layer.tokens, layer.in_features, layer.out_features  # noqa: E741
        E, R = layer.experts, layer.experts * layer.rank
        self.lora_a = self.normal(R, I, over=I)
        self.lora_b = self.normal(O, R)
        self.router = RouterTensors([self.normal(E, I, over=I)], [self.normal(E)])
        self.x = clear_routing(self.normal(T, I), self.router, layer.top_k)
        self.dy = self.normal(T, O, over=O)
        self.bias = self.normal(O)
        seed = torch.tensor([-5_000_000_003], device=device)
        self.dropout = Dropout(0.1, False, seed)

    def normal(self, *shape: int, over: int = 1, dtype: torch.dtype | None = None) -> Tensor:
        """Return normal numbers, divided by the root of `over`."""
        values = torch.randn(shape, generator=self.generator, device=self.device)
        return (values / over**0.5).to(dtype or self.dtype)


def _wide_calls(layer: Layer, draw: _Tensors, split: bool) -> Iterator[Call]:
    scaling, lora_a, dy = (2.0,) * layer.experts, [draw.lora_a], [draw.dy]
    options: dict[str, Any] = {}
    gate: Any = Gate(*NO_GATE)  # type: ignore[arg-type]
    router, top_k, dropout = draw.router, layer.top_k, NO_DROPOUT
    if split:
        options = {"split": 2}
        router, top_k, dropout = NO_ROUTER, 0, draw.dropout
        gate = Gate(draw.normal(layer.tokens, layer.experts))
    mixture = Mixture(layer.ranks, scaling, router_top_k=top_k)
    arguments: list[Any] = [draw.x, lora_a, router, gate, mixture, dropout]
    yield Call("shrink_gate", arguments, options)
    h, u, *router_gate = reference.shrink_gate(*arguments)
    if not split:
        gate = mixture.router_gate(*router_gate)
    arguments = [dy, [draw.lora_b], h, gate, None, mixture]
    yield Call("shrink_gate_backward", arguments, options)
    dh, _, dgate = reference.shrink_gate_backward(*arguments)
    dlogits = None if split else dgate
    dtypes = (layer.dtype, layer.dtype)
    arguments = [draw.x, dh, dlogits, dy, u, layer.ranks, dropout, *dtypes]
    yield Call("weight_grad", arguments, options)
    yield Call("shrink_dx", [dh, dlogits, lora_a, router.weight, layer.ranks, dropout], {})


def _grouped_calls(layer: Layer, draw: _Tensors, split: bool) -> Iterator[Call]:
    T, E, ranks = layer.tokens, layer.experts, layer.ranks
    scaling, lora_a, lora_b, dy = (2.0,) * E, [draw.lora_a], [draw.lora_b], [draw.dy]
    dropout, chunk = (draw.dropout, TILE + 1) if split else (NO_DROPOUT, CHUNK)
    experts = draw_experts("uniform", T, E, layer.top_k, torch.Generator().manual_seed(0))
    experts = experts.to(draw.device, torch.int32)
    routing = reference.route(experts, E, 1, TILE, chunk)
    weights = draw.normal(T, layer.top_k, dtype=torch.float32)
    dlogits = draw.normal(T, E, dtype=torch.float32)
    in_parts = {"split": 2} if split else {}
    yield Call("router_logits", [draw.x, draw.router], in_parts)
    arguments: list[Any] = [draw.x, lora_a, weights, routing, ranks, scaling, dropout]
    yield Call("grouped_shrink", arguments, {})
    h, u = reference.grouped_shrink(*arguments)
    yield Call(
        "grouped_expand", [u, lora_b, draw.bias, routing, ranks, NO_DROPOUT, T, 0, False], {}
    )
    arguments = [dy, lora_b, h, weights, routing, ranks, scaling]
    yield Call("grouped_shrink_backward", arguments, {})
    dh, u, _ = reference.grouped_shrink_backward(*arguments)
    router = draw.router.weight
    # The layer adds the dlogits of a token's experts alone.
    routed = torch.zeros_like(dlogits, dtype=torch.bool).scatter_(1, experts.long(), True)
    sparse_dlogits = torch.where(routed, dlogits, 0)
    arguments = [dh, sparse_dlogits, lora_a, router, routing, ranks, dropout, T, True]
    yield Call("grouped_dx", arguments, {})
    arguments = [draw.x, dh, dy, u, routing, ranks, dropout, layer.dtype]
    yield Call("grouped_weight_grad", arguments, {})
    yield Call("router_grad", [dlogits, draw.x, layer.dtype], in_parts)
