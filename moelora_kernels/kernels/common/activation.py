"""Device functions: the activations of whole-FFN experts, and their slopes, in float32."""

import triton
import triton.language as tl

ROOT_HALF = tl.constexpr(0.7071067811865476)
# 2 sqrt(2 / pi).
TWO_ROOTS = tl.constexpr(1.5957691216057308)
# 1 / sqrt(2 pi).
DENSITY = tl.constexpr(0.3989422804014327)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def sigmoid(z):
    """Return 1 / (1 + exp(-z))."""
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def normal_cdf(z):
    """Return the distribution function of the standard normal distribution, within 1e-7.

    Formula 7.1.26 of Abramowitz and Stegun, Handbook of Mathematical Functions. `tl.erf` has a
    branch in every thread.
    """
    y = tl.abs(z) * ROOT_HALF
    t = 1.0 / (1.0 + 0.3275911 * y)
    polynomial = ((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736
    tail = 0.5 * (polynomial * t + 0.254829592) * t * tl.exp(-y * y)
    return tl.where(z < 0, tail, 1.0 - tail)


@triton.jit
def tanh_argument(z):
    """Return 2 y of GELU by tanh: z sigmoid(2 y) with y = sqrt(2 / pi) (z + 0.044715 z^3)."""
    return (z + z * z * z * CUBIC) * TWO_ROOTS


@triton.jit
def activation(z, ACTIVATION: tl.constexpr):
    """Return act(z) of an activation of `types.FFN_ACTIVATIONS`."""
    if ACTIVATION == "silu":
        return z * sigmoid(z)
    elif ACTIVATION == "relu":
        # A NaN stays.
        return tl.where(z < 0, 0.0, z)
    elif ACTIVATION == "gelu":
        return z * normal_cdf(z)
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        return z * sigmoid(tanh_argument(z))


@triton.jit
def activation_slope(z, ACTIVATION: tl.constexpr):
    """Return act'(z); 0 for relu at 0."""
    if ACTIVATION == "silu":
        share = sigmoid(z)
        return share * (1.0 + z * (1.0 - share))
    elif ACTIVATION == "relu":
        return tl.where(z > 0, 1.0, 0.0)
    elif ACTIVATION == "gelu":
        density = tl.exp(-0.5 * z * z) * DENSITY
        return normal_cdf(z) + z * density
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        share = sigmoid(tanh_argument(z))
        inner = (1.0 + 3.0 * (z * z * CUBIC)) * TWO_ROOTS
        return share + z * share * (1.0 - share) * inner
