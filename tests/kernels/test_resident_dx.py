"""`resident_dx_kernel`, which keeps A in shared memory: when it is taken, and what it returns."""

from __future__ import annotations

import pytest
import torch

from moelora_kernels.kernels.common import configs, launcher
from moelora_kernels.types import NO_DROPOUT
from support.arguments import calls
from support.backends import SM_90, TRITON, Backend, op_launcher
from support.cases import Case
from support.inputs import Inputs, moved
from support.op_checks import check
from support.selection import exhaustive

# Every case has tails of tokens and columns. With one range of tokens, a program goes over all.
CASES = {
    "router": Case(T=150, I=300, router_bias=True, ranks=(32,) * 4),
    "dense": Case(T=70, I=70, gate="dense", ranks=(40, 60)),
    # A of one sibling ends within a tile, where that of the next begins.
    "siblings": Case(T=150, I=300, n=3, ranks=(5, 16, 3), aux=True),
    "two_matrices": Case(T=150, I=272, n=2, ranks=(32,) * 4),
    "share_a": Case(T=70, I=300, n=2, ranks=(48,) * 3, K=3, share_a=True),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def kernels(case: Case, dtype: torch.dtype = torch.bfloat16) -> list[str]:
    """Return the names of the kernels that a case launches."""
    (arguments,) = calls("shrink_dx", Inputs(case, dtype))
    with launcher.recording() as launches:
        op_launcher("shrink_dx")(*moved(arguments, "meta"))
    return [launch.kernel.fn.__name__ for launch in launches]


@pytest.mark.parametrize(
    "backend",
    (
        pytest.param(TRITON, id="triton", marks=TRITON.marks),
        pytest.param(SM_90, id=SM_90.name, marks=(*SM_90.marks, exhaustive)),
    ),
)
@pytest.mark.parametrize("multiprocessors", (1, 132))
@each_case
def test_right_by_float64(case: Case, multiprocessors: int, backend: Backend, monkeypatch) -> None:
    monkeypatch.setitem(configs.PROCESSORS, "sm_90", multiprocessors)
    check("shrink_dx", backend.implementation("shrink_dx"), Inputs(case, torch.bfloat16))


@pytest.mark.ptx
def test_the_compiled_loop(monkeypatch) -> None:
    """Three tiles of tokens in one program, whose copies overlap with products."""
    monkeypatch.setitem(configs.PROCESSORS, "sm_90", 1)
    case = CASES["siblings"]
    check("shrink_dx", SM_90.implementation("shrink_dx"), Inputs(case, torch.bfloat16))


@each_case
def test_cases_that_take_it(case: Case) -> None:
    with configs.assume("sm_90"):
        assert kernels(case) == ["resident_dx_kernel"]
    with configs.assume("sm_80"):
        assert kernels(case) == ["shrink_dx_kernel"]


@pytest.mark.parametrize(
    ("change", "dtype"),
    (
        (dict(dropout=0.1), torch.bfloat16),
        # dlogits and the router are float32 and float16: their product is not one of bfloat16.
        ({}, torch.float16),
        ({}, torch.float32),
        (dict(adapters=torch.float32), torch.bfloat16),
        # A of 64 rows is small, and A of 320 rows does not fit.
        (dict(ranks=(16,) * 4), torch.bfloat16),
        (dict(ranks=(80,) * 4), torch.bfloat16),
        # The routers of 48 experts.
        (dict(ranks=(3,) * 48), torch.bfloat16),
    ),
)
def test_cases_that_do_not_take_it(change: dict, dtype: torch.dtype) -> None:
    with configs.assume("sm_90"):
        assert kernels(CASES["router"]._replace(**change), dtype) == ["shrink_dx_kernel"]


def test_ranges_of_tokens_let_all_programs_run_at_once() -> None:
    """16 tiles of 256 features, and 8 ranges of 1024 tokens: 128 of 132 multiprocessors."""

    def empty(*shape: int):
        return torch.empty(shape, dtype=torch.bfloat16, device="meta")

    dh, a = empty(8192, 128), empty(128, 4096)
    with configs.assume("sm_90"), launcher.recording() as launches:
        op_launcher("shrink_dx")(dh, None, [a], [], (16,) * 8, NO_DROPOUT)
    (launch,) = launches
    assert (launch.programs, launch.arguments["t_per_program"]) == (128, 1024)
