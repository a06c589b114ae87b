"""Accesses that must be noticed: outside of tensors, misaligned, racing; and right ones that pass.

Two warps of 32 threads unless a test says otherwise. Thread i has byte 4 i of shared memory in
%r20, and the byte of its neighbour in the other warp in %r21.
"""

from __future__ import annotations

import numpy as np
import pytest

from ptx.errors import AccessError, RaceError
from ptx.execution import Kernel
from ptx.global_memory import GlobalMemory
from ptx.harness import address, run
from ptx.program import parse

NEIGHBOURS = "shl.b32 %r20, %r0, 2; xor.b32 %r21, %r20, 128;"
WRITE = "st.shared.b32 [%r20], %r0;"
READ = "ld.shared.b32 %r1, [%r21];"
BARRIER = "bar.sync 0;"


def shared(body: str, **options) -> None:
    run(NEIGHBOURS + body, **{"threads": 64, "shared": 256, **options})


# --- global memory ------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", (-4, 128))
def test_one_element_outside_of_a_tensor(offset: int) -> None:
    array = np.zeros(32, np.uint32)
    with pytest.raises(AccessError, match="outside of every tensor"):
        run(f"ld.global.b32 %r1, [%rd0+{offset}];", array)
    with pytest.raises(AccessError, match="outside of every tensor"):
        run(f"setp.eq.u32 %p1, %r0, 0; @%p1 st.global.b32 [%rd0+{offset}], %r0;", array)
    run(f"mov.pred %p1, 0; @%p1 ld.global.b32 %r1, [%rd0+{offset}];", array)


def test_an_access_over_the_end_of_a_tensor() -> None:
    with pytest.raises(AccessError, match="outside of every tensor"):
        run("ld.global.v2.b32 {%r1, %r2}, [%rd0+8];", np.zeros(3, np.uint32))


def test_a_misaligned_access() -> None:
    array = np.zeros(32, np.uint32)
    with pytest.raises(AccessError, match="not a multiple of 8 bytes"):
        run("ld.global.v2.b32 {%r1, %r2}, [%rd0+4];", array)


def test_two_programs_that_write_the_same_byte() -> None:
    array = np.zeros(64, np.uint32)
    body = f"mov.u32 %r1, %ctaid.x; shl.b32 %r2, %r1, 5; add.s32 %r0, %r0, %r2; {address(0, 4)}"
    run(body + "st.global.b32 [%rd90], %r1;", array, programs=2)
    assert array.tolist() == [0] * 32 + [1] * 32
    with pytest.raises(RaceError, match="two programs write the same byte"):
        run(
            f"mov.u32 %r1, %ctaid.x; {address(0, 4)} st.global.b32 [%rd90], %r1;", array, programs=2
        )


@pytest.mark.parametrize("programs", (2, 1000), ids=("one_batch", "several_batches"))
def test_a_program_that_reads_what_another_writes(programs: int) -> None:
    """Each writes its own element; program 1 reads that of program 0."""
    array = np.zeros(1000, np.uint32)
    body = """mov.u32 %r1, %ctaid.x; mad.wide.u32 %rd90, %r1, 4, %rd0;
        setp.eq.u32 %p1, %r0, 0; @%p1 st.global.b32 [%rd90], %r1;"""
    run(body + "@%p1 ld.global.b32 %r2, [%rd90];", array, programs=programs)
    with pytest.raises(RaceError, match="a program reads what another writes"):
        run(
            body + "setp.eq.u32 %p2, %r1, 1; @%p2 ld.global.b32 %r2, [%rd90-4];",
            array, programs=programs,
        )  # fmt: skip


def test_two_threads_that_write_different_values_to_the_same_byte() -> None:
    with pytest.raises(RaceError, match="two threads write different values"):
        run("st.global.b32 [%rd0], %r0;", np.zeros(1, np.uint32))


