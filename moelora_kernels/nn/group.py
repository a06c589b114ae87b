"""MoeLoraGroup and link_siblings: run linears that read the same x together (q, k, v; gate, up)."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from moelora_kernels.nn.base_linear import given_input
from moelora_kernels.nn.forward import (
    forward_siblings,
    gate_rows_differ,
    keep_routing,
    run_siblings,
)
from moelora_kernels.nn.layer_tensors import has_computing_hooks
from moelora_kernels.nn.linear import MoeLoraLinear
from moelora_kernels.nn.recorded_forwards import follow_forwards
from moelora_kernels.nn.wrappers import named_modules
from moelora_kernels.numerics import active_dtype
from moelora_kernels.types import Gate


class MoeLoraGroup(nn.Module):
    """Run MoeLoraLinear siblings on one x: one shrink, one product for dA, one for dx.

        group = MoeLoraGroup(q_proj=q, k_proj=k, v_proj=v)
        q, k, v = group(x)

    The state dict is the same as that of the siblings outside a group, and each sibling can still
    be called alone. The siblings have the same in_features and options; out_features may differ. In
    training they share the dropout mask of x.

    Raises:
        TypeError: a sibling is not a MoeLoraLinear.
        ValueError: there are no siblings, or they differ in in_features, options or adapter dtype.

    Example:
        >>> import torch
        >>> from moelora_kernels import MoeLoraGroup, MoeLoraLinear
        >>> q, k = (MoeLoraLinear(16, out, num_experts=4, rank=2) for out in (32, 8))
        >>> [y.shape for y in MoeLoraGroup(q=q, k=k)(torch.randn(3, 16))]
        [torch.Size([3, 32]), torch.Size([3, 8])]
    """

    def __init__(self, **siblings: MoeLoraLinear) -> None:
        super().__init__()
        check_siblings(siblings)
        for name, layer in siblings.items():
            self.add_module(name, layer)

    def forward(
        self,
        x: Tensor | None = None,
        gates: Tensor | None = None,
        *,
        input: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Return y_i [..., O_i] of every sibling, in their order.

        gates and `input`, another name of x, as in MoeLoraLinear.
        """
        if x is None or input is not None:
            x = given_input(x, input)
        layers = tuple(self._modules.values())
        if any(map(has_computing_hooks, layers)):
            # Pruning masks and norms compute the adapters before each call of a layer.
            return tuple(layer(x, gates) for layer in layers)
        return tuple(forward_siblings(layers, x, gates))


def check_siblings(siblings: dict[str, nn.Module]) -> None:
    """Raise TypeError or ValueError unless these modules can run as one group."""
    if not siblings:
        raise ValueError("siblings: expected at least one MoeLoraLinear, got none")
    for name, layer in siblings.items():
        if not isinstance(layer, MoeLoraLinear):
            raise TypeError(f"{name}: expected a MoeLoraLinear, got {type(layer)}")
    (first_name, first), *others = siblings.items()
    for name, layer in others:
        if layer.in_features != first.in_features:
            raise ValueError(
                f"{name}: expected in_features {first.in_features} like {first_name}, "
                f"got {layer.in_features}"
            )
        if layer.config != first.config:
            raise ValueError(f"{name}: expected the options of {first_name}, got {layer.config}")
        if layer.lora_A.dtype != first.lora_A.dtype:
            raise ValueError(
                f"{name}: expected adapters of {first.lora_A.dtype} like {first_name}, "
                f"got {layer.lora_A.dtype}"
            )


