"""The steps of a plan, and their replay.

A plan numbers its tensors: the inputs, then the tensors that its steps make and the tables that
they read. Every other tensor is a view of one of these.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# The tensors by number; None before the step that makes a tensor, and after its last use.
Tensors = list[Any]
# The address of the first element of each tensor.
Addresses = list[int]


class View(NamedTuple):
    """A view of a numbered tensor."""

    tensor: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    # Elements between the first element of the tensor and that of the view.
    offset: int
    # "whole" if the view is the tensor, "t" if it is its transpose, else "strided".
    kind: str

    def of(self, tensors: Tensors) -> Tensor:
        """Return the view."""
        tensor = tensors[self.tensor]
        if self.kind == "whole":
            return tensor
        if self.kind == "t":
            return tensor.t()
        return tensor.as_strided(self.size, self.stride, tensor.storage_offset() + self.offset)


def views_of(outputs: Sequence[View | Sequence[View]]) -> list[View]:
    """Return the views in the outputs of an op, in their order."""
    return [v for output in outputs for v in ([output] if isinstance(output, View) else output)]


class Address(NamedTuple):
    """The address of a view of a numbered tensor."""

    tensor: int
    # In bytes, from the first element of the tensor.
    offset: int


class Allocate:
    """Allocate a tensor on the device of the inputs."""

    def __init__(
        self,
        tensor: int,
        size: tuple[int, ...],
        stride: tuple[int, ...],
        dtype: torch.dtype,
        device: torch.device,
        zeros: bool,
    ) -> None:
        self.tensor, self.size, self.stride, self.zeros = tensor, size, stride, zeros
        self.dtype, self.device = dtype, device

    def uses(self) -> list[int]:
        """Return the numbers of the tensors that the step reads or makes."""
        return [self.tensor]

    def __call__(self, tensors: Tensors, addresses: Addresses, stream: int) -> None:
        result = torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)
        if self.zeros:
            result.zero_()
        tensors[self.tensor] = result
        addresses[self.tensor] = result.data_ptr()


class Launch:
    """Launch a compiled kernel.

    values: the arguments of the kernel in its order, with constants; None for a tensor. An
    argument is a number, None, an `Address`, or a tuple of them.
    """

    def __init__(self, kernel: Any, programs: int, values: Sequence[Any]) -> None:
        self.kernel, self.programs, self.values = kernel, programs, tuple(values)
        self.run, self.function = kernel.run, kernel.function
        self.metadata = kernel.packed_metadata
        # For a replay: the arguments with an address, by position.
        self.single = [(i, *v) for i, v in enumerate(values) if isinstance(v, Address)]
        self.tuples = [
            (i, v)
            for i, v in enumerate(values)
            if isinstance(v, tuple) and v and all(isinstance(each, Address) for each in v)
        ]

    def uses(self) -> list[int]:
        nested = [tensor for _, places in self.tuples for tensor, _ in places]
        return [tensor for _, tensor, _ in self.single] + nested

    def __call__(self, tensors: Tensors, addresses: Addresses, stream: int) -> None:
        values: list[Any] = [*self.values]
        for i, tensor, offset in self.single:
            values[i] = addresses[tensor] + offset
        for i, places in self.tuples:
            values[i] = tuple([addresses[tensor] + offset for tensor, offset in places])
        # Grid, stream and kernel, then the metadata and hooks of a profiler, then the arguments.
        self.run(
            self.programs, 1, 1, stream, self.function, self.metadata, None, None, None, *values
        )


# The functions of torch that take less time than the overloads of the dispatcher.
_FUNCTIONS: dict[Any, Callable] = {
    torch.ops.aten.mm.default: torch.mm,
    torch.ops.aten.addmm.default: torch.addmm,
    torch.ops.aten.addmm_.default: Tensor.addmm_,
}


class Call:
    """Call an op of ATen. Arguments: `View`s, lists of them, and other values.

    outputs: the numbers of the tensors that the op returns; empty if it writes its first argument.
    results: size, stride and dtype of every output.
    """

    def __init__(
        self,
        op: Any,
        arguments: Sequence[Any],
        options: dict[str, Any],
        outputs: Sequence[int],
        results: Sequence[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]],
    ) -> None:
        self.op, self.arguments, self.options = op, arguments, options
        self.outputs, self.results = outputs, results
        self.function = _FUNCTIONS.get(op, op)
        # For a replay: the arguments that are tensors, views or lists of views, by position.
        self.wholes, self.views, self.lists = [], [], []
        for i, argument in enumerate(arguments):
            if isinstance(argument, list) and any(isinstance(v, View) for v in argument):
                self.lists.append((i, argument))
            elif isinstance(argument, View) and argument.kind == "whole":
                self.wholes.append((i, argument.tensor))
            elif isinstance(argument, View):
                self.views.append((i, argument))

    def reads(self) -> list[int]:
        """Return the numbers of the tensors in the arguments."""
        nested = [view.tensor for _, views in self.lists for view in views]
        return [n for _, n in self.wholes] + [view.tensor for _, view in self.views] + nested

    def uses(self) -> list[int]:
        return [*self.reads(), *self.outputs]

    def __call__(self, tensors: Tensors, addresses: Addresses, stream: int) -> None:
        arguments = [*self.arguments]
        for i, number in self.wholes:
            arguments[i] = tensors[number]
        for i, view in self.views:
            arguments[i] = view.of(tensors)
        for i, views in self.lists:
            arguments[i] = [view.of(tensors) for view in views]
        result = self.function(*arguments, **self.options)
        if self.outputs:
            results = (result,) if isinstance(result, Tensor) else result
            for number, each in zip(self.outputs, results, strict=True):
                tensors[number] = each
                addresses[number] = each.data_ptr()


class Release:
    """Let go of tensors after their last use, so that their memory can be used again."""

    def __init__(self, numbers: Sequence[int]) -> None:
        self.numbers = tuple(numbers)

    def uses(self) -> list[int]:
        return [*self.numbers]

    def __call__(self, tensors: Tensors, addresses: Addresses, stream: int) -> None:
        for number in self.numbers:
            tensors[number] = None


Step = Allocate | Launch | Call | Release


class Plan:
    """The steps of one call of an op."""

    def __init__(
        self,
        inputs: int,
        constants: Sequence[Tensor | None],
        steps: Sequence[Step],
        outputs: Sequence[View | Sequence[View]],
    ) -> None:
        """`inputs`: how many inputs the op has. The plan has a number for each of `constants`.

        constants: by number, the tables; None for every other tensor.
        outputs: the results of the op, in their structure.
        """
        self.inputs, self.steps, self.outputs = inputs, tuple(steps), tuple(outputs)
        self.constants = list(constants[inputs:])
        self._addresses = [0 if t is None else t.data_ptr() for t in self.constants]

    def replay(self, inputs: list[Tensor], addresses: list[int], stream: int) -> tuple[Any, ...]:
        """Return the results of the op for `inputs`, whose addresses are `addresses`."""
        tensors: Tensors = inputs + self.constants
        addresses = addresses + self._addresses
        for step in self.steps:
            step(tensors, addresses, stream)
        return tuple(
            [
                output.of(tensors)
                if isinstance(output, View)
                else [view.of(tensors) for view in output]
                for output in self.outputs
            ]
        )
