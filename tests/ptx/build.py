"""Build the steps of a kernel: the table opcode -> function, and the operands of an instruction.

A function of the table takes a `Builder` and an `Instruction`. It returns the function that runs
the instruction on a `Batch` of programs. A register is an array [programs, threads] of raw bits
(uint8 to uint64; bool for predicates). A side on which all values are equal has length 1.
Constants and special registers are registers that no instruction writes.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from ptx.errors import Unsupported
from ptx.program import Instruction, Program, split_operands

BITS = {0: np.bool_, 1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
TYPES = {
    "pred": np.bool_,
    **{f"b{8 * size}": BITS[size] for size in (1, 2, 4, 8)},
    **{f"u{8 * size}": BITS[size] for size in (1, 2, 4, 8)},
    **{f"s{8 * size}": kind for size, kind in ((1, "i1"), (2, "i2"), (4, "i4"), (8, "i8"))},
    "f32": np.float32,
}
TYPES = {name: np.dtype(kind) for name, kind in TYPES.items()}
# An undefined register: NaN in every float format, and a large integer.
UNDEFINED = {0: False, 2: 0xFFEF, 4: 0xFFFFFFEF, 8: 0xFFFFFFFFFFFFFFEF}
# Opcodes that `execution` runs.
BRANCHES = ("bra", "bra.uni", "ret")
# The threads that must run an instruction together.
WARP, PROGRAM = "warp", "program"

Run = Callable[[Any], None]


class Step(NamedTuple):
    """An instruction that is ready to run."""

    run: Run
    # Registers that it reads, and those that it writes.
    reads: frozenset[int]
    writes: tuple[int, ...]
    # WARP or PROGRAM: the threads that must run it together; None: each thread for itself.
    together: str | None
    instruction: Instruction


TABLE: dict[str, Callable[[Builder, Instruction], Run]] = {}
TOGETHER: dict[str, str] = {}


def expand(pattern: str) -> list[str]:
    """Return the words of a pattern: "ld{,.v2}.b{8,16}" -> ld.b8, ld.b16, ld.v2.b8, ld.v2.b16."""
    parts = re.split(r"\{([^}]*)\}", pattern)
    choices = [part.split(",") if i % 2 else [part] for i, part in enumerate(parts)]
    return ["".join(words) for words in itertools.product(*choices)]


def implements(*patterns: str, together: str | None = None) -> Callable:
    """Enter a function into the table, under every opcode of the patterns.

    together: WARP or PROGRAM: its threads must run the instruction together. Instructions that
    read or write shared memory ask for PROGRAM, because they do so for all warps.
    """

    def enter(function: Callable) -> Callable:
        for opcode in itertools.chain.from_iterable(map(expand, patterns)):
            TABLE[opcode] = function
            if together:
                TOGETHER[opcode] = together
        return function

    return enter


class Builder:
    """The registers of a kernel while its steps are built."""

    def __init__(self, program: Program, threads: int) -> None:
        self.program, self.threads, self.warps = program, threads, -(-threads // 32)
        # Name of a register, or (value, bytes) of a constant -> index.
        self.index: dict[Any, int] = {}
        self.initial: list[np.ndarray] = []
        # Registers that the instruction at hand reads, and those that it writes.
        self._read: list[int] = []
        self._written: list[int] = []
        self.special("%tid.x", np.arange(threads, dtype=np.uint32)[None, :])
        self.special("%ntid.x", np.full((1, 1), threads, np.uint32))
        # The launch sets these three.
        self.special("%ctaid.x", np.zeros((1, 1), np.uint32))
        self.special("%nctaid.x", np.zeros((1, 1), np.uint32))
        self.special("%cluster_ctarank", np.zeros((1, 1), np.uint32))
        self.special("%cluster_nctarank", np.full((1, 1), program.cluster, np.uint32))
        for name in ("%tid.y", "%tid.z", "%ctaid.y", "%ctaid.z"):
            self.special(name, np.zeros((1, 1), np.uint32))
        for name in ("%nctaid.y", "%nctaid.z", "%ntid.y", "%ntid.z"):
            self.special(name, np.ones((1, 1), np.uint32))
        self.special("%laneid", (np.arange(threads, dtype=np.uint32) % 32)[None, :])

    def steps(self) -> list[Step]:
        """Return the steps of all instructions. `execution` runs branches, so theirs do nothing."""
        steps = []
        for instruction in self.program.instructions:
            self._read, self._written = [], []
            if instruction.opcode in BRANCHES:
                steps.append(Step(None, frozenset(), (), None, instruction))
                continue
            function = TABLE.get(instruction.opcode)
            if function is None:
                raise Unsupported(f"{self.program.name}: no implementation of {instruction}")
            try:
                run = function(self, instruction)
            except Unsupported as error:
                raise Unsupported(f"{self.program.name}: {instruction}: {error}") from None
            together = TOGETHER.get(instruction.opcode)
            reads, writes = frozenset(self._read), tuple(self._written)
            steps.append(Step(run, reads, writes, together, instruction))
        return steps

    # --- operands

    def special(self, name: str, value: np.ndarray) -> int:
        self.initial.append(value)
        self.index[name] = len(self.initial) - 1
        return self.index[name]

    def width(self, name: str) -> int:
        """Return the bytes of a register; 0 for a predicate."""
        return self.program.width(name)

    def register(self, name: str) -> int:
        """Return the index of a register."""
        if name not in self.index:
            width = self.width(name)
            self.special(name, np.full((1, 1), UNDEFINED[width], BITS[width]))
        return self.index[name]

    def constant(self, value: int, size: int) -> int:
        """Return the register of an integer of `size` bytes; size 0: of a truth value."""
        bits = bool(value) if size == 0 else value & ((1 << 8 * size) - 1)
        if (bits, size) not in self.index:
            self.special((bits, size), np.full((1, 1), bits, BITS[size]))
        return self.index[bits, size]

    def target(self, name: str, size: int | None = None) -> int:
        """Return the index of a register that the instruction writes.

        size: the bytes that the register must have; None: any.
        """
        index = self.register(name)
        if size is not None and self.width(name) != size:
            raise Unsupported(f"{name} has {self.width(name)} bytes, expected {size}")
        self._written.append(index)
        return index

    def source(self, text: str, size: int) -> int:
        """Return the index of a register, or of a constant, with `size` bytes; 0: a predicate."""
        if text in self.index:
            index = self.index[text]
        elif text.startswith("%"):
            index = self.register(text)
        else:
            return self.constant(self.value(text), size)
        if self.initial[index].dtype.itemsize != max(size, 1):
            raise Unsupported(f"{text} does not have {size} bytes")
        self._read.append(index)
        return index

    def value(self, text: str) -> int:
        """Return the bits of a constant, of a variable's address or of a parameter's."""
        if text in self.program.variables:
            return self.program.variables[text]
        if text in self.program.parameters:
            return self.program.parameters[text].offset
        if text.startswith(("0f", "0F", "0d", "0D")):
            return int(text[2:], 16)
        try:
            return int(text.rstrip("U"), 0)
        except ValueError:
            raise Unsupported(f"operand {text}") from None

    def address(self, text: str) -> tuple[int, int]:
        """Return (register, offset) of "[%rd1 + 16]"; the register is a constant in "[symbol]"."""
        match = re.fullmatch(r"\[\s*([%$\w.]+)\s*(?:\+?\s*(-?\d+))?\s*\]", text)
        if not match:
            raise Unsupported(f"address {text}")
        base, offset = match.group(1), int(match.group(2) or 0)
        size = self.width(base) if base.startswith("%") else 8
        return self.source(base, size), offset

    def vector(self, text: str) -> list[str]:
        """Return the elements of "{%r1, %r2}", or the operand itself."""
        return split_operands(text.strip()[1:-1]) if text.startswith("{") else [text]

    def predicate(self, instruction: Instruction) -> tuple[int, bool] | None:
        """Return (register, negated) of the instruction's predicate."""
        if instruction.predicate is None:
            return None
        return self.source(instruction.predicate, 0), instruction.negated

    # --- what an instruction does

    def compute(
        self,
        instruction: Instruction,
        function: Callable,
        target: int,
        sources: tuple[int, ...],
        view: np.dtype | None = None,
    ) -> Run:
        """Return the step target = function(*sources).

        view: the dtype that the function takes and returns, in the place of raw bits.
        """
        if view is None or view == self.initial[target].dtype:
            view = None
        bits = self.initial[target].dtype

        if view is not None:

            def run(batch) -> None:
                r = batch.registers
                r[target] = function(*(r[s].view(view) for s in sources)).view(bits)

        elif len(sources) == 2:
            first, second = sources

            def run(batch) -> None:
                r = batch.registers
                r[target] = function(r[first], r[second])

        else:

            def run(batch) -> None:
                r = batch.registers
                r[target] = function(*(r[s] for s in sources))

        return self.guarded(instruction, run, [target])

    def guarded(self, instruction: Instruction, run: Run, targets: list[int]) -> Run:
        """Return `run`, whose targets keep their values in threads whose predicate is false."""
        guard = self.predicate(instruction)
        if guard is None:
            return run
        index, negated = guard

        def guarded(batch) -> None:
            r = batch.registers
            active = ~r[index] if negated else r[index]
            before = [r[t] for t in targets]
            run(batch)
            for t, old in zip(targets, before, strict=True):
                r[t] = np.where(active, r[t], old)

        return guarded
