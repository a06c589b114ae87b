"""Branches: of all threads, of some programs, of some threads of a program."""

from __future__ import annotations

import numpy as np
import pytest

from ptx.errors import PtxError
from ptx.harness import address, run

# The number of a thread over all programs in %r30.
NUMBER = "mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x; mad.lo.s32 %r30, %r1, %r2, %r0;"
STORE = "mad.wide.u32 %rd90, %r30, 4, %rd0; st.global.b32 [%rd90], %r9;"


def loop(bound: str) -> str:
    """Return PTX that adds 0, 1, ... to %r9, `bound` times."""
    return f"""mov.b32 %r9, 0; mov.b32 %r8, 0;
    LOOP: setp.ge.s32 %p1, %r8, {bound}; @%p1 bra DONE;
    add.s32 %r9, %r9, %r8; add.s32 %r8, %r8, 1; bra.uni LOOP;
    DONE:"""


def sums(counts: np.ndarray) -> np.ndarray:
    return counts * (counts - 1) // 2


@pytest.mark.parametrize("programs", (1, 3, 300))
def test_programs_that_loop_more_or_less_often(programs: int) -> None:
    result = np.zeros((programs, 32), np.uint32)
    run(NUMBER + "and.b32 %r7, %r1, 7;" + loop("%r7") + "bar.sync 0;" + STORE, result,
        programs=programs)  # fmt: skip
    assert (result == sums(np.arange(programs) % 8)[:, None]).all()


@pytest.mark.parametrize("programs", (1, 3))
def test_threads_that_loop_more_or_less_often(programs: int) -> None:
    """They wait for one another behind the loop: a barrier is possible there."""
    result = np.zeros((programs, 64), np.uint32)
    body = NUMBER + "add.s32 %r7, %r0, %r1; and.b32 %r7, %r7, 5;" + loop("%r7") + "bar.sync 0;"
    run(body + STORE, result, programs=programs, threads=64)
    counts = (np.arange(64)[None, :] + np.arange(programs)[:, None]) & 5
    assert (result == sums(counts)).all()


def test_nested_branches() -> None:
    result = np.zeros((4, 32), np.uint32)
    run(
        NUMBER + """mov.b32 %r9, 1;
        setp.lt.u32 %p1, %r0, 16; @%p1 bra LOW;
        setp.eq.u32 %p2, %r1, 2; @%p2 bra HIGH_OF_TWO;
        add.s32 %r9, %r9, 10; bra MEET;
        HIGH_OF_TWO: add.s32 %r9, %r9, 20; bra MEET;
        LOW: and.b32 %r8, %r0, 1; setp.eq.u32 %p3, %r8, 0; @!%p3 bra MEET;
        add.s32 %r9, %r9, 30;
        MEET: bar.sync 0;""" + STORE,
        result, programs=4,
    )  # fmt: skip
    expected = np.full((4, 32), 11)
    expected[2] = 21
    expected[:, :16] = np.where(np.arange(16) % 2 == 0, 31, 1)
    assert (result == expected).all()


def test_a_barrier_of_threads_that_have_parted() -> None:
    body = "setp.lt.u32 %p1, %r0, 16; @%p1 bra A; bar.sync 0; A: mov.u32 %r1, 0;"
    with pytest.raises(PtxError, match="threads that must run it together have parted"):
        run(body)


def test_threads_that_end_early() -> None:
    result = np.zeros(32, np.uint32)
    run(f"{address(0, 4)} setp.lt.u32 %p1, %r0, 5; @%p1 ret; st.global.b32 [%rd90], %r0;", result)
    assert result.tolist() == [0] * 5 + list(range(5, 32))


def test_programs_that_part_keep_their_copies_and_shared_memory() -> None:
    """A copy is issued by all programs, and waited for after they have parted."""
    source, result = np.arange(128, dtype=np.uint32), np.zeros(128, np.uint32)
    for late in (False, True):
        run(
            NUMBER + """shl.b32 %r20, %r0, 2; mad.wide.u32 %rd91, %r30, 4, %rd1;
            cp.async.ca.shared.global [%r20], [%rd91], 4; cp.async.commit_group;
            mov.b32 %r9, 0; and.b32 %r7, %r1, 1; setp.eq.s32 %p1, %r7, 0; @%p1 bra EVEN;
            cp.async.wait_group 0; bar.sync 0; xor.b32 %r21, %r20, 4; ld.shared.b32 %r9, [%r21];
            bra END;
            EVEN: cp.async.wait_group 0; bar.sync 0; ld.shared.b32 %r9, [%r20];
            END:""" + STORE,
            result, source, programs=4, shared=128, late=late,
        )  # fmt: skip
        number = np.arange(128)
        assert (result == np.where(number // 32 % 2, number ^ 1, number)).all()
