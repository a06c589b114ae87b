"""Cases for the ops: every option as tensors, and how to compare with the reference."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from moelora_kernels import native, reference
from moelora_kernels.ops import registration
from moelora_kernels.testing import assert_within_budget
from moelora_kernels.types import NO_GATE, Dropout, Gate, LayerForward, Mixture, RouterTensors

REQUIRED = os.environ.get("MOELORA_REQUIRE_NATIVE") == "1"
needs_library = pytest.mark.skipif(
    not native.available() and not REQUIRED, reason=f"native library: {native.reason()}"
)
DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
# Triton's interpreter takes CPU tensors, also on a machine with a GPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
KERNEL_DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
# Computed in float32 whatever x is; every other result has passed through x.dtype.
EXACT = ("logits", "weights", "dweights", "drouter", "dlogits")


class Case(NamedTuple):
    """Sizes and options of one layer; `gate` names the form its gate takes."""

    T: int = 13
    I: int = 70  # noqa: E741
    O: int = 45  # noqa: E741
    ranks: tuple[int, ...] = (16, 16, 16, 16)
    n: int = 1
    gate: str = "router"
    top_k: int = 2
    renormalize: bool = True
    temperature: float = 1.0
    bias: bool = False
    share_a: bool = False
    dropout: float = 0.0
    per_expert: bool = False
    adapters: torch.dtype | None = None
    chained: bool = False


# name -> case; the comment says what it would catch.
CASES = {
    "plain": Case(),
    # Column blocks of the router, token tiles, tails of both, two threads.
    "long": Case(T=523, I=2100, bias=True),
    "no_token": Case(T=0),
    "no_token_dense": Case(T=0, gate="dense"),
    "one_token": Case(T=1),
    "one_expert": Case(ranks=(5,), top_k=1),
    "one_expert_dense": Case(ranks=(16,), gate="dense"),
    "all_experts": Case(top_k=4),
    "all_experts_softmax": Case(top_k=4, renormalize=False, temperature=0.7),
    "softmax_before_topk": Case(renormalize=False, temperature=1.7, chained=True),
    "many_experts": Case(T=31, ranks=(2,) * 67, top_k=6),
    "mixed_ranks": Case(ranks=(1, 3, 16, 128), bias=True, chained=True),
    "mixed_ranks_dense": Case(ranks=(1, 3, 16, 128), gate="dense"),
    "siblings": Case(n=3, bias=True, chained=True),
    "siblings_sparse": Case(n=3, gate="sparse"),
    "siblings_dense": Case(n=3, ranks=(4, 9), gate="dense"),
    "sparse_int64": Case(gate="sparse_int64"),
    "one_row": Case(T=131, gate="one_row"),
    "rows": Case(T=131, gate="rows"),
    "rows_int64": Case(T=131, gate="rows_int64", n=2),
    "share_a": Case(share_a=True, ranks=(8, 8, 8), n=2),
    "share_a_dense": Case(share_a=True, ranks=(8, 8, 8), gate="dense"),
    "dropout": Case(dropout=0.25, n=2),
    "dropout_per_expert": Case(dropout=0.25, per_expert=True, n=2, ranks=(1, 5, 16)),
    "float32_adapters": Case(n=2, adapters=torch.float32, bias=True),
}


class Inputs:
    """Random tensors of a case in one dtype; `.double()` is the same layer in float64."""

    def __init__(
        self, case: Case, dtype: torch.dtype, seed: int = 0, device: str | torch.device = "cpu"
    ) -> None:
        on = dict(generator=torch.Generator(device).manual_seed(seed), device=device)

        def draw(*shape: int, of: torch.dtype = dtype) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, **on).to(of)

        T, I, O, ranks, n = case[:5]  # noqa: E741
        E, R = len(ranks), sum(ranks)
        width = ranks[0] if case.share_a else R
        of = case.adapters if case.adapters and dtype is not torch.float64 else dtype
        self.case, self.E, self.R = case, E, R
        self.scaling = [0.5 + 0.25 * e for e in range(E)]
        self.seed = torch.tensor([-5_000_000_003], device=device) if case.dropout else None
        self.x = draw(T, I)
        # Adapters are rounded to x.dtype here: what the cast inside the op costs is no error of it.
        self.lora_a = [draw(width, I).div(I**0.5).to(dtype).to(of) for _ in range(n)]
        self.lora_b = [draw(O, R).to(dtype).to(of) for _ in range(n)]
        self.dy = [draw(T, O).div(O**0.5) for _ in range(n)]
        self.dlogits = draw(T, n * E, of=reference.compute_dtype(self.x)) if case.chained else None
        self.gates = self.indices = self.rows = None
        self.router: list[Tensor] = []
        self.bias: list[Tensor] = []
        kind = case.gate
        wide = torch.int64 if kind.endswith("int64") else torch.int32
        if kind == "router":
            self.router = [draw(E, I, of=of).div(I**0.5) for _ in range(n)]
            self.bias = [draw(E, of=of) for _ in range(n)] if case.bias else []
        elif kind.startswith("sparse"):
            self.gates = draw(T, n * 2)
            ids = torch.randint(-1, E + 1, (T, n * 2), **on)
            self.indices = ids.to(wide)
        else:
            G = {"dense": T, "one_row": 1}.get(kind, 5)
            self.gates = draw(G, n * E)
            self.gates[:, 0] = 0
            if kind.startswith("rows"):
                self.rows = torch.randint(-1, G + 1, (T,), **on).to(wide)

    def double(self) -> Inputs:
        return self._mapped(_double)

    def to(self, device: str | torch.device) -> Inputs:
        """The same numbers on another device."""
        return self._mapped(lambda value: _moved(value, device))

    def _mapped(self, function) -> Inputs:
        copy = object.__new__(Inputs)
        copy.__dict__ = {name: function(value) for name, value in self.__dict__.items()}
        return copy

    @property
    def mixture(self) -> Mixture:
        c = self.case
        top_k = c.top_k if self.router else 0
        ranks, scaling = tuple(c.ranks), tuple(self.scaling)
        return Mixture(ranks, scaling, c.share_a, top_k, c.renormalize, c.temperature)

    @property
    def dropout(self) -> Dropout:
        return Dropout(self.case.dropout, self.case.per_expert, self.seed)

    @property
    def gate(self) -> Gate:
        return Gate(self.gates, self.indices, self.rows)

    def shrink(self) -> list:
        """The arguments of shrink_gate."""
        router = RouterTensors(self.router, self.bias)
        return [self.x, self.lora_a, router, self.gate, self.mixture, self.dropout]

    def backward(self, forward: Sequence[Tensor], dy: list[Tensor] | None = None) -> list:
        """The arguments of shrink_gate_backward after shrink_gate returned `forward`."""
        h, _, *made = forward
        gate = self.mixture.router_gate(*made) if self.router else self.gate
        dlogits = self.dlogits if self.router else None
        return [self.dy if dy is None else dy, self.lora_b, h, gate, dlogits, self.mixture]

    def weight_grad(
        self, forward: Sequence[Tensor], back: Sequence[Tensor], dy: list[Tensor] | None = None
    ) -> list:
        """The arguments of weight_grad after shrink_gate and shrink_gate_backward."""
        dlogits = back[2] if self.router else None
        dtypes = self.lora_a[0].dtype, (self.router or [self.x])[0].dtype
        dy = self.dy if dy is None else dy
        return [
            self.x, back[0], dlogits, dy, forward[1], self.case.ranks, self.dropout, *dtypes
        ]  # fmt: skip

    def shrink_dx(self, back: Sequence[Tensor]) -> list:
        """The arguments of shrink_dx after shrink_gate_backward."""
        dlogits = back[2] if self.router else None
        return [back[0], dlogits, self.lora_a, self.router, self.case.ranks, self.dropout]


def _double(value):
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, Case):
        return value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(_double, value))
    if isinstance(value, (list, tuple)):
        return type(value)(map(_double, value))
    return torch.float64 if isinstance(value, torch.dtype) else value


def _moved(value, device):
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_moved(v, device) for v in value))
    if isinstance(value, list):
        return [_moved(v, device) for v in value]
    return value.to(device) if isinstance(value, Tensor) else value


def _named(names: str, outputs) -> dict[str, Tensor]:
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    found = dict(zip(names.split(), outputs, strict=True))
    if isinstance(found.get("db"), list):
        found.update({f"db{i}": db for i, db in enumerate(found.pop("db"))})
    return found


def _tensor_core_steps(arguments: list) -> int:
    """Additions of tensor cores to one float32 sum, which they cut instead of rounding.

    A sum of 16-bit products takes 16 terms at a time, and no sum of an op is longer than the
    longest side of its arguments. On a CPU, in the interpreter too, float32 additions round.
    """
    flat = registration.flat(arguments)
    tensors = [t for a in flat for t in (a if isinstance(a, (list, tuple)) else [a])]
    tensors = [t for t in tensors if isinstance(t, Tensor) and t.is_cuda]
    return max((side for t in tensors for side in t.shape), default=0) // 16


def compare(names: str, op, specification, arguments: list, dtype: torch.dtype) -> None:
    """`op` against `specification` on the same arguments, integers and dtypes exactly."""
    actual = _named(names, op(*arguments))
    yardstick = _named(names, specification(*arguments))
    truth = _named(names, specification(*_double(arguments)))
    for name, expected in yardstick.items():
        assert actual[name].dtype == expected.dtype, name
        assert actual[name].shape == expected.shape, name
        assert actual[name].is_contiguous(), name
        if not expected.is_floating_point():
            assert torch.equal(actual[name], expected), name
    for name, expected in truth.items():
        of = yardstick[name].dtype if name in EXACT else dtype
        if dtype is torch.float64:
            largest = expected.abs().max().item() if expected.numel() else 0.0
            torch.testing.assert_close(actual[name], expected, rtol=0, atol=1e-13 * (1 + largest))
        elif expected.is_floating_point():
            steps = _tensor_core_steps(arguments) if name in EXACT else 0
            assert_within_budget(actual, {name: expected}, yardstick, of, steps)
    again = _named(names, op(*arguments))
    for name, value in actual.items():
        assert torch.equal(value, again[name]), f"{name}: two runs differ"


def opcheck(name: str, arguments: list, **options) -> None:
    """torch.library.opcheck of an op on structured arguments."""
    op = getattr(torch.ops.moelora, name).default
    torch.library.opcheck(op, tuple(registration.flat(arguments)), **options)


def composed_forward(function):
    """The composition behind `ops.wide` or `ops.grouped`, with the signature of the op."""

    def call(x, tensors, gate, mixture, dropout):
        return LayerForward(*function(x, tensors, gate or Gate(*NO_GATE), mixture, dropout))

    return call


def forward_of(inputs: Inputs) -> tuple[Tensor, ...]:
    return reference.shrink_gate(*inputs.shrink())
