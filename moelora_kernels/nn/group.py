"""MoeLoraGroup: siblings that read the same x, such as q, k, v or gate, up."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from moelora_kernels.nn.forward import forward_siblings
from moelora_kernels.nn.linear import MoeLoraLinear
from moelora_kernels.numerics import active_dtype


class MoeLoraGroup(nn.Module):
    """Run MoeLoraLinear siblings on one x: one shrink, one product for dA, one for dx.

        group = MoeLoraGroup(q_proj=q, k_proj=k, v_proj=v)
        q, k, v = group(x)

    The siblings stay what they are: the state dict is that of the same modules outside a group, and
    each of them can still be called alone. They share in_features and every option of their config;
    out_features may differ. In training they share the dropout mask of x.

    Raises:
        TypeError: a sibling is not a MoeLoraLinear.
        ValueError: no siblings, or siblings that differ in in_features or in their options.
    """

    def __init__(self, **siblings: MoeLoraLinear) -> None:
        super().__init__()
        check_siblings(siblings)
        for name, layer in siblings.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor, gates: Tensor | None = None) -> tuple[Tensor, ...]:
        """x [..., I] -> one y [..., O_i] for each sibling, in their order."""
        return tuple(forward_siblings(tuple(self._modules.values()), x, gates))


def check_siblings(siblings: dict[str, nn.Module]) -> None:
    """Raise unless these modules can be run as one group."""
    if not siblings:
        raise ValueError("siblings: expected at least one MoeLoraLinear, got none")
    for name, layer in siblings.items():
        if not isinstance(layer, MoeLoraLinear):
            raise TypeError(f"{name}: expected a MoeLoraLinear, got {type(layer)}")
    (first_name, first), *others = siblings.items()
    for name, layer in others:
        if layer.in_features != first.in_features:
            raise ValueError(
                f"{name}: expected in_features {first.in_features} as {first_name} has, "
                f"got {layer.in_features}"
            )
        if layer.config != first.config:
            raise ValueError(f"{name}: expected the options of {first_name}, got {layer.config}")
        if layer.lora_A.dtype != first.lora_A.dtype:
            raise ValueError(
                f"{name}: expected adapters of {first.lora_A.dtype} as {first_name} has, "
                f"got {layer.lora_A.dtype}"
            )


class SiblingLink:
    """Layers that a model calls one by one on the same x, run together at the first of the calls.

    The first layer that is called with an x computes the outputs of all; the others, called with
    the same tensor, take theirs. A layer that is called with another x starts anew: how the model
    calls its layers decides what is computed twice, never what comes out.
    """

    def __init__(self, layers: Sequence[MoeLoraLinear]) -> None:
        self.layers = tuple(layers)
        self.forget()
        for layer in self.layers:
            layer.link = self

    def forget(self) -> None:
        """Drop the outputs that no layer has taken yet."""
        self.given: tuple = ()
        self.outputs: dict[int, Tensor] = {}

    def forward(self, layer: MoeLoraLinear, x: Tensor, gates: Tensor | None) -> Tensor:
        """y of one of the layers."""
        # Nothing tells whether an inference tensor was changed between two calls; and hooks before
        # a call (offloading, FSDP, ZeRO-3) bring the tensors of that one layer.
        if x.is_inference() or any(map(_is_prepared, self.layers)):
            return forward_siblings((layer,), x, gates)[0]
        own = self.layers.index(layer)
        state = (x._version, torch.is_grad_enabled(), layer.training, active_dtype(x))
        fresh = own in self.outputs and self.given[0] is x and self.given[1] is gates
        if not fresh or self.given[2] != state:
            self.outputs = dict(enumerate(forward_siblings(self.layers, x, gates)))
            self.given = (x, gates, state)
        y = self.outputs.pop(own)
        if not self.outputs:
            self.forget()
        return y

    def __getstate__(self) -> dict:
        # Copies and pickles start without outputs, which are kept by the identity of x.
        return {"layers": self.layers, "given": (), "outputs": {}}


def _is_prepared(layer: MoeLoraLinear) -> bool:
    """Whether something is to happen before each call of a layer."""
    return bool(layer._forward_pre_hooks) or "forward" in layer.__dict__


def link_siblings(
    model: nn.Module,
    groups: Iterable[Sequence[str]] = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")),
) -> list[str]:
    """Run siblings of a model together without changing its code or its state dict.

    Every module of `model` whose children have all the names of a group, as MoeLoraLinear layers
    with the same options, runs them as a MoeLoraGroup would. In training the siblings then share
    the dropout mask of x. Under torch.compile and torch.inference_mode they run one by one; a
    MoeLoraGroup does not, and neither do they under torch.no_grad.

    Args:
        model: a model whose linears have been replaced.
        groups: names of children that are called with the same x.

    Returns:
        One name per group that was found, such as "layers.0.self_attn.{q_proj,k_proj,v_proj}".

    Raises:
        ValueError: no group is found, or the layers of one cannot be run together.
    """
    linked = []
    for name, module in model.named_modules():
        for group in groups:
            children = {child: getattr(module, child, None) for child in group}
            if all(isinstance(layer, MoeLoraLinear) for layer in children.values()):
                check_siblings(children)
                SiblingLink([*children.values()])
                linked.append(f"{name}.{{{','.join(group)}}}".lstrip("."))
    if not linked:
        raise ValueError(f"groups: no module has children {[[*group] for group in groups]}")
    return linked
