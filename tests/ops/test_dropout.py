"""dropout: the same bits as the reference on every backend, alone and inside of shrink_gate."""

from __future__ import annotations

import pytest
import torch

from moelora_kernels import ops, reference
from moelora_kernels.numerics import dropout_threshold
from moelora_kernels.types import NO_ROUTER, Dropout, Gate, Mixture
from support.backends import (
    DTYPES,
    GPU,
    HALF,
    INTERPRETED,
    KERNEL_DTYPES,
    NATIVE,
    PTX,
    TRITON,
    Backend,
    each_cpu_backend,
    each_cpu_backend_and_sm_90,
    needs_library,
    op_launcher,
    parameters,
    require_gpu_memory,
)
from support.philox import mask_number


def masks(rates: tuple[float, ...], shapes: tuple[tuple[int, int], ...]) -> dict:
    """Return (p, shape) by name."""
    return {f"{p}-{'x'.join(map(str, shape))}": (p, shape) for p in rates for shape in shapes}


# The last one has a whole number of counters in a row.
SHAPES = ((0, 5), (1, 1), (3, 7), (129, 131), (67, 264))


@pytest.mark.parametrize(
    ("backend", "mask", "dtype"),
    (
        *parameters(NATIVE, masks((0.0, 0.1, 0.5, 0.999), SHAPES), DTYPES),
        *parameters(
            TRITON,
            masks((0.0, 0.1, 0.999), SHAPES),
            KERNEL_DTYPES,
            lambda name, dtype: name.startswith("0.1-"),
        ),
        *(
            parameter
            for ptx in PTX
            for parameter in parameters(
                ptx,
                masks((0.1,), SHAPES),
                {name: DTYPES[name] for name in ("fp32", "bf16")},
                lambda *_: False,
            )
        ),
        *parameters(GPU, masks((0.1,), ((1000, 4099),)), HALF),
    ),
)
def test_dropout_equals_the_reference_bit_by_bit(
    backend: Backend, mask: tuple[float, tuple[int, int]], dtype: torch.dtype
) -> None:
    """The mask of a seed is the same on every device, and at every position."""
    p, shape = mask
    x = torch.randn(shape, dtype=torch.float64).to(dtype)
    transposed = torch.randn(shape[::-1], dtype=torch.float64).to(dtype).t()
    # Triton's interpreter cuts a float32 down to bfloat16, which a GPU rounds.
    ulp = 2**-7 if backend is TRITON and INTERPRETED and dtype == torch.bfloat16 else 0.0
    tensors = (x, transposed) if backend is NATIVE else (x,)
    for tensor in tensors:
        for seed in (0, -1, 2**62 + 12345):
            for stream in (0, 3):
                # On a GPU torch divides by a number by multiplying with its reciprocal.
                expected = reference.dropout(tensor, p, torch.tensor([seed]), stream)
                args = tensor.to(backend.device), p, torch.tensor([seed]).to(backend.device), stream
                result = backend.implementation("dropout")(*args)
                torch.testing.assert_close(result.cpu(), expected, rtol=ulp, atol=0.0)


@needs_library
def test_a_dropped_nan_is_zero() -> None:
    x = torch.full((64, 64), torch.nan)
    dropped = ops.dropout(x, 0.5, torch.tensor([1]), 0)
    expected = reference.dropout(x, 0.5, torch.tensor([1]), 0)
    assert torch.equal(dropped.isnan(), expected.isnan())
    assert (dropped[~dropped.isnan()] == 0).all()


@each_cpu_backend_and_sm_90
def test_the_smallest_number_that_is_kept(backend) -> None:
    """An element is kept if its number is at least dropout_threshold(p)."""
    x = torch.ones(1, 1, device=backend.device)
    one, mixture, seed = x, Mixture((1,), (1.0,)), torch.tensor([3], device=backend.device)
    number = mask_number(3, 0, 0, 0, 1)
    for p, expected in ((number / 2**16, True), ((number + 1) / 2**16, False)):
        assert (backend.implementation("dropout")(x, p, seed, 0).item() != 0) == expected
        # The mask inside another kernel is the same.
        arguments = x, [one], NO_ROUTER, Gate(one), mixture, Dropout(p, False, seed)
        h, *_ = backend.implementation("shrink_gate")(*arguments)
        assert (h.item() != 0) == expected


@each_cpu_backend
def test_a_p_near_0_or_1_is_applied(backend) -> None:
    """The probability is a multiple of 2^-16, and neither 0 nor 1: no p is ignored."""
    x, seed = torch.ones(300, 500), torch.tensor([11])
    for p in (1e-9, 2.5 / 2**16, 1 - 1e-9):
        expected = reference.dropout(x, p, seed)
        assert 0 < (expected == 0).sum() < x.numel()
        result = backend.implementation("dropout")(
            x.to(backend.device), p, seed.to(backend.device), 0
        )
        assert torch.equal(result.cpu(), expected)


@pytest.mark.gpu
def test_masks_past_2_to_the_31_elements() -> None:
    """The mask of the last tokens, from the op alone and from the shrink beside its product."""
    T, I, p, seed = 262_400, 8192, 0.4, 2**40 + 7  # noqa: E741
    assert T * I > 2**31
    require_gpu_memory(3 * T * I * 2)
    x = torch.ones(T, I, device="cuda", dtype=torch.float16)
    columns = [*range(0, I, I // 16)]
    # Row r of A picks one column of x.
    a = x.new_zeros(16, I)
    a[range(16), columns] = 1
    seed_tensor = torch.tensor([seed], device="cuda")
    drop = Dropout(p, False, seed_tensor)
    gate = Gate(x.new_ones(1, 1))
    h, *_ = op_launcher("shrink_gate")(x, [a], NO_ROUTER, gate, Mixture((16,), (1.0,)), drop)
    dropped = op_launcher("dropout")(x, p, seed_tensor, 0)
    for token in range(T - 20, T):
        kept = [mask_number(seed, 0, token, i, I) >= dropout_threshold(p) for i in columns]
        assert (h[token] != 0).tolist() == kept
        assert (dropped[token, columns] != 0).tolist() == kept
