"""Exchanges between the threads of a warp; warps, and threads, that have parted."""

from __future__ import annotations

import numpy as np
import pytest

from ptx.errors import PtxError, Unsupported
from ptx.harness import address, run

LANES = np.arange(64) % 32
LOAD = f"{address(0, 4)} ld.global.b32 %r1, [%rd90];"


def store(parameter: int, register: str) -> str:
    return f"{address(parameter, 4)} st.global.b32 [%rd90], {register};"


def drawn() -> np.ndarray:
    return np.random.default_rng(1).integers(-50, 50, 64).astype(np.int32)


def test_shuffles_and_the_smallest_of_a_warp() -> None:
    values = drawn()
    flipped, first, least = (np.zeros(64, np.int32) for _ in range(3))
    run(
        f"""{LOAD}
        shfl.sync.bfly.b32 %r2, %r1, 5, 31, -1;
        shfl.sync.idx.b32 %r3, %r1, 7, 31, -1;
        redux.sync.min.s32 %r4, %r1, -1;
        {store(1, "%r2")} {store(2, "%r3")} {store(3, "%r4")}""",
        values, flipped, first, least, threads=64,
    )  # fmt: skip
    lanes = np.arange(64)
    assert (flipped == values[lanes ^ 5]).all()
    assert (first == values[lanes // 32 * 32 + 7]).all()
    assert (least == values.reshape(2, 32).min(1).repeat(32)).all()


@pytest.mark.parametrize("distance", (0, 1, 16, 31))
def test_a_shuffle_from_a_lower_lane(distance: int) -> None:
    """The lowest lanes keep their value, and a predicate says so."""
    values = drawn()
    shifted, inside = np.zeros(64, np.int32), np.zeros(64, np.int32)
    run(
        f"""{LOAD} mov.b32 %r5, {distance}; mov.b32 %r6, 0;
        shfl.sync.up.b32 %r2|%p1, %r1, %r5, %r6, -1; selp.b32 %r3, 1, 0, %p1;
        {store(1, "%r2")} {store(2, "%r3")}""",
        values, shifted, inside, threads=64,
    )  # fmt: skip
    valid = distance <= LANES
    assert (inside == valid).all()
    assert (shifted == np.where(valid, np.roll(values, distance), values)).all()


def test_votes() -> None:
    values, votes = drawn(), np.zeros(64, np.uint32)
    run(
        f"""{LOAD} setp.gt.s32 %p1, %r1, 0; vote.sync.ballot.b32 %r2, %p1, -1; {store(1, "%r2")}""",
        values, votes, threads=64,
    )  # fmt: skip
    expected = [sum(1 << lane for lane in range(32) if w[lane] > 0) for w in values.reshape(2, 32)]
    assert votes.tolist() == np.repeat(expected, 32).tolist()


def test_warps_that_vote_more_or_less_often() -> None:
    """Warp 0 votes twice, warp 1 five times; lane l votes yes in the first l % 8 rounds."""
    result = np.zeros(64, np.uint32)
    run(
        f"""setp.lt.u32 %p1, %r0, 32; selp.b32 %r7, 2, 5, %p1; and.b32 %r6, %r0, 7;
        mov.b32 %r8, 0; mov.b32 %r9, 0;
        LOOP: setp.ge.s32 %p2, %r8, %r7; @%p2 bra DONE;
        setp.lt.s32 %p3, %r8, %r6; vote.sync.ballot.b32 %r5, %p3, -1; popc.b32 %r5, %r5;
        add.s32 %r9, %r9, %r5; shfl.sync.idx.b32 %r9, %r9, 3, 31, -1; bar.warp.sync -1;
        add.s32 %r8, %r8, 1; bra LOOP;
        DONE: bar.sync 0; {store(0, "%r9")}""",
        result, threads=64, by_thread=True,
    )  # fmt: skip
    votes = [(LANES[:32] % 8 > i).sum() for i in range(5)]
    assert (result == np.repeat([sum(votes[:2]), sum(votes)], 32)).all()


@pytest.mark.parametrize(
    "instruction",
    (
        "vote.sync.ballot.b32 %r1, %p1, -1;",
        "shfl.sync.up.b32 %r1, %r2, 1, 0, -1;",
        "bar.warp.sync -1;",
    ),
)
def test_threads_of_a_warp_that_have_parted(instruction: str) -> None:
    """A part of a warp is an error, a part of the warps is not."""
    for threads, right in ((40, False), (32, True)):
        body = f"setp.lt.u32 %p1, %r0, {threads}; @!%p1 bra A; {instruction} A: mov.u32 %r9, 0;"
        if right:
            run(body, threads=64)
        else:
            with pytest.raises(PtxError, match="threads that must run it together have parted"):
                run(body, threads=64)


@pytest.mark.parametrize(
    "instruction",
    (
        "vote.sync.ballot.b32 %r1, %p1, 255;",
        "bar.warp.sync 1;",
        "shfl.sync.up.b32 %r1, %r2, 1, 0, 65535;",
        "shfl.sync.up.b32 %r1, %r2, 1, 4096, -1;",
        "shfl.sync.bfly.b32 %r1, %r2, 1, 7, -1;",
    ),
)
def test_parts_of_a_warp_are_not_implemented(instruction: str) -> None:
    with pytest.raises(Unsupported, match="a warp"):
        run(instruction)
