"""wgmma: products of a warpgroup (4 warps) whose operands lie in shared memory."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np

from ptx import fragments
from ptx.build import PROGRAM, Builder, Run, implements
from ptx.errors import RaceError, Unsupported
from ptx.program import Instruction
from ptx.shared_memory import CHUNK

GROUP = 128
# Terms that a wgmma adds at a time, and bits that it keeps beside 24, on H100 (`truncated_sum`).
SUMS = {"bf16": (16, 2), "f16": (16, 2), "tf32": (8, 2)}
# Mode of a descriptor -> bytes of a row of the swizzle's pattern, and the bits that it flips.
SWIZZLE = {1: (128, 7), 2: (64, 3), 3: (32, 1)}


@lru_cache(maxsize=4096)
def chunks(descriptor: int, rows: int, columns: int, size: int, transposed: bool) -> np.ndarray:
    """Return the 16-byte pieces of shared memory that a matrix has, in ascending order."""
    return np.unique(tile(descriptor, rows, columns, size, transposed) // CHUNK)


@lru_cache(maxsize=4096)
def tile(descriptor: int, rows: int, columns: int, size: int, transposed: bool) -> np.ndarray:
    """Return the byte of every element [rows, columns] of a matrix in shared memory.

    The descriptor has: bits 0 to 13 the first byte, 16 to 29 the leading byte offset (LBO) and 32
    to 45 the stride byte offset (SBO), all divided by 16; 62 and 63 the swizzle.
    A core matrix has 8 rows of 16 bytes. Not transposed (the columns, K, are contiguous): the next
    8 rows are SBO behind; without swizzle, the next 16 bytes of a row are LBO behind; with it, they
    follow at once. Transposed (the rows are contiguous; 16-bit types alone): a row of the pattern
    has pitch / size rows of the matrix, the next ones are LBO behind, the next 8 columns SBO.
    The swizzle flips bits 4 to 6 of a byte's address by bits 7 to 9.
    """
    start, lbo, sbo = (((descriptor >> bit) & 0x3FFF) << 4 for bit in (0, 16, 32))
    if (descriptor >> 49) & 7:
        raise Unsupported("a base offset in a descriptor")
    r, k = np.arange(rows)[:, None], np.arange(columns)[None, :]
    mode = descriptor >> 62
    if mode == 0:
        if transposed:
            raise Unsupported("a transposed matrix without swizzle")
        byte = k * size
        return start + r // 8 * sbo + r % 8 * 16 + byte // 16 * lbo + byte % 16
    pitch, bits = SWIZZLE[mode]
    if transposed:
        each = pitch // size
        at = start + r % each * size + r // each * lbo + k % 8 * pitch + k // 8 * sbo
    else:
        at = start + r // 8 * sbo + r % 8 * pitch + k * size
    return at ^ (((at >> 7) & bits) << 4)


@dataclass(frozen=True)
class Product:
    """A wgmma that no wait has seen."""

    operation: Operation
    # Of every program and warpgroup, [programs, groups]: descriptors (A: None in registers).
    a: np.ndarray | None
    b: np.ndarray
    # Whether D is added to, [1 or programs, 1 or threads].
    adds: np.ndarray

    def select(self, rows: np.ndarray) -> Product:
        """Return the product of some of the programs."""
        return replace(
            self,
            a=None if self.a is None else self.a[rows],
            b=self.b[rows],
            adds=self.adds if len(self.adds) == 1 else self.adds[rows],
        )

    def chunks(self):
        """Yield (programs, 16-byte pieces of shared memory) that the product reads."""
        op = self.operation
        for descriptors, rows, transposed in (
            (self.b, op.columns, op.transposed_b),
            (self.a, 64, op.transposed_a),
        ):
            if descriptors is not None:
                for group in descriptors.T:
                    for value, programs in distinct(group):
                        yield programs, chunks(value, rows, op.depth, op.size, transposed)


def distinct(values: np.ndarray):
    """Yield (value, programs that have it)."""
    if (values == values[0]).all():
        yield int(values[0]), np.arange(len(values))
        return
    for value in np.unique(values):
        yield int(value), np.flatnonzero(values == value)


@dataclass(frozen=True)
class Operation:
    """The static operands of a wgmma: D [64, columns] (+)= A [64, depth] B [depth, columns]."""

    kind: str
    size: int
    columns: int
    depth: int
    d: tuple[int, ...]
    # Registers of A; empty if A has a descriptor.
    a: tuple[int, ...]
    transposed_a: bool
    transposed_b: bool

    def matrix(self, batch, descriptors: np.ndarray, rows: int, transposed: bool) -> np.ndarray:
        """Return matrices of shared memory, [programs, groups, rows, depth] float64."""
        programs, groups = descriptors.shape
        kind = np.uint16 if self.size == 2 else np.uint32
        memory = batch.shared.bytes.view(kind)
        bits = np.empty((programs, groups, rows, self.depth), kind)
        for group in range(groups):
            for value, some in distinct(descriptors[:, group]):
                at = tile(value, rows, self.depth, self.size, transposed) // self.size
                bits[some, group] = memory[some][:, at]
        return fragments.numbers(bits, self.kind)

    def run(self, batch, product: Product) -> None:
        """Compute D of all warpgroups."""
        r, shape = batch.registers, batch.shape
        programs, groups = shape[0], shape[1] // GROUP
        if self.a:
            table = fragments.layout("A", self.size)
            bits = fragments.gather([r[i] for i in self.a], shape, table)
            a = fragments.numbers(bits, self.kind).reshape(programs, groups, 64, self.depth)
        else:
            a = self.matrix(batch, product.a, 64, self.transposed_a)
        b = self.matrix(batch, product.b, self.columns, self.transposed_b)
        table = fragments.accumulator(self.columns)
        if product.adds.any():
            c = fragments.gather([r[i] for i in self.d], shape, table).view(np.float32)
            if not product.adds.all():
                c = c * fragments.by_warp(
                    np.broadcast_to(product.adds, (len(product.adds), shape[1])), shape[1] // 32
                )
        else:
            c = np.zeros((programs, shape[1] // 32, 16 * self.columns), np.float32)
        model = SUMS[self.kind] if batch.cut else None
        c = c.reshape(programs, groups, 64, self.columns)
        result = fragments.multiply(a, np.swapaxes(b, -1, -2), c, model)
        bits = result.reshape(programs, groups * 4, -1).view(np.uint32)
        for i, value in zip(self.d, fragments.scatter(bits, table), strict=True):
            r[i] = value
        batch.of_products.update(self.d)


def _descriptors(value: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Return [programs, groups] of a register, which must be equal in all threads of a group."""
    groups = shape[1] // GROUP
    whole = np.broadcast_to(value, shape).reshape(shape[0], groups, GROUP)
    if value.shape[1] > 1 and (whole != whole[..., :1]).any():
        raise RaceError("the threads of a warpgroup have different descriptors")
    return whole[..., 0]


