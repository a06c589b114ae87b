"""Which calls of a layer op have a plan: their keys, how many keys are kept, and refused work.

Every test runs on the replay in Python and on that of the native library.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
import triton

from moelora_kernels.kernels.common import launcher
from moelora_kernels.plans import PlannedOp, cache
from support.plans import BACKENDS, counted, planned_ops, plans_of, run, shifted, wide_arguments


@pytest.fixture(params=BACKENDS)
def wide(request) -> Iterator[PlannedOp]:
    """The op `wide` with plans, on a driver that computes nothing."""
    with planned_ops(request.param, interpret=False) as (planned, _):
        yield planned["wide"]


def test_another_key_has_another_plan(wide) -> None:
    """Tokens, strides, dtypes, alignment, and options of the op."""
    arguments = wide_arguments()
    x, *others = arguments
    longer = wide_arguments(T=10)
    temperature = len(arguments) - 4
    assert arguments[temperature] == 1.0
    changed = [*arguments]
    changed[temperature] = 2.0
    calls = [
        arguments,
        longer,
        [shifted(x), *others],
        [torch.cat([x, x], dim=1)[:, : x.shape[1]], *others],
        changed,
    ]
    for count, call in enumerate(calls, start=1):
        for _ in range(3):
            run(wide, call)
        assert len(plans_of({"wide": wide})) == len(wide.plans) == count


def test_the_key_that_was_seen_first_leaves(wide, monkeypatch) -> None:
    monkeypatch.setattr(cache, "MAX_KEYS", 2)
    calls = [wide_arguments(T) for T in (5, 6, 7)]
    for call in calls:
        run(wide, call)
    keys = [cache.key_of(call)[0] for call in calls]
    assert [*wide.plans] == keys[1:]


def test_work_that_is_not_known_is_never_replayed(wide) -> None:
    arguments = wide_arguments()
    function, calls = wide.function, []

    def with_sine(*arguments):
        calls.append(len(calls))
        ys, *others = function(*arguments)
        return [y.sin() for y in ys], *others

    wide.function = with_sine
    for _ in range(4):
        run(wide, arguments)
    assert len(calls) == 4
    assert [*wide.problems] == ["aten.sin.default is not known"]


def test_an_op_that_returns_its_input_is_never_replayed(wide) -> None:
    arguments = wide_arguments()
    wide.function = lambda x, *_: (x.view(-1),)
    for _ in range(3):
        (y,) = wide(*arguments)
        assert y.data_ptr() == arguments[0].data_ptr()
    assert wide.problems
    assert not plans_of({"wide": wide})


def test_a_call_that_is_observed_is_not_replayed(wide) -> None:
    """A profiler of Triton, a recording of launches, and a replaced launcher see every launch."""
    arguments = wide_arguments()
    for _ in range(3):
        run(wide, arguments)
    count = Counter()
    wide.function = counted(wide.function, "wide", count)
    run(wide, arguments)
    assert not count
    with launcher.recording() as launches:
        run(wide, arguments)
    assert count["wide"] == len(launches) == 1
    hook = triton.knobs.runtime.launch_enter_hook
    hook.add(print_nothing)
    try:
        run(wide, arguments)
    finally:
        hook.remove(print_nothing)
    assert count["wide"] == 2
    with mock.patch.object(launcher, "run"):
        run(wide, arguments)
    assert count["wide"] == 3


def print_nothing(*_) -> None: ...
