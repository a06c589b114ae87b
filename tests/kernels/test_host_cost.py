"""The work of the host in a call of a layer or of a launcher: Python calls and kernel launches.

A count does not depend on the machine or its load, unlike a time. `tests/tools/host_cost.py` prints
the times. Python calls are those of all Python functions, also of torch and Triton.
"""

from __future__ import annotations

import pytest

from support.backends import needs_library
from support.fake_driver import called_code, fake_driver
from support.host_cost import launcher_call, layer_calls
from support.kernels_on_cpu import kernels_on_cpu

# Layer -> the most Python calls. Raise a number only for work that every call needs.
LAYER_CALLS = {
    "wide": dict(inference=51, forward=58, backward=48),
    "grouped": dict(inference=53, forward=60, backward=49),
    "siblings": dict(inference=104, forward=111, backward=81),
    "ffn": dict(inference=173, forward=193, backward=126),
}
# The same on the kernels, with the plans of `plans/`: what runs on a GPU.
PLANNED_CALLS = {
    "wide": dict(inference=78, forward=85, backward=83),
    "grouped": dict(inference=95, forward=102, backward=99),
    "siblings": dict(inference=144, forward=151, backward=122),
}
# The same with the plans in the native library.
NATIVE_CALLS = {
    "wide": dict(inference=56, forward=63, backward=53),
    "grouped": dict(inference=58, forward=65, backward=54),
    "siblings": dict(inference=109, forward=116, backward=86),
}
# Launcher -> launches, and the most Python calls of all of them.
LAUNCHER_CALLS = {
    "shrink_gate": (1, 54),
    "shrink_gate_backward": (1, 51),
    "shrink_dx": (1, 41),
    "weight_grad": (1, 62),
    "router_logits": (1, 43),
    "grouped_shrink": (1, 44),
    "grouped_expand": (2, 66),
    "grouped_dx": (2, 71),
    "grouped_shrink_backward": (1, 48),
    "grouped_weight_grad": (1, 63),
    "router_grad": (1, 37),
}


@needs_library
@pytest.mark.parametrize("name", LAYER_CALLS)
def test_python_calls_of_a_layer(name: str) -> None:
    """A signature that torch binds in every call is about 30 more."""
    over = {}
    for mode, call in layer_calls(name).items():
        call()
        count = len(called_code(call))
        if count > LAYER_CALLS[name][mode]:
            over[mode] = count
    assert not over


@pytest.mark.parametrize("name", PLANNED_CALLS)
def test_python_calls_of_a_layer_with_plans(name: str) -> None:
    """Without plans they are 140 to 440."""
    with fake_driver("sm_90"), kernels_on_cpu() as planned:
        over = counts_over(name, PLANNED_CALLS[name])
    assert not over
    assert not any(op.problems for op in planned.values())


@needs_library
@pytest.mark.parametrize("name", NATIVE_CALLS)
def test_python_calls_of_a_layer_with_native_plans(name: str) -> None:
    with fake_driver("sm_90") as driver, kernels_on_cpu(launch=driver.address) as planned:
        over = counts_over(name, NATIVE_CALLS[name])
    assert not over
    assert not driver.errors
    assert not any(op.problems for op in planned.values())


def counts_over(name: str, most: dict[str, int]) -> dict[str, int]:
    """Return the Python calls of a layer that are more than `most`, after its plans exist."""
    calls = layer_calls(name)
    # The second call records.
    for call in [*calls.values()] * 3:
        call()
    counts = {
        mode: len([code for code in called_code(call) if "fake_driver" not in code.co_filename])
        for mode, call in calls.items()
    }
    return {mode: count for mode, count in counts.items() if count > most[mode]}


@pytest.mark.parametrize("op", LAUNCHER_CALLS)
def test_launches_and_python_calls_of_a_launcher(op: str) -> None:
    """The first call compiles, and the second one finds what it compiled."""
    launches, most = LAUNCHER_CALLS[op]
    call = launcher_call(op)
    with fake_driver("sm_90") as driver:
        call()
        assert len(driver.launched) == len(driver.compiled) == launches
        codes = called_code(call)
    assert driver.launched[:launches] == driver.launched[launches:]
    assert len(driver.compiled) == launches
    count = len([code for code in codes if "fake_driver" not in code.co_filename])
    assert count <= most, count