def test_widths_of_loads_and_stores() -> None:
    source = np.random.default_rng(0).integers(0, 256, 512, np.uint8)
    copy, extended = np.zeros_like(source), np.zeros(32, np.uint32)
    run(
        f"""{address(0, 16)} {address(1, 16, "%rd91")} {address(2, 4, "%rd92")}
        ld.global.v2.b64 {{%rd1, %rd2}}, [%rd90]; st.global.b64 [%rd91+8], %rd2;
        ld.global.b32 %r1, [%rd90]; st.global.b32 [%rd91], %r1;
        ld.global.b16 %rs1, [%rd90+4]; st.global.b16 [%rd91+4], %rs1;
        ld.global.b8 %rs2, [%rd90+6]; st.global.b8 [%rd91+6], %rs2;
        ld.global.b8 %rs3, [%rd90+7]; st.global.b8 [%rd91+7], %rs3;
        ld.global.s16 %r2, [%rd90]; st.global.b32 [%rd92], %r2;""",
        source, copy, extended,
    )  # fmt: skip
    assert (copy == source).all()
    assert (extended.view(np.int32) == source.view(np.int16)[::8]).all()


# --- parameters ---------------------------------------------------------------------------------

# A structure of 24 bytes behind a number of 4: it begins at a multiple of 8.
SIGNATURE = """.visible .entry test(
    .param .u32 number, .param .align 8 .b8 structure[24], .param .u64 .ptr .global .align 1 out
    ) .reqntid 32 { .reg .b32 %r<9>; .reg .b64 %rd<9>; ld.param.u64 %rd0, [out];
    BODY ret; }"""


def with_parameters(body: str) -> list[int]:
    """Return what a kernel stores in 8 words of 32 bits."""
    result = np.zeros(8, np.uint32)
    memory = GlobalMemory([(result.view(np.uint8), 0)])
    structure = np.array([1, -2, 3, 4, 5, 6], np.int32).tobytes()
    program = parse(SIGNATURE.replace("BODY", body))
    Kernel(program, 32, 0).launch(1, [7, structure, memory.address(0)], memory)
    return memory.contents(0).view(np.uint32).tolist()


def test_parameters_that_are_structures() -> None:
    stored = with_parameters(
        """ld.param.u32 %r1, [number]; st.global.b32 [%rd0], %r1;
        ld.param.v2.u32 {%r2, %r3}, [structure]; st.global.v2.b32 [%rd0+8], {%r2, %r3};
        ld.param.v4.u32 {%r2, %r3, %r4, %r5}, [structure+8]; st.global.b32 [%rd0+4], %r5;
        ld.param.s32 %rd1, [structure+4]; st.global.b64 [%rd0+16], %rd1;
        mov.u64 %rd2, structure; ld.param.u32 %r6, [%rd2+12]; st.global.b32 [%rd0+24], %r6;"""
    )
    assert stored == [7, 6, 1, 2**32 - 2, 2**32 - 2, 2**32 - 1, 4, 0]


@pytest.mark.parametrize("address", ("structure+2", "structure-12", "out+8"))
def test_addresses_of_no_parameter(address: str) -> None:
    with pytest.raises(AccessError, match="misaligned address, or one outside of the parameters"):
        with_parameters(f"ld.param.u32 %r1, [{address}];")


# --- shared memory ------------------------------------------------------------------------------


def test_a_barrier_between_a_write_and_a_read_of_another_warp() -> None:
    shared(WRITE + BARRIER + READ)
    with pytest.raises(RaceError, match="reads what was written since the last barrier"):
        shared(WRITE + READ)
    # The own warp's bytes need none.
    shared(WRITE + "ld.shared.b32 %r1, [%r20];")


def test_a_barrier_between_a_read_and_a_write_of_another_warp() -> None:
    shared(WRITE + BARRIER + READ + BARRIER + WRITE)
    with pytest.raises(RaceError, match="overwrites what another warp read"):
        shared(WRITE + BARRIER + READ + WRITE)
    # Both warps read byte 0; then one of them writes it.
    both = WRITE + BARRIER + "ld.shared.b32 %r1, [global_smem];"
    with pytest.raises(RaceError, match="overwrites what another warp read"):
        shared(both + "setp.eq.u32 %p1, %r0, 0; @%p1 st.shared.b32 [%r20], %r0;")


