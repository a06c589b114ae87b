"""mbarriers, tensor maps, the instructions of a cluster, and the checks of their order."""

from __future__ import annotations

import numpy as np
import pytest

from ptx.bulk import tensor_map
from ptx.errors import AccessError, PtxError, RaceError, Unsupported
from ptx.harness import address, run
from ptx.program import parse

# Thread 0 runs what is behind @%p1. Its mbarriers lie behind two tiles of 8 rows of 128 bytes.
FULL, EMPTY = "global_smem+2048", "global_smem+2056"
TILE = 1024
FIRST = "setp.eq.u32 %p1, %r0, 0;"
FENCE = "@%p1 fence.mbarrier_init.release.cluster;"
CLUSTER = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"
COPY = (
    "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes{} "
    f"[global_smem], [%rd80, {{{{%r20, %r21}}}}], [{FULL}]{{}};"
)
TO_SELF = COPY.format("", "")
READ = f"{address(1, 4)} ld.shared.b32 %r9, [global_smem]; st.global.b32 [%rd90], %r9;"


def init(at: str = FULL, count: int = 1) -> str:
    return f"@%p1 mbarrier.init.shared::cta.b64 [{at}], {count};"


def wait(name: str, at: str = FULL, parity: int = 0, scope: str = "", guard: str = "") -> str:
    """Try until a phase has ended; threads for which the guard is false go on."""
    skip = f"@!{guard} bra {name}_END;" if guard else ""
    return f"""{skip}
    {name}: mbarrier.try_wait.parity{scope}.shared::cta.b64 %p9, [{at}], {parity};
    @!%p9 bra {name};
    {name}_END:"""


def expect(count: int = TILE, at: str = FULL) -> str:
    return f"@%p1 mbarrier.arrive.expect_tx.shared::cta.b64 _, [{at}], {count};"


BEGIN = f"{FIRST} {init()} {FENCE} bar.sync 0; mov.b32 %r20, 0; mov.b32 %r21, 0;"
MATRIX = np.arange(16 * 72, dtype=np.uint16).reshape(16, 72)
# Rows, columns and pitch of the matrix; rows, columns and bytes of an element of a box.
MAP = (0, 16, 72, 144, 8, 64, 2)


def execute(body: str, late: bool = False, threads: int = 32, **options) -> np.ndarray:
    """Run a body with the map of MATRIX; return the words that its threads stored."""
    out = np.zeros(options.get("programs", 1) * threads, np.uint32)
    options = {"maps": [MAP], "shared": 2048 + 64, **options}
    run(body, MATRIX.copy(), out, threads=threads, late=late, **options)
    return out


each_time = pytest.mark.parametrize("late", (False, True), ids=("early", "late"))


# --- phases --------------------------------------------------------------------------------------


def test_phases_end_with_their_last_arrival_and_alternate_in_parity() -> None:
    """Bit 2 n + parity: what a test of a parity finds after n phases."""
    test = "mbarrier.try_wait.parity.shared::cta.b64 %p5, [{}], {}; @%p5 or.b32 %r9, %r9, {};"
    body = f"{FIRST} {init(count=33)} bar.sync 0; mov.b32 %r9, 0;"
    for n in range(3):
        body += test.format(FULL, 0, 1 << 2 * n) + test.format(FULL, 1, 2 << 2 * n)
        # 32 arrivals are one less than the phase counts.
        body += f"mbarrier.arrive.shared::cta.b64 _, [{FULL}];"
        body += test.format(FULL, n % 2, 1 << 10) + "bar.warp.sync 0xffffffff;"
        body += f"@%p1 mbarrier.arrive.release.cta.shared::cta.b64 _, [{FULL}];"
    out = execute(body + f"{address(1, 4)} st.global.b32 [%rd90], %r9;")
    # The phase before the first counts as ended.
    assert (out == 0b10_01_10).all()


