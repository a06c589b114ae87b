"""Atomics, and races between any two threads of a program, in shared and in global memory.

Two warps of 32 threads. Thread i has word i in %r20 (shared) and %rd20 (global), and the word of
the next thread of its warp in %r21 and %rd21, that of the same lane in the other warp in %r22 and
%rd22.
"""

from __future__ import annotations

import numpy as np
import pytest

from ptx.errors import AccessError, RaceError, Unsupported
from ptx.harness import address, run

WORDS = (
    "and.b32 %r1, %r0, 32; add.s32 %r2, %r0, 1; and.b32 %r2, %r2, 31; or.b32 %r1, %r1, %r2;"
    "shl.b32 %r20, %r0, 2; shl.b32 %r21, %r1, 2; xor.b32 %r22, %r20, 128;"
    + "".join(f"cvt.u64.u32 %rd{i}, %r{i}; add.s64 %rd{i}, %rd{i}, %rd0;" for i in (20, 21, 22))
)
SPACES = {"shared": "%r", "global": "%rd"}
WARP_BARRIER = "bar.warp.sync -1;"
each_space = pytest.mark.parametrize("space", SPACES)


def check(actions: str, space: str) -> None:
    """Run actions of all threads, such as "store barrier load_next"."""
    register = SPACES[space]
    ptx = {
        "barrier": "bar.sync 0;",
        "warp_barrier": WARP_BARRIER,
        "vote": "vote.sync.ballot.b32 %r5, %p1, -1;",
        "shuffle": "shfl.sync.up.b32 %r5, %r0, 1, 0, -1;",
    }
    for suffix, index in (("", 20), ("_next", 21), ("_other", 22)):
        at = f"[{register}{index}]"
        ptx[f"load{suffix}"] = f"ld.{space}.b32 %r30, {at};"
        ptx[f"store{suffix}"] = f"st.{space}.b32 {at}, %r0;"
        ptx[f"add{suffix}"] = f"atom.{space}.add.u32 %r31, {at}, %r0;"
    body = " ".join(ptx[action] for action in f"store barrier {actions}".split())
    run(WORDS + body, np.zeros(64, np.uint32), threads=64, shared=256, by_thread=True)


@each_space
@pytest.mark.parametrize(
    ("first", "second"),
    (
        ("store", "load"),
        ("load", "store"),
        ("store", "store"),
        ("add", "load"),
        ("load", "add"),
        ("add", "store"),
        ("store", "add"),
    ),
)
def test_two_accesses_with_a_barrier_between_them(first: str, second: str, space: str) -> None:
    check(f"{first} {second}", space)
    check(f"{first} warp_barrier {second}_next", space)
    check(f"{first} barrier {second}_other", space)
    check(f"{first} barrier {second}_next", space)
    for actions in (f"{first} {second}_next", f"{first} warp_barrier {second}_other"):
        with pytest.raises(RaceError):
            check(actions, space)


@each_space
def test_accesses_that_need_no_barrier(space: str) -> None:
    check("load load_next load_other load", space)
    check("add add_next add_other add", space)


@each_space
def test_a_barrier_orders_all_earlier_accesses(space: str) -> None:
    """Several threads of a warp, or of both warps, read a word before another one writes it."""
    check("load load_next warp_barrier store", space)
    check("load load_next load_other barrier store", space)
    for actions in (
        "load load_next store",
        "load_other warp_barrier load_next warp_barrier store",
        "load_other load_next warp_barrier load store",
    ):
        with pytest.raises(RaceError):
            check(actions, space)


@each_space
@pytest.mark.parametrize("exchange", ("vote", "shuffle"))
def test_a_vote_and_a_shuffle_order_no_memory(exchange: str, space: str) -> None:
    """CUDA promises it of __syncwarp alone."""
    with pytest.raises(RaceError):
        check(f"store {exchange} load_next", space)


