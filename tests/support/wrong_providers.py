"""Providers of the benchmark with one planted fault each."""

import torch

from benchmarks.baselines.linear import Masked


class ForgetsLastExpert(Masked):
    """The last expert computes nothing."""

    def forward(self, x):
        with torch.no_grad():
            self.lora_A[-self.rank :] = 0
        return super().forward(x)

    def __init__(self, adapter, layer):
        super().__init__(adapter, layer)
        self.lora_A = torch.nn.Parameter(adapter.lora_A.clone())


class ScalesOneGradient(Masked):
    """dB is 5 % too large."""

    def __init__(self, adapter, layer):
        super().__init__(adapter, layer)
        self.lora_B.register_hook(lambda gradient: gradient * 1.05)


class DetachesTheRouter(Masked):
    """The router gets no gradient, and dx lacks its path."""

    def route(self, x):
        weights, chosen = super().route(x)
        return weights.detach(), chosen


class ReturnsNan(Masked):
    """The last row of y is NaN."""

    def forward(self, x):
        y = super().forward(x)
        return y.index_fill(0, torch.tensor([len(x) - 1]), torch.nan)


class DropsLastColumn(Masked):
    """The last column of y is zero, like in a kernel that forgets the last tile of O."""

    def forward(self, x):
        y = super().forward(x)
        return torch.cat([y[:, :-1], torch.zeros_like(y[:, -1:])], dim=1)
