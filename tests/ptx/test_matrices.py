"""Products of a warp and of a warpgroup, and the layouts of their operands, on plain matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ptx import floats
from ptx.harness import address, run
from ptx.wgmma import tile

# Type of an input -> columns of A, and the numbers that it stores exactly.
DEPTH = {"bf16": 16, "f16": 16, "tf32": 8}
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "tf32": torch.float32}


def draw(kind: str, *shape: int) -> np.ndarray:
    """Return small integers and halves: exact in every type, and so are sums of their products."""
    return np.random.default_rng(0).integers(-8, 9, shape).astype(np.float32) / 2


def stored(values: np.ndarray, kind: str) -> np.ndarray:
    """Return the bits of numbers in their type."""
    tensor = torch.from_numpy(np.ascontiguousarray(values)).to(DTYPES[kind])
    return (
        tensor.view(torch.int32 if kind == "tf32" else torch.int16)
        .numpy()
        .view(np.uint32 if kind == "tf32" else np.uint16)
    )


def registers(first: int, count: int) -> str:
    return "{" + ", ".join(f"%r{first + i}" for i in range(count)) + "}"


def fragment(values: np.ndarray, kind: str, matrix: str) -> np.ndarray:
    """Return the registers [lanes, registers] of A [16, K], B [K, 8] or C [16, 8] of an mma.

    Written down from the PTX manual: lane = 4 g + t. A: rows g and g + 8, columns from 2 t (t) on.
    """
    bits = stored(values, kind)
    result = np.zeros((32, 4 if matrix != "B" else 2), np.uint32)
    for lane in range(32):
        g, t = divmod(lane, 4)
        for r in range(result.shape[1]):
            if matrix == "C":
                result[lane, r] = bits[g + 8 * (r // 2), 2 * t + r % 2]
            elif kind == "tf32":
                row, column = (
                    (g + 8 * (r % 2), t + 4 * (r // 2)) if matrix == "A" else (t + 4 * r, g)
                )
                result[lane, r] = bits[row, column]
            elif matrix == "A":
                row, column = g + 8 * (r % 2), 2 * t + 8 * (r // 2)
                result[lane, r] = int(bits[row, column]) | int(bits[row, column + 1]) << 16
            else:
                row = 2 * t + 8 * r
                result[lane, r] = int(bits[row, g]) | int(bits[row + 1, g]) << 16
    return result


@pytest.mark.parametrize("kind", DEPTH)
def test_mma(kind: str) -> None:
    """D = A B + C of each of two warps."""
    K = DEPTH[kind]
    a, b, c = draw(kind, 16, K), draw(kind, K, 8)[::-1], draw(kind, 16, 8)
    c_bits = fragment(c, "tf32", "C")
    arrays = [
        np.concatenate([x, y])
        for x, y in (
            (fragment(a, kind, "A"), fragment(-a, kind, "A")),
            (fragment(b, kind, "B"), fragment(b, kind, "B")),
            (c_bits, c_bits),
        )
    ]
    d = np.zeros((64, 4), np.uint32)
    suffix = "f32.tf32.tf32.f32" if K == 8 else f"f32.{kind}.{kind}.f32"
    run(
        f"""{address(0, 16)} ld.global.v4.b32 {registers(1, 4)}, [%rd90];
        {address(1, 8)} ld.global.v2.b32 {registers(5, 2)}, [%rd90];
        {address(2, 16)} ld.global.v4.b32 {registers(7, 4)}, [%rd90];
        mma.sync.aligned.m16n8k{K}.row.col.{suffix} {registers(11, 4)}, {registers(1, 4)},
            {registers(5, 2)}, {registers(7, 4)};
        {address(3, 16)} st.global.v4.b32 [%rd90], {registers(11, 4)};""",
        *arrays, d, threads=64,
    )  # fmt: skip
    assert (d[:32] == fragment(a @ b + c, "tf32", "C")).all()
    assert (d[32:] == fragment(-a @ b + c, "tf32", "C")).all()


@pytest.mark.parametrize("transposed", (False, True), ids=("", "trans"))
@pytest.mark.parametrize("count", (1, 2, 4))
def test_ldmatrix_and_stmatrix(count: int, transposed: bool) -> None:
    """Lane 8 k + i gives the address of row i of matrix k."""
    matrices = np.arange(count * 64, dtype=np.uint16).reshape(count, 8, 8)
    source = matrices.reshape(-1, 8)
    loaded = np.zeros((32, count), np.uint32)
    back = np.zeros_like(source)
    ending = f"m8n8.x{count}{'.trans' if transposed else ''}.shared.b16"
    vector = {1: "", 2: ".v2", 4: ".v4"}[count]
    rows = 8 * count
    run(
        f"""setp.lt.u32 %p1, %r0, {rows}; {address(0, 16)}
        @%p1 ld.global.v4.b32 {registers(1, 4)}, [%rd90];
        shl.b32 %r20, %r0, 4;
        @%p1 st.shared.v4.b32 [%r20], {registers(1, 4)};
        bar.sync 0;
        ldmatrix.sync.aligned.{ending} {registers(30, count)}, [%r20];
        {address(1, 4 * count)}
        st.global{vector}.b32 [%rd90], {registers(30, count)};
        stmatrix.sync.aligned.{ending} [%r20+512], {registers(30, count)};
        bar.sync 0; {address(2, 16)}
        @%p1 ld.shared.v4.b32 {registers(1, 4)}, [%r20+512];
        @%p1 st.global.v4.b32 [%rd90], {registers(1, 4)};""",
        source, loaded, back, shared=1024,
    )  # fmt: skip
    for lane in range(32):
        g, t = divmod(lane, 4)
        for k, matrix in enumerate(matrices):
            m = matrix.T if transposed else matrix
            assert loaded[lane, k] == int(m[g, 2 * t]) | int(m[g, 2 * t + 1]) << 16
    assert (back == source).all()


# --- wgmma --------------------------------------------------------------------------------------

PITCH = {"none": 16, "128B": 128, "64B": 64, "32B": 32}
MODE = {"none": 0, "128B": 1, "64B": 2, "32B": 3}


def swizzled(row: int, piece: int, pitch: int) -> int:
    """Return where a piece of 16 bytes lies in its row: pieces change places from row to row.

    From the figures of the PTX manual: with a pitch of 128 in each of 8 rows another way, of 64 in
    every second row, of 32 in every fourth.
    """
    return piece ^ (row * pitch // 128) % (pitch // 16)


def lay_out(
    matrix: np.ndarray, kind: str, swizzle: str, transposed: bool
) -> tuple[np.ndarray, int]:
    """Return the bytes of a matrix [rows, K] in shared memory, and its descriptor at byte 0.

    Atoms have 8 lines of `pitch` bytes. Not transposed, a line is a row of the matrix, 8 lines are
    8 rows, and K lies along the line. Transposed, a line is one k.
    """
    bits = stored(matrix, kind)
    lines = bits.T if transposed else bits
    size, pitch = bits.itemsize, PITCH[swizzle]
    each = pitch // size
    across = -(-lines.shape[1] // each)
    groups = lines.shape[0] // 8
    memory = np.zeros((across, groups, 8, pitch // 16, 16 // size), bits.dtype)
    for line in range(lines.shape[0]):
        for column in range(lines.shape[1]):
            atom, inside = divmod(column, each)
            piece, element = divmod(inside, 16 // size)
            place = swizzled(line % 8, piece, pitch)
            memory[atom, line // 8, line % 8, place, element] = lines[line, column]
    # Atoms along the line, and groups of 8 lines.
    along, down = groups * 8 * pitch, 8 * pitch
    descriptor = (along >> 4) << 16 | (down >> 4) << 32 | MODE[swizzle] << 62
    return memory.reshape(-1).view(np.uint8), descriptor


CASES = [
    (kind, swizzle, transposed)
    for kind in DEPTH
    for swizzle in PITCH
    for transposed in (False, True)
    if not transposed or (kind != "tf32" and swizzle != "none")
]


@pytest.mark.parametrize("columns", (8, 64))
@pytest.mark.parametrize(("kind", "swizzle", "transposed"), CASES)
def test_wgmma(kind: str, swizzle: str, transposed: bool, columns: int) -> None:
    """D = A B and then D += A B: A and B in shared memory in every layout, also A in registers."""
    K = DEPTH[kind]
    each = PITCH[swizzle] // (4 if kind == "tf32" else 2)
    rows_of_b = max(columns, each) if transposed else columns
    a, b = draw(kind, 64, K), draw(kind, rows_of_b, K)[::-1]
    if transposed is False and swizzle != "none":
        # K fills a part of a line; the rest is never read.
        a, b = (np.pad(m, ((0, 0), (0, each - K % each if K % each else 0))) for m in (a, b))
    (a_bytes, a_descriptor), (b_bytes, b_descriptor) = (
        lay_out(m, kind, swizzle, transposed) for m in (a, b)
    )
    b_start = -(-len(a_bytes) // 1024) * 1024
    memory = np.zeros(b_start + -(-len(b_bytes) // 2048) * 2048, np.uint8)
    memory[: len(a_bytes)] = a_bytes
    memory[b_start : b_start + len(b_bytes)] = b_bytes
    b_descriptor |= b_start >> 4
    count = columns // 2
    d = np.zeros((2, 128, count), np.uint32)
    numbers = "1, 1" if kind == "tf32" else f"1, 1, {int(transposed)}, {int(transposed)}"
    suffix = f"f32.{kind}.{kind}"
    opcode = f"wgmma.mma_async.sync.aligned.m64n{columns}k{K}.{suffix}"
    moves = " ".join(
        f"ld.global.v4.b32 {registers(1, 4)}, [%rd90+{2048 * i}];"
        f"st.shared.v4.b32 [%r20+{2048 * i}], {registers(1, 4)};"
        for i in range(len(memory) // 2048)
    )
    stores = " ".join(f"st.global.b32 [%rd90+{4 * i}], %r{100 + i};" for i in range(count))
    for late in (False, True):
        run(
            f"""shl.b32 %r20, %r0, 4; {address(0, 16)} {moves}
            fence.proxy.async.shared::cta; bar.sync 0;
            mov.u64 %rd10, {a_descriptor}; mov.u64 %rd11, {b_descriptor};
            mov.pred %p1, 0; mov.pred %p2, -1;
            wgmma.fence.sync.aligned;
            {opcode} {registers(100, count)}, %rd10, %rd11, %p1, {numbers};
            wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
            {address(1, 4 * count)} {stores}
            {opcode} {registers(100, count)}, %rd10, %rd11, %p2, {numbers};
            wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
            {address(2, 4 * count)} {stores}""",
            memory, d[0], d[1], threads=128, shared=len(memory), late=late,
        )  # fmt: skip
        expected = a[:, :K] @ b[:columns, :K].T
        for factor, result in enumerate(d, 1):
            for lane in range(128):
                warp, (g, t) = lane // 32, divmod(lane % 32, 4)
                for r in range(count):
                    row = 16 * warp + g + 8 * (r % 4 // 2)
                    value = expected[row, 8 * (r // 4) + 2 * t + r % 2]
                    assert result[lane, r].view(np.float32) == factor * value


@pytest.mark.parametrize("kind", DEPTH)
def test_wgmma_with_a_in_registers(kind: str) -> None:
    K = DEPTH[kind]
    a, b = draw(kind, 64, K), draw(kind, 8, K)[::-1]
    b_bytes, descriptor = lay_out(b, kind, "none", False)
    a_registers = np.concatenate([fragment(a[16 * w : 16 * w + 16], kind, "A") for w in range(4)])
    memory = np.resize(b_bytes, 2048)
    d = np.zeros((128, 4), np.uint32)
    numbers = "1, 1" if kind == "tf32" else "1, 1, 0"
    run(
        f"""shl.b32 %r20, %r0, 4; {address(0, 16)} ld.global.v4.b32 {registers(1, 4)}, [%rd90];
        st.shared.v4.b32 [%r20], {registers(1, 4)};
        fence.proxy.async.shared::cta; bar.sync 0;
        {address(1, 16)} ld.global.v4.b32 {registers(30, 4)}, [%rd90];
        mov.u64 %rd11, {descriptor};
        wgmma.fence.sync.aligned;
        wgmma.mma_async.sync.aligned.m64n8k{K}.f32.{kind}.{kind} {registers(40, 4)},
            {registers(30, 4)}, %rd11, 0, {numbers};
        wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;
        {address(2, 16)} st.global.v4.b32 [%rd90], {registers(40, 4)};""",
        memory, a_registers, d, threads=128, shared=2048,
    )  # fmt: skip
    for warp in range(4):
        expected = fragment((a @ b.T)[16 * warp : 16 * warp + 16], "tf32", "C")
        assert (d[32 * warp : 32 * warp + 32] == expected).all()


@pytest.mark.parametrize(("kind", "swizzle", "transposed"), CASES)
def test_every_element_of_a_tile_has_its_own_bytes(
    kind: str, swizzle: str, transposed: bool
) -> None:
    size, K = (4 if kind == "tf32" else 2), DEPTH[kind]
    matrix = np.zeros((64, max(K, PITCH[swizzle] // size)), np.float32)
    if transposed:
        matrix = np.zeros((64, K), np.float32)
    _, descriptor = lay_out(matrix, kind, swizzle, transposed)
    at = tile(descriptor, 64, K, size, transposed)
    assert len(np.unique(at)) == 64 * K
    assert (at % size == 0).all()


# --- sums ---------------------------------------------------------------------------------------


def test_cut_sums() -> None:
    """Terms are cut to 24 + extra bits of the largest, and the sum to 24."""
    unit = 2.0**-23

    def total(*terms: float, extra: int = 2) -> float:
        values = np.array([terms])
        with np.errstate(invalid="ignore"):
            result = floats.truncated_sum(values, np.zeros(1, np.float32), len(terms), extra)
        return float(result[0])

    assert total(1.0, unit) == 1 + unit
    # Rounding would give 1 + unit.
    assert total(1.0, 0.75 * unit) == 1.0
    # Two extra bits keep quarters, whose sum counts.
    assert total(1.0, 0.5 * unit, 0.5 * unit) == 1 + unit
    assert total(1.0, 0.5 * unit, 0.5 * unit, extra=0) == 1.0
    # Toward zero, on both sides.
    assert total(-1.0, -0.75 * unit) == -1.0
    assert np.isnan(total(np.inf, -np.inf))


def test_a_product_is_cut_if_it_is_asked_for() -> None:
    a, b, c = np.zeros((16, 16)), np.zeros((16, 8)), np.ones((16, 8))
    a[:, 0], b[0] = 2.0**-12, 1.5 * 2.0**-12
    a_bits, b_bits = fragment(a, "bf16", "A"), fragment(b, "bf16", "B")
    for cut, expected in ((False, 1 + 2.0**-23), (True, 1.0)):
        d = np.zeros((32, 4), np.float32)
        run(
            f"""{address(0, 16)} ld.global.v4.b32 {registers(1, 4)}, [%rd90];
            {address(1, 8)} ld.global.v2.b32 {registers(5, 2)}, [%rd90];
            {address(2, 16)} ld.global.v4.b32 {registers(7, 4)}, [%rd90];
            mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {registers(11, 4)},
                {registers(1, 4)}, {registers(5, 2)}, {registers(7, 4)};
            {address(3, 16)} st.global.v4.b32 [%rd90], {registers(11, 4)};""",
            a_bits, b_bits, fragment(c, "tf32", "C"), d, cut=cut,
        )  # fmt: skip
        assert (d == np.float32(expected)).all()
