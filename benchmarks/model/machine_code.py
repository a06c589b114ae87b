"""Compile recorded launches for any architecture, and read the machine code, without a GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moelora_kernels.kernels.common.launcher import Launch, options

TENSOR_CORE = re.compile(r"\b(HGMMA|HMMA|UTCHMMA|UTCQMMA)\b")
MEMORY = re.compile(r"\b(LDGSTS|LDG|STG)\.E([.\w]*)")
WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", re.MULTILINE)
# BRA 0x1200, with or without a predicate of its own.
JUMP = re.compile(r"\bBRA(?:\.\w+)*\s+(?:!?U?P\d+,\s*)?(0x[0-9a-f]+)")


# HGMMA.64x16x16.F32.BF16 R24, R56, gdesc[UR20], R24, gsb0: the second register is the first of the
# four of a left operand in registers; gsb0 ends a group.
PRODUCT = re.compile(r"\bHGMMA\S*\s+R\d+, (?:R(\d+), )?")
WAIT = re.compile(r"\bWARPGROUP\.DEPBAR\S*\s+gsb0, (0x[0-9a-f]+)")
# The register that an instruction writes, and its opcode. Stores and jumps write none; the result
# of a product is its accumulator.
RESULT = re.compile(
    r"^(?:@!?U?P\w+\s+)?(?!ST|RED|BRA|LDGSTS|HGMMA)([\w.]+)\s+(?:!?U?P\w+, )*R(\d+),"
)


class MachineCode(NamedTuple):
    """What the compiler made of a kernel.

    Attributes:
        threads: threads of a program.
        registers: 32-bit registers of a thread.
        shared: bytes of shared memory of a program.
        spills: instructions that load or store spilled registers.
        stack: bytes of the stack of a thread.
        instructions: all instructions of a thread, every loop body once.
        loop: instructions of the longest innermost loop, for one pass through its body; 0 without
            a loop.
        tensor_core: instruction -> how often it occurs.
        accesses: "LDG.16", a kind and its bytes -> how often it occurs.
        overwrites: instructions that write to a register while a product may still read it.
    """

    threads: int
    registers: int
    shared: int
    spills: int
    stack: int
    instructions: int
    loop: int
    tensor_core: dict[str, int]
    accesses: dict[str, int]
    overwrites: tuple[str, ...] = ()


def arguments_of(launch: Launch) -> tuple[dict, dict, dict]:
    """Return signature, constants and alignment of a launch, specialised as in Triton."""
    names = {
        torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16",
        torch.int32: "i32", torch.int64: "i64",
    }  # fmt: skip
    constants: dict[tuple, Any] = {}
    aligned: dict[tuple, Any] = {}

    def type_of(value: Any, path: tuple, specialize: bool):
        if isinstance(value, tuple):
            return tuple(type_of(each, (*path, i), specialize) for i, each in enumerate(value))
        if isinstance(value, Tensor):
            # Tensors of the meta device begin at 0. Views into a workspace begin at multiples of 64
            # bytes, other tensors at 256.
            if value.data_ptr() % 16 == 0:
                aligned[path] = [["tt.divisibility", 16]]
            return "*" + names[value.dtype]
        if value is None or (value == 1 and isinstance(value, int) and specialize):
            constants[path] = value
            return "constexpr"
        if isinstance(value, float):
            return "fp32"
        if value % 16 == 0 and specialize:
            aligned[path] = [["tt.divisibility", 16]]
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    signature = {}
    for index, parameter in enumerate(launch.kernel.params):
        if parameter.name in launch.constants:
            signature[parameter.name] = "constexpr"
            constants[(index,)] = launch.constants[parameter.name]
        else:
            value = launch.arguments[parameter.name]
            signature[parameter.name] = type_of(value, (index,), not parameter.do_not_specialize)
    return signature, constants, aligned


def compile_launch(launch: Launch, architecture: str):
    """Compile the kernel of a launch for an architecture."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, aligned = arguments_of(launch)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", int(architecture.removeprefix("sm_")), 32)
    return triton.compile(source, target=target, options=options(launch.tile_config))


def key_of(launch: Launch) -> str:
    """Return a key of the compiled code of a launch. It does not depend on the grid."""
    return str((launch.kernel.fn.__name__, arguments_of(launch), options(launch.tile_config)))


