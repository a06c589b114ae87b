"""The model that the design was drawn up with: how long a product takes at assumed rates.

    time = max(FLOPs / rate, bytes / bandwidth)

Bytes: each operand read once, each result written once, 2 per element. Sizes: T tokens, I
in_features, O out_features, R columns of rank space. Times are in microseconds. What comes out is a
prediction, never a measurement: nothing else costs time, no launch, no ramp-up, no tail.
"""

from typing import NamedTuple


class Rates(NamedTuple):
    """Rates that a GPU is assumed to reach: bf16 products [TFLOP/s], device memory [TB/s]."""

    tflops: float
    tbytes: float


# Assumed before anything was measured: about 80 % of the data sheet's matrix rate and 90 % of its
# bandwidth. Keys are the names that the driver reports; slower boards of a family are not in it.
ASSUMED = {
    "NVIDIA H200": Rates(790.0, 4.3),
    "NVIDIA H100 80GB HBM3": Rates(720.0, 2.9),
    "NVIDIA A100-SXM4-80GB": Rates(270.0, 1.75),
    "NVIDIA L40S": Rates(250.0, 0.78),
    "NVIDIA GeForce RTX 4090": Rates(160.0, 0.93),
    "NVIDIA B200": Rates(1600.0, 7.0),
}

# Every time computed from these is NaN: no prediction.
UNKNOWN = Rates(float("nan"), float("nan"))

# Microseconds of the host per launch: the middle of what Triton (11 to 12) and precompiled C++
# (2 to 3) are reported to take.
LAUNCH = {"triton": 11.5, "native": 2.5}


def rates(device: str, dtype: str) -> Rates:
    """The assumed rates of a GPU by its name; UNKNOWN for others and for other dtypes than bf16."""
    return ASSUMED.get(device, UNKNOWN) if dtype == "bf16" else UNKNOWN


def launch(of: Rates, kind: str) -> float:
    """Microseconds of the host per launch, on the machines whose rates are assumed."""
    return float("nan") if of is UNKNOWN else LAUNCH[kind]


def limit(of: Rates, flops: float, moved: float) -> float:
    """The larger of the times of `flops` operations and of `moved` bytes."""
    return max(flops / (of.tflops * 1e6), moved / (of.tbytes * 1e6))


def one_pass(of: Rates, tokens: int, features: int) -> float:
    """[T, d] read or written once."""
    return limit(of, 0.0, 2.0 * tokens * features)


def product(of: Rates, T: int, I: int, O: int) -> float:  # noqa: E741
    """x Wt or dy W: 2 T I O operations; x, W and y. With O = R it is the shrink x At."""
    return limit(of, 2.0 * T * I * O, 2.0 * (T * I + I * O + T * O))


def expand(of: Rates, T: int, R: int, O: int, passes: int) -> float:  # noqa: E741
    """u Bt: y in one pass where it is only written, in two where it is read and added to."""
    return limit(of, 2.0 * T * R * O, 2.0 * (T * R + R * O + passes * T * O))


def weight_grad(of: Rates, T: int, d: int, R: int) -> float:
    """dh^T x or dy^T u: both read once, the result [R, d] in float32."""
    return limit(of, 2.0 * T * d * R, 2.0 * (T * d + T * R) + 4.0 * R * d)


def layer(of: Rates, T: int, I: int, O: int, R: int, mode: str, passes: int | None) -> float:  # noqa: E741
    """A layer forward, or forward and backward; passes None: the frozen layer alone.

        forward     x Wt, x At, u Bt                        over R columns, whatever the routing
        backward    dy W, dy B, dh A, dh^T x, dy^T u

    passes: 1 expands first and lets the base product add to it, its read of y hidden; 2 computes
    the base first and adds to that, as eager and compiled PyTorch do.
    """
    forward, backward = product(of, T, I, O), product(of, T, O, I)
    if passes is not None:
        forward += product(of, T, I, R) + expand(of, T, R, O, passes)
        backward += product(of, T, O, R) + expand(of, T, R, I, passes)
        backward += weight_grad(of, T, I, R) + weight_grad(of, T, O, R)
    return forward if mode == "fwd" else forward + backward


def crossover(of: Rates) -> float:
    """R / K from which on experts on their own tokens win over products with all experts.

    Wide is bound by arithmetic there, 6 T R (I + O) operations forward and backward; grouped reads
    and adds rows of x and y for every slot, 8 T K (I + O) bytes: equal at (4/3) rate / bandwidth.
    """
    return 4.0 / 3.0 * of.tflops / of.tbytes
