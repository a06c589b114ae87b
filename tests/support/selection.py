"""Which cases run by default, and which with `--exhaustive` only."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pytest

exhaustive = pytest.mark.exhaustive


def default_cases(cases: Mapping | Iterable, *names) -> list:
    """Return the parameters of all cases; all but those in `names` are marked exhaustive.

    cases: a mapping name -> value, whose names become the ids, or values that are their own names.
    Raise KeyError if a name is not among the cases.
    """
    pairs = dict(cases) if isinstance(cases, Mapping) else {case: case for case in cases}
    unknown = [name for name in names if name not in pairs]
    if unknown:
        raise KeyError(f"{unknown} are not among the cases {list(pairs)}")
    ids = str if isinstance(cases, Mapping) else (lambda name: None)
    return [
        pytest.param(value, id=ids(name), marks=() if name in names else exhaustive)
        for name, value in pairs.items()
    ]
