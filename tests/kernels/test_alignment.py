"""A launcher copies unaligned tensors and pads odd widths: its kernel loads 16 bytes at a time."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moelora_kernels.kernels.common import launcher
from support.arguments import calls
from support.backends import KERNEL_DEVICE, op_launcher
from support.cases import Case
from support.fake_driver import fake_driver
from support.inputs import Inputs, map_tensors
from support.op_checks import GROUPED_OPS, WIDE_OPS

LAUNCHERS = [op for op in {**WIDE_OPS, **GROUPED_OPS} if op != "route"]


def case_of(op: str, **widths: int) -> Case:
    """Return a layer; its widths are multiples of 16 unless `widths` has I and O."""
    sizes = Case(**{**dict(T=20, I=64, O=48, ranks=(16,) * 16), **widths})
    return sizes if op in WIDE_OPS else sizes._replace(gate="sparse", K=2)


def shifted(tensor: Tensor) -> Tensor:
    """Return an equal tensor whose pointer is not a multiple of 16 bytes."""
    buffer = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return buffer[1:].view(tensor.shape).copy_(tensor)


def sliced(tensor: Tensor) -> Tensor:
    """Return an equal tensor; the rows of a matrix lie one element further apart."""
    if tensor.dim() != 2:
        return tensor
    buffer = torch.zeros(len(tensor), tensor.shape[1] + 1, dtype=tensor.dtype, device=tensor.device)
    return buffer[:, :-1].copy_(tensor)


def unaligned(arguments: list, change) -> list:
    """Return the arguments with every tensor of floats changed."""

    def changed(value):
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        return change(value) if value.is_contiguous() else change(value.t()).t()

    return map_tensors(changed, arguments)


@pytest.mark.parametrize("change", (shifted, sliced), ids=lambda f: f.__name__)
@pytest.mark.parametrize("op", LAUNCHERS)
def test_unaligned_tensors_take_the_kernel_of_aligned_ones(op: str, change) -> None:
    inputs = Inputs(case_of(op), torch.bfloat16)
    launch = op_launcher(op)
    with fake_driver("sm_90") as driver:
        for arguments in calls(op, inputs):
            launch(*arguments)
            compiled = len(driver.compiled)
            launch(*unaligned(arguments, change))
            assert driver.compiled[compiled:] == []


@pytest.mark.parametrize("change", (shifted, sliced), ids=lambda f: f.__name__)
@pytest.mark.parametrize("op", LAUNCHERS)
def test_unaligned_tensors_give_the_same_values(op: str, change) -> None:
    inputs = Inputs(case_of(op), torch.float32).to(KERNEL_DEVICE)
    launch = op_launcher(op)
    for arguments in calls(op, inputs):
        expected, actual = launch(*arguments), launch(*unaligned(arguments, change))
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("op", LAUNCHERS)
def test_odd_widths_take_the_kernels_of_multiples_of_16(op: str) -> None:
    launch = op_launcher(op)
    with fake_driver("sm_90") as driver:
        for case in (case_of(op), case_of(op, I=61, O=33), case_of(op, I=1, O=1)):
            compiled = len(driver.compiled)
            for arguments in calls(op, Inputs(case, torch.bfloat16)):
                launch(*arguments)
            if case != case_of(op):
                assert driver.compiled[compiled:] == []


@pytest.mark.parametrize("width", (1, 3, 17))
def test_what_pads_a_matrix_does_not_reach_the_results(width: int) -> None:
    """The columns behind a slice are NaN."""
    matrix = torch.full((4, 32), float("nan"))
    matrix[:, :width] = 1
    rows = launcher.rows_dense(matrix[:, :width])
    assert rows.shape == (4, launcher.padded_width(width))
    assert rows.sum() == 4 * width
    assert torch.equal(launcher.cropped(rows, 4, width), matrix[:, :width])
