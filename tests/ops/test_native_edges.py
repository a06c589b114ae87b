"""The native CPU library at its edges: ties, bad numbers and indices, strides, wrong shapes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moelora_kernels import ops, reference
from support.op_cases import DTYPES, Case, Inputs, compare, forward_of, needs_library


@needs_library
@pytest.mark.parametrize("top_k", (1, 3, 5, 6))
def test_ties_go_to_the_lower_expert(top_k: int) -> None:
    logits = torch.randint(0, 3, (257, 6), generator=torch.Generator().manual_seed(1)).float()
    weights, indices = ops.topk_gate(logits, top_k, True, 1.0)
    expected_weights, expected = reference.topk_gate(logits, top_k, True, 1.0)
    assert torch.equal(indices, expected)
    torch.testing.assert_close(weights, expected_weights)


@needs_library
@pytest.mark.parametrize("bad", (torch.nan, torch.inf, -torch.inf))
def test_bad_logits_choose_valid_and_different_experts(bad: float) -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(200, 9, generator=generator)
    logits[torch.rand(200, 9, generator=generator) < 0.4] = bad
    logits[0] = bad
    for top_k in (1, 4, 9):
        for renormalize in (True, False):
            weights, indices = ops.topk_gate(logits, top_k, renormalize, 1.0)
            expected = reference.topk_gate(logits, top_k, renormalize, 1.0)
            assert torch.equal(indices, expected[1])
            assert all(len(set(row)) == top_k for row in indices.tolist())
            torch.testing.assert_close(weights, expected[0], equal_nan=True)


@needs_library
@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
def test_experts_out_of_range_and_repeated(dtype: torch.dtype) -> None:
    inputs = Inputs(Case(T=6, gate="sparse"), torch.float32)
    far = 2**40 if dtype is torch.int64 else 2**31 - 1
    inputs.indices = torch.tensor(
        [[-1, 4], [far, 0], [-far, 2], [2, 2], [2**31 - 1, -1], [1, 3]], dtype=dtype
    )
    forward = forward_of(inputs)
    compare(
        "h u weights experts logits", ops.shrink_gate, reference.shrink_gate, inputs.shrink(),
        torch.float32,
    )  # fmt: skip
    compare(
        "dh u dgate", ops.shrink_gate_backward, reference.shrink_gate_backward,
        inputs.backward(forward), torch.float32,
    )  # fmt: skip
    _, u, *_ = ops.shrink_gate(*inputs.shrink())
    assert (u[0] == 0).all()
    dgate = ops.shrink_gate_backward(*inputs.backward(forward))[2]
    assert (dgate[0] == 0).all()
    assert dgate[1, 0] == 0


@needs_library
@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
@pytest.mark.parametrize("gate_rows", (0, 1, 3))
def test_rows_out_of_range(gate_rows: int, dtype: torch.dtype) -> None:
    inputs = Inputs(Case(T=6, gate="rows"), torch.float32)
    inputs.gates = torch.randn(gate_rows, inputs.E)
    far = 2**40 if dtype is torch.int64 else 2**31 - 1
    inputs.rows = torch.tensor([-1, gate_rows, far, -far, 0, gate_rows - 1], dtype=dtype)
    if gate_rows:
        forward = forward_of(inputs)
        compare(
            "dh u dgate", ops.shrink_gate_backward, reference.shrink_gate_backward,
            inputs.backward(forward), torch.float32,
        )  # fmt: skip
    _, u, *_ = ops.shrink_gate(*inputs.shrink())
    assert (u[:4] == 0).all()
    if gate_rows:
        assert (u[4] != 0).any()


@needs_library
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("gate", ("sparse", "dense"))
def test_nan_of_an_expert_nobody_chose_stays_there(gate: str, dtype: torch.dtype) -> None:
    inputs = Inputs(Case(gate=gate), dtype)
    poisoned = slice(32, 48)
    inputs.lora_a[0][poisoned] = torch.nan
    inputs.lora_b[0][:, poisoned] = torch.inf
    if gate == "sparse":
        inputs.indices = torch.tensor([[0, 3]], dtype=torch.int32).repeat(13, 1)
    else:
        inputs.gates[:, 2] = 0
    forward = ops.shrink_gate(*inputs.shrink())
    assert forward[1].isfinite().all()
    assert (forward[1][:, poisoned] == 0).all()
    dh, u, _ = ops.shrink_gate_backward(*inputs.backward(forward))
    assert dh.isfinite().all()
    assert u.isfinite().all()


def _layouts(dy: Tensor) -> dict[str, Tensor]:
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


@needs_library
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("layout", _layouts(torch.zeros(1, 1)))
def test_any_strides_of_dy(layout: str, dtype: torch.dtype) -> None:
    inputs = Inputs(Case(n=2), dtype)
    forward = forward_of(inputs)
    dy = [_layouts(g)[layout] for g in inputs.dy]
    compare(
        "dh u dgate", ops.shrink_gate_backward, reference.shrink_gate_backward,
        inputs.backward(forward, dy), dtype,
    )  # fmt: skip
    back = reference.shrink_gate_backward(*inputs.backward(forward, dy))
    compare(
        "da drouter dbias db",
        ops.weight_grad,
        reference.weight_grad,
        inputs.weight_grad(forward, back, dy),
        dtype,
    )


@needs_library
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_inputs_that_are_not_contiguous(dtype: torch.dtype) -> None:
    inputs = Inputs(Case(gate="dense"), dtype)
    inputs.x = torch.cat([inputs.x, inputs.x], dim=1)[:, : inputs.case.I]
    inputs.lora_a = [a.t().contiguous().t() for a in inputs.lora_a]
    inputs.lora_b = [b.t().contiguous().t() for b in inputs.lora_b]
    inputs.gates = inputs.gates.t().contiguous().t()
    names = "h u weights experts logits"
    compare(names, ops.shrink_gate, reference.shrink_gate, inputs.shrink(), dtype)
    arguments = inputs.backward(forward_of(inputs))
    names = "dh u dgate"
    compare(names, ops.shrink_gate_backward, reference.shrink_gate_backward, arguments, dtype)


@needs_library
def test_wrong_shapes_raise() -> None:
    inputs = Inputs(Case(), torch.float32)
    arguments = inputs.shrink()
    arguments[1] = [inputs.lora_a[0][:, :-1]]
    with pytest.raises(RuntimeError, match="lora_a, in_features: expected size 70, got 69"):
        ops.shrink_gate(*arguments)
    arguments = inputs.backward(forward_of(inputs))
    arguments[0] = [inputs.dy[0][:-1]]
    with pytest.raises(RuntimeError, match="dy, tokens: expected size 13, got 12"):
        ops.shrink_gate_backward(*arguments)
