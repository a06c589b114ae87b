"""Parse PTX: the instructions of a kernel, its labels, parameters, registers and shared memory."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from ptx.errors import Unsupported

# The generic address of byte 0 of the space of parameters.
PARAMETERS = 1 << 56


class Instruction(NamedTuple):
    """One instruction: `@!%p1 add.s32 %r1, %r2, 3;`."""

    # Position in the kernel.
    number: int
    # Name of the predicate, or None; whether it is negated.
    predicate: str | None
    negated: bool
    # "add.s32"
    opcode: str
    # ("%r1", "%r2", "3"); a vector "{%r1, %r2}" or an address "[%rd1 + 16]" is one operand.
    operands: tuple[str, ...]

    @property
    def parts(self) -> list[str]:
        """The opcode and its modifiers."""
        return self.opcode.split(".")

    def __str__(self) -> str:
        guard = f"@{'!' * self.negated}{self.predicate} " if self.predicate else ""
        return f"#{self.number} {guard}{self.opcode} {', '.join(self.operands)}"


class Parameter(NamedTuple):
    """The bytes of a parameter in the space of parameters."""

    offset: int
    size: int


@dataclass
class Program:
    """A kernel."""

    name: str
    # In the order of the arguments.
    parameters: dict[str, Parameter]
    # Threads of a program; None if the PTX does not say.
    threads: int | None
    instructions: list[Instruction] = field(default_factory=list)
    # Label -> number of the instruction behind it.
    labels: dict[str, int] = field(default_factory=dict)
    # Register, or the prefix of numbered registers, -> bytes; 0 for predicates.
    registers: dict[str, int] = field(default_factory=dict)
    # Variable in shared memory -> its first byte. Those of a size that the launch sets come last.
    variables: dict[str, int] = field(default_factory=dict)
    # Bytes of the variables whose size the PTX sets.
    shared: int = 0
    # Programs of a cluster.
    cluster: int = 1

    def width(self, register: str) -> int:
        """Return the bytes of a register; 0 for a predicate."""
        prefix = register.rstrip("0123456789")
        width = self.registers.get(register, self.registers.get(prefix))
        if width is None:
            raise Unsupported(f"register {register} is not declared")
        return width

    def pack(self, arguments: list[int | bytes]) -> np.ndarray:
        """Return the space of parameters, uint8.

        arguments: the value of every parameter: raw bits, or the bytes of a structure.
        """
        end = max((p.offset + p.size for p in self.parameters.values()), default=0)
        space = np.zeros(-(-end // 8) * 8, np.uint8)
        for (offset, size), value in zip(self.parameters.values(), arguments, strict=True):
            if isinstance(value, int):
                value = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")
            space[offset : offset + size] = np.frombuffer(value, np.uint8)
        return space


_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.\w(\d+)\s+(?:\.ptr\b[^,]*\s)?(\w+)(?:\[(\d+)\])?"
)
_VARIABLE = re.compile(r"\.shared\s+\.align\s+(\d+)\s+\.\w(\d+)\s+(\w+)(?:\[(\d*)\])?\s*;")
_CLUSTER = re.compile(r"\.reqnctapercluster\s+(\d+)(?:\s*,\s*1)*\s")
_REGISTER = re.compile(r"\.reg\s+\.(\w+)\s+(%?[\w.]+)(?:<\d+>)?")
_DIRECTIVE = re.compile(r"^\.(?:loc|file|section|pragma|branchtargets|noreturn)\b.*")
_LABEL = re.compile(r"^([$\w]+):\s*")
_GUARD = re.compile(r"^@(!?)(%\w+)\s+")


def split_operands(text: str) -> list[str]:
    """Return the operands between the commas that no bracket encloses."""
    if not any(bracket in text for bracket in "[{("):
        return [operand.strip() for operand in text.split(",")] if text else []
    operands, depth, start = [], 0, 0
    for i, character in enumerate(text):
        depth += (character in "[{(") - (character in "]})")
        if character == "," and depth == 0:
            operands.append(text[start:i].strip())
            start = i + 1
    operands.append(text[start:].strip())
    return [operand for operand in operands if operand]


def parse(ptx: str, name: str | None = None) -> Program:
    """Return a kernel of a PTX module: the one of this name, or the first."""
    ptx = re.sub(r"//[^\n]*", "", ptx)
    entries = re.finditer(r"\.entry\s+(\w+)", ptx)
    entry = next((match for match in entries if name in (None, match.group(1))), None)
    if entry is None:
        raise Unsupported(f"the module has no kernel {name or ''}")
    head, _, body = ptx[entry.end() :].partition("{")
    signature, _, attributes = head.partition(")")
    threads = re.search(r"\.reqntid\s+(\d+)", attributes)
    program = Program(
        entry.group(1),
        _parameters(signature),
        int(threads.group(1)) if threads else None,
    )
    body = body[: _end(body)]
    if cluster := _CLUSTER.search(f"{attributes} "):
        program.cluster = int(cluster.group(1))
    # "name" is one element. "name[]" is as many as the launch adds, and comes last.
    variables = [each.groups() for each in _VARIABLE.finditer(ptx[: entry.start()] + body)]
    for align, bits, variable, count in sorted(variables, key=lambda each: each[3] == ""):
        program.shared = -(-program.shared // int(align)) * int(align)
        program.variables[variable] = program.shared
        elements = 1 if count is None else int(count or 0)
        program.shared += elements * int(bits) // 8
    for kind, register in _REGISTER.findall(body):
        program.registers[register] = 0 if kind == "pred" else int(kind[1:]) // 8
    lines = [_DIRECTIVE.sub("", line.strip()) for line in body.splitlines()]
    for statement in "\n".join(line for line in lines if line).split(";"):
        _add_statement(program, statement.strip())
    return program


def _parameters(signature: str) -> dict[str, Parameter]:
    """Return the parameters of a kernel: each begins at a multiple of its alignment."""
    parameters, end = {}, 0
    for align, bits, name, count in _PARAMETER.findall(signature):
        size = int(bits) // 8 * int(count or 1)
        alignment = int(align or size)
        offset = -(-end // alignment) * alignment
        parameters[name] = Parameter(offset, size)
        end = offset + size
    return parameters


def _end(body: str) -> int:
    """Return the position of the brace that closes the body of a kernel."""
    depth = 1
    for match in re.finditer(r"[{}]", body):
        depth += 1 if match.group() == "{" else -1
        if depth == 0:
            return match.start()
    raise Unsupported("a kernel without an end")


def _add_statement(program: Program, text: str) -> None:
    """Add an instruction and the labels before it. A brace at the start opens or closes a scope."""
    while text:
        if text[0] in "{}":
            text = text[1:].strip()
        elif match := _LABEL.match(text):
            program.labels[match.group(1)] = len(program.instructions)
            text = text[match.end() :]
        else:
            break
    if not text or text.startswith((".reg", ".shared", ".local")):
        if text.startswith(".local"):
            raise Unsupported("local memory")
        return
    text = re.sub(r"\s+", " ", text)
    predicate, negated = None, False
    if match := _GUARD.match(text):
        negated, predicate = match.group(1) == "!", match.group(2)
        text = text[match.end() :]
    opcode, _, rest = text.partition(" ")
    program.instructions.append(
        Instruction(
            len(program.instructions), predicate, negated, opcode, tuple(split_operands(rest))
        )
    )
