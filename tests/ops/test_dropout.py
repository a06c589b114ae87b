"""dropout: the same bits as the reference on every backend, alone and inside of shrink_gate."""

from __future__ import annotations

import pytest
import torch

from moelora_kernels import ops, reference
from moelora_kernels.types import NO_ROUTER, Dropout, Gate, Mixture
from support.backends import (
    DTYPES,
    GPU,
    HALF,
    INTERPRETED,
    KERNEL_DTYPES,
    NATIVE,
    TRITON,
    Backend,
    needs_library,
    needs_triton,
    op_launcher,
    parameters,
    require_gpu_memory,
)
from support.backends import KERNEL_DEVICE as DEVICE


def masks(rates: tuple[float, ...], shapes: tuple[tuple[int, int], ...]) -> dict:
    """Return (p, shape) by name."""
    return {f"{p}-{'x'.join(map(str, shape))}": (p, shape) for p in rates for shape in shapes}


SHAPES = ((0, 5), (1, 1), (3, 7), (129, 131))


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


@needs_triton
def test_the_smallest_word_that_is_kept() -> None:
    """An element is kept if its word is at least p 2^32; for one element, halving finds that p."""
    x, seed = torch.ones(1, 1), torch.tensor([3])
    low, high = 0, 2**32
    while high - low > 1:
        middle = (low + high) // 2
        kept = reference.dropout(x, middle / 2**32, seed).item() != 0
        low, high = (middle, high) if kept else (low, middle)
    x, seed = x.to(DEVICE), seed.to(DEVICE)
    dropout, shrink_gate = op_launcher("dropout"), op_launcher("shrink_gate")
    assert dropout(x, low / 2**32, seed, 0).item() != 0
    assert dropout(x, high / 2**32, seed, 0).item() == 0
    # The mask inside another kernel is the same.
    one, mixture = torch.ones(1, 1, device=DEVICE), Mixture((1,), (1.0,))
    for p, expected in ((low / 2**32, True), (high / 2**32, False)):
        h, *_ = shrink_gate(x, [one], NO_ROUTER, Gate(one), mixture, Dropout(p, False, seed))
        assert (h.item() != 0) == expected


def random_word(seed: int, stream: int, element: int) -> int:
    """Return the random word of one element: `reference.dropout` in integers of any size."""
    philox = reference.gates
    words = [element // 4 & philox.UINT32, element // 4 >> 32, stream, 0]
    key = [seed & philox.UINT32, seed >> 32 & philox.UINT32]
    for _ in range(philox.PHILOX_ROUNDS):
        left = words[0] * philox.PHILOX_MULTIPLIERS[0]
        right = words[2] * philox.PHILOX_MULTIPLIERS[1]
        words = [
            right >> 32 ^ words[1] ^ key[0], right & philox.UINT32,
            left >> 32 ^ words[3] ^ key[1], left & philox.UINT32,
        ]  # fmt: skip
        steps = zip(key, philox.PHILOX_KEY_STEPS, strict=True)
        key = [k + step & philox.UINT32 for k, step in steps]
    return words[element % 4]


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
    from moelora_kernels.kernels.dropout import threshold

    for token in range(T - 20, T):
        kept = [random_word(seed, 0, token * I + i) >= threshold(p) for i in columns]
        assert (h[token] != 0).tolist() == kept
        assert (dropped[token, columns] != 0).tolist() == kept
