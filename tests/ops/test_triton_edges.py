"""Kernels at the edges: routings, ids, strides, offsets past 2^31, ranks past a tile, NaN."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from moelora_kernels import reference
from moelora_kernels.kernels import (
    shrink_dx,
    shrink_gate,
    shrink_gate_backward,
    topk_gate,
    weight_grad,
)
from moelora_kernels.kernels.common import launcher
from moelora_kernels.testing import ROUTINGS, draw_experts
from support.op_cases import KERNEL_DEVICE as DEVICE
from support.op_cases import Case, Inputs, compare, forward_of

FP16 = torch.float16


def check_all(inputs: Inputs, dtype: torch.dtype = FP16) -> None:
    """Every op of a layer, each on what the reference made of the one before."""
    inputs = inputs.to(DEVICE)
    shrink = inputs.shrink()
    names = "h u weights indices logits"
    compare(names, shrink_gate.launch, reference.shrink_gate, shrink, dtype)
    forward = forward_of(inputs)
    back = inputs.backward(forward)
    compare("dh u dgate", shrink_gate_backward.launch, reference.shrink_gate_backward, back, dtype)
    given = reference.shrink_gate_backward(*back)
    compare("dx", shrink_dx.launch, reference.shrink_dx, inputs.shrink_dx(given), dtype)
    compare(
        "da drouter dbias db",
        weight_grad.launch,
        reference.weight_grad,
        inputs.weight_grad(forward, given),
        dtype,
    )


@pytest.mark.parametrize("routing", ROUTINGS)
def test_routings(routing: str) -> None:
    inputs = Inputs(Case(T=97, gate="sparse"), FP16)
    generator = torch.Generator().manual_seed(0)
    inputs.indices = draw_experts(routing, 97, 4, 2, generator).int()
    check_all(inputs)


@pytest.mark.parametrize("id_", (-1, 4, 2**31 - 1, -(2**31)))
def test_a_token_that_is_not_routed_gets_exact_zeros(id_: int) -> None:
    inputs = Inputs(Case(T=33, gate="sparse"), FP16).to(DEVICE)
    inputs.indices.fill_(id_)
    forward = shrink_gate.launch(*inputs.shrink())
    assert not forward[1].any()
    dh, u, dgate = shrink_gate_backward.launch(*inputs.backward(forward))
    assert not dh.any()
    assert not u.any()
    assert not dgate.any()


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
@pytest.mark.parametrize("G", (0, 1, 3))
def test_rows_out_of_range_gate_with_zero(G: int, dtype: torch.dtype) -> None:
    inputs = Inputs(Case(T=6, gate="rows"), FP16)
    inputs.gates = torch.randn(G, inputs.E).half()
    far = 2**40 if dtype is torch.int64 else 2**31 - 1
    inputs.rows = torch.tensor([-1, G, far, -far, 0, G - 1], dtype=dtype)
    check_all(inputs)


def test_one_expert_twice_adds_up() -> None:
    inputs = Inputs(Case(T=33, gate="sparse"), FP16)
    inputs.indices.fill_(3)
    check_all(inputs)


@pytest.mark.parametrize("rank", (1, 2, 3, 8, 17, 64, 128))
def test_ranks(rank: int) -> None:
    check_all(Inputs(Case(T=37, I=33, O=35, ranks=(rank,) * 2, top_k=1), FP16))


@pytest.mark.parametrize(
    "case",
    (
        # Three tiles of columns, the last with a tail; an expert over two of them.
        Case(T=31, ranks=(40, 100, 160), bias=True, chained=True),
        Case(T=31, ranks=(150, 50), gate="dense", n=2),
        # Logits spread over the column tiles of a sibling.
        Case(T=31, ranks=(4,) * 50, top_k=3, bias=True),
        # Masks of experts that are wider than a tile.
        Case(T=31, ranks=(150, 20), dropout=0.25, per_expert=True, gate="sparse"),
        # Shared rows of A beside more columns than a step of the gate holds.
        Case(T=31, ranks=(70,) * 3, share_a=True),
    ),
    ids=("mixed", "dense_siblings", "many_logits", "wide_dropout", "share_a"),
)
def test_ranks_past_one_tile(case: Case) -> None:
    check_all(Inputs(case, FP16))


@pytest.mark.parametrize("dtype", (FP16, torch.float32), ids=("fp16", "fp32"))
def test_one_past_a_tile(dtype: torch.dtype) -> None:
    """The last token, row and column stand in a step of their own."""
    check_all(Inputs(Case(T=65, I=129, O=129, n=2), dtype), dtype)


@pytest.mark.parametrize("per_expert", (False, True), ids=("one_mask", "mask_per_expert"))
@pytest.mark.parametrize("I", (70, 72), ids=("shifted", "aligned"))
def test_masks_where_rows_begin_within_and_at_a_counter(I: int, per_expert: bool) -> None:  # noqa: E741
    """Where I is a multiple of 4 four neighbours share a counter; else each has its own."""
    case = Case(T=37, I=I, ranks=(5, 16), dropout=0.25, per_expert=per_expert, n=2)
    check_all(Inputs(case, FP16))


def test_strides() -> None:
    """Rows at a distance, columns at a distance, one element for all, overlapping rows."""
    inputs = Inputs(Case(T=37, n=4), FP16)
    O, I = inputs.lora_b[0].shape[0], inputs.x.shape[1]  # noqa: E741
    inputs.x = torch.randn(37, I + 9).half()[:, 3 : I + 3]
    inputs.lora_a[1] = torch.randn(I, inputs.R).div(8).half().t()
    inputs.lora_b[1] = torch.randn(inputs.R, O).half().t()
    inputs.lora_b[2] = torch.randn(O, inputs.R + 5).half()[:, :-5]
    inputs.dy = [
        torch.randn(37, O + 8).half()[:, 8:],
        torch.randn(O, 37).half().t(),
        torch.randn(1, 1).half().expand(37, O),
        torch.randn(37 + O).half().as_strided((37, O), (1, 1)),
    ]
    check_all(inputs)


@pytest.mark.skipif(DEVICE != "cpu", reason="test_gpu_kernels.py has it with real tensors")
def test_offsets_past_two_to_the_31() -> None:
    """Two tokens more than 2^31 elements apart; the pages between them are never touched."""
    distance = 2**31 + 16
    case = Case(T=2, I=32, O=32)
    inputs = Inputs(case, FP16)

    def apart(rows: Tensor) -> Tensor:
        memory = torch.from_numpy(np.zeros(distance + rows.shape[1], dtype=np.float16))
        far = memory.as_strided(rows.shape, (distance, 1))
        return far.copy_(rows)

    inputs.x, inputs.dy = apart(inputs.x), [apart(inputs.dy[0])]
    check_all(inputs)


def test_nan_of_an_expert_nobody_chose_stays_there() -> None:
    """In A it reaches neither u nor the logits; in B neither the gates nor dh of the others."""
    inputs = Inputs(Case(T=33, gate="sparse"), FP16).to(DEVICE)
    inputs.indices.fill_(1)
    inputs.lora_a[0][:16] = torch.nan
    inputs.lora_b[0][:, 48:] = torch.nan
    h, u, *rest = shrink_gate.launch(*inputs.shrink())
    assert h[:, :16].isnan().all()
    assert torch.isfinite(u).all()
    for tensor in shrink_gate_backward.launch(*inputs.backward((h, u, *rest))):
        assert torch.isfinite(tensor).all()


def test_nan_of_a_chosen_expert_is_seen() -> None:
    inputs = Inputs(Case(T=33, gate="sparse"), FP16).to(DEVICE)
    inputs.indices.fill_(1)
    inputs.lora_a[0][16:32] = torch.nan
    forward = shrink_gate.launch(*inputs.shrink())
    assert forward[1][:, 16:32].isnan().all()
    assert torch.isfinite(forward[1][:, 32:]).all()
    assert shrink_gate_backward.launch(*inputs.backward(forward))[2].isnan().all()


@pytest.mark.parametrize("renormalize", (True, False))
@pytest.mark.parametrize("top_k", (1, 2, 4))
def test_logits_that_are_equal_infinite_or_nan(top_k: int, renormalize: bool) -> None:
    inf, nan = torch.inf, torch.nan
    logits = torch.tensor(
        [
            [1.0, 1.0, 1.0, 1.0],
            [0.0, 2.0, 2.0, -1.0],
            [-inf, -inf, 0.5, -inf],
            [-inf, -inf, -inf, -inf],
            [inf, 0.0, inf, 1.0],
            [0.0, nan, 1.0, 2.0],
        ],
        device=DEVICE,
    )
    found = topk_gate.launch(logits, top_k, renormalize, 1.0)
    expected = reference.topk_gate(logits, top_k, renormalize, 1.0)
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0], expected[0], equal_nan=True)


@pytest.mark.parametrize("gate", ("router", "sparse", "dense", "rows", "one_row"))
def test_launches_follow_from_shapes_alone(gate: str) -> None:
    """The same kernels, grids and workspaces on tensors that hold nothing."""

    def launches(inputs: Inputs) -> list:
        with launcher.recording() as found:
            forward = shrink_gate.launch(*inputs.shrink())
            back = shrink_gate_backward.launch(*inputs.backward(forward))
            shrink_dx.launch(*inputs.shrink_dx(back))
            weight_grad.launch(*inputs.weight_grad(forward, back))
        return [
            (
                launch.kernel.fn.__name__,
                launch.programs,
                launch.constants,
                {name: getattr(a, "shape", None) for name, a in launch.arguments.items()},
            )
            for launch in found
        ]

    inputs = Inputs(Case(T=131, gate=gate), FP16)
    assert launches(inputs.to(DEVICE)) == launches(inputs.to("meta"))
