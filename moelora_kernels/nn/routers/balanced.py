"""A router with a selection bias per expert, for loss-free balancing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moelora_kernels.nn.routers.logits import router_logits
from moelora_kernels.numerics import is_backward


class Balance(nn.Module):
    """A bias per expert that changes which experts are selected, but not their weights.

    Attributes:
        bias: [E], a buffer; `update_balance` moves it against the load.
        load: [E] float32, how often each expert was selected in the training forwards since the
            last `update_balance`; None before the first.

    Source: arXiv 2408.15664 (loss-free balancing).
    """

    def __init__(self, num_experts, *, device=None):
        super().__init__()
        self.register_buffer("bias", torch.zeros(num_experts, device=device))
        # Not a buffer: DistributedDataParallel copies buffers of the first process to all others.
        self.load: Tensor | None = None

    def count(self, keep: Tensor) -> None:
        """Count the selection `keep` [G, E] of a forward, unless backward repeats the forward."""
        if is_backward():
            return
        counts = keep.sum(dim=0).to(torch.float32)
        self.load = counts if self.load is None else self.load + counts


class BalancedRouter(nn.Module):
    """A router `gate` with a `balance`, which only the selection uses.

    If several layers share `gate`, each layer still has a separate balance.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from moelora_kernels.nn import BalancedRouter
        >>> router = BalancedRouter(nn.Linear(16, 4), num_experts=4)
        >>> router(torch.randn(3, 16)).shape, router.balance.bias.shape
        (torch.Size([3, 4]), torch.Size([4]))

    Source: arXiv 2408.15664 (loss-free balancing).
    """

    def __init__(self, gate, num_experts, *, device=None):
        super().__init__()
        self.gate = gate
        self.balance = Balance(num_experts, device=device)

    def forward(self, x: Tensor, *args: Tensor | None) -> Tensor:
        """Return the logits [T, E] of `gate` for x [T, I], without the bias."""
        return router_logits(self.gate, x, *args)