class SiblingLink:
    """Run the layers that a model calls one by one on the same x together, in the first call.

    The first layer that is called with an x computes the outputs of all layers. The others, called
    with the same tensor, return the stored outputs. Calling a layer with a different x recomputes
    all outputs. The call order can cost time but never changes results. Each thread has its stored
    outputs, so threads can run one model at the same time.
    """

    def __init__(self, layers: Sequence[MoeLoraLinear]) -> None:
        self.layers = tuple(layers)
        self.forget()
        for layer in self.layers:
            layer.link = self

    def forget(self) -> None:
        """Drop the stored outputs of all threads."""
        # A thread that is computing outputs right now stores them in the previous object, which
        # is never read again.
        self.stored = StoredOutputs()

    def forward(self, layer: MoeLoraLinear, x: Tensor, gates: Tensor | None) -> Tensor:
        """Return y of `layer`, which is one of the linked layers or a replica of one."""
        layers = self.layers
        if layer not in layers or _run_alone(layers, x):
            return forward_siblings((layer,), x, gates)[0]
        i, stored, state = layers.index(layer), self.stored, _state(x)
        last = stored.last
        if (
            last is None
            or last.x is not x
            or last.gates is not gates
            or last.state != state
            or i not in last.outputs
            or last.versions[i] != _versions(layer)
        ):
            outputs, gate = run_siblings(layers, x, gates)
            versions = [_versions(sibling) for sibling in layers]
            last = Pass(x, gates, state, versions, dict(enumerate(outputs)), gate)
            stored.last = last
        y = last.outputs.pop(i)
        if not last.outputs:
            stored.last = None
        if layer.record.is_on:
            keep_routing(layer, last.gate, x.shape[:-1], i, len(layers))
        return y

    def __getstate__(self) -> dict:
        # Outputs belong to one x object, so copies and pickles start without them.
        return {"layers": self.layers}

    def __setstate__(self, state: dict) -> None:
        self.layers = state["layers"]
        self.forget()


@dataclasses.dataclass(slots=True)
class Pass:
    """The outputs of one pass of linked layers, and what they depend on."""

    x: Tensor
    gates: Tensor | None
    state: tuple
    versions: list[list]
    # The position of a layer -> its output, until the layer is called.
    outputs: dict[int, Tensor]
    gate: Gate | None


class StoredOutputs(threading.local):
    """The last pass of every thread, until all of its outputs are returned."""

    last: Pass | None = None


def _run_alone(layers: Sequence[MoeLoraLinear], x: Tensor) -> bool:
    """Return whether linked layers have to run one by one on x."""
    # An inference tensor has no version counter, so a change of x between two calls would go
    # unnoticed. Hooks before a call (offloading, FSDP, ZeRO-3) load the tensors of one layer.
    is_training = layers[0].training
    return (
        not isinstance(x, Tensor)
        or x.is_inference()
        or any(
            [
                layer._forward_pre_hooks
                or "forward" in layer.__dict__
                or layer.merged
                or layer.training != is_training
                for layer in layers
            ]
        )
        or gate_rows_differ(layers)
    )


def _state(x: Tensor) -> tuple:
    """Return what a stored output depends on besides x and the layer."""
    return (
        x._version,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        active_dtype(x),
        torch.cuda.current_stream(x.device) if x.is_cuda else None,
    )


def _versions(layer: MoeLoraLinear) -> list:
    """Return the mode of a layer and the version counters of A, B and a linear router."""
    tensors = [*layer._parameters.values()]
    if (router := layer._modules.get("router")) is not None:
        tensors += router._parameters.values()
    return [layer.training, *[t if t is None else t._version for t in tensors]]


def link_siblings(
    model: nn.Module,
    groups: Iterable[Sequence[str]] = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")),
) -> list[str]:
    """Run siblings of a model together, without changing the model's code or state dict.

    In every module of `model` whose children have all names of a group and are MoeLoraLinear layers
    with the same options, these children run together, like a MoeLoraGroup. In training they then
    share the dropout mask of x. Under torch.compile and torch.inference_mode they run one by one.

    Args:
        model: a model whose linears have been replaced.
        groups: names of children that the model calls with the same x.

    Returns:
        One name per linked group, such as "layers.0.self_attn.{q_proj,k_proj,v_proj}".

    Raises:
        ValueError: the model has no group, or the layers of a group cannot run together.

    Example:
        >>> from torch import nn
        >>> from moelora_kernels import MoeLoraConfig, link_siblings, replace_linears
        >>> mlp = nn.ModuleDict({name: nn.Linear(16, 32) for name in ("gate_proj", "up_proj")})
        >>> names = replace_linears(mlp, MoeLoraConfig.preset("ming"), ["gate_proj", "up_proj"])
        >>> link_siblings(mlp)
        ['{gate_proj,up_proj}']
    """
    follow_forwards(model)
    linked = []
    for name, module in named_modules(model):
        for group in groups:
            children = {child: getattr(module, child, None) for child in group}
            if all(isinstance(layer, MoeLoraLinear) for layer in children.values()):
                check_siblings(children)
                SiblingLink([*children.values()])
                linked.append(f"{name}.{{{','.join(group)}}}".lstrip("."))
    if not linked:
        raise ValueError(f"groups: no module has children {[[*group] for group in groups]}")
    return linked
