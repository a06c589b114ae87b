"""The ops of the wide form at their edges: routings, ids, ranks, strides, NaN, wrong shapes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from moelora_kernels import ops
from moelora_kernels.testing import ROUTINGS
from support import arguments
from support.backends import (
    DTYPES,
    KERNEL_DEVICE,
    NATIVE,
    SM_90,
    TRITON,
    Backend,
    each_cpu_backend,
    each_cpu_backend_and_sm_90,
    needs_library,
    parameters,
)
from support.cases import Case
from support.inputs import Inputs
from support.op_checks import WIDE_OPS, check, compare

FP16 = torch.float16


def check_all(backend: Backend, inputs: Inputs) -> None:
    """Check every op of the wide form, each on the results of the reference."""
    inputs = inputs.to(backend.device)
    for op in WIDE_OPS:
        check(op, backend.implementation(op), inputs)


# --- gates --------------------------------------------------------------------------------------


@each_cpu_backend
@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings(routing: str, backend: Backend) -> None:
    check_all(backend, Inputs(Case(T=97, gate="sparse", routing=routing), FP16))


@each_cpu_backend
@pytest.mark.parametrize("expert", (-1, 4, 2**31 - 1, -(2**31)))
def test_a_token_that_is_not_routed_gets_exact_zeros(expert: int, backend: Backend) -> None:
    inputs = Inputs(Case(T=33, gate="sparse"), FP16)
    inputs.experts.fill_(expert)
    inputs = inputs.to(backend.device)
    shrunk = backend.implementation("shrink_gate")(*arguments.shrink_gate(inputs))
    assert not shrunk[1].any()
    args = arguments.shrink_gate_backward(inputs, shrunk)
    for output in backend.implementation("shrink_gate_backward")(*args):
        assert not output.any()


@each_cpu_backend_and_sm_90
@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
def test_experts_out_of_range_and_repeated(dtype: torch.dtype, backend: Backend) -> None:
    # Products of three parts in tf32 miss the float32 budget of sums as short as these.
    inputs = Inputs(Case(T=6, gate="sparse"), FP16 if backend.ptx else torch.float32)
    far = 2**40 if dtype is torch.int64 else 2**31 - 1
    inputs.experts = torch.tensor(
        [[-1, 4], [far, 0], [-far, 2], [2, 2], [2**31 - 1, -1], [1, 3]], dtype=dtype
    )
    check_all(backend, inputs)


@each_cpu_backend
def test_one_expert_twice_adds_up(backend: Backend) -> None:
    inputs = Inputs(Case(T=33, gate="sparse"), FP16)
    inputs.experts.fill_(3)
    check_all(backend, inputs)


@each_cpu_backend_and_sm_90
@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
@pytest.mark.parametrize("G", (0, 1, 3))
def test_rows_out_of_range_gate_with_zero(G: int, dtype: torch.dtype, backend: Backend) -> None:
    inputs = Inputs(Case(T=6, gate="rows"), FP16)
    inputs.gate_weights = torch.randn(G, 4).half()
    far = 2**40 if dtype is torch.int64 else 2**31 - 1
    inputs.rows = torch.tensor([-1, G, far, -far, 0, G - 1], dtype=dtype)
    check_all(backend, inputs)
    inputs = inputs.to(backend.device)
    _, u, *_ = backend.implementation("shrink_gate")(*arguments.shrink_gate(inputs))
    assert not u[:4].any()
    assert u[4:].any() == (G > 0)


# --- sizes --------------------------------------------------------------------------------------


@each_cpu_backend
@pytest.mark.parametrize("rank", (1, 2, 3, 8, 17, 64, 128))
def test_ranks(rank: int, backend: Backend) -> None:
    check_all(backend, Inputs(Case(T=37, I=33, O=35, ranks=(rank,) * 2, K=1), FP16))


LARGE_RANKS = {
    # Three tiles of columns, the last with a tail; an expert over two of them.
    "mixed": Case(T=31, ranks=(40, 100, 160), router_bias=True, aux=True),
    "dense_siblings": Case(T=31, ranks=(150, 50), gate="dense", n=2),
    # Logits spread over the column tiles of a sibling.
    "many_logits": Case(T=31, ranks=(4,) * 50, K=3, router_bias=True),
    # Masks of experts that are wider than a tile.
    "wide_dropout": Case(T=31, ranks=(150, 20), dropout=0.25, per_expert=True, gate="sparse"),
    # Shared rows of A beside more columns than a step of the gate holds.
    "share_a": Case(T=31, ranks=(70,) * 3, share_a=True),
}


@each_cpu_backend_and_sm_90
@pytest.mark.parametrize("case", LARGE_RANKS.values(), ids=LARGE_RANKS)
def test_ranks_past_one_tile(case: Case, backend: Backend) -> None:
    check_all(backend, Inputs(case, FP16))


@each_cpu_backend
@pytest.mark.parametrize("dtype", (FP16, torch.float32), ids=("fp16", "fp32"))
def test_one_past_a_tile(dtype: torch.dtype, backend: Backend) -> None:
    """The last token, row and column stand in a step of their own."""
    check_all(backend, Inputs(Case(T=65, I=129, O=129, n=2), dtype))


@each_cpu_backend
@pytest.mark.parametrize("per_expert", (False, True), ids=("one_mask", "mask_per_expert"))
@pytest.mark.parametrize("I", (70, 72), ids=("shifted", "aligned"))
def test_masks_of_rows_that_begin_within_and_at_a_counter(
    I: int,  # noqa: E741
    per_expert: bool,
    backend: Backend,
) -> None:
    """If I is a multiple of 4, four neighbours share a counter; else each has its own."""
    case = Case(T=37, I=I, ranks=(5, 16), dropout=0.25, per_expert=per_expert, n=2)
    check_all(backend, Inputs(case, FP16))


# --- strides ------------------------------------------------------------------------------------


@each_cpu_backend_and_sm_90
@pytest.mark.parametrize("gate", ("router", "dense"))
def test_strides(gate: str, backend: Backend) -> None:
    """Rows at a distance, columns at a distance, one element for all, overlapping rows."""
    inputs = backend.inputs(Case(T=37, n=4, gate=gate), FP16)
    T, I, O, R = 37, inputs.case.I, inputs.case.O, sum(inputs.case.ranks)  # noqa: E741

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=backend.device).half()

    inputs.x = normal(T, I + 9)[:, 3 : I + 3]
    inputs.lora_a[1] = normal(I, R).div(8).t()
    inputs.lora_b[1] = normal(R, O).t()
    inputs.lora_b[2] = normal(O, R + 5)[:, :-5]
    inputs.dy = [
        normal(T, O + 8)[:, 8:],
        normal(O, T).t(),
        normal(1, 1).expand(T, O),
        normal(T + O).as_strided((T, O), (1, 1)),
    ]
    if gate == "dense":
        inputs.gate_weights = inputs.gate_weights.t().contiguous().t()
    check_all(backend, inputs)


def layouts(dy: Tensor) -> dict[str, Tensor]:
    """The same sizes under the strides that autograd hands out."""
    T, O = dy.shape  # noqa: E741
    return {
        "sum": torch.ones((), dtype=dy.dtype).expand(T, O),
        "mean over tokens": dy[:1].expand(T, O),
        "one column": dy[:, :1].expand(T, O),
        "transposed": dy.t().contiguous().t(),
        "cat": torch.cat([dy + 1, dy, dy - 1], dim=1)[:, O : 2 * O],
        "every other": dy.repeat_interleave(2, dim=1)[:, ::2],
        "float32": dy.float(),
        "float64": dy.double(),
    }


# The launchers get dy from the op `wide`, which casts it to the dtype of x.
@needs_library
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("layout", layouts(torch.zeros(1, 1)))
def test_any_strides_and_dtype_of_dy(layout: str, dtype: torch.dtype) -> None:
    inputs = Inputs(Case(n=2), dtype)
    inputs.dy = [layouts(dy)[layout] for dy in inputs.dy]
    for op in ("shrink_gate_backward", "weight_grad"):
        check(op, getattr(ops, op), inputs)


@pytest.mark.skipif(KERNEL_DEVICE != "cpu", reason="test_gpu_linear.py has it with real tensors")
def test_offsets_past_2_to_the_31() -> None:
    """Two tokens more than 2^31 elements apart; the pages between them are never touched."""
    distance = 2**31 + 16
    inputs = Inputs(Case(T=2, I=32, O=32), FP16)

    def spread(rows: Tensor) -> Tensor:
        memory = torch.from_numpy(np.zeros(distance + rows.shape[1], dtype=np.float16))
        return memory.as_strided(rows.shape, (distance, 1)).copy_(rows)

    inputs.x, inputs.dy = spread(inputs.x), [spread(inputs.dy[0])]
    for op in WIDE_OPS:
        for args in arguments.calls(op, inputs):
            compare(op, TRITON.implementation(op), args, FP16)


# --- NaN and errors -----------------------------------------------------------------------------

SPARSE_AND_DENSE = {"sparse": "sparse", "dense": "dense"}


@pytest.mark.parametrize(
    ("backend", "gate", "dtype"),
    (
        *parameters(NATIVE, SPARSE_AND_DENSE, DTYPES),
        *parameters(TRITON, SPARSE_AND_DENSE, {"fp16": FP16}),
        *parameters(SM_90, SPARSE_AND_DENSE, {"fp16": FP16}, lambda *_: False),
    ),
)
def test_nan_of_an_expert_that_is_not_selected_stays_there(
    backend: Backend, gate: str, dtype: torch.dtype
) -> None:
    """In A it reaches neither u nor the logits; in B neither the gates nor dh of other experts."""
    inputs = Inputs(Case(T=33, gate=gate), dtype)
    inputs.lora_a[0][:16] = torch.nan
    inputs.lora_b[0][:, :16] = torch.inf
    inputs.lora_b[0][:, 48:] = torch.nan
    if gate == "sparse":
        inputs.experts = torch.tensor([[1, 2]], dtype=torch.int32).repeat(33, 1)
    else:
        inputs.gate_weights[:, [0, 3]] = 0
    inputs = inputs.to(backend.device)
    shrunk = backend.implementation("shrink_gate")(*arguments.shrink_gate(inputs))
    h, u, *_ = shrunk
    assert h[:, :16].isnan().all()
    assert torch.isfinite(u).all()
    assert not u[:, :16].any()
    args = arguments.shrink_gate_backward(inputs, shrunk)
    dh, u, dgate = backend.implementation("shrink_gate_backward")(*args)
    assert torch.isfinite(dh).all()
    assert torch.isfinite(u).all()
    assert torch.isfinite(dgate if gate == "sparse" else dgate[:, 1:3]).all()


@each_cpu_backend
def test_nan_of_a_selected_expert_is_seen(backend: Backend) -> None:
    inputs = Inputs(Case(T=33, gate="sparse"), FP16)
    inputs.experts.fill_(1)
    inputs.lora_a[0][16:32] = torch.nan
    inputs = inputs.to(backend.device)
    shrunk = backend.implementation("shrink_gate")(*arguments.shrink_gate(inputs))
    assert shrunk[1][:, 16:32].isnan().all()
    assert torch.isfinite(shrunk[1][:, 32:]).all()
    args = arguments.shrink_gate_backward(inputs, shrunk)
    assert backend.implementation("shrink_gate_backward")(*args)[2].isnan().all()


@needs_library
def test_wrong_shapes_raise() -> None:
    inputs = Inputs(Case(), torch.float32)
    args = arguments.shrink_gate(inputs)
    args[1] = [inputs.lora_a[0][:, :-1]]
    with pytest.raises(RuntimeError, match="lora_a, in_features: expected size 70, got 69"):
        ops.shrink_gate(*args)
    args = arguments.shrink_gate_backward(inputs)
    args[0] = [inputs.dy[0][:-1]]
    with pytest.raises(RuntimeError, match="dy, tokens: expected size 13, got 12"):
        ops.shrink_gate_backward(*args)
