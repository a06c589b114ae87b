"""Random layers for the tests of the Function and its ops."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moelora_kernels.functional import run_layer
from moelora_kernels.testing import assert_within_budget, draw_experts, reference_step
from moelora_kernels.types import NO_DROPOUT, Dropout, Gate, LayerOutput, LinearTensors, Mixture


@dataclass
class Case:
    """n siblings on one x, with a gate in one of its forms, and the gradients that come back.

    gate None: linear routers make it.
    """

    mixture: Mixture
    x: Tensor
    linears: list[LinearTensors]
    dy: list[Tensor]
    gate: Gate | None = None
    dropout: Dropout = NO_DROPOUT
    dlogits: Tensor | None = None

    def to(self, dtype: torch.dtype, adapters: torch.dtype | None = None) -> Case:
        """The same case in another dtype; adapters and routers in `adapters` if it is given."""

        def cast(tensor, to=dtype):
            if tensor is None or not tensor.is_floating_point():
                return tensor
            return tensor.detach().to(to)

        linears = [
            LinearTensors(*(cast(t) for t in s[:3]), *(cast(t, adapters or dtype) for t in s[3:]))
            for s in self.linears
        ]
        gate = None if self.gate is None else Gate(*(cast(t) for t in self.gate))
        dy, dlogits = [cast(g) for g in self.dy], cast(self.dlogits)
        return Case(self.mixture, cast(self.x), linears, dy, gate, self.dropout, dlogits)

    def reference(self) -> dict[str, Tensor]:
        """Outputs and gradients of the reference ops."""
        return reference_step(
            self.mixture, self.x, self.linears, self.dy, self.gate, self.dropout, self.dlogits
        )

    def forward(
        self,
        x: Tensor | None = None,
        linears: list[LinearTensors] | None = None,
        impl: str = "auto",
        gate: Gate | None = None,
    ) -> LayerOutput:
        """The outputs of `run_layer`; arguments take the place of the case's own tensors."""
        x, linears = self.x if x is None else x, linears or self.linears
        return run_layer(self.mixture, x, linears, gate or self.gate, self.dropout, impl)

    def leaves(self) -> list[LinearTensors]:
        """The linears with adapters and routers that train."""
        return [
            LinearTensors(
                *s[:3], *(None if t is None else t.clone().requires_grad_() for t in s[3:])
            )
            for s in self.linears
        ]

    def run(self, impl: str = "wide") -> dict[str, Tensor]:
        """Outputs and gradients of the Function by the names of `reference`."""
        x, linears, gate = self.x.clone().requires_grad_(), self.leaves(), self.gate
        if gate is not None:
            gate = gate._replace(weights=gate.weights.clone().requires_grad_())
        ys, made = self.forward(x, linears, impl, gate)
        outputs, grads = list(ys), list(self.dy)
        if self.dlogits is not None:
            outputs, grads = [*outputs, made.logits], [*grads, self.dlogits.to(made.logits.dtype)]
        torch.autograd.backward(outputs, grads)
        result = {"dx": x.grad}
        if gate is not None:
            result["dgates"] = gate.weights.grad
        for i, (s, y) in enumerate(zip(linears, ys, strict=True)):
            result |= {f"y{i}": y.detach(), f"dA{i}": s.lora_a.grad, f"dB{i}": s.lora_b.grad}
            if s.router_weight is not None:
                result[f"drouter{i}"] = s.router_weight.grad
            if s.router_bias is not None:
                result[f"dbias{i}"] = s.router_bias.grad
        return result


def make_case(
    *,
    tokens: int = 23,
    in_features: int = 19,
    out_features: tuple[int, ...] = (13,),
    ranks: tuple[int, ...] = (4, 4, 4, 4),
    top_k: int = 2,
    gate: str = "router",
    routing: str = "uniform",
    share_a: bool = False,
    renormalize: bool = True,
    temperature: float = 1.0,
    dropout: float = 0.0,
    dropout_per_expert: bool = False,
    bias: bool = True,
    aux: bool = False,
) -> Case:
    """A case in float64 whose values fit bfloat16, so that every dtype sees the same numbers.

    gate: "router" (linear, top_k), "sparse" (weights and indices of a named routing), "dense" (one
    row per token), "rows" (two gate rows), "one" (one row for all tokens).
    """
    n, num_experts = len(out_features), len(ranks)

    def normal(*shape, scale=1.0):
        return (torch.randn(*shape) * scale).bfloat16().double()

    routed = gate == "router"
    x = normal(tokens, in_features)
    rows_of_a = ranks[0] if share_a else sum(ranks)
    linears = [
        LinearTensors(
            normal(o, in_features, scale=in_features**-0.5),
            normal(o) if bias else None,
            None,
            normal(rows_of_a, in_features, scale=in_features**-0.5),
            normal(o, sum(ranks), scale=0.3),
            normal(num_experts, in_features, scale=in_features**-0.5) if routed else None,
            normal(num_experts) if routed and bias else None,
        )
        for o in out_features
    ]
    scaling = tuple(0.5 + e / 4 for e in range(num_experts))
    top = top_k if routed else 0
    mixture = Mixture(ranks, scaling, share_a, top, renormalize, temperature)
    made: Gate | None = None
    if gate == "sparse":
        generator = torch.Generator().manual_seed(1)
        drawn = [draw_experts(routing, tokens, num_experts, top_k, generator) for _ in range(n)]
        made = Gate(normal(tokens, n * top_k).abs(), torch.cat(drawn, dim=1))
    elif gate == "rows":
        weights = normal(2, n * num_experts)
        made = Gate(weights, rows=torch.randint(0, 2, (tokens,)))
    elif gate in ("dense", "one"):
        made = Gate(normal(1 if gate == "one" else tokens, n * num_experts))
    drop = NO_DROPOUT
    if dropout:
        drop = Dropout(dropout, dropout_per_expert, torch.tensor([0x123456789ABCDEF]))
    dy = [normal(tokens, o) for o in out_features]
    dlogits = normal(tokens, n * num_experts) if aux else None
    return Case(mixture, x, linears, dy, made, drop, dlogits)


def assert_case(
    case: Case, dtype: torch.dtype, adapters: torch.dtype | None = None, impl: str = "wide"
) -> None:
    """The Function in `dtype` against the float64 reference, within the budget of its dtype."""
    low = case.to(dtype, adapters)
    assert_within_budget(low.run(impl), case.reference(), low.reference(), dtype)
