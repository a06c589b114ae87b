"""Plans for the native library, which replays them without Python.

The library has its own table of plans. Its op `replay_<op>` returns an empty list if the table has
no plan of the call, or if a step failed. The layer op then runs in Python, so a user sees the
exceptions of Python. The list is also empty under a mode of torch, under functorch, in
`torch.jit.trace`, and if an argument is a subclass of a tensor.

If a step other than an allocation fails, the library drops the plan for good, and Python replays
the calls with its key. The first failure warns.
"""

from __future__ import annotations

import struct
import threading
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from moelora_kernels import native
from moelora_kernels.kernels.common import launcher
from moelora_kernels.plans.steps import (
    Address,
    Allocate,
    Call,
    Launch,
    Plan,
    Release,
    Step,
    View,
    views_of,
)

# The steps by number; `Kind` in csrc/plan/plan.h.
ALLOCATE, LAUNCH, MM, ADDMM, COPY, COPY_ALL, ROUTE, RELEASE, CLUSTER_SHRINK = range(9)
# The dtypes by number; c10::ScalarType.
_DTYPES = {
    torch.int32: 3,
    torch.int64: 4,
    torch.float16: 5,
    torch.float32: 6,
    torch.float64: 7,
    torch.bfloat16: 15,
}
# Type of a kernel's parameter in a signature of Triton -> its format for `struct`.
_FORMATS = {"i1": "<b", "i32": "<i", "i64": "<q", "fp32": "<f", "fp64": "<d"}
# More parameters do not fit into the arrays of csrc/plan/plan.cpp.
_MAX_PARAMETERS = 128
_aten = torch.ops.aten


class NotNative(Exception):
    """The library cannot replay a step."""


class NativeReplay:
    """A layer op that the native library replays if it has a plan."""

    def __init__(self, name: str) -> None:
        """`name`: the layer op is `moelora::name`."""
        self.op = getattr(torch.ops.moelora, name).default
        schema = self.op._schema
        arguments = str(schema).partition(") -> ")[0].removeprefix(schema.name)
        # Return the results of the layer op in one list, or an empty list.
        torch.library.define(f"moelora::replay_{name}", f"{arguments}) -> Tensor[]")
        self._replay = getattr(torch.ops.moelora, f"replay_{name}").default
        torch.library.define(f"moelora::plan_{name}", f"{arguments}, int[] plan) -> ()")
        self._plan = getattr(torch.ops.moelora, f"plan_{name}").default
        # One result of the layer op is a list.
        is_list = [str(result.type) == "List[Tensor]" for result in schema.returns]
        self._before = is_list.index(True)
        self._after = len(is_list) - self._before - 1

    def __call__(self, *arguments: Any) -> tuple[Any, ...]:
        """Return the results of the layer op."""
        if launcher.is_plain():
            results = self._replay(*arguments)
            if results:
                start, stop = self._before, len(results) - self._after
                return *results[:start], results[start:stop], *results[stop:]
            _warn_of_failures()
        return self.op(*arguments)

    def keep(self, plan: Plan, arguments: Sequence[Any]) -> None:
        """Give the library the plan of a call, if it can replay it."""
        numbers = encoded(plan)
        if numbers is not None:
            self._plan(*arguments, numbers)


# Layer op -> its replay. torch defines an op once, so one thread at a time adds to it.
_replays: dict[str, NativeReplay] = {}
_replays_lock = threading.Lock()


def native_replay(name: str) -> NativeReplay | None:
    """Return the replay of the layer op `moelora::name`; None if there is no native library."""
    if native.plan_library() is None:
        return None
    with _replays_lock:
        if name not in _replays:
            _replays[name] = NativeReplay(name)
        return _replays[name]


_warned = False


def _warn_of_failures() -> None:
    """Warn if a replay of the library failed, once in a process."""
    global _warned
    if _warned:
        return
    count, reason = native.replay_failures()
    if count:
        _warned = True
        warnings.warn(
            f"moelora_kernels: the native library cannot replay a plan: {reason}. Python replays "
            "it, with the same results in more host time",
            RuntimeWarning,
            stacklevel=3,
        )


def encoded(plan: Plan) -> list[int] | None:
    """Return the numbers from which the library makes the plan; None if it cannot replay it."""
    tables = [(i, t) for i, t in enumerate(plan.constants, start=plan.inputs) if t is not None]
    try:
        steps = [numbers for step in plan.steps for numbers in _step(step)]
    except NotNative:
        return None
    result = [plan.inputs + len(plan.constants), len(tables)]
    for number, table in tables:
        result += [number, table.data_ptr()]
    result.append(len(steps))
    for numbers in steps:
        result += numbers
    views = views_of(plan.outputs)
    result.append(len(views))
    for view in views:
        result += _view(view)
    return result


