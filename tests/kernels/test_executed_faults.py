"""Faults that are planted into the PTX of the kernels, one at a time: the execution notices them.

A barrier, a fence, a wait or a mask is removed from the PTX that Triton compiled. The kernel then
runs with early and with late copies, and its results are compared. A part of the faults changes
nothing: a fence behind which no byte was written, a wait behind the last step, one of two barriers
in a row, a mask of elements that another mask drops. LEAST is the share that must be noticed.
"""

from __future__ import annotations

import functools
import random
import re
from collections.abc import Callable, Iterator

import pytest
import torch

from moelora_kernels.kernels.common import configs
from support.arguments import calls
from support.backends import SPLIT, needs_triton, op_launcher
from support.cases import Case
from support.inputs import Inputs
from support.op_checks import WIDE_OPS, compare
from support.selection import exhaustive

pytestmark = [pytest.mark.ptx, needs_triton]

CASE = Case(T=40, I=400, O=400, router_bias=True)
# With one multiprocessor, a program of `resident_dx_kernel` goes over all tokens.
RESIDENT = Case(T=150, I=300, ranks=(32,) * 4, router_bias=True)
MOST = 12


def _with_three_more(match: re.Match) -> str:
    return f"{match.group(1)}{int(match.group(2)) + 3};"


def _without_predicate(match: re.Match) -> str:
    return match.group(1)


def _whole_copy(match: re.Match) -> str:
    return f"{match.group(1)}, {int(match.group(2), 16)};"


FENCE = "fence.proxy.async.shared::cta;"


def _without_fences(match: re.Match) -> str:
    return match.group().replace(FENCE, "")


# name -> pattern of an instruction, and what takes its place.
FAULTS: dict[str, tuple[str, str | Callable]] = {
    "barrier": (r"bar\.sync\s+0;", ""),
    # With all others before the next product: the package adds one (kernels/README.md).
    "fence": (rf"{FENCE}(?:(?:(?!wgmma\.mma|\n\$L)[\s\S])*{FENCE})?", _without_fences),
    "wait for copies": (r"(cp\.async\.wait_group\s+)(\d+);", _with_three_more),
    "wait for products": (r"(wgmma\.wait_group\.sync\.aligned\s+)(\d+);", _with_three_more),
    "mask of a load or store": (r"@%p\d+ ((?:ld|st)\.global)", _without_predicate),
    "mask of a copy": (
        r"(cp\.async\.c[ga]\.shared\.global \[[^\]]*\], \[[^\]]*\], 0x(\w+)), %r\d+;",
        _whole_copy,
    ),
}

# The share of the planted faults that is noticed, at least, in every kernel and with every version
# of Triton. Triton 3.6 emits barriers that others make redundant: in weight_grad 8 of 12 are
# noticed, and with Triton 3.9 all. Triton waits for each product; of several products in a row into
# the same registers only the last wait is needed: in shrink_gate 2 of 6 are noticed.
LEAST = {
    "barrier": 0.65,
    "fence": 0.15,
    "wait for copies": 0.2,
    "wait for products": 0.3,
    "mask of a load or store": 0.4,
    "mask of a copy": 0.3,
}


def planted(ptx: str, fault: str) -> Iterator[str]:
    """Yield the PTX with one fault, at 12 places at most."""
    pattern, place = FAULTS[fault]
    matches = list(re.finditer(pattern, ptx))
    if len(matches) > MOST:
        matches = random.Random(0).sample(matches, MOST)
    for match in matches:
        text = place if isinstance(place, str) else place(match)
        yield ptx[: match.start()] + text + ptx[match.end() :]


def without_any(ptx: str, fault: str) -> list[str]:
    """Return the PTX with the fault at every place; none if it has no place."""
    changed = re.sub(*FAULTS[fault], ptx)
    return [changed] if changed != ptx else []


def failures(kernel: str, architecture: str, change: Callable) -> tuple[int, list[str]]:
    """Return how many changed kernels ran, and the messages of those that failed.

    change: PTX -> the changed kernels.
    """
    from ptx.launcher import executed

    op, case = ("shrink_dx", RESIDENT) if kernel == "resident_dx" else (kernel, CASE)
    (arguments,) = calls(op, Inputs(case, torch.bfloat16))
    launch = op_launcher(op)
    if op in SPLIT:
        launch = functools.partial(launch, split=1)
    with executed(architecture) as executor:
        launch(*arguments)
    (compiled,) = executor.kernels.values()
    kernels, messages = list(change(compiled.ptx)), []
    for ptx in kernels:
        copies = iter(("early", "late"))

        def run(*arguments, ptx=ptx, copies=copies):
            with executed(architecture, copies=next(copies), change=lambda name, old: ptx):
                return launch(*arguments)

        try:
            compare(op, run, arguments, torch.bfloat16)
        except AssertionError as error:
            messages.append(str(error))
    return len(kernels), messages


each_kernel = pytest.mark.parametrize(
    ("kernel", "architecture"),
    (
        pytest.param("shrink_dx", "sm_90"),
        pytest.param("resident_dx", "sm_90", marks=exhaustive),
        *(pytest.param(op, "sm_90", marks=exhaustive) for op in WIDE_OPS if op != "shrink_dx"),
        *(pytest.param(op, "sm_80", marks=exhaustive) for op in WIDE_OPS),
    ),
)


@each_kernel
@pytest.mark.parametrize("fault", FAULTS)
def test_one_fault_at_a_time(fault: str, kernel: str, architecture: str, monkeypatch) -> None:
    if kernel == "resident_dx":
        monkeypatch.setitem(configs.PROCESSORS, architecture, 1)
    total, messages = failures(kernel, architecture, lambda ptx: planted(ptx, fault))
    assert len(messages) >= LEAST[fault] * total, f"{len(messages)} of {total}: {messages}"


@each_kernel
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_at_every_place(fault: str, kernel: str, architecture: str, monkeypatch) -> None:
    if kernel == "resident_dx":
        monkeypatch.setitem(configs.PROCESSORS, architecture, 1)
    total, messages = failures(kernel, architecture, lambda ptx: without_any(ptx, fault))
    assert len(messages) == total
