"""Snapshot: the objects and versions on which the output of a layer depends, besides x."""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

from torch import Tensor, nn

from moelora_kernels.nn.layer import LoraLayer
from moelora_kernels.nn.samples import Samples

_OPTIONS = operator.itemgetter(
    "config", "mixture", "fused_mixture", "training", "merged", "samples", "external_gates",
    "external_experts", "task_ids",
)  # fmt: skip


class Snapshot(NamedTuple):
    """The state of a layer after a forward. Two equal snapshots mean the same output for one x.

    A change of values through `parameter.data` is not seen. Autograd does not see it either.
    """

    # Compared by identity: options, modules and tensors.
    objects: list[Any]
    # Compared by value: requires_grad and address of A and B, and the version of every tensor.
    numbers: list[int]

    def equals(self, other: Snapshot) -> bool:
        """Return whether the layer did not change between the two snapshots."""
        return (
            self.numbers == other.numbers
            and len(self.objects) == len(other.objects)
            and all(map(operator.is_, self.objects, other.objects))
        )


def snapshot(layer: LoraLayer) -> Snapshot:
    """Return the present state of `layer`, its base and its router."""
    # Linked layers call this function for every x, so it is written for speed.
    options = _OPTIONS(layer.__dict__)
    samples, gates, experts, task_ids = options[-4:]
    adapters, modules = layer._parameters.values(), layer.parts()
    tensors = [*adapters]
    # A pruning hook changes the value of a Parameter, which keeps its identity and version.
    objects = [*options, *modules, len(layer._forward_pre_hooks)]
    numbers = [number for t in adapters for number in (t.requires_grad, t.data_ptr())]
    for module in modules:
        if type(module) is not nn.Linear or module._forward_hooks or module._forward_pre_hooks:
            if module is not None:
                _add_attributes(module, objects)
                tensors += [value for value in objects if isinstance(value, Tensor)]
        else:
            tensors += module._parameters.values()
    if samples is not None or gates is not None or task_ids is not None:
        ids = samples.ids if isinstance(samples, Samples) else None
        tensors += (gates, experts, task_ids, ids)
    objects += tensors
    try:
        numbers += [t._version for t in tensors if t is not None]
    except RuntimeError:
        # A tensor of inference mode has no version. Only code in that mode can change it.
        numbers += [t._version for t in tensors if t is not None and not t.is_inference()]
    return Snapshot(objects, numbers)


def _add_attributes(module: nn.Module, values: list[Any]) -> None:
    """Add every attribute, tensor and hook of `module` and of its children to `values`."""
    # A module that is not a plain linear can compute with any attribute, such as the tasks of a
    # router.
    values += module.__dict__.values()
    values += module._parameters.values()
    values += module._buffers.values()
    values += module._forward_hooks.values()
    values += module._forward_pre_hooks.values()
    for child in module._modules.values():
        values.append(child)
        if child is not None:
            _add_attributes(child, values)
