"""The ops of the grouped form at their edges: NaN, sums over many slots, strides, far offsets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from moelora_kernels import reference
from moelora_kernels.types import NO_DROPOUT, Routing
from support import arguments
from support.backends import (
    DTYPES,
    GPU,
    HALF,
    KERNEL_DEVICE,
    NATIVE,
    SM_90,
    TRITON,
    Backend,
    each_cpu_backend_and_sm_90,
    in_parts,
    needs_triton,
    op_launcher,
)
from support.cases import GROUPED, grouped_case
from support.inputs import Inputs
from support.op_checks import GROUPED_OPS, check

FP16 = torch.float16
# `route` has no Triton kernel.
each_op_and_backend = pytest.mark.parametrize(
    ("op", "backend"),
    [
        pytest.param(op, backend, id=f"{op}-{backend.name}", marks=backend.marks_of_edges)
        for op in GROUPED_OPS
        for backend in (NATIVE, TRITON, SM_90)
        if op != "route" or backend is NATIVE
    ],
)


@dataclass
class Poisoned:
    """A layer whose experts 0, 2 and 3 hold NaN, and so do x and dy of the tokens `idle`.

    Every token but those of `idle` selects expert 1 in each slot. One exception: in the last slot
    of sibling 1, every third token selects expert 2 with a gate of zero. Experts 2 and 3 have the
    columns behind those of expert 1: a load that is too wide would read them.
    """

    inputs: Inputs
    routing: Routing
    idle: list[int]
    # Columns of rank space of experts 0, 2 and 3.
    others: list[slice]
    # [P] by sorted position: the pair.
    pair: Tensor
    # [P] by sorted position: the pair is not routed, or its gate is zero.
    gate_is_zero: Tensor

    def shrink(self, backend: Backend) -> tuple[Tensor, Tensor]:
        """Return h and u."""
        return backend.implementation("grouped_shrink")(*arguments.grouped_shrink(self.inputs))

    def shrink_backward(self, backend: Backend) -> tuple[Tensor, Tensor, Tensor]:
        """Return dh, u and dweights."""
        h, _ = self.shrink(backend)
        args = arguments.grouped_shrink_backward(self.inputs, h)
        return backend.implementation("grouped_shrink_backward")(*args)


def draw_poisoned(backend: Backend, dtype: torch.dtype) -> Poisoned:
    case = grouped_case(T=21, ranks=(3, 5, 16, 1), n=2, routing="all", start="bias")
    inputs, idle = backend.inputs(case, dtype), [4, 20]
    inputs.experts.fill_(1)
    inputs.experts[::3, -1] = 2
    inputs.experts[idle] = -1
    inputs.x[idle] = torch.nan
    others = [columns for e, columns in enumerate(reference.blocks(case.ranks)) if e != 1]
    for i in range(2):
        inputs.dy[i][idle] = torch.nan
        for columns in others:
            inputs.lora_a[i][columns] = torch.nan
            inputs.lora_b[i][:, columns] = torch.nan
    routing = arguments.routing(inputs)
    pair, routed = routing.order.long(), int(routing.offsets[-1])
    not_routed = torch.arange(len(pair), device=pair.device) >= routed
    gate_is_zero = (inputs.gate_weights.view(-1)[pair] == 0) | not_routed
    return Poisoned(inputs, routing, idle, others, pair, gate_is_zero)


each_dtype_and_backend = pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        pytest.param(
            backend, DTYPES[name], id=f"{backend.name}-{name}", marks=backend.marks_of_edges
        )
        for backend, names in (
            (NATIVE, DTYPES),
            (TRITON, ("fp16", "fp32")),
            (SM_90, ("fp16",)),
            (GPU, HALF),
        )
        for name in names
    ],
)


@each_dtype_and_backend
def test_grouped_shrink_ignores_nan_of_other_experts(backend: Backend, dtype: torch.dtype) -> None:
    layer = draw_poisoned(backend, dtype)
    h, u = layer.shrink(backend)
    assert torch.isfinite(h[~layer.gate_is_zero]).all()
    assert h[int(layer.routing.offsets[-1]) :].count_nonzero() == 0
    assert torch.isfinite(u).all()
    assert u[layer.gate_is_zero].count_nonzero() == 0


@each_dtype_and_backend
def test_grouped_shrink_backward_ignores_nan_of_other_experts(
    backend: Backend, dtype: torch.dtype
) -> None:
    layer = draw_poisoned(backend, dtype)
    dh, u, dweights = layer.shrink_backward(backend)
    assert torch.isfinite(dh).all()
    assert dh[layer.gate_is_zero].count_nonzero() == 0
    assert torch.isfinite(u).all()
    assert torch.isfinite(dweights.view(-1)[layer.pair[~layer.gate_is_zero]]).all()
    assert dweights[layer.idle].count_nonzero() == 0


@each_dtype_and_backend
def test_grouped_expand_ignores_nan_of_other_experts(backend: Backend, dtype: torch.dtype) -> None:
    """A token that is not routed gets the start as it is in y, and zeros in dx."""
    layer = draw_poisoned(backend, dtype)
    inputs, expand = layer.inputs, backend.implementation("grouped_expand")
    T, ranks = inputs.case.T, inputs.case.ranks
    dh, u, _ = layer.shrink_backward(backend)
    for i, (b, start) in enumerate(zip(inputs.lora_b, inputs.start, strict=True)):
        y = expand(u, [b], start, layer.routing, ranks, NO_DROPOUT, T, i, False)
        # B of expert 2 is NaN, and its u is zero.
        finite = [t for t in range(T) if i == 0 or t % 3 != 0]
        assert torch.isfinite(y[finite]).all()
        assert torch.equal(y[layer.idle], start.expand(2, -1))
    a = [inputs.lora_a[0].t()]
    dx = expand(dh, a, None, layer.routing, ranks, NO_DROPOUT, T, 0, False)
    assert torch.isfinite(dx).all()
    assert dx[layer.idle].count_nonzero() == 0


@each_dtype_and_backend
def test_grouped_weight_grad_is_zero_for_experts_without_tokens(
    backend: Backend, dtype: torch.dtype
) -> None:
    """Also for expert 2, all of whose gates are zero."""
    layer = draw_poisoned(backend, dtype)
    inputs, ranks = layer.inputs, layer.inputs.case.ranks
    dh, u, _ = layer.shrink_backward(backend)
    da, dbs = backend.implementation("grouped_weight_grad")(
        inputs.x, dh, inputs.dy, u, layer.routing, ranks, NO_DROPOUT, dtype
    )
    assert torch.isfinite(da).all()
    for da_i, db in zip(da.split(sum(ranks)), dbs, strict=True):
        assert torch.isfinite(db).all()
        for columns in layer.others:
            assert db[:, columns].count_nonzero() == 0
            assert da_i[columns].count_nonzero() == 0


@each_cpu_backend_and_sm_90
def test_grouped_expand_rounds_after_the_last_slot(backend: Backend) -> None:
    """Terms of 3/8 of the last place of y: rounded one by one they would all be lost."""
    case = grouped_case(T=3, K=8, O=5, ranks=(1,) * 8, routing="all")
    routing = arguments.routing(Inputs(case, FP16).to(backend.device))
    u = torch.full((24, 1), 0.75, device=backend.device).half()
    start = torch.full((5,), 2048.0, device=backend.device).half()
    matrix = torch.ones(5, 8, device=backend.device).half()
    expand = backend.implementation("grouped_expand")
    y = expand(u, [matrix], start, routing, (1,) * 8, NO_DROPOUT, 3, 0, False)
    assert (y == 2048 + 8 * 0.75).all()


@needs_triton
@pytest.mark.parametrize("op", ("router_logits", "router_grad"))
@pytest.mark.parametrize("name", ("plain", "float32_adapters", "wide"))
def test_router_in_parts(op: str, name: str) -> None:
    """Inner dimensions cut into more parts than there are steps."""
    inputs = TRITON.inputs(GROUPED[name]._replace(router_bias=True), FP16)
    check(op, in_parts(op_launcher(op), split=3), inputs)


@each_op_and_backend
def test_strides(op: str, backend: Backend) -> None:
    """Rows at a distance, columns at a distance, one element for all, matrices transposed."""
    case = grouped_case(T=21, n=3, K=1, start="base", router_bias=True)
    inputs = backend.inputs(case, FP16)
    E, R, T, I, O = len(case.ranks), sum(case.ranks), case.T, case.I, case.O  # noqa: E741

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=backend.device).half()

    inputs.x = normal(T, I + 9)[:, 3 : I + 3]
    inputs.lora_a[1] = normal(I, R).div(8).t()
    inputs.lora_b[1] = normal(R, O).t()
    inputs.lora_b[2] = normal(O, R + 5)[:, :-5]
    inputs.router_weight[1] = normal(I, E).div(8).t()
    inputs.gate_weights = normal(3, T).t()
    inputs.dlogits = torch.randn(3 * E, T, device=backend.device).t()
    inputs.dy = [normal(T, O + 8)[:, 8:], normal(O, T).t(), normal(1, 1).expand(T, O)]
    inputs.start = [normal(T, O + 1)[:, 1:], normal(O, T).t(), normal(1, 1).expand(T, O)]
    check(op, backend.implementation(op), inputs)


@needs_triton
@pytest.mark.skipif(KERNEL_DEVICE != "cpu", reason="a GPU would need the memory of all pages")
@pytest.mark.parametrize("op", ("grouped_shrink", "grouped_shrink_backward", "grouped_weight_grad"))
def test_offsets_past_2_to_the_31(op: str) -> None:
    """Two tokens more than 2^31 elements apart; the pages between them are never touched."""
    inputs = Inputs(grouped_case(T=2, I=32, O=32), FP16)

    def spread(rows: Tensor) -> Tensor:
        distance = 2**31 + 16
        memory = torch.from_numpy(np.zeros(distance + rows.shape[1], dtype=np.float16))
        return memory.as_strided(rows.shape, (distance, 1)).copy_(rows)

    inputs.x, inputs.dy = spread(inputs.x), [spread(inputs.dy[0])]
    check(op, op_launcher(op), inputs)
