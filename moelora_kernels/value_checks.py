"""Checks of single values. An error names the argument, the expected values and the given one."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple


class Interval(NamedTuple):
    """The allowed numbers of an option: a text for messages, and a test."""

    text: str
    contains: Callable[[float], bool]
    whole: bool = False


COUNT = Interval("a whole number from 1", lambda n: n >= 1, whole=True)
FINITE = Interval("a finite number", math.isfinite)
NOT_NEGATIVE = Interval("a number from 0", lambda n: n >= 0)
POSITIVE = Interval("a number above 0", lambda n: n > 0)
BELOW_ONE = Interval("a number in [0, 1)", lambda n: 0 <= n < 1)
UP_TO_ONE = Interval("a number in (0, 1]", lambda n: 0 < n <= 1)


def check_one_of(name: str, value: Any, values: tuple) -> None:
    """Raise ValueError if value is not one of values."""
    # `in` alone would accept True and 1.0 for 1.
    is_plain = value is None or (isinstance(value, (str, int)) and not isinstance(value, bool))
    if not (is_plain and value in values):
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, values))}, got {value!r}")


def check_number(name: str, value: Any, interval: Interval = FINITE) -> None:
    """Raise ValueError if value is not a finite number of the interval."""
    types = int if interval.whole else (int, float)
    is_number = isinstance(value, types) and not isinstance(value, bool) and math.isfinite(value)
    if not (is_number and interval.contains(value)):
        raise ValueError(f"{name}: expected {interval.text}, got {value!r}")


def check_experts(name: str, experts: Any, num_experts: int) -> None:
    """Raise ValueError or TypeError unless experts are different whole numbers below num_experts.

    num_experts: the number of experts, a shared expert included.
    """
    expected = f"different numbers of experts from 0 to {num_experts - 1}"
    if not isinstance(experts, (tuple, list)):
        raise TypeError(f"{name}: expected {expected}, got {experts!r}")
    if any(isinstance(e, bool) or not isinstance(e, int) for e in experts):
        raise TypeError(f"{name}: expected {expected}, got {experts!r}")
    if len({*experts}) < len(experts) or not all(0 <= e < num_experts for e in experts):
        raise ValueError(f"{name}: expected {expected}, got {[*experts]}")
