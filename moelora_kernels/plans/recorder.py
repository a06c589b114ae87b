"""Record the steps of one call of a layer op."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from moelora_kernels.kernels.common import launcher, tables
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

_aten = torch.ops.aten
# Ops that allocate a tensor -> whether they fill it with zeros.
_ALLOCATIONS = {
    _aten.empty.memory_format: False,
    _aten.empty_strided.default: False,
    _aten.empty_like.default: False,
    _aten.new_empty.default: False,
    _aten.new_empty_strided.default: False,
    _aten.zeros.default: True,
    _aten.zeros_like.default: True,
    _aten.new_zeros.default: True,
}
# Ops whose work depends on the shapes, strides and dtypes of their tensors alone, and that return
# new tensors or write their first argument.
_CALLS = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.addmm_.default,
    _aten.add.Tensor,
    _aten.cat.default,
    _aten.clone.default,
    _aten._to_copy.default,
    _aten._foreach_copy_.default,
    _aten.constant_pad_nd.default,
    _aten.copy_.default,
}
# Ops of the native library whose work depends on the same alone.
NATIVE_OPS = ("route", "cluster_shrink")


class Recorder(TorchDispatchMode):
    """Record the steps of a call in the context.

    The recorder knows the ops of `_ALLOCATIONS` and `_CALLS`, views, and the ops of this package.
    Any other work sets `problem`, and the call then has no plan.
    """

    def __init__(self, inputs: Sequence[Tensor], launchers: Mapping[str, Callable]) -> None:
        """`launchers`: see `record`."""
        super().__init__()
        self.launchers = launchers
        # A second name of every input: two inputs may be the same tensor, or views of one storage,
        # and in another call with the same key they may not.
        self.inputs = [tensor.detach() for tensor in inputs]
        self.problem: str | None = None
        self.tensors: list[Tensor] = list(self.inputs)
        self.steps: list[Step] = []
        # The numbers of the tables.
        self._tables: set[int] = set()
        # id of a tensor -> the number of the tensor that it is a view of.
        self._numbers: dict[int, int] = {id(t): i for i, t in enumerate(self.inputs)}
        # Keeps the views, so that their ids are not used again.
        self._views: list[Tensor] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if op.namespace == "moelora" and op._opname in self.launchers:
            with self:
                return self.launchers[op._opname](*args, **kwargs)
        if _is_composite(op):
            # Such as `contiguous`, which returns its argument or a copy.
            with self:
                return op.decompose(*args, **kwargs)
        result = op(*args, **kwargs)
        if op in _ALLOCATIONS:
            self._allocate(result, _ALLOCATIONS[op])
        elif op in _CALLS or (op.namespace == "moelora" and op._opname in NATIVE_OPS):
            self._call(op, args, kwargs, result)
        elif _is_view(op):
            for view in [result] if isinstance(result, Tensor) else result:
                if not _shares_storage(view, args[0]):
                    self._fail(f"{op} returned a tensor that is not a view")
                self._views.append(view)
                self._numbers[id(view)] = self._number(args[0])
        elif any(isinstance(value, Tensor) for value in _flat([args, kwargs, result])):
            self._fail(f"{op} is not known")
        return result

    def launch(self, compiled: Any, kernel: Any, programs: int, arguments: dict[str, Any]) -> None:
        """Record a launch. arguments: by name, with constants; Triton's runtime compiled them."""
        if not hasattr(compiled, "packed_metadata"):
            self._fail("the kernel is interpreted")
            return

        def value(argument: Any) -> Any:
            if isinstance(argument, Tensor):
                return self._address(argument)
            if isinstance(argument, (tuple, list)):
                values = tuple([value(each) for each in argument])
                if len({isinstance(each, Address) for each in values}) > 1:
                    self._fail("a tuple of tensors and numbers")
                return values
            return argument

        values = [value(arguments[name]) for name in kernel.arg_names]
        self.steps.append(Launch(compiled, programs, values))

    def plan(self, result: Sequence[Any]) -> Plan | None:
        """Return the plan of a call that returned `result`; None if there is a problem."""
        outputs: list[Any] = [
            self._view(each) if isinstance(each, Tensor) else [self._view(t) for t in each]
            for each in result
        ]
        views = views_of(outputs)
        constant = {*range(len(self.inputs)), *self._tables}
        if any(view.tensor in constant for view in views):
            self._fail("the op returns an input or a table")
        if self.problem:
            return None
        outputs = self._allocated_as_returned(outputs)
        kept = constant | {view.tensor for view in views}
        constants = [t if i in self._tables else None for i, t in enumerate(self.tensors)]
        return Plan(len(self.inputs), constants, _with_releases(self.steps, kept), outputs)

    def _allocated_as_returned(self, outputs: list[Any]) -> list[Any]:
        """Return the outputs, after their allocations have taken their shapes.

        An op may return a view of all elements of a tensor that it allocated. The replay then
        allocates the view.
        """
        allocations = {s.tensor: s for s in self.steps if isinstance(s, Allocate)}
        called = {n for step in self.steps if isinstance(step, Call) for n in step.reads()}
        returned = Counter(view.tensor for view in views_of(outputs))

        def allocated(view: View) -> View:
            step = allocations.get(view.tensor)
            if step is None or view.kind == "whole" or view.tensor in called:
                return view
            if returned[view.tensor] > 1 or view.offset or not _is_dense(view, step):
                return view
            step.size, step.stride = view.size, view.stride
            return view._replace(kind="whole")

        return [allocated(o) if isinstance(o, View) else [allocated(v) for v in o] for o in outputs]

    def _allocate(self, tensor: Tensor, zeros: bool) -> None:
        number = self._add(tensor)
        size, stride = tuple(tensor.shape), tensor.stride()
        self.steps.append(Allocate(number, size, stride, tensor.dtype, tensor.device, zeros))

    def _call(self, op: Any, args: Sequence[Any], options: dict[str, Any], result: Any) -> None:
        def argument(value: Any) -> Any:
            if isinstance(value, Tensor):
                return self._view(value)
            return [argument(each) for each in value] if isinstance(value, (list, tuple)) else value

        if any(isinstance(value, Tensor) for value in _flat(options.values())):
            self._fail(f"{op}: a tensor is passed by name")
        arguments = [argument(each) for each in args]
        results: Sequence[Tensor] = [result] if isinstance(result, Tensor) else result
        if op._schema.is_mutable:
            results = []
        properties = [(tuple(t.shape), t.stride(), t.dtype) for t in results]
        outputs = [self._add(tensor) for tensor in results]
        self.steps.append(Call(op, arguments, options, outputs, properties))

    def _add(self, tensor: Tensor) -> int:
        self.tensors.append(tensor)
        self._numbers[id(tensor)] = len(self.tensors) - 1
        return len(self.tensors) - 1

    def _number(self, tensor: Tensor) -> int:
        """Return the number of the tensor that `tensor` is, or is a view of."""
        number = self._numbers.get(id(tensor))
        if number is None:
            number = self._add(tensor)
            if tables.is_table(tensor):
                self._tables.add(number)
            else:
                self._fail("a tensor of unknown origin")
        if tensor.dtype != self.tensors[number].dtype:
            self._fail("a view in another dtype")
        return number

    def _view(self, tensor: Tensor) -> View:
        number = self._number(tensor)
        base = self.tensors[number]
        size, stride = tuple(tensor.shape), tensor.stride()
        offset = int(tensor.storage_offset() - base.storage_offset())
        whole = tuple(base.shape), base.stride()
        kind = "strided"
        if offset == 0 and (size, stride) == whole:
            kind = "whole"
        elif offset == 0 and base.dim() == 2 and (size[::-1], stride[::-1]) == whole:
            kind = "t"
        return View(number, size, stride, offset, kind)

    def _address(self, tensor: Tensor) -> Address:
        view = self._view(tensor)
        return Address(view.tensor, view.offset * tensor.element_size())

    def _fail(self, problem: str) -> None:
        self.problem = self.problem or problem