def _list(values: Sequence[int]) -> list[int]:
    return [len(values), *values]


def _view(view: View) -> list[int]:
    whole = int(view.kind == "whole")
    return [view.tensor, whole, *_list(view.size), *_list(view.stride), view.offset]


def _work(kind: int, tensors: Sequence[int], views: Sequence[View], options=()) -> list[int]:
    result = [kind, *_list(tensors), len(views)]
    for view in views:
        result += _view(view)
    return result + _list(options)


def _step(step: Step) -> list[list[int]]:
    """Return the steps of the library for one step."""
    if isinstance(step, Release):
        return [[RELEASE, *_list(step.numbers)]]
    if isinstance(step, Allocate):
        if step.zeros:
            raise NotNative
        return [_allocation(step.tensor, step.size, step.stride, step.dtype)]
    if isinstance(step, Launch):
        return [_launch(step)]
    return _call(step)


def _allocation(
    tensor: int, size: Sequence[int], stride: Sequence[int], dtype: torch.dtype
) -> list[int]:
    if dtype not in _DTYPES:
        raise NotNative
    return [ALLOCATE, *_list([tensor]), *_list(size), *_list(stride), _DTYPES[dtype]]


def _call(step: Call) -> list[list[int]]:
    op, arguments = step.op, step.arguments
    if op is torch.ops.moelora.route.default:
        experts, *options = arguments
        return [_work(ROUTE, step.outputs, [experts], options)]
    if op.namespace == "moelora" and op._opname == "cluster_shrink":
        ranks, scaling, top_k, renormalize, temperature = arguments[4:]
        numbers = [_bits(temperature), *ranks, *map(_bits, scaling)]
        options = [top_k, int(renormalize), len(ranks), *numbers]
        return [_work(CLUSTER_SHRINK, step.outputs, arguments[:4], options)]
    copies = op in (_aten.clone.default, _aten._to_copy.default)
    if step.options and not copies:
        raise NotNative
    if op is _aten._foreach_copy_.default:
        outs, sources = arguments
        return [_work(COPY_ALL, [], [*outs, *sources])]
    if op is _aten.addmm_.default:
        return [_work(ADDMM, [], [arguments[0], *arguments])]
    kinds = {_aten.mm.default: MM, _aten.addmm.default: ADDMM}
    if not copies and op not in kinds:
        raise NotNative
    (number,), ((size, stride, dtype),) = step.outputs, step.results
    out = View(number, size, stride, 0, "whole")
    work = _work(COPY if copies else kinds[op], [], [out, *arguments])
    return [_allocation(number, size, stride, dtype), work]


def _bits(number: float) -> int:
    """Return the bits of a float64 as an integer."""
    return int.from_bytes(struct.pack("<d", number), "little", signed=True)


def _launch(step: Launch) -> list[int]:
    """Return a launch with the parameters of the compiled kernel, in their order."""
    metadata = step.kernel.metadata
    scratch = [getattr(metadata, f"{name}_scratch_size", 0) for name in ("global", "profile")]
    clusters = getattr(metadata, "num_ctas", 1) != 1
    special = [getattr(metadata, f"launch_{name}", False) for name in ("cooperative_grid", "pdl")]
    # An instrumented kernel has more parameters.
    special.append(getattr(metadata, "instrumentation_mode", ""))
    if any(scratch) or clusters or any(special):
        raise NotNative
    parameters = [
        number
        for value, type_ in zip(step.values, step.kernel.src.signature.values(), strict=True)
        for pair in _parameters(value, type_)
        for number in pair
    ]
    # Two pointers to scratch memory, which these kernels do not use, come last.
    parameters += [-1, 0] * 2
    if len(parameters) > 2 * _MAX_PARAMETERS:
        raise NotNative
    threads = metadata.num_warps * 32
    launch = [step.function, step.programs, threads, metadata.shared]
    return [LAUNCH, 0, *launch, len(parameters) // 2, *parameters]


def _parameters(value: Any, type_: Any) -> Iterable[tuple[int, int]]:
    """Yield (number of a tensor, offset in bytes) or (-1, bits) for every parameter of a value."""
    if isinstance(value, Address):
        yield value.tensor, value.offset
    elif isinstance(type_, tuple):
        for each, each_type in zip(value, type_, strict=True):
            yield from _parameters(each, each_type)
    elif type_ != "constexpr":
        if type_ not in _FORMATS or value is None:
            raise NotNative
        bits = struct.pack(_FORMATS[type_], value).ljust(8, b"\0")
        yield -1, int.from_bytes(bits, "little", signed=True)