def test_a_barrier_between_two_writes() -> None:
    other = "add.s32 %r2, %r0, 1; st.shared.b32 [%r21], %r2;"
    shared(WRITE + BARRIER + other)
    with pytest.raises(RaceError, match="overwrites what another warp wrote"):
        shared(WRITE + other)
    # The same values may be written twice.
    shared("mov.u32 %r0, 7;" + WRITE + "st.shared.b32 [%r21], %r0;")


def test_bytes_that_nobody_wrote() -> None:
    with pytest.raises(RaceError, match="nobody wrote"):
        shared(READ)
    with pytest.raises(RaceError, match="nobody wrote"):
        shared("st.shared.b16 [%r20], %rs1;" + "ld.shared.b32 %r1, [%r20];")


def test_bounds_and_alignment_of_shared_memory() -> None:
    with pytest.raises(AccessError, match="of 256 bytes of shared memory"):
        shared("st.shared.b32 [%r20+4], %r0;")
    with pytest.raises(AccessError, match="not a multiple of 8 bytes"):
        shared("st.shared.b64 [%r20], %rd1;")


# --- cp.async -----------------------------------------------------------------------------------

COPY = f"{address(0, 4)} cp.async.ca.shared.global [%r20], [%rd90], 4;"
COMMIT, WAIT = "cp.async.commit_group;", "cp.async.wait_group 0;"


def test_a_copy_is_waited_for() -> None:
    array, result = np.arange(64, dtype=np.uint32), np.zeros(64, np.uint32)
    store = f"{address(1, 4)} st.global.b32 [%rd90], %r1;"
    for late in (False, True):
        options = dict(threads=64, shared=256, late=late)
        run(NEIGHBOURS + COPY + COMMIT + WAIT + BARRIER + READ + store, array, result, **options)
        assert (result == array[np.arange(64) ^ 32]).all()
        for body, problem in (
            (COPY + COMMIT + READ, "pending cp.async"),
            (COPY + COMMIT + BARRIER + READ, "pending cp.async"),
            (COPY + COMMIT + "cp.async.wait_group 1;" + BARRIER + READ, "pending cp.async"),
            (COPY + COMMIT + WAIT + READ, "since the last barrier"),
            (COPY + COMMIT + WRITE, "pending cp.async"),
            (WRITE + BARRIER + READ + COPY + COMMIT, "another warp read"),
        ):
            with pytest.raises(RaceError, match=problem):
                run(NEIGHBOURS + body, array, result, **options)


def test_a_copy_of_no_bytes_writes_zeros() -> None:
    array, result = np.arange(1, 65, dtype=np.uint32), np.full(64, 9, np.uint32)
    run(
        f"""{NEIGHBOURS} {address(0, 4)} and.b32 %r2, %r0, 1; shl.b32 %r2, %r2, 2;
        cp.async.ca.shared.global [%r20], [%rd90], 4, %r2; {COMMIT} {WAIT} {BARRIER}
        ld.shared.b32 %r1, [%r20]; {address(1, 4)} st.global.b32 [%rd90], %r1;""",
        array, result, threads=64, shared=256,
    )  # fmt: skip
    assert (result == np.where(np.arange(64) % 2, array, 0)).all()


# --- wgmma --------------------------------------------------------------------------------------

# Descriptors without swizzle, of A at byte 0 and B at byte 2048: the next 16 bytes of K lie behind
# all rows, and 8 rows have 128 bytes.
A = 1024 >> 4 << 16 | 128 >> 4 << 32
B = 2048 >> 4 | 128 >> 4 << 16 | 128 >> 4 << 32
# 4 warps write A [64, 16], which has 2048 bytes, and as many bytes behind it.
FILL = f"""shl.b32 %r20, %r0, 4; mov.u32 %r1, 0;
    st.shared.v4.b32 [%r20], {{%r1, %r1, %r1, %r1}};
    st.shared.v4.b32 [%r20+2048], {{%r1, %r1, %r1, %r1}};
    mov.u64 %rd10, {A}; mov.u64 %rd11, {B};"""
