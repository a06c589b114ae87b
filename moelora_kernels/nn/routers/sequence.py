"""SequenceGate: gates for router="external", one for each instruction."""

from __future__ import annotations

from torch import Tensor, nn

from moelora_kernels.config import MoeLoraConfig
from moelora_kernels.nn.gates import gate_of_logits
from moelora_kernels.nn.routers.logits import float32_linear


class SequenceGate(nn.Module):
    """Compute one gate per sample for the whole model, from the embeddings of its instruction.

        gates = topk(softmax(W mean_s embeddings)) / sum

    For layers with router="external":

        set_tasks(model, gate(model.get_input_embeddings()(instruction_ids), mask))

    Args:
        hidden_size: I.
        num_experts: E.
        top_k: K, the experts of a sample.

    Example:
        >>> import torch
        >>> from moelora_kernels.nn import SequenceGate
        >>> gate = SequenceGate(16, num_experts=4)
        >>> gate(torch.randn(2, 7, 16)).shape
        torch.Size([2, 4])

    Source: arXiv 2311.02684 (Octavius).
    """

    def __init__(self, hidden_size, num_experts, top_k=2, *, device=None, dtype=None):
        super().__init__()
        self.config = MoeLoraConfig(
            num_experts=num_experts, granularity="sequence", top_k=top_k, normalize="sum"
        )
        self.linear = nn.Linear(hidden_size, num_experts, bias=False, device=device, dtype=dtype)

    def forward(self, embeddings: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return gates [B, E] in float32 for embeddings [B, L, I].

        mask: [B, L], nonzero at the positions that count; None counts padding too, like the
        original.
        """
        if mask is None:
            mean = embeddings.mean(dim=1)
        else:
            if mask.shape != embeddings.shape[:2]:
                raise ValueError(f"mask: expected {[*embeddings.shape[:2]]}, got {[*mask.shape]}")
            counts = (mask != 0).to(embeddings.dtype)[..., None]
            mean = (counts * embeddings).sum(dim=1) / counts.sum(dim=1).clamp_min(1)
        gates, _ = gate_of_logits(float32_linear(mean, self.linear), self.config, self.training)
        return gates