def test_a_phase_ends_when_its_bytes_have_come_too() -> None:
    body = f"""{BEGIN} {expect(2 * TILE)} @%p1 {TO_SELF} bar.sync 0;
    mbarrier.try_wait.parity.shared::cta.b64 %p5, [{FULL}], 0; selp.b32 %r9, 1, 0, %p5;
    mov.b32 %r20, 8; @%p1 {TO_SELF.replace("[global_smem]", "[global_smem+1024]")}
    {wait("W")} mbarrier.try_wait.parity.shared::cta.b64 %p5, [{FULL}], 0;
    @%p5 add.u32 %r9, %r9, 2; {address(1, 4)} st.global.b32 [%rd90], %r9;"""
    assert (execute(body) == 2).all()


@pytest.mark.parametrize("guard", ("", "%p1"))
def test_a_wait_that_nothing_ends(guard: str) -> None:
    with pytest.raises(PtxError, match="that does not end"):
        execute(f"{BEGIN} {wait('W', guard=guard)}")


def test_threads_that_wait_let_others_run() -> None:
    """Thread 0 waits for an arrival of thread 1, which comes behind it in the code."""
    body = f"""{BEGIN} setp.eq.u32 %p2, %r0, 1; {wait("W", guard="%p1")}
    @%p2 mbarrier.arrive.shared::cta.b64 _, [{FULL}]; bra NEXT; NEXT:
    {address(1, 4)} st.global.b32 [%rd90], 7;"""
    assert (execute(body) == 7).all()


# --- bulk copies ---------------------------------------------------------------------------------


def box(row: int, column: int) -> np.ndarray:
    """Return a box of 8 rows of 128 bytes as it lies in shared memory: words.

    Outside of the matrix it has zeros. In row r, piece p of 16 bytes lies at place p xor r.
    """
    padded = np.zeros((32, 160), np.uint16)
    padded[8:24, 8:80] = MATRIX
    values = padded[8 + row : 16 + row, 8 + column : 72 + column].reshape(8, 8, 8)
    result = np.empty_like(values)
    for r in range(8):
        for piece in range(8):
            result[r, piece ^ r] = values[r, piece]
    return result.reshape(-1).view(np.uint32)


@each_time
@pytest.mark.parametrize(("row", "column"), ((0, 0), (5, 8), (12, 16), (-3, -8), (16, 72)))
def test_a_box(row: int, column: int, late: bool) -> None:
    body = f"{BEGIN} mov.b32 %r20, {column}; mov.b32 %r21, {row}; {expect()} @%p1 {TO_SELF}"
    body += wait("W") + f"shl.b32 %r8, %r0, 2; {address(1, 4)}"
    for i in range(8):
        body += f"ld.shared.b32 %r9, [%r8+{128 * i}]; st.global.b32 [%rd90+{128 * i}], %r9;"
    out = np.zeros(256, np.uint32)
    run(body, MATRIX.copy(), out, maps=[MAP], shared=2048 + 64, late=late)
    assert (out == box(row, column)).all()


RANK = "mov.u32 %r22, %cluster_ctarank; mov.u32 %r23, %ctaid.x;"
START = f"{FIRST} {RANK} {init()} {init(EMPTY, 4)} {FENCE} {CLUSTER} mov.b32 %r20, 0;"
# Rank r copies 8 rows, from row 8 r on, to tile r of both ranks.
SHARE = f"""shl.b32 %r21, %r22, 3; shl.b32 %r24, %r22, 10; mov.u32 %r25, global_smem;
add.u32 %r24, %r24, %r25; mov.u16 %rs1, 3; {expect(2 * TILE)}
@%p1 {COPY.format(".multicast::cluster", ", %rs1").replace("[global_smem]", "[%r24]")}"""
# Every thread stores a word of tile 0 plus one of tile 1.
SUM = """shl.b32 %r8, %r0, 2; ld.shared.b32 %r9, [%r8]; ld.shared.b32 %r10, [%r8+1024];
add.u32 %r9, %r9, %r10; mad.lo.u32 %r11, %r23, 64, %r0; mad.wide.u32 %rd90, %r11, 4, %rd1;
st.global.b32 [%rd90], %r9;"""


