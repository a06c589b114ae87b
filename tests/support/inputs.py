"""The random tensors of a case, and one training step of the layer that they make."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor

from moelora_kernels import reference
from moelora_kernels.functional import run_layer
from moelora_kernels.testing import (
    ROUTINGS,
    assert_within_budget,
    draw_experts,
    reference_step,
)
from moelora_kernels.tune.check import as_float64, map_tensors
from moelora_kernels.types import (
    NO_GATE,
    NO_ROUTER,
    Dropout,
    Gate,
    LayerOutput,
    LinearTensors,
    Mixture,
    RouterTensors,
)
from support.cases import Case

INT_MAX, INT_MIN = 2**31 - 1, -(2**31)


class Inputs:
    """Random tensors of a case. A test may replace each of them before it uses them.

    x             [T, I]             dlogits        [T, n E], in the compute dtype
    lora_a        n x [R, I]         router_weight  n x [E, I]
    lora_b        n x [O_i, R]       router_bias    n x [E], or none
    dy            n x [T, O_i]       base_weight    n x [O_i, I]
    gate_weights  see `Gate`         start          n x [O_i], n x [T, O_i] or n x None
    experts       see `Gate`         rows           see `Gate`
    seed          one int64, or None without dropout

    gate_weights is None if routers make the gate; experts is there in any case if the gate is
    sparse. A column of the gate has weights that are exactly zero. With per_pair, x and dy have
    T K rows. A and B are rounded to the dtype of x before they are cast to `case.adapters`: the
    rounding of the cast inside an op is no error of that op.
    """

    def __init__(
        self, case: Case, dtype: torch.dtype, seed: int = 0, device: str | torch.device = "cpu"
    ) -> None:
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int, to: torch.dtype = dtype) -> Tensor:
            values = torch.randn(*shape, dtype=torch.float64, generator=generator, device=device)
            return values.to(to)

        def option(choice: torch.dtype | None) -> torch.dtype:
            return choice if choice and dtype is not torch.float64 else dtype

        T, I, n, K = case.T, case.I, case.n, case.K  # noqa: E741
        E, R, sizes = len(case.ranks), sum(case.ranks), case.out_features
        tokens = T * K if case.per_pair else T
        adapters, gate_dtype = option(case.adapters), option(case.gate_dtype)
        routers = option(case.routers or case.adapters)
        self.case, self.dtype = case, dtype
        self.scaling = tuple(0.5 + 0.25 * (e % 5) for e in range(E))
        self.seed = torch.tensor([-5_000_000_003], device=device) if case.dropout else None
        self.gate_weights = self.experts = self.rows = None
        if case.gate in ("sparse", "unweighted"):
            # The routings of `testing` are drawn on the CPU.
            on_cpu = generator.device.type == "cpu"
            ids = generator if on_cpu else torch.Generator().manual_seed(seed)
            self.experts = draw_experts_of_case(case, ids).to(case.ids).to(device)
        self.x = normal(tokens, I)
        rows_of_a = case.ranks[0] if case.share_a else R
        self.lora_a = [normal(rows_of_a, I).div(I**0.5).to(dtype).to(adapters) for _ in sizes]
        self.lora_b = [normal(out, R).to(dtype).to(adapters) for out in sizes]
        self.dy = [normal(tokens, out).div(out**0.5) for out in sizes]
        if case.gate in ("dense", "one_row", "rows"):
            G = {"dense": T, "one_row": 1, "rows": 5}[case.gate]
            self.gate_weights = normal(G, n * E, to=gate_dtype)
            self.gate_weights[:, 0] = 0
            if case.gate == "rows":
                ids = torch.randint(-1, G + 1, (T,), generator=generator, device=device)
                self.rows = ids.to(case.ids)
        self.router_weight = [normal(E, I, to=routers).div(I**0.5) for _ in sizes]
        self.router_bias = [normal(E, to=routers) for _ in sizes] if case.router_bias else []
        self.dlogits = normal(tokens, n * E, to=reference.compute_dtype(self.x))
        if case.gate == "sparse":
            self.gate_weights = normal(T, n * K, to=gate_dtype)
            self.gate_weights[::3, -1] = 0
        self.start: list[Tensor | None] = [None] * n
        if case.start:
            wide = case.start == "base_float32" and dtype.itemsize == 2
            to = torch.float32 if wide else dtype
            rows = () if case.start == "bias" else (T,)
            self.start = [normal(*rows, out, to=to) for out in sizes]
        self.base_weight = [normal(out, I).div(I**0.5) for out in sizes]

    def double(self) -> Inputs:
        """Return the same numbers in float64."""
        return self._map(as_float64)

    def to(self, device: str | torch.device) -> Inputs:
        """Return the same numbers on another device."""
        return self._map(lambda value: moved(value, device))

    def _map(self, function: Callable) -> Inputs:
        result = copy.copy(self)
        result.__dict__ |= {k: function(v) for k, v in self.__dict__.items() if k != "case"}
        return result

    @property
    def has_router(self) -> bool:
        return self.case.gate == "router"

    @property
    def mixture(self) -> Mixture:
        c = self.case
        K = c.K if self.has_router else 0
        return Mixture(c.ranks, self.scaling, c.share_a, K, c.renormalize, c.temperature)

    @property
    def dropout(self) -> Dropout:
        return Dropout(self.case.dropout, self.case.per_expert, self.seed)

    @property
    def gate(self) -> Gate:
        """The gate, or NO_GATE's fields if the routers make it."""
        if self.has_router:
            return Gate(*NO_GATE)
        return Gate(self.gate_weights, self.experts, self.rows)

    @property
    def router(self) -> RouterTensors:
        """The routers that make the gate, or none."""
        return RouterTensors(self.router_weight, self.router_bias) if self.has_router else NO_ROUTER

    @property
    def linears(self) -> list[LinearTensors]:
        """The siblings of a whole layer."""
        assert self.case.start in ("", "bias")
        routers = self.router_weight if self.has_router else [None] * self.case.n
        biases = (self.router_bias if self.has_router else []) or [None] * self.case.n
        bases = [None] * self.case.n
        fields = self.base_weight, self.start, bases, self.lora_a, self.lora_b, routers, biases
        return [LinearTensors(*tensors) for tensors in zip(*fields, strict=True)]

    def trainable(self) -> list[LinearTensors]:
        """Return the siblings with copies of A, B and the routers that take gradients."""
        return [
            LinearTensors(
                *s[:3], *(None if t is None else t.detach().clone().requires_grad_() for t in s[3:])
            )
            for s in self.linears
        ]

    def forward(
        self,
        x: Tensor | None = None,
        linears: list[LinearTensors] | None = None,
        impl: str = "auto",
        gate: Gate | None = None,
    ) -> LayerOutput:
        """Return the outputs of the layer; arguments take the place of its own tensors."""
        if gate is None and not self.has_router:
            gate = self.gate
        x = self.x if x is None else x
        return run_layer(self.mixture, x, linears or self.linears, gate, self.dropout, impl)

    def step(self, impl: str) -> dict[str, Tensor]:
        """Return outputs and gradients of the layer, by the names of `reference_step`."""
        x, linears = self.x.detach().clone().requires_grad_(), self.trainable()
        gate = None
        if not self.has_router:
            gate = self.gate._replace(weights=self.gate_weights.detach().clone().requires_grad_())
        ys, layer_gate = self.forward(x, linears, impl, gate)
        outputs, grads = list(ys), list(self.dy)
        if self.has_router and self.case.aux:
            outputs.append(layer_gate.logits)
            grads.append(self.dlogits.to(layer_gate.logits.dtype))
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

    def reference_step(self) -> dict[str, Tensor]:
        """Return outputs and gradients of the layer, computed by the reference ops alone."""
        gate = None if self.has_router else self.gate
        dlogits = self.dlogits if self.has_router and self.case.aux else None
        return reference_step(
            self.mixture, self.x, self.linears, self.dy, gate, self.dropout, dlogits
        )