def record(
    function: Callable[..., Any], arguments: Sequence[Any], launchers: Mapping[str, Callable]
) -> tuple[Any, Plan | None, str | None]:
    """Return the result of `function(*arguments)`; its plan, or None and the reason.

    launchers: op of this package -> the function that launches its Triton kernel.
    """
    inputs = list(_flat(arguments))
    recorder = Recorder([t for t in inputs if isinstance(t, Tensor)], launchers)
    aliases = iter(recorder.inputs)
    with launcher.passing_launches_to(recorder), recorder:
        result = function(*[_replaced(argument, aliases) for argument in arguments])
    return result, recorder.plan(result), recorder.problem


def _replaced(argument: Any, aliases: Iterator[Tensor]) -> Any:
    """Return the argument with the next alias in the place of each tensor."""
    if isinstance(argument, (list, tuple)):
        return [_replaced(each, aliases) for each in argument]
    return next(aliases) if isinstance(argument, Tensor) else argument


def _shares_storage(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def _is_composite(op: Any) -> bool:
    """Return whether an op is a composition of other ops."""
    key = "CompositeImplicitAutograd"
    return torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), key)


def _is_view(op: Any) -> bool:
    """Return whether the outputs of an op are views of its first argument."""
    aliases = [r.alias_info for r in op._schema.returns]
    return bool(aliases) and all(a is not None and not a.is_write for a in aliases)


def _is_dense(view: View, step: Allocate) -> bool:
    """Return whether a view has all elements of an allocated tensor, without gaps."""
    numel = math.prod(view.size)
    span = 1 + sum((n - 1) * s for n, s in zip(view.size, view.stride, strict=True))
    whole = 1 + sum((n - 1) * s for n, s in zip(step.size, step.stride, strict=True))
    return numel == span == whole == math.prod(step.size)


def _with_releases(steps: Sequence[Step], kept: set[int]) -> list[Step]:
    """Return the steps, each followed by the release of the tensors that it is the last to use."""
    result: list[Step] = []
    last: dict[int, int] = {}
    for i, step in enumerate(steps):
        last |= dict.fromkeys(step.uses(), i)
    for i, step in enumerate(steps):
        result.append(step)
        if numbers := [n for n, at in last.items() if at == i and n not in kept]:
            result.append(Release(numbers))
    return result


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        elif isinstance(value, dict):
            yield from _flat(value.values())
        else:
            yield value
