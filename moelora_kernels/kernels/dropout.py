"""The dropout mask as a function of (seed, stream, element): the op, and tiles for other kernels.

Element i of x gets word i % 4 of Philox-4x32-10 at the counter (i // 4, stream). It is kept if the
word is not below p * 2^32, so that no mask is ever stored.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moelora_kernels.kernels.common import launcher
from moelora_kernels.kernels.common.configs import TileConfig


@triton.jit
def random_words(seed, stream, counter):
    """Return the four uint32 words of Philox-4x32-10 at a 64-bit counter."""
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = ((counter >> 32) & 0xFFFFFFFF).to(tl.uint32)
    return tl.philox(seed, low, high, low * 0 + stream.to(tl.uint32), low * 0)


@triton.jit
def element_words(seed, stream, elements):
    """Return the word of every element: word elements % 4 of counter elements // 4."""
    a, b, c, d = random_words(seed, stream, elements >> 2)
    lane = elements & 3
    return tl.where(lane < 2, tl.where(lane == 0, a, b), tl.where(lane == 2, c, d))


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
    """Return which elements of x[tokens, first : first + BLOCK_I] are kept, [BLOCK_T, BLOCK_I].

    `first` and BLOCK_I are multiples of 4. ALIGNED: I is a multiple of 4, so that the four words of
    a counter belong to neighbours in one row. Otherwise every element computes all four words and
    selects one.
    """
    stream = tl.full((), 0, tl.int32) + stream
    if ALIGNED:
        groups = first // 4 + tl.arange(0, BLOCK_I // 4)
        a, b, c, d = random_words(seed, stream, tokens[:, None] * (I // 4) + groups[None, :])
        words = tl.join(tl.join(a, c), tl.join(b, d)).reshape(tokens.shape[0], BLOCK_I)
    else:
        elements = tokens[:, None] * I + (first + tl.arange(0, BLOCK_I))[None, :]
        words = element_words(seed, stream, elements)
    return words >= tl.full((), DROPOUT, tl.uint32)


@triton.jit(do_not_specialize=["size", "divisor"])
def dropout_kernel(
    x_ptr, seed_ptr, y_ptr, size, divisor, stream, DROPOUT: tl.constexpr, BLOCK: tl.constexpr
):
    """y = x / divisor if the element is kept, else 0. x, y [size]; seed [1] int64.

    Programs: blocks of BLOCK elements.
    """
    elements = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    elements_in = elements < size
    x = tl.load(x_ptr + elements, mask=elements_in, other=0.0).to(tl.float32)
    stream = tl.full((), 0, tl.int32) + stream
    words = element_words(tl.load(seed_ptr), stream, elements)
    kept = words >= tl.full((), DROPOUT, tl.uint32)
    y = tl.where(kept, tl.div_rn(x, divisor), 0.0)
    tl.store(y_ptr + elements, y.to(y_ptr.dtype.element_ty), mask=elements_in)


def threshold(p: float) -> int:
    """Return the smallest word whose element is kept, for dropout with probability p."""
    return min(round(p * 2**32), 2**32 - 1)


def launch(x: Tensor, p: float, seed: Tensor, stream: int) -> Tensor:
    """Return x / (1 - p) where the mask of (seed, stream) keeps it, 0 elsewhere."""
    x = x.contiguous()
    y = torch.empty_like(x)
    tile_config = TileConfig(tokens=1, step=1024, warps=4, stages=1)
    launcher.run(
        dropout_kernel,
        launcher.ceil_div(x.numel(), tile_config.step),
        tile_config,
        dict(x_ptr=x, seed_ptr=seed, y_ptr=y, size=x.numel(), divisor=1.0 - p, stream=stream),
        dict(DROPOUT=threshold(p), BLOCK=tile_config.step),
    )
    return y
