"""MoeLoraGroup and link_siblings: run linears that read the same x together (q, k, v; gate, up)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from moelora_kernels.nn.forward import forward_siblings
from moelora_kernels.nn.linear import MoeLoraLinear
from moelora_kernels.nn.wrappers import named_modules
from moelora_kernels.numerics import active_dtype


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

    def forward(self, x: Tensor, gates: Tensor | None = None) -> tuple[Tensor, ...]:
        """Return y_i [..., O_i] of every sibling, in their order; gates as in MoeLoraLinear."""
        return tuple(forward_siblings(tuple(self._modules.values()), x, gates))


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
    all outputs. The call order can cost time but never changes results.
    """

    def __init__(self, layers: Sequence[MoeLoraLinear]) -> None:
        self.layers = tuple(layers)
        self.forget()
        for layer in self.layers:
            layer.link = self

    def forget(self) -> None:
        """Drop the stored outputs."""
        self.saved: tuple = ()
        self.outputs: dict[int, Tensor] = {}

    def forward(self, layer: MoeLoraLinear, x: Tensor, gates: Tensor | None) -> Tensor:
        """Return y of `layer`, which is one of the linked layers."""
        # An inference tensor has no version counter, so a change of x between two calls would go
        # unnoticed. Hooks before a call (offloading, FSDP, ZeRO-3) load the tensors of one layer.
        if x.is_inference() or any(map(_is_prepared, self.layers)):
            return forward_siblings((layer,), x, gates)[0]
        i = self.layers.index(layer)
        state = (x._version, torch.is_grad_enabled(), layer.training, active_dtype(x))
        is_stored = i in self.outputs and self.saved[0] is x and self.saved[1] is gates
        if not is_stored or self.saved[2] != state:
            self.outputs = dict(enumerate(forward_siblings(self.layers, x, gates)))
            self.saved = (x, gates, state)
        y = self.outputs.pop(i)
        if not self.outputs:
            self.forget()
        return y

    def __getstate__(self) -> dict:
        # Outputs belong to one x object, so copies and pickles start without them.
        return {"layers": self.layers, "saved": (), "outputs": {}}


def _is_prepared(layer: MoeLoraLinear) -> bool:
    """Return whether hooks or a patched forward run before each call of a layer."""
    return bool(layer._forward_pre_hooks) or "forward" in layer.__dict__


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
