"""The dropout mask as a function of (seed, stream, t, i): the op, and tiles for other kernels.

No mask is stored: every kernel computes the part that it applies. `reference.dropout` defines it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moelora_kernels.kernels.common import launcher
from moelora_kernels.kernels.common.configs import TileConfig
from moelora_kernels.kernels.common.memory import load_rows, store_rows
from moelora_kernels.numerics import dropout_threshold, keep_probability

# The rounds of Philox, and the random numbers of 16 bits in the four words of one counter.
ROUNDS = tl.constexpr(7)
LANES = tl.constexpr(8)


@triton.jit
def philox(seed, a, b, c, d):
    """Return the four words of Philox-4x32-7 at the counter (a, b, c, d), all uint32.

    `tl.philox` multiplies twice to get both halves of a product; this function multiplies once.
    """
    key_0 = (seed & 0xFFFFFFFF).to(tl.uint32)
    key_1 = ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    for _ in tl.static_range(ROUNDS):
        left = a.to(tl.uint64) * 0xD2511F53
        right = c.to(tl.uint64) * 0xCD9E8D57
        a = (right >> 32).to(tl.uint32) ^ b ^ key_0
        b = right.to(tl.uint32)
        c = (left >> 32).to(tl.uint32) ^ d ^ key_1
        d = left.to(tl.uint32)
        key_0 += tl.full((), 0x9E3779B9, tl.uint32)
        key_1 += tl.full((), 0xBB67AE85, tl.uint32)
    return a, b, c, d


@triton.jit
def keep_tile(
    seed,
    stream,
    tokens,
    first,
    row_counters,
    DROPOUT: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """Return which elements of x[tokens, first : first + BLOCK_I] are kept, [BLOCK_T, BLOCK_I].

    tokens [BLOCK_T] int64. `first` and BLOCK_I are multiples of LANES. row_counters is the number
    of counters of a row of x, see `num_counters`. DROPOUT is the smallest random number whose
    element is kept.
    """
    groups = first // LANES + tl.arange(0, BLOCK_I // LANES)
    counter = tokens[:, None] * row_counters + groups[None, :]  # [BLOCK_T, BLOCK_I / LANES]
    low = (counter & 0xFFFFFFFF).to(tl.uint32)
    high = ((counter >> 32) & 0xFFFFFFFF).to(tl.uint32)
    stream = low * 0 + (tl.full((), 0, tl.int32) + stream).to(tl.uint32)
    a, b, c, d = philox(seed, low, high, stream, low * 0)

    # Lanes 2 j and 2 j + 1 are the halves of word j. A word is at least DROPOUT 2^16 if and only if
    # its high half is at least DROPOUT.
    words = tl.join(tl.join(a, c), tl.join(b, d))
    low_half = (words & 0xFFFF) >= tl.full((), DROPOUT, tl.uint32)
    high_half = words >= tl.full((), DROPOUT << 16, tl.uint32)
    return tl.join(low_half, high_half).reshape(tokens.shape[0], BLOCK_I)


def num_counters(width: int) -> int:
    """Return how many counters the elements of a row of `width` elements take."""
    return -(-width // LANES.value)


@triton.jit(do_not_specialize=["T", "keep_probability", "stream"])
def dropout_kernel(
    x_ptr,
    stride_x,
    seed_ptr,
    y_ptr,
    T,
    I,  # noqa: E741
    keep_probability,
    stream,
    DROPOUT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    """y = x / keep_probability if the element is kept, else 0.

    x    [T, I], rows stride_x apart
    seed [1] int64
    y    [T, I]

    Programs: (token tile, tile of I), the last fastest.
    """
    i_tiles = tl.cdiv(I, BLOCK_I)
    first_i = tl.program_id(0) % i_tiles * BLOCK_I
    i = first_i + tl.arange(0, BLOCK_I)
    tokens = (tl.program_id(0) // i_tiles).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    x = load_rows(x_ptr, stride_x, tokens, i, tokens < T, i < I).to(tl.float32)
    seed, row_counters = tl.load(seed_ptr), tl.cdiv(I, LANES)
    kept = keep_tile(seed, stream, tokens, first_i, row_counters, DROPOUT, BLOCK_I)
    y = tl.where(kept, tl.div_rn(x, keep_probability), 0.0)
    store_rows(y_ptr, I, tokens, i, tokens < T, i < I, y)


def launch(x: Tensor, p: float, seed: Tensor, stream: int) -> Tensor:
    """Return x / keep_probability(p) if the mask of (seed, stream) keeps the element, else 0."""
    T, I = x.shape  # noqa: E741
    # The kernel has no loop, so wide loads save less time than a copy takes.
    x = x if x.stride(1) == 1 else x.contiguous()
    y = x.new_empty((T, I))
    tile_config = TileConfig(tokens=8, step=128, warps=4, stages=1)
    launcher.run(
        dropout_kernel,
        launcher.ceil_div(T, tile_config.tokens) * launcher.ceil_div(I, tile_config.step),
        tile_config,
        dict(
            x_ptr=x,
            stride_x=x.stride(0),
            seed_ptr=seed,
            y_ptr=y,
            T=T,
            I=I,
            keep_probability=keep_probability(p),
            stream=stream,
        ),
        dict(DROPOUT=dropout_threshold(p), BLOCK_T=tile_config.tokens, BLOCK_I=tile_config.step),
    )
    return y