@implements(
    "wgmma.mma_async.sync.aligned.m64n{8,16,24,32,40,48,56,64,96,128,160,192,256}k16.f32"
    ".{bf16.bf16,f16.f16}",
    "wgmma.mma_async.sync.aligned.m64n{8,16,24,32,40,48,56,64,96,128,160,192,256}k8.f32.tf32.tf32",
    together=PROGRAM,
)
def wgmma(build: Builder, ins: Instruction) -> Run:
    """D = A B, or D + A B if the predicate is true: issued, and seen at the wait of its group."""
    kind, shape = ins.parts[-1], ins.parts[4]
    size, depth = fragments.INPUTS[kind]
    columns = int(shape.removeprefix("m64n").split("k")[0])
    d, a, b, adds, *numbers = ins.operands
    values = [int(text) for text in numbers]
    in_registers = a.startswith("{")
    transposed = values[2:] if size == 2 else []
    if values[:2] != [1, 1] or len(transposed) != (0 if size == 4 else 1 if in_registers else 2):
        raise Unsupported(f"the numbers {numbers}")
    operation = Operation(
        kind, size, columns, depth,
        d=tuple(build.target(name, 4) for name in build.vector(d)),
        a=tuple(build.source(name, 4) for name in build.vector(a)) if in_registers else (),
        transposed_a=bool(transposed[0]) if len(transposed) == 2 else False,
        transposed_b=bool(transposed[-1]) if transposed else False,
    )  # fmt: skip
    if len(operation.d) != columns // 2 or ins.predicate is not None:
        raise Unsupported(f"{len(operation.d)} registers of D, or a predicate")
    a_descriptor = None if in_registers else build.source(a, 8)
    b_descriptor, scale = build.source(b, 8), build.source(adds, 0)

    def run(batch) -> None:
        r = batch.registers
        _require_fence(batch, (*operation.a, *operation.d))
        product = Product(
            operation,
            None if in_registers else _descriptors(r[a_descriptor], batch.shape),
            _descriptors(r[b_descriptor], batch.shape),
            r[scale],
        )
        for programs, chunks in product.chunks():
            batch.shared.begin_wgmma(programs, chunks)
        if not batch.late:
            operation.run(batch, product)
        batch.products.append(product)
        batch.pending = batch.pending.union(operation.d)

    return run


def finish(batch, product: Product) -> None:
    """A wait has seen the end of a product."""
    if batch.late:
        product.operation.run(batch, product)
    for programs, chunks in product.chunks():
        batch.shared.end_wgmma(programs, chunks)


@implements("wgmma.fence.sync.aligned", together=PROGRAM)
def fence(build: Builder, ins: Instruction) -> Run:
    """Order earlier writes to registers before the products behind it."""

    def run(batch: Any) -> None:
        batch.fenced = batch.registers.copy()
        batch.of_products = set()

    return run


def _require_fence(batch: Any, registers: tuple[int, ...]) -> None:
    """Raise RaceError if a thread wrote to registers of a product since the last wgmma.fence.

    Products of one shape that add to the same registers need no fence between them.
    """
    if batch.fenced is None:
        raise RaceError("a wgmma without a wgmma.fence before it")
    for i in registers:
        if batch.registers[i] is not batch.fenced[i] and i not in batch.of_products:
            raise RaceError("a register of a wgmma was written since the last wgmma.fence")


@implements("wgmma.commit_group.sync.aligned", together=PROGRAM)
def commit(build: Builder, ins: Instruction) -> Run:
    """The products since the last commit make a group."""

    def run(batch: Any) -> None:
        batch.product_groups.append(batch.products)
        batch.products = []

    return run


@implements("wgmma.wait_group.sync.aligned", together=PROGRAM)
def wait(build: Builder, ins: Instruction) -> Run:
    """Wait until at most N groups are pending."""
    left = int(ins.operands[0])

    def run(batch: Any) -> None:
        while len(batch.product_groups) > left:
            for product in batch.product_groups.pop(0):
                finish(batch, product)
        pending = (*itertools.chain(*batch.product_groups), *batch.products)
        batch.pending = frozenset().union(*(product.operation.d for product in pending))

    return run
