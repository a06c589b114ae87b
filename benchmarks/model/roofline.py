"""A roofline model: the time of a product at the rates that a GPU is assumed to reach.

    time = max(FLOPs / rate, bytes / bandwidth)

Bytes: every operand is read once, every result is written once, at 2 bytes per element. Sizes: T
tokens, I in_features, O out_features, R columns in rank space. Times are in microseconds. They are
predictions, not measurements: launches, ramp-up and tails cost nothing in the model.
"""

from typing import NamedTuple


class Rates(NamedTuple):
    """The rates that a GPU is assumed to reach: bf16 products [TFLOP/s], memory [TB/s]."""

    tflops: float
    tbytes: float


# Assumed before anything was measured: about 80 % of the data sheet's matrix rate and 90 % of its
# bandwidth. The keys are the names that the driver reports. Slower boards of a family are missing.
ASSUMED = {
    "NVIDIA H200": Rates(790.0, 4.3),
    "NVIDIA H100 80GB HBM3": Rates(720.0, 2.9),
    "NVIDIA A100-SXM4-80GB": Rates(270.0, 1.75),
    "NVIDIA L40S": Rates(250.0, 0.78),
    "NVIDIA GeForce RTX 4090": Rates(160.0, 0.93),
    "NVIDIA B200": Rates(1600.0, 7.0),
    "NVIDIA GeForce RTX 5090": Rates(168.0, 1.6),
}

# Every time that is computed from these is NaN: there is no prediction.
UNKNOWN = Rates(float("nan"), float("nan"))

# Microseconds of the host per launch: the middle of the published values for Triton (11 to 12) and
# for precompiled C++ (2 to 3).
LAUNCH = {"triton": 11.5, "native": 2.5}


def assumed_rates(device: str, dtype: str) -> Rates:
    """Return the rates of a GPU by its name; UNKNOWN for other devices and for dtypes but bf16."""
    return ASSUMED.get(device, UNKNOWN) if dtype == "bf16" else UNKNOWN


def launch(rates: Rates, kind: str) -> float:
    """Return microseconds of the host per launch; NaN on a device without assumed rates."""
    return float("nan") if rates is UNKNOWN else LAUNCH[kind]


def limit(rates: Rates, flops: float, moved: float) -> float:
    """Return the time of `flops` operations or of `moved` bytes, the larger of the two."""
    return max(flops / (rates.tflops * 1e6), moved / (rates.tbytes * 1e6))


def one_pass(rates: Rates, tokens: int, features: int) -> float:
    """Return the time to read or write [T, d] once."""
    return limit(rates, 0.0, 2.0 * tokens * features)


def product(rates: Rates, T: int, I: int, O: int) -> float:  # noqa: E741
    """Return the time of x Wt or dy W: 2 T I O operations; x, W and y. O = R: the shrink x At."""
    return limit(rates, 2.0 * T * I * O, 2.0 * (T * I + I * O + T * O))


def expand(rates: Rates, T: int, R: int, O: int, passes: int) -> float:  # noqa: E741
    """Return the time of u Bt. passes: 1 if y is only written, 2 if y is read and added to."""
    return limit(rates, 2.0 * T * R * O, 2.0 * (T * R + R * O + passes * T * O))


def weight_grad(rates: Rates, T: int, d: int, R: int) -> float:
    """Return the time of dh^T x or dy^T u: both are read once, the result [R, d] is float32."""
    return limit(rates, 2.0 * T * d * R, 2.0 * (T * d + T * R) + 4.0 * R * d)


def layer(rates: Rates, T: int, I: int, O: int, R: int, mode: str, passes: int | None) -> float:  # noqa: E741
    """Return the time of a layer forward, or forward and backward.

        forward     x Wt, x At, u Bt                        over R columns, whatever the routing
        backward    dy W, dy B, dh A, dh^T x, dy^T u

    passes: None: the frozen layer alone; 1: the expand goes first and the base product adds to it,
    with a hidden read of y; 2: the base product goes first and the expand adds to it, like eager
    and compiled PyTorch.
    """
    forward, backward = product(rates, T, I, O), product(rates, T, O, I)
    if passes is not None:
        forward += product(rates, T, I, R) + expand(rates, T, R, O, passes)
        backward += product(rates, T, O, R) + expand(rates, T, R, I, passes)
        backward += weight_grad(rates, T, I, R) + weight_grad(rates, T, O, R)
    return forward if mode == "fwd" else forward + backward


def crossover(rates: Rates) -> float:
    """Return the R / K above which grouped is faster than wide.

    Wide is bound by arithmetic there: 6 T R (I + O) operations, forward and backward. Grouped reads
    and adds rows of x and y for every slot: 8 T K (I + O) bytes. Both take the same time at
    R / K = (4/3) rate / bandwidth.
    """
    return 4.0 / 3.0 * rates.tflops / rates.tbytes