def test_programs_do_not_share_their_order() -> None:
    """The barrier of one program does not order the accesses of another."""
    body = f"""{WORDS} mov.u32 %r1, %ctaid.x; st.shared.b32 [%r20], %r0;
        setp.eq.u32 %p1, %r1, 1; @%p1 bra SKIP; {{barrier}} SKIP: ld.shared.b32 %r5, [%r21];"""
    options = dict(threads=64, shared=256, programs=2, by_thread=True)
    with pytest.raises(RaceError, match="load: no barrier behind the store of another thread"):
        run(body.format(barrier=WARP_BARRIER), np.zeros(64, np.uint32), **options)
    run(
        f"{WORDS} st.shared.b32 [%r20], %r0; {WARP_BARRIER} ld.shared.b32 %r5, [%r21];",
        np.zeros(64, np.uint32), **options,
    )  # fmt: skip


def test_a_wide_access_covers_several_words() -> None:
    body = WORDS + f"st.shared.b32 [%r20], %r0; {WARP_BARRIER} {{more}} and.b32 %r5, %r20, 248;"
    load = "ld.shared.v2.b32 {%r6, %r7}, [%r5];"
    options = dict(threads=64, shared=256, by_thread=True)
    run(body.format(more="") + load, np.zeros(64, np.uint32), **options)
    with pytest.raises(RaceError):
        run(body.format(more="st.shared.b32 [%r20], %r0;") + load, np.zeros(64, "u4"), **options)


@each_space
def test_atomics_add_all_values_and_return_the_sums_between(space: str) -> None:
    """64 threads add to 8 words; the numbers of the threads may come in any order."""
    added = np.random.default_rng(0).integers(1, 2**32, 64).astype(np.uint32)
    met, words = np.zeros(64, np.uint32), np.full(8, 7, np.uint32)
    begin = f"mov.b32 %r4, 7; @%p1 st.{space}.b32 [{SPACES[space]}5], %r4; bar.sync 0;"
    run(
        f"""{address(0, 4)} ld.global.b32 %r1, [%rd90]; setp.lt.u32 %p1, %r0, 8;
        and.b32 %r3, %r0, 7; shl.b32 %r5, %r3, 2; mad.wide.u32 %rd5, %r3, 4, %rd2; {begin}
        atom.{space}.add.u32 %r6, [{SPACES[space]}5], %r1; bar.sync 0;
        {address(1, 4)} st.global.b32 [%rd90], %r6;
        @%p1 ld.{space}.b32 %r7, [{SPACES[space]}5]; @%p1 st.global.b32 [%rd5], %r7;""",
        added, met, words, threads=64, shared=32, by_thread=True,
    )  # fmt: skip
    for word in range(8):
        values, before = added[word::8].tolist(), set(met[word::8].tolist())
        total = 7
        assert total in before
        # Each thread met what one of the others left.
        assert {(b + v) % 2**32 for b, v in zip(met[word::8].tolist(), values, strict=True)} == (
            before - {7} | {(7 + sum(values)) % 2**32}
        )
        assert words[word] == (7 + sum(values)) % 2**32


def test_an_atomic_of_some_threads() -> None:
    words = np.zeros(1, np.uint32)
    run("setp.lt.u32 %p1, %r0, 5; @%p1 atom.global.add.s32 %r1, [%rd0], -3;", words, by_thread=True)
    assert words.view(np.int32)[0] == -15


def test_checks_of_an_atomic() -> None:
    add, words = "atom.{}.add.u32 %r1, [{}], 1;", np.zeros(4, np.uint32)
    with pytest.raises(AccessError, match="outside of every tensor"):
        run(add.format("global", "%rd0+16"), words, by_thread=True)
    with pytest.raises(AccessError, match="not a multiple of 4 bytes"):
        run(add.format("global", "%rd0+2"), words, by_thread=True)
    with pytest.raises(AccessError, match="of 64 bytes of shared memory"):
        run(add.format("shared", "global_smem+64"), words, shared=64, by_thread=True)
    with pytest.raises(RaceError, match="nobody wrote"):
        run(add.format("shared", "global_smem"), words, shared=64, by_thread=True)
    with pytest.raises(RaceError, match="two programs write the same byte"):
        run(add.format("global", "%rd0"), words, programs=2, by_thread=True)
    with pytest.raises(Unsupported, match="order is not checked"):
        run(add.format("global", "%rd0"), words)


def test_the_order_of_accesses_narrower_than_a_word_is_not_implemented() -> None:
    with pytest.raises(Unsupported, match="the order of accesses of 2 bytes"):
        run("st.global.b16 [%rd0], %rs1;", np.zeros(1, np.uint16), by_thread=True)
