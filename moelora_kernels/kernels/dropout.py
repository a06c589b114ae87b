"""The dropout mask as a function of (seed, stream, position): the op, and tiles for others."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moelora_kernels.kernels.common import launcher
from moelora_kernels.kernels.common.configs import Tile


@triton.jit
def _words(seed, stream, counter):
    """Philox-4x32-10 of a 64-bit counter: four random words."""
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = ((counter >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(seed, low, high, low * 0 + stream.to(tl.uint32), low * 0)


@triton.jit
def keep_tile(
    seed,
    stream,
    tokens,
    first,
    I,  # noqa: E741
    DROPOUT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Which of x[tokens, first : first + BLOCK_I] are kept. first and BLOCK_I: multiples of 4.

    ALIGNED: I is a multiple of 4, so that the four words of a counter belong to neighbours in a
    row; else every element computes all four and takes its own.
    """
    stream = tl.full((), 0, tl.int32) + stream
    if ALIGNED:
        groups = first // 4 + tl.arange(0, BLOCK_I // 4)
        a, b, c, d = _words(seed, stream, tokens[:, None] * (I // 4) + groups[None, :])
        words = tl.join(tl.join(a, c), tl.join(b, d)).reshape(tokens.shape[0], BLOCK_I)
    else:
        element = tokens[:, None] * I + (first + tl.arange(0, BLOCK_I))[None, :]
        words = lane(seed, stream, element)
    return words >= tl.full((), DROPOUT, tl.uint32)


@triton.jit
def lane(seed, stream, element):
    """The word of one element: lane element % 4 of counter element // 4."""
    a, b, c, d = _words(seed, stream, element >> 2)
    of = element & 3
    return tl.where(of < 2, tl.where(of == 0, a, b), tl.where(of == 2, c, d))


@triton.jit(do_not_specialize=["size", "divisor"])
def dropout_kernel(
    x_ptr, seed_ptr, y_ptr, size, divisor, stream, DROPOUT: tl.constexpr, BLOCK: tl.constexpr
):
    """y = x / divisor where kept, else 0; element by element."""
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = element < size
    x = tl.load(x_ptr + element, mask=real, other=0.0).to(tl.float32)
    stream = tl.full((), 0, tl.int32) + stream
    kept = lane(tl.load(seed_ptr), stream, element) >= tl.full((), DROPOUT, tl.uint32)
    y = tl.where(kept, tl.div_rn(x, divisor), 0.0)
    tl.store(y_ptr + element, y.to(y_ptr.dtype.element_ty), mask=real)


def threshold(p: float) -> int:
    """The smallest word that is kept."""
    return min(round(p * 2**32), 2**32 - 1)


def launch(x: Tensor, p: float, seed: Tensor, stream: int) -> Tensor:
    """`reference.dropout` on a GPU."""
    x = x.contiguous()
    y = torch.empty_like(x)
    tile = Tile(1, 1024, 4, 1)
    launcher.run(
        dropout_kernel,
        launcher.ceil_div(x.numel(), tile.step),
        tile,
        dict(x_ptr=x, seed_ptr=seed, y_ptr=y, size=x.numel(), divisor=1.0 - p, stream=stream),
        dict(DROPOUT=threshold(p), BLOCK=tile.step),
    )
    return y
