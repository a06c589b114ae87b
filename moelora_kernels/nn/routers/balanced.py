"""Loss-free balancing."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moelora_kernels.nn.routers.logits import router_logits


class Balance(nn.Module):
    """A bias per expert that counts where experts are selected and nowhere else.

    `bias` [E] is a buffer that `update_balance` moves against `load` [E], how often each expert was
    selected in the training forwards since then (None: none yet).

    Source: arXiv 2408.15664 (loss-free balancing).
    """

    def __init__(self, num_experts, *, device=None):
        super().__init__()
        self.register_buffer("bias", torch.zeros(num_experts, device=device))
        # Not a buffer: DDP overwrites those of all ranks with the first one's.
        self.load: Tensor | None = None

    def count(self, keep: Tensor) -> None:
        """Add the selection keep [N, E] of a forward, but not that of a repeated one."""
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            return
        counts = keep.sum(dim=0).to(torch.float32)
        self.load = counts if self.load is None else self.load + counts


class BalancedRouter(nn.Module):
    """A gate and its `balance`, which only selection sees.

    A gate that several layers share has a balance of its own in each of them.
    """

    def __init__(self, gate, num_experts, *, device=None):
        super().__init__()
        self.gate = gate
        self.balance = Balance(num_experts, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, I] -> logits [T, E] of the gate, without the bias."""
        return router_logits(self.gate, x)