def disassemble(cubin: bytes) -> tuple[str, str]:
    """Return resource usage and SASS, as printed by the cuobjdump of Triton's wheel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return tuple(
            subprocess.run(
                [tool, flag, file.name], capture_output=True, text=True, check=True
            ).stdout
            for flag in ("-res-usage", "-sass")
        )


def width(suffix: str) -> int:
    """Return the bytes of one access: 16 for LDG.E.128, 4 for LDG.E, 2 for LDG.E.U16."""
    return next((WIDTHS[part] for part in suffix.split(".") if part in WIDTHS), 4)


def instructions_and_jumps(sass: str) -> tuple[list[str], dict[int, int]]:
    """Return the instructions, and by the number of a jump the number of its target."""
    instructions = [(int(at, 16), text) for at, text in INSTRUCTION.findall(sass)]
    position = {at: i for i, (at, _) in enumerate(instructions)}
    jumps = {
        i: position[int(jump.group(1), 16)]
        for i, (_, text) in enumerate(instructions)
        if (jump := JUMP.search(text)) and int(jump.group(1), 16) in position
    }
    return [text for _, text in instructions], jumps


def innermost_loops(sass: str) -> list[int]:
    """Return the number of instructions of every loop that contains no other loop.

    A loop is a jump backwards. A jump to itself, which ends a kernel, is none.
    """
    _, jumps = instructions_and_jumps(sass)
    loops = [(target, i) for i, target in jumps.items() if target < i]
    return [
        end - start + 1
        for start, end in loops
        if not any(
            (start, end) != (other_start, other_end) and start <= other_start and other_end <= end
            for other_start, other_end in loops
        )
    ]


def overwritten_operands(sass: str) -> list[str]:
    """Return the instructions that write to a left operand of a product before a wait for it.

    A product reads its operands until a wait for its group: WARPGROUP.DEPBAR with the number of
    later groups that may go on. All ways through the program are followed.
    """
    instructions, jumps = instructions_and_jumps(sass)
    found = []
    for start, text in enumerate(instructions):
        product = PRODUCT.search(text)
        if not product or not product.group(1):
            continue
        operand = range(int(product.group(1)), int(product.group(1)) + 4)
        # (instruction, groups that ended since the product was issued)
        ways, seen = [(start + 1, int("gsb0" in text))], set()
        while ways:
            way = ways.pop()
            i, groups = way
            if i >= len(instructions) or way in seen:
                continue
            seen.add(way)
            text = instructions[i]
            if PRODUCT.search(text):
                # More groups than a wait can name make no difference.
                groups = min(groups + ("gsb0" in text), 9)
            elif wait := WAIT.search(text):
                if groups > int(wait.group(1), 16):
                    continue
            elif result := RESULT.match(text):
                first = int(result.group(2))
                written = range(first, first + written_registers(result.group(1)))
                if set(written) & set(operand):
                    found.append(f"{text} behind {instructions[start]}")
                    break
            if i in jumps:
                ways.append((jumps[i], groups))
            # Only a jump or an exit without a condition does not go on.
            if not re.match(r"(BRA\S* 0x|EXIT)", text):
                ways.append((i + 1, groups))
    return found


def written_registers(opcode: str) -> int:
    """Return how many registers an instruction writes."""
    if opcode.startswith("LDSM"):
        return int(opcode[-1]) if opcode[-1] in "24" else 1
    if opcode.startswith("LD"):
        return max(1, width(opcode) // 4)
    return 2 if "WIDE" in opcode or ".64" in opcode else 1


def machine_code(launch: Launch, architecture: str) -> MachineCode:
    """Return the machine code of a launch, compiled for an architecture."""
    compiled = compile_launch(launch, architecture)
    usage, sass = disassemble(compiled.asm["cubin"])
    resources = dict(re.findall(r"(REG|STACK):(\d+)", usage))
    accesses = Counter((kind, width(suffix)) for kind, suffix in MEMORY.findall(sass))
    return MachineCode(
        threads=32 * launch.tile_config.warps,
        registers=int(resources["REG"]),
        shared=compiled.metadata.shared,
        spills=len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        stack=int(resources["STACK"]),
        instructions=len(INSTRUCTION.findall(sass)),
        loop=max(innermost_loops(sass), default=0),
        tensor_core=dict(Counter(TENSOR_CORE.findall(sass))),
        accesses={f"{kind}.{size}": n for (kind, size), n in sorted(accesses.items())},
        overwrites=tuple(overwritten_operands(sass)),
    )
