"""SiblingLink: run layers that a model calls one by one on the same x together."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moelora_kernels.autograd.linear import Unused, share_unused
from moelora_kernels.nn.forward import (
    forward_siblings,
    gate_rows_differ,
    keep_routing,
    run_siblings,
)
from moelora_kernels.nn.layer import LoraLayer
from moelora_kernels.nn.snapshot import Snapshot, snapshot
from moelora_kernels.numerics import active_dtype
from moelora_kernels.types import ExternalGates, Gate


class SiblingLink:
    """Run the layers that a model calls one by one on the same x together, in the first call.

    The first layer that is called with an x computes the outputs of all layers. The others, called
    with the same tensor, return the stored outputs. A stored output is dropped if x, the layer or
    the mode of autograd changed; the call then computes all outputs again. The call order can cost
    time but never changes results. Each thread has its stored outputs, so threads can run one
    model at the same time.

    Stored outputs are dropped when x is freed. They do not keep x alive, but their graph does,
    until backward has run or until the next call.

    A graph of torch.compile has no version counter of x. There the layers run together only if the
    source of their parent calls them one after another.

    Args:
        layers: the siblings.
        in_a_row: whether `are_called_in_a_row` holds.
    """

    def __init__(self, layers: Sequence[LoraLayer], in_a_row: bool) -> None:
        self.layers = tuple(layers)
        self.in_a_row = in_a_row
        self.forget()
        for layer in self.layers:
            layer.link = self

    def forget(self) -> None:
        """Drop the stored outputs of all threads."""
        # A thread that is computing outputs right now stores them in the previous object, which
        # is never read again.
        self.stored = StoredOutputs()

    def forward(self, layer: LoraLayer, x: Tensor, gates: ExternalGates | None) -> Tensor:
        """Return y of `layer`, which is one of the linked layers or a replica of one."""
        if torch.compiler.is_compiling():
            return self.traced_forward(layer, x, gates)
        layers, stored = self.layers, self.stored
        if layer not in layers:
            return forward_siblings((layer,), x, gates)[0]
        i, last = layers.index(layer), stored.last
        output = None if last is None else last.pop(i, x, gates)
        if output is None or not output.snapshot.equals(snapshot(layer)):
            if _run_alone(layers, x, gates):
                return forward_siblings((layer,), x, gates)[0]
            stored.last = last = run_pass(layers, i, x, gates)
            output = last.outputs.pop(i)
        if not last.outputs:
            stored.last = None
        last.unused.discard(i)
        if layer.record.is_on:
            keep_routing(layer, output.gate, x.shape[:-1], i, len(layers))
        return output.y

    def traced_forward(self, layer: LoraLayer, x: Tensor, gates: ExternalGates | None) -> Tensor:
        """Return y of `layer` in a graph that is being compiled."""
        layers = self.layers
        here = [i for i, other in enumerate(layers) if other is layer]
        if not here or gates is not None or not self._can_trace(x):
            return forward_siblings((layer,), x, gates)[0]
        (i,) = here
        # An attribute of x: inside an activation checkpoint Dynamo refuses a change of an object
        # from outside, and x is made inside of it.
        reference = getattr(x, _TRACED, None)
        traced = None if reference is None else reference()
        mode = (torch.is_grad_enabled(), active_dtype(x))
        if traced is None or traced.link is not self or i not in traced.ys:
            ys, gate = run_siblings(layers, x)
            traced = TracedPass(self, mode, dict(enumerate(ys)), gate)
            setattr(x, _TRACED, weakref.ref(traced))
        elif traced.mode != mode:
            return forward_siblings((layer,), x)[0]
        y = traced.ys.pop(i)
        if not traced.ys:
            setattr(x, _TRACED, None)
        if layer.record.is_on:
            keep_routing(layer, traced.gate, x.shape[:-1], i, len(layers))
        return y

    def _can_trace(self, x: Tensor) -> bool:
        """Return whether the layers can run together on x in a graph that is being compiled."""
        return (
            self.in_a_row
            # Not torch.export without Dynamo: there nothing keeps a TracedPass alive.
            and torch.compiler.is_dynamo_compiling()
            and type(x) is Tensor
            and x.layout is torch.strided
            and not torch._C._are_functorch_transforms_active()
            and not any([layer.has_hooks_after_call() for layer in self.layers])
            and not _must_run_alone(self.layers)
        )

    def __getstate__(self) -> dict:
        # Outputs belong to one x object, so copies and pickles start without them.
        return {"layers": self.layers, "in_a_row": self.in_a_row}

    def __setstate__(self, state: dict) -> None:
        self.layers, self.in_a_row = state["layers"], state["in_a_row"]
        self.forget()


# The attribute of x with a weak reference to a TracedPass, which exists only while Dynamo traces.
_TRACED = "_moelora_traced_pass"


class TracedPass:
    """The outputs of one pass in a graph that is being compiled, which no call has returned yet."""

    def __init__(
        self, link: SiblingLink, mode: tuple, ys: dict[int, Tensor], gate: Gate | None
    ) -> None:
        self.link, self.mode, self.ys, self.gate = link, mode, ys, gate


class Output(NamedTuple):
    """The output of one linked layer."""

    y: Tensor
    # The gate of all linked layers side by side.
    gate: Gate | None
    # None for the layer whose call ran the pass.
    snapshot: Snapshot | None


@dataclasses.dataclass(slots=True)
class Pass:
    """The outputs of one pass of linked layers that no call has returned yet."""

    # These references do not keep x, the gates and their graphs alive.
    x: weakref.ref[Tensor]
    gates: tuple[weakref.ref[Tensor], ...]
    state: tuple
    # The position of a layer -> its output. Empty after x is freed.
    outputs: dict[int, Output]
    # The positions of the layers that were not called.
    unused: Unused

    def pop(self, i: int, x: Tensor, gates: ExternalGates | None) -> Output | None:
        """Remove and return output i; None if there is none for this x and these gates."""
        given = _gate_tensors(gates)
        if self.x() is not x or len(given) != len(self.gates) or self.unused.is_closed:
            return None
        if any([gate() is not tensor for gate, tensor in zip(self.gates, given, strict=True)]):
            return None
        return self.outputs.pop(i, None) if self.state == _state(x, gates) else None


class StoredOutputs(threading.local):
    """The last pass of every thread, until all of its outputs are returned."""

    last: Pass | None = None


def run_pass(layers: Sequence[LoraLayer], i: int, x: Tensor, gates: ExternalGates | None) -> Pass:
    """Run linked layers together on x, for a call of layer i."""
    unused = Unused(range(len(layers)))
    trains = torch.is_grad_enabled()
    ys, gate = run_siblings(layers, x, gates, unused if trains else None)
    outputs: dict[int, Output] = {}
    for j, layer in enumerate(layers):
        outputs[j] = Output(ys[j], gate, None if j == i else snapshot(layer))
    if trains:
        share_unused(ys[0], unused)
    x_ref = weakref.ref(x, lambda _: outputs.clear())
    gate_refs = tuple([weakref.ref(tensor) for tensor in _gate_tensors(gates)])
    return Pass(x_ref, gate_refs, _state(x, gates), outputs, unused)


def _gate_tensors(gates: ExternalGates | None) -> tuple[Tensor, ...]:
    """Return the tensors of gates: none, one of dense gates, two of sparse ones."""
    if gates is None:
        return ()
    return gates if isinstance(gates, tuple) else (gates,)


def _run_alone(layers: Sequence[LoraLayer], x: Tensor, gates: ExternalGates | None) -> bool:
    """Return whether linked layers have to run one by one on x."""
    # An inference tensor has no version counter, so a change of x between two calls would go
    # unnoticed. Sparse tensors, other types of tensors, and those of functorch have no address.
    if type(x) not in (Tensor, nn.Parameter) or x.is_inference():
        return True
    if x.layout is not torch.strided:
        return True
    for gate in _gate_tensors(gates):
        if not isinstance(gate, Tensor) or gate.is_inference():
            return True
    return (
        torch.is_inference_mode_enabled()
        or torch._C._are_functorch_transforms_active()
        or _must_run_alone(layers)
    )


def _must_run_alone(layers: Sequence[LoraLayer]) -> bool:
    """Return whether linked layers have to run one by one, whatever x is."""
    first = layers[0]
    return (
        # A forward that trains counts the load of its experts, so only a layer that the model
        # calls may run.
        (first.config.balance_rate is not None and first.training)
        or not all([layer.can_run_for_sibling() for layer in layers])
        or first.merged
        or not agree(layers)
        or gate_rows_differ(layers)
    )


def agree(layers: Sequence[LoraLayer]) -> bool:
    """Return whether siblings can run together: none of them was changed alone."""
    first, *others = [_common(layer) for layer in layers]
    return all([other == first for other in others])


def _common(layer: LoraLayer) -> tuple:
    """Return the state that siblings have in common if they can run together."""
    # Without `member`: this runs for every layer in every call. Layers of PEFT have properties in
    # the place of these children.
    parameters, modules = layer._parameters, layer._modules
    a, b = parameters.get("lora_A"), parameters.get("lora_B")
    if "base_layer" in modules:
        base, router = modules["base_layer"], modules.get("router")
    else:
        base, router = layer.base_layer, layer.router
    weight = base._parameters.get("weight")
    return (
        layer.config,
        layer.training,
        layer.merged,
        a if a is None else (a.dtype, a.device, a.requires_grad),
        b if b is None else b.requires_grad,
        weight if weight is None else weight.dtype,
        router if router is None else router._parameters.get("bias") is None,
    )


def _state(x: Tensor, gates: ExternalGates | None) -> tuple:
    """Return what stored outputs depend on besides the layers and the objects x and gates."""
    return (
        x._version,
        x.requires_grad,
        x.data_ptr(),
        [(t._version, t.requires_grad, t.data_ptr()) for t in _gate_tensors(gates)],
        torch.is_grad_enabled(),
        active_dtype(x),
        torch.cuda.current_stream(x.device) if x.is_cuda else None,
    )
