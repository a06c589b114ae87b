"""Device functions: products of two tiles, summed in float32."""

import triton
import triton.language as tl


@triton.jit
def pick(tensors, i):
    """tensors[i] of a tuple, for an i known at run time only."""
    found = tensors[0]
    for j in tl.static_range(1, len(tensors)):
        if i == j:
            found = tensors[j]
    return found


@triton.jit
def product(left, right, total, UPCAST: tl.constexpr):
    """total + left @ right, both in the dtype of left; float32 stays float32 (no TF32 rounding)."""
    right = right.to(left.dtype)
    if UPCAST:
        left = left.to(tl.float32)
        right = right.to(tl.float32)
    return tl.dot(left, right, total, input_precision="tf32x3")


@triton.jit
def exact_product(left, right, total, UPCAST: tl.constexpr):
    """total + left @ right without rounding a float32 `right` to the dtype of a 16-bit left.

    Three bfloat16 hold the 24 bits of a float32, so under a bfloat16 left the product is the sum of
    three; float16 lacks the range for that, but TF32 holds it exactly.
    """
    if left.dtype == right.dtype:
        total = product(left, right, total, UPCAST)
    elif left.dtype == tl.bfloat16:
        for _ in tl.static_range(3):
            part = right.to(tl.bfloat16)
            right = right - part.to(tl.float32)
            total = product(left, part, total, UPCAST)
    else:
        total = product(left.to(tl.float32), right, total, UPCAST)
    return total


@triton.jit
def exact_sum(left, chosen, total, UPCAST: tl.constexpr):
    """total + left @ chosen for a float32 left and a bfloat16 matrix of zeros and ones.

    As above: left is the sum of three bfloat16, and their products with 0 and 1 are exact.
    """
    for _ in tl.static_range(3):
        part = left.to(tl.bfloat16)
        left = left - part.to(tl.float32)
        total = product(part, chosen, total, UPCAST)
    return total
