"""Device functions: products of two tiles, summed in float32.

Tensor cores compute each product of two elements exactly. They add the products of one instruction
and the running sum, and cut the result to float32; they do not round it. So the error of a sum
grows with the number of instructions, which is its length over 8 (TF32) or 16 (16 bits), times
three if an operand is split into three parts.
"""

import re

import triton
import triton.language as tl
from triton.language import core

# Whether this Triton orders the steps of a wgmma by itself, from 3.9 on (`kernels/README.md`).
IS_ORDERED = tuple(map(int, re.findall(r"\d+", triton.__version__)[:2])) >= (3, 9)


def _is_wgmma(semantic) -> bool:
    """Return whether a kernel is compiled for wgmma, which other architectures do not have."""
    return semantic.builder.options.arch == "sm90"


@core.builtin
def fence_copies(_semantic=None):
    """Let wgmma see the bytes that asynchronous copies wrote to shared memory."""
    if _is_wgmma(_semantic) and not IS_ORDERED:
        core.inline_asm_elementwise(
            "fence.proxy.async.shared::cta; mov.b32 $0, 0;", "=r,r", [0], core.int32,
            is_pure=False, pack=1, _semantic=_semantic,
        )  # fmt: skip


@core.builtin
def before_product(left, _semantic=None):
    """Return an operand that is computed in registers before a wgmma begins to read them."""
    if not _is_wgmma(_semantic) or IS_ORDERED:
        return left
    return core.inline_asm_elementwise(
        "mov.b32 $0, $1;", "=r,r", [left], left.dtype, is_pure=False,
        pack=32 // left.dtype.primitive_bitwidth, _semantic=_semantic,
    )  # fmt: skip


@core.builtin
def after_product(total, wait, _semantic=None):
    """Return `total` after the end of the wgmma that computes it, if this must be waited for.

    wait: the package asks for it. Without IS_ORDERED it is needed everywhere.
    """
    if not _is_wgmma(_semantic) or (IS_ORDERED and not wait):
        return total
    # No instruction: Triton waits because the loop uses the result.
    return core.inline_asm_elementwise(
        "", "=r,0", [total], total.dtype, is_pure=True, pack=1, _semantic=_semantic
    )


@triton.jit
def select_from(values, i):
    """Return values[i] of a tuple, for an i that is known at run time only."""
    selected = values[0]
    for j in tl.static_range(1, len(values)):
        if i == j:
            selected = values[j]
    return selected


@triton.jit
def product(
    left,
    right,
    total,
    UPCAST: tl.constexpr,
    COMPUTED: tl.constexpr = False,
    WAIT: tl.constexpr = False,
):
    """Return total + left @ right.

    `right` is rounded to the dtype of `left`. float32 tiles keep float32 precision: each operand is
    split into parts of TF32 (`tf32x3`).

    A wgmma reads its operands while the loop goes on, unless Triton waits for its end. It must wait
    in two cases. COMPUTED: `left` is computed in the loop, so it is in registers; Triton protects
    them from 3.9 on, but the assembler before CUDA 13.3 does not. WAIT: another product takes the
    same loaded tile through registers; then Triton loads the next tile too early.
    """
    right = right.to(left.dtype)
    if UPCAST:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    else:
        if COMPUTED:
            left = before_product(left)
        fence_copies()
    total = tl.dot(left, right, total, input_precision="tf32x3")
    if not UPCAST:
        total = after_product(total, COMPUTED or WAIT)
    return total


@triton.jit
def exact_product(left, right, total, UPCAST: tl.constexpr, WAIT: tl.constexpr = False):
    """Return total + left @ right without rounding a float32 `right` to a 16-bit `left`.

    Three bfloat16 hold the 24 bits of a float32, so under a bfloat16 `left` the result is the sum
    of three products, each of them exact. float16 has too small a range for that, but TF32 holds a
    float16 exactly. WAIT: see `product`.
    """
    if left.dtype == right.dtype:
        total = product(left, right, total, UPCAST, WAIT=WAIT)
    elif left.dtype == tl.bfloat16:
        for _ in tl.static_range(3):
            high = right.to(tl.bfloat16)
            right = right - high.to(tl.float32)
            total = product(left, high, total, UPCAST, WAIT=WAIT)
    else:
        total = product(left.to(tl.float32), right, total, UPCAST)
    return total


@triton.jit
def exact_left_product(left, right, total, UPCAST: tl.constexpr):
    """Return total + left @ right without rounding a float32 `left` to the bfloat16 of `right`.

    `left` becomes the sum of two bfloat16, which hold 16 of its 24 bits.
    """
    if left.dtype == right.dtype:
        total = product(left, right, total, UPCAST)
    else:
        tl.static_assert(right.dtype == tl.bfloat16)
        for _ in tl.static_range(2):
            high = left.to(tl.bfloat16)
            left = left - high.to(tl.float32)
            total = product(high, right, total, UPCAST, COMPUTED=True)
    return total


@triton.jit
def is_finite(tile):
    """Return for every element whether it is neither NaN nor infinite."""
    return tl.abs(tile) < float("inf")


@triton.jit
def exact_sum(left, selection, total, UPCAST: tl.constexpr):
    """Return total + left @ selection for a float32 `left`: sums of selected elements.

    `selection` is a bfloat16 matrix of zeros and ones; a sum selects at most 127 elements. `left`
    is the sum of three bfloat16, and their products with 0 and 1 are exact; their sums are cut.

    An element that is not finite reaches only the sums that select it. The products would carry it
    to all sums of its row, because 0 * NaN is NaN. So they multiply the finite elements only, and
    another product counts the infinities: 1 for infinity, 128 for minus infinity, both for NaN.
    """
    rest = tl.where(is_finite(left), left, 0.0)
    for _ in tl.static_range(3):
        high = rest.to(tl.bfloat16)
        rest = rest - high.to(tl.float32)
        if not UPCAST:
            high = before_product(high)
        total = product(high, selection, total, UPCAST)
    code = tl.where(left < float("inf"), 0.0, 1.0) + tl.where(left > float("-inf"), 0.0, 128.0)
    code = code.to(tl.bfloat16)
    if not UPCAST:
        code = before_product(code)
    counts = product(code, selection, tl.zeros_like(total), UPCAST).to(tl.int32)
    total += tl.where(counts % 128 > 0, float("inf"), 0.0)
    total += tl.where(counts >= 128, float("-inf"), 0.0)
    return total
