"""MoeLoraGroup: siblings that read the same x, such as q, k, v or gate, up."""

from __future__ import annotations

from torch import Tensor, nn

from moelora_kernels.nn.linear import MoeLoraLinear, forward_siblings


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
