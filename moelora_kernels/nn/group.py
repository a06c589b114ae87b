"""MoeLoraGroup and link_siblings: run linears that read the same x together (q, k, v; gate, up)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor, nn

from moelora_kernels.nn.base_linear import given_input
from moelora_kernels.nn.forward import forward_siblings
from moelora_kernels.nn.layer import LoraLayer
from moelora_kernels.nn.layer_tensors import has_computing_hooks
from moelora_kernels.nn.linear import MoeLoraLinear
from moelora_kernels.nn.recorded_forwards import follow_forwards
from moelora_kernels.nn.sibling_calls import SIBLINGS, are_called_in_a_row, sibling_names
from moelora_kernels.nn.sibling_link import SiblingLink, agree
from moelora_kernels.nn.wrappers import named_modules
from moelora_kernels.types import ExternalGates


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
        follow_forwards(self)

    def forward(
        self,
        x: Tensor | None = None,
        gates: ExternalGates | None = None,
        *,
        input: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """Return y_i [..., O_i] of every sibling, in their order.

        gates and `input`, another name of x, as in MoeLoraLinear.
        """
        if x is None or input is not None:
            x = given_input(x, input)
        layers = tuple(self._modules.values())
        if any(map(has_computing_hooks, layers)) or not agree(layers):
            # Pruning masks and norms compute the adapters before each call of a layer.
            return tuple(layer(x, gates) for layer in layers)
        return tuple(forward_siblings(layers, x, gates))


def check_siblings(siblings: Mapping[str, nn.Module]) -> None:
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


def link_siblings(
    model: nn.Module,
    groups: Iterable[Sequence[str]] = SIBLINGS,
) -> list[str]:
    """Run siblings of a model together, without changing the model's code or state dict.

    In every module of `model` whose children have all names of a group and are MoeLoraLinear layers
    with the same options, these children run together, like a MoeLoraGroup. In training they then
    share the dropout mask of x. Under torch.inference_mode they run one by one, and under
    torch.compile if the source of the module does not call them one after another.

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
                SiblingLink([*children.values()], are_called_in_a_row(module, group))
                linked.append(_group_name([f"{name}.{child}" for child in group]))
    if not linked:
        raise ValueError(f"groups: no module has children {[[*group] for group in groups]}")
    return linked


def link_named(modules: Mapping[str, nn.Module], layers: Mapping[str, LoraLayer]) -> list[str]:
    """Link the layers with equal options that read the same x; see `nn/sibling_calls.py`.

    Args:
        modules: the parents of the layers by name, at least; the model's name is "".
        layers: layers with the same config, by the names of their linears.

    Returns:
        One name per linked group, as `link_siblings` does.
    """
    linked = []
    for names in sibling_names(modules, layers):
        siblings = [layers[name] for name in names]
        first, *others = siblings
        is_one_layer = len(set(siblings)) < len(siblings)
        if is_one_layer or any(s.in_features != first.in_features for s in others):
            continue
        parent, children = _split(names)
        SiblingLink(siblings, are_called_in_a_row(modules[parent], children))
        linked.append(_group_name(names))
    return linked


def _group_name(names: Sequence[str]) -> str:
    """Return "layers.0.{q,k}" for the names "layers.0.q" and "layers.0.k"."""
    parent, children = _split(names)
    return f"{parent}.{{{','.join(children)}}}".lstrip(".")


def _split(names: Sequence[str]) -> tuple[str, list[str]]:
    """Return the common parent of names, and their last parts."""
    return names[0].rpartition(".")[0], [name.rpartition(".")[2] for name in names]
