"""Random layers for the tests of the Function and its ops."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from moelora_kernels.autograd.linear import _Flat as Mixture
from moelora_kernels.functional import _apply as apply
from moelora_kernels.testing import assert_within_budget, draw_experts, reference_step
from moelora_kernels.types import LinearTensors


@dataclass
class Case:
    """n siblings on one x, with the gate in one of its forms, and the gradients that come back."""

    plan: Mixture
    x: Tensor
    siblings: list[LinearTensors]
    dy: list[Tensor]
    gate: dict = field(default_factory=dict)
    dlogits: Tensor | None = None

    def to(self, dtype: torch.dtype, adapters: torch.dtype | None = None) -> Case:
        """The same case in another dtype, adapters and routers in one of their own if given."""

        def cast(tensor, to=dtype):
            if tensor is None or not tensor.is_floating_point():
                return tensor
            return tensor.detach().to(to)

        siblings = [
            LinearTensors(*(cast(t) for t in s[:3]), *(cast(t, adapters or dtype) for t in s[3:]))
            for s in self.siblings
        ]
        gate = {k: cast(v) for k, v in self.gate.items()}
        return Case(
            self.plan, cast(self.x), siblings, [cast(g) for g in self.dy], gate, cast(self.dlogits)
        )

    def reference(self) -> dict[str, Tensor]:
        """Outputs and gradients of the reference ops."""
        return reference_step(
            self.plan, self.x, self.siblings, self.dy, dlogits=self.dlogits, **self.gate
        )

    def run(self, impl: str = "wide") -> dict[str, Tensor]:
        """Outputs and gradients of the Function by the names of `reference`."""
        x = self.x.clone().requires_grad_()
        siblings = [
            LinearTensors(
                *s[:3], *(None if t is None else t.clone().requires_grad_() for t in s[3:])
            )
            for s in self.siblings
        ]
        gate = dict(self.gate)
        gates = gate.get("gates")
        if gates is not None:
            gates = gate["gates"] = gates.clone().requires_grad_()
        ys, _, _, logits = apply(self.plan, x, siblings, impl=impl, **gate)
        outputs, grads = list(ys), list(self.dy)
        if self.dlogits is not None:
            outputs, grads = [*outputs, logits], [*grads, self.dlogits.to(logits.dtype)]
        torch.autograd.backward(outputs, grads)
        found = {"dx": x.grad}
        if gates is not None:
            found["dgates"] = gates.grad
        for i, (s, y) in enumerate(zip(siblings, ys, strict=True)):
            found |= {f"y{i}": y.detach(), f"dA{i}": s.lora_a.grad, f"dB{i}": s.lora_b.grad}
            if s.router_weight is not None:
                found[f"drouter{i}"] = s.router_weight.grad
            if s.router_bias is not None:
                found[f"dbias{i}"] = s.router_bias.grad
        return found


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
    siblings = [
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
    plan = Mixture(
        ranks,
        tuple(0.5 + e / 4 for e in range(num_experts)),
        share_a,
        top_k if routed else 0,
        renormalize,
        temperature,
        dropout,
        dropout_per_expert,
    )
    options: dict = {}
    if gate == "sparse":
        generator = torch.Generator().manual_seed(1)
        drawn = [draw_experts(routing, tokens, num_experts, top_k, generator) for _ in range(n)]
        options = {"gates": normal(tokens, n * top_k).abs(), "indices": torch.cat(drawn, dim=1)}
    elif gate == "rows":
        options = {"gates": normal(2, n * num_experts), "rows": torch.randint(0, 2, (tokens,))}
    elif gate in ("dense", "one"):
        options = {"gates": normal(1 if gate == "one" else tokens, n * num_experts)}
    if dropout:
        options["seed"] = torch.tensor([0x123456789ABCDEF])
    dy = [normal(tokens, o) for o in out_features]
    return Case(plan, x, siblings, dy, options, normal(tokens, n * num_experts) if aux else None)


def assert_case(
    case: Case, dtype: torch.dtype, adapters: torch.dtype | None = None, impl: str = "wide"
) -> None:
    """The Function in `dtype` against the float64 reference, within the budget of its dtype."""
    low = case.to(dtype, adapters)
    assert_within_budget(low.run(impl), case.reference(), low.reference(), dtype)
