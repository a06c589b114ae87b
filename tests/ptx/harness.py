"""Run a few lines of PTX on arrays: for the tests of single instructions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ptx.bulk import MAP_BYTES, tensor_map
from ptx.execution import Kernel
from ptx.global_memory import GlobalMemory
from ptx.program import parse

# Register names by bytes of a value.
PREFIX = {2: "%rs", 4: "%r", 8: "%rd"}


def kernel(
    body: str, parameters: int, threads: int = 32, shared: int = 0, cluster: int = 1, maps: int = 0
) -> Kernel:
    """Return a kernel of this body. Parameter i, a pointer, is in %rd{i}; %tid.x in %r0.

    The address of tensor map i is in %rd{80 + i}.
    """
    lines = [f"ld.param.b64 %rd{i}, [param_{i}];" for i in range(parameters)]
    lines += [
        f"mov.b64 %rd{80 + i}, map_{i}; cvta.param.u64 %rd{80 + i}, %rd{80 + i};"
        for i in range(maps)
    ]
    names = [f".param .u64 param_{i}" for i in range(parameters)]
    names += [f".param .align 128 .b8 map_{i}[{MAP_BYTES}]" for i in range(maps)]
    text = f"""
    .extern .shared .align 16 .b8 global_smem[];
    .visible .entry test(
    {", ".join(names)}
    )
    .reqntid {threads}
    .reqnctapercluster {cluster}, 1, 1
    {{
    .reg .pred %p<100>;
    .reg .b16 %rs<100>;
    .reg .b32 %r<500>;
    .reg .b64 %rd<100>;
    mov.u32 %r0, %tid.x;
    {" ".join(lines)}
    {body}
    ret;
    }}
    """
    return Kernel(parse(text), threads, shared)


def run(
    body: str,
    *arrays: np.ndarray,
    threads: int = 32,
    programs: int = 1,
    shared: int = 0,
    late: bool = False,
    cut: bool = False,
    by_thread: bool = False,
    cluster: int = 1,
    maps: Sequence[tuple[int, ...]] = (),
) -> None:
    """Run a kernel of this body on arrays, which it may change.

    maps: of each tensor map the array, and the fields of `TensorMap` behind the address.
    """
    memory = GlobalMemory([(array.view(np.uint8).reshape(-1), 0) for array in arrays])
    pointers = [memory.address(i) for i in range(len(arrays))]
    tensor_maps = [tensor_map(pointers[array], *fields) for array, *fields in maps]
    kernel(body, len(arrays), threads, shared, cluster, len(maps)).launch(
        programs, [*pointers, *tensor_maps], memory, late, cut, by_thread=by_thread
    )
    for i, array in enumerate(arrays):
        array.view(np.uint8).reshape(-1)[:] = memory.contents(i)


def address(parameter: int, size: int, register: str = "%rd90") -> str:
    """Return PTX that puts the address of this thread's element of a parameter into a register."""
    return f"mad.wide.u32 {register}, %r0, {size}, %rd{parameter};"


def apply(instruction: str, *values: np.ndarray, result: type) -> np.ndarray:
    """Return d of an instruction, by thread; its operands are "{d}", "{a}", "{b}", "{c}".

    values: a, b and c by thread; bool for predicates. result: dtype of d; bool for a predicate.
    """
    threads = -(-len(values[0]) // 32) * 32
    arrays, names, body = [], {}, []
    for i, (name, value) in enumerate(zip("abc", values, strict=False)):
        stored = value.astype(np.uint16) if value.dtype == bool else value
        padded = np.resize(stored, threads).copy()
        size = padded.itemsize
        register = f"{PREFIX[size]}{50 + i}"
        body += [address(i, size), f"ld.global.b{8 * size} {register}, [%rd90];"]
        if value.dtype == bool:
            body.append(f"setp.ne.b16 %p{50 + i}, {register}, 0;")
            register = f"%p{50 + i}"
        arrays.append(padded)
        names[name] = register
    output = np.zeros(threads, np.uint16 if result is bool else result)
    size = output.itemsize
    d = f"{PREFIX[size]}60"
    names["d"] = "%p60" if result is bool else d
    body.append(instruction.format(**names) + ";")
    if result is bool:
        body.append(f"selp.b16 {d}, 1, 0, %p60;")
    body += [address(len(arrays), size), f"st.global.b{8 * size} [%rd90], {d};"]
    run(" ".join(body), *arrays, output, threads=threads)
    output = output[: len(values[0])]
    return output.astype(bool) if result is bool else output
