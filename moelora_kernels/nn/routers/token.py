"""Routers whose logits depend on the token alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moelora_kernels.nn.routers.logits import float32_linear, float32_product, router_logits


class MlpRouter(nn.Module):
    """Compute logits with an MLP of two layers.

        logits = W2 act(W1 x + b1) + b2        x [T, I] -> [T, E]; act is silu by default

    Example:
        >>> import torch
        >>> from moelora_kernels.nn import MlpRouter
        >>> MlpRouter(16, num_experts=4, hidden=8)(torch.randn(3, 16)).shape
        torch.Size([3, 4])
    """

    def __init__(
        self,
        in_features,
        num_experts,
        hidden,
        *,
        activation=nn.functional.silu,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.activation = activation
        self.fc1 = nn.Linear(in_features, hidden, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, num_experts, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [T, E] for x [T, I]."""
        return float32_linear(self.activation(float32_linear(x, self.fc1)), self.fc2)


class ThresholdRouter(nn.Module):
    """Append the logit of a learned threshold to the logits of another router.

        logits = (gate(x), w x + b)        x [T, I] -> [T, E + 1]

    `split_threshold` separates the two. If several layers share the inner router `gate`, each layer
    still has a separate threshold.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from moelora_kernels.nn import ThresholdRouter
        >>> ThresholdRouter(nn.Linear(16, 4), 16)(torch.randn(3, 16)).shape
        torch.Size([3, 5])

    Source: arXiv 2405.00361 (AdaMoLE).
    """

    def __init__(self, gate, in_features, *, device=None, dtype=None):
        super().__init__()
        self.gate = gate
        self.threshold = nn.Linear(in_features, 1, device=device, dtype=dtype)

    def forward(self, x: Tensor, *args: Tensor | None) -> Tensor:
        """Return logits [T, E + 1] for x [T, I]; the threshold's is the last column."""
        logits = router_logits(self.gate, x, *args)
        return torch.cat([logits, router_logits(self.threshold, x)], dim=1)


class PrototypeRouter(nn.Module):
    """Compute logits from the product of x with one direction per expert, as in Arrow.

        logits = |x v_e|        x [T, I] -> [T, E]

    v_e is row e of the buffer `prototypes` [E, I], which `set_prototypes` sets; it is zero until
    then. The router has no parameters.

    Example:
        >>> import torch
        >>> from moelora_kernels.nn import PrototypeRouter
        >>> PrototypeRouter(16, num_experts=4)(torch.randn(3, 16)).shape
        torch.Size([3, 4])

    Source: arXiv 2405.11157 (Arrow).
    """

    def __init__(self, in_features, num_experts, *, device=None, dtype=None):
        super().__init__()
        zeros = torch.zeros(num_experts, in_features, device=device, dtype=dtype)
        self.register_buffer("prototypes", zeros)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [T, E] for x [T, I], all at least 0."""
        return float32_product(x, self.prototypes).abs()