@each_time
def test_multicast(late: bool) -> None:
    """Programs of two clusters have what both ranks of each copied."""
    body = f"{START} {SHARE} {wait('W')} {SUM} {CLUSTER}"
    out = execute(body, late, 64, programs=4, cluster=2)
    assert (out.reshape(4, 64) == box(0, 0)[:64] + box(8, 0)[:64]).all()


# A warp tells rank 0 that it is done with the tiles; then rank 0 copies again to both.
RELEASE = """mov.u32 %r30, global_smem; add.u32 %r30, %r30, 2056;
mapa.shared::cluster.u32 %r31, %r30, 0; and.b32 %r32, %r0, 31; setp.eq.u32 %p2, %r32, 0;
@%p2 mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r31];
setp.eq.u32 %p3, %r22, 0; and.pred %p3, %p3, %p1;"""
AGAIN = f"""mov.b32 %r21, 4; {expect()} bra ISSUE; ISSUE:
@%p3 {COPY.format(".multicast::cluster", ", %rs1")}"""
WAIT_EMPTY = wait("E", EMPTY, scope=".acquire.cluster", guard="%p3")
TOUCH = "shl.b32 %r8, %r0, 2; ld.shared.b32 %r9, [%r8];"
CYCLE = f"""{START} {SHARE} {wait("W")} {TOUCH} {RELEASE} {WAIT_EMPTY} {AGAIN}
{wait("V", parity=1)} {SUM} {CLUSTER}"""


@each_time
def test_a_tile_is_filled_again_behind_arrivals_of_all_its_readers(late: bool) -> None:
    out = execute(CYCLE, late, 64, programs=4, cluster=2)
    assert (out.reshape(4, 64) == box(4, 0)[:64] + box(8, 0)[:64]).all()


# Reads bytes 0 to 2047 as A [64, 16], and the first 256 of them as B [8, 16], without swizzle.
PRODUCT = f"""mov.u64 %rd10, {1024 >> 4 << 16 | 128 >> 4 << 32};
mov.u64 %rd11, {128 >> 4 << 16 | 128 >> 4 << 32}; wgmma.fence.sync.aligned;
wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {{%r1, %r2, %r3, %r4}}, %rd10, %rd11,
0, 1, 1, 0, 0;
wgmma.commit_group.sync.aligned;"""
END = "wgmma.wait_group.sync.aligned 0;"


@each_time
def test_the_end_of_a_product_is_known_without_a_scope(late: bool) -> None:
    """But not that of a load, and not before the wait."""

    def run_cycle(use: str) -> None:
        body = CYCLE.replace(SUM, "").replace(init(EMPTY, 4), init(EMPTY, 8))
        body = body.replace(TOUCH + " " + RELEASE, use)
        body = body.replace("arrive.release.cluster", "arrive").replace(".acquire.cluster", "")
        execute(body, late, threads=128, programs=2, cluster=2)

    run_cycle(PRODUCT + END + RELEASE)
    for use, message in (
        (TOUCH + RELEASE, "not all warps have released"),
        (PRODUCT + RELEASE, "pending wgmma reads"),
        (RELEASE + PRODUCT + END, "not all warps have released"),
    ):
        with pytest.raises(RaceError, match=message):
            run_cycle(use)


# --- faults --------------------------------------------------------------------------------------