FENCE = "fence.proxy.async.shared::cta;"
PRODUCT = """wgmma.fence.sync.aligned;
    wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r1, %r2, %r3, %r4}, %rd10, %rd11,
    0, 1, 1, 0, 0; wgmma.commit_group.sync.aligned;"""
END = "wgmma.wait_group.sync.aligned 0;"
REWRITE = "st.shared.b32 [%r20], %r0;"


def test_a_wgmma_is_fenced_and_waited_for() -> None:
    for late in (False, True):
        options = dict(threads=128, shared=4096, late=late)
        run(FILL + FENCE + BARRIER + PRODUCT + END + BARRIER + REWRITE, **options)
        run(FILL + BARRIER + FENCE + PRODUCT + END + BARRIER + REWRITE, **options)
        for body, problem in (
            (FILL + BARRIER + PRODUCT, "fence.proxy.async"),
            (FILL + FENCE + PRODUCT, "since the last barrier"),
            (FILL + FENCE + BARRIER + PRODUCT + REWRITE, "a pending wgmma reads"),
            (FILL + FENCE + BARRIER + PRODUCT + BARRIER + REWRITE, "a pending wgmma reads"),
            (FILL + FENCE + BARRIER + PRODUCT + END + REWRITE, "another warp read"),
            (f"mov.u64 %rd10, {A}; mov.u64 %rd11, {B};" + PRODUCT, "nobody wrote"),
        ):
            with pytest.raises(RaceError, match=problem):
                run(body, **options)


def test_a_late_wgmma_writes_its_registers_at_the_wait() -> None:
    """An instruction that writes one of them before the wait is overwritten."""
    ones = " ".join(f"st.shared.b32 [%r20+{4 * i}], %r5;" for i in (0, 1, 2, 3, 512, 513, 514, 515))
    results = []
    for late in (False, True):
        result = np.zeros(128, np.float32)
        run(
            f"""{FILL} mov.u32 %r5, 0x3F803F80; {ones} {FENCE} {BARRIER} {PRODUCT}
            mov.b32 %r1, 0f40A00000; {END} {address(0, 4)} st.global.b32 [%rd90], %r1;""",
            result, threads=128, shared=4096, late=late,
        )  # fmt: skip
        results.append(result[0])
    assert results == [5.0, 16.0]


@pytest.mark.parametrize("late", (False, True))
def test_a_register_of_a_pending_wgmma_is_not_read(late: bool) -> None:
    start, options = FILL + FENCE + BARRIER + PRODUCT, dict(threads=128, shared=8192, late=late)
    for reads in ("mov.b32 %r9, %r2;", "st.shared.v2.b32 [%r20+4096], {%r9, %r3};"):
        run(start + END + reads, **options)
        for body in (start + reads, start + "wgmma.wait_group.sync.aligned 1;" + reads):
            with pytest.raises(RaceError, match="reads a register that a pending wgmma writes"):
                run(body, **options)


def test_registers_of_a_wgmma_are_fenced() -> None:
    options = dict(threads=128, shared=4096)
    add = PRODUCT.replace("0, 1, 1, 0, 0", "1, 1, 1, 0, 0")
    without = add.replace("wgmma.fence.sync.aligned;", "")
    start = FILL + FENCE + BARRIER
    run(start + PRODUCT + without + END, **options)
    with pytest.raises(RaceError, match=r"without a wgmma\.fence"):
        run(start + without, **options)
    with pytest.raises(RaceError, match="was written since the last wgmma"):
        run(start + "wgmma.fence.sync.aligned; mov.u32 %r3, 0;" + without, **options)
