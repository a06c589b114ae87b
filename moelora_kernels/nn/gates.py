"""Gates that stand beside the model: one for all layers, from what the user gives them."""

from __future__ import annotations

from torch import Tensor, nn

from moelora_kernels.config import MoeLoraConfig
from moelora_kernels.nn.routers import gate_of_logits, wide_linear


class SequenceGate(nn.Module):
    """gates = topk(softmax(W mean_s embeddings)) / sum        [B, S, I] -> [B, E], in float32

    The gate of Octavius (arXiv 2311.02684): one per sample for the whole model, from the input
    embeddings of its instruction. For layers with router="external":

        set_tasks(model, gate(model.get_input_embeddings()(instruction_ids), mask))

    Args:
        hidden_size: I.
        num_experts: E.
        top_k: experts of a sample.
    """

    def __init__(self, hidden_size, num_experts, top_k=2, *, device=None, dtype=None):
        super().__init__()
        self.config = MoeLoraConfig(
            num_experts=num_experts, granularity="sequence", top_k=top_k, normalize="sum"
        )
        self.linear = nn.Linear(hidden_size, num_experts, bias=False, device=device, dtype=dtype)

    def forward(self, embeddings: Tensor, mask: Tensor | None = None) -> Tensor:
        """embeddings [B, S, I] -> gates [B, E]; mask [B, S], True where a position counts.

        Without a mask padding counts, as in the original.
        """
        if mask is None:
            mean = embeddings.mean(dim=1)
        else:
            if mask.shape != embeddings.shape[:2]:
                raise ValueError(f"mask: expected {[*embeddings.shape[:2]]}, got {[*mask.shape]}")
            counts = (mask != 0).to(embeddings.dtype)[..., None]
            mean = (counts * embeddings).sum(dim=1) / counts.sum(dim=1).clamp_min(1)
        gates, _ = gate_of_logits(wide_linear(mean, self.linear), self.config, self.training)
        return gates
