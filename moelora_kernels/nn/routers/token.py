"""Routers that read every token."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moelora_kernels.nn.routers.logits import router_logits, wide_linear, wide_product


class MlpRouter(nn.Module):
    """logits = W2 act(W1 x + b1) + b2        x [T, I] -> [T, E]; act is silu unless given"""

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
        """x [T, I] -> logits [T, E]."""
        return wide_linear(self.activation(wide_linear(x, self.fc1)), self.fc2)


class ThresholdRouter(nn.Module):
    """logits = (gate(x), w x + b): beside the gate's, the logit of the threshold of each token.

    x [T, I] -> [T, E + 1]. The gate of AdaMoLE (arXiv 2405.00361); `split_threshold` takes the two
    apart again. A gate that several layers share has a threshold of its own in each of them.
    """

    def __init__(self, gate, in_features, *, device=None, dtype=None):
        super().__init__()
        self.gate = gate
        self.threshold = nn.Linear(in_features, 1, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, I] -> logits [T, E + 1], that of the threshold last."""
        return torch.cat([router_logits(self.gate, x), router_logits(self.threshold, x)], dim=1)


class PrototypeRouter(nn.Module):
    """logits = |x v_e|        x [T, I] -> [T, E]

    The gate of Arrow (arXiv 2405.11157): v_e is a direction of expert e, one row of the buffer
    `prototypes` [E, I], which `set_prototypes` fills; zero until then. Nothing in it trains.
    """

    def __init__(self, in_features, num_experts, *, device=None, dtype=None):
        super().__init__()
        zeros = torch.zeros(num_experts, in_features, device=device, dtype=dtype)
        self.register_buffer("prototypes", zeros)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, I] -> logits [T, E], none negative."""
        return wide_product(x, self.prototypes).abs()