def assert_layer_within_budget(inputs: Inputs, impl: str) -> dict[str, Tensor]:
    """Assert that a training step stays within the error budget of its dtype, and return it."""
    result = inputs.step(impl)
    truth = inputs.double().reference_step()
    assert_within_budget(result, truth, inputs.reference_step(), inputs.dtype)
    return result


def _outside(case: Case, position: Tensor) -> Tensor:
    ids = [-1, len(case.ranks), INT_MAX, INT_MIN]
    if case.ids is torch.int64:
        # The low words of the last two are experts 0 and 1.
        ids += [2**40, -(2**40), 2**32, 2**32 + 1]
    return torch.tensor(ids)[position % len(ids)]


def draw_experts_of_case(case: Case, generator: torch.Generator) -> Tensor:
    """Return experts [T, n K] of a named routing."""
    E, n = len(case.ranks), case.n
    if case.routing in ROUTINGS:
        columns = [draw_experts(case.routing, case.T, E, case.K, generator) for _ in range(n)]
        return torch.cat(columns, dim=1)
    shape = (case.T, n * case.K)

    def integers(low: int, high: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    position = torch.arange(case.T * n * case.K).view(shape)
    return EXPERTS[case.routing](case, integers, position)


# name -> function of the case, a source of random integers and the index of each pair. In contrast
# to those of `testing.ROUTINGS`, a token may name an expert twice, or one that is not there.
EXPERTS: dict[str, Callable[[Case, Callable, Tensor], Tensor]] = {
    # -1 and E are not routed.
    "some": lambda case, integers, _: integers(-1, len(case.ranks) + 1),
    "all": lambda case, integers, _: integers(0, len(case.ranks)),
    "last": lambda case, integers, _: integers(len(case.ranks) - 1, len(case.ranks)),
    "mostly_first": lambda case, integers, _: torch.where(
        integers(0, 10) == 0, integers(0, len(case.ranks)), 0
    ),
    # Neither expert 0 nor 1, then every second one, and not the last.
    "even": lambda case, integers, _: integers(1, (len(case.ranks) - 1) // 2) * 2,
    "alternate": lambda case, _, position: position % len(case.ranks),
    # Not routed.
    "outside": lambda case, _, position: _outside(case, position),
}


def moved(value, device: str | torch.device):
    """Return a structure with its tensors on another device."""
    return map_tensors(lambda v: v.to(device) if isinstance(v, Tensor) else v, value)