# Name -> (body, part of the message), of 64 threads.
FAULTS = {
    "a read before the wait": (f"{BEGIN} {expect()} @%p1 {TO_SELF} {READ}", "pending cp.async"),
    "a barrier in the place of the wait": (
        f"{BEGIN} {expect()} @%p1 {TO_SELF} bar.sync 0; {READ}", "pending cp.async",
    ),
    "a wait of one thread": (
        f"{BEGIN} {expect()} @%p1 {TO_SELF} {wait('W', guard='%p1')} {READ}", "pending cp.async",
    ),
    "a second copy to the same bytes": (
        f"{BEGIN} {expect(2 * TILE)} @%p1 {TO_SELF} @%p1 {TO_SELF}", "pending cp.async",
    ),
    "a copy over words of other threads": (
        f"{BEGIN} st.shared.b32 [global_smem], 1; fence.proxy.async.shared::cta; {expect()} "
        f"@%p1 {TO_SELF}", "not all warps have released",
    ),
    "a copy over words without a fence": (
        f"{BEGIN} st.shared.b32 [global_smem], 1; bar.sync 0; {expect()} @%p1 {TO_SELF}",
        "without a fence.proxy.async",
    ),
    "an end under a copy": (f"{BEGIN} {expect()} @%p1 {TO_SELF}", "ends under a pending"),
    "no barrier behind the initialisation": (
        f"{FIRST} {init()} {FENCE} {wait('W', parity=1)}", "no barrier behind",
    ),
    "no fence before a copy": (
        f"{BEGIN.replace(FENCE, '')} {expect()} @%p1 {TO_SELF}", "no fence behind",
    ),
    "no initialisation": (f"{FIRST} {expect()}", "nobody initialised"),
    "too many arrivals": (
        f"{BEGIN} mbarrier.arrive.shared::cta.b64 _, [{FULL}];", "more arrivals",
    ),
    "no arrivals to count": (f"{FIRST} {init(count=0)}", "counts no arrivals"),
    "an initialisation by two threads": (
        f"mbarrier.init.shared::cta.b64 [{FULL}], 1; bar.sync 0; "
        f"mbarrier.init.shared::cta.b64 [{FULL}], 1;", "initialised twice",
    ),
    "an mbarrier outside of shared memory": (
        f"{FIRST} {init('global_smem+4096')}", "not at 8 bytes",
    ),
    "a parity of two": (f"{BEGIN} {wait('W', parity=2)}", "neither 0 nor 1"),
    "a tile that is not at a pattern": (
        f"{BEGIN} {expect()} @%p1 {TO_SELF.replace('[global_smem]', '[global_smem+512]')}",
        "not a multiple of 1024",
    ),
    "a tile behind shared memory": (
        f"{BEGIN} {expect()} @%p1 {TO_SELF.replace('[global_smem]', '[global_smem+2048]')}",
        "of 2112 bytes",
    ),
    "a box that begins inside of a piece": (
        f"{BEGIN} mov.b32 %r20, 4; {expect()} @%p1 {TO_SELF}", "inside of a piece",
    ),
    "a map that is no parameter": (
        f"{BEGIN} mov.b64 %rd80, %rd0; {expect()} @%p1 {TO_SELF}", "not that of a parameter",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_noticed(name: str) -> None:
    body, message = FAULTS[name]
    with pytest.raises(PtxError, match=message):
        execute(body, threads=64)


def test_a_wait_for_the_phase_before_is_noticed() -> None:
    """It may let the threads pass, or never."""
    body = f"{BEGIN} {expect()} @%p1 {TO_SELF} {wait('W', parity=1)} {READ}"
    for late, message in ((False, "does not end"), (True, "pending cp.async")):
        with pytest.raises(PtxError, match=message):
            execute(body, late)


# The cycle of a tile with one change: (old, new), and a part of the message.
CLUSTER_FAULTS = {
    "one warp of two releases": (
        "and.b32 %r32, %r0, 31; setp.eq.u32 %p2, %r32, 0;", "setp.lt.u32 %p2, %r0, 2;",
        "not all warps have released",
    ),
    "a read behind the release": (RELEASE, RELEASE + TOUCH, "not all warps have released"),
    "a release to the own program": (
        "mapa.shared::cluster.u32 %r31, %r30, 0", "mov.u32 %r31, %r30", "does not end",
    ),
    "a release without its scope": (
        "arrive.release.cluster", "arrive", "not all warps have released",
    ),
    "a wait without its scope": (".acquire.cluster", "", "not all warps have released"),
    "no wait for the release": (WAIT_EMPTY, "", "not all warps have released"),
    "no barrier at the start": (f"{FENCE} {CLUSTER}", FENCE, "no barrier behind"),
    "no fence at the start": (FENCE, "", "no fence behind"),
    "no barrier at the end": (f"{SUM} {CLUSTER}", SUM, "others are done with it"),
    "a rank that does not exist": ("%r30, 0;", "%r30, 2;", "does not have"),
    "a mask that does not exist": ("mov.u16 %rs1, 3", "mov.u16 %rs1, 5", "mask of ranks 0x5"),
    "too few bytes expected": (expect(2 * TILE), expect(TILE), "pending cp.async"),
    "too many bytes expected": (expect(2 * TILE), expect(2 * TILE + 16), "does not end"),
    "a wait in another place": (
        "barrier.cluster.wait", "bar.sync 0; barrier.cluster.wait", "without a wait behind it",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CLUSTER_FAULTS)
def test_a_fault_in_a_cluster_is_noticed(name: str) -> None:
    old, new, message = CLUSTER_FAULTS[name]
    options = dict(threads=64, programs=2, cluster=2)
    assert old in CYCLE
    with pytest.raises(PtxError, match=message):
        execute(CYCLE.replace(old, new), **options)


def test_programs_come_in_whole_clusters() -> None:
    with pytest.raises(PtxError, match="3 programs in clusters of 2"):
        execute(CLUSTER, programs=3, cluster=2)


def test_maps_that_cuda_forbids() -> None:
    for fields, error in (
        ((8, 16, 64, 128, 8, 64, 2), PtxError),
        ((0, 16, 64, 136, 8, 64, 2), PtxError),
        ((0, 16, 72, 128, 8, 64, 2), PtxError),
        ((0, 16, 64, 128, 8, 32, 2), Unsupported),
        ((0, 16, 64, 128, 257, 64, 2), Unsupported),
    ):
        with pytest.raises(error):
            tensor_map(*fields)


def test_the_errors_say_what_they_are() -> None:
    with pytest.raises(RaceError):
        execute(FAULTS["a read before the wait"][0], threads=64)
    with pytest.raises(AccessError):
        execute(FAULTS["a tile behind shared memory"][0], threads=64)


def test_the_registers_of_a_cluster() -> None:
    body = f"""{RANK} mov.u32 %r24, %cluster_nctarank; mad.lo.u32 %r25, %r24, 100, %r22;
    mad.lo.u32 %r26, %r23, 32, %r0; mad.wide.u32 %rd90, %r26, 4, %rd1;
    st.global.b32 [%rd90], %r25;"""
    out = execute(body, programs=6, cluster=3)
    assert (out.reshape(6, 32)[:, 0] == [300, 301, 302] * 2).all()


def test_shared_variables_lie_behind_one_another_and_those_of_the_launch_come_last() -> None:
    program = parse(
        """.extern .shared .align 16 .b8 dynamic[];
        .visible .entry test() .reqnctapercluster 4, 1, 1 {
        .shared .align 8 .u64 barrier;
        .shared .align 4 .b8 words[12];
        ret; }"""
    )
    assert program.variables == {"barrier": 0, "words": 8, "dynamic": 32}
    assert program.cluster == 4


def test_threads_that_have_parted_load_parameters() -> None:
    """The others have no address."""
    body = f"""setp.lt.u32 %p1, %r0, 5; {address(0, 4)} @!%p1 bra END;
    mov.b64 %rd10, param_0; mul.wide.u32 %rd11, %r0, 0; add.s64 %rd10, %rd10, %rd11;
    ld.param.u64 %rd12, [%rd10]; setp.eq.u64 %p2, %rd12, %rd0; selp.b32 %r1, 1, 0, %p2;
    st.global.b32 [%rd90], %r1; END:"""
    out = np.zeros(32, np.uint32)
    run(body, out)
    assert out.tolist() == [1] * 5 + [0] * 27
