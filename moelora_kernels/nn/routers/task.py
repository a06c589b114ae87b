"""Routers that read the task of a sequence."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moelora_kernels.nn.base_linear import state_without_graph
from moelora_kernels.nn.routers.logits import router_logits, wide_linear
from moelora_kernels.nn.routers.token import MlpRouter


def _beside(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A tensor on the device of a parameter; as it is while that waits for its values on meta."""
    return tensor if parameter.is_meta else tensor.to(parameter.device)


class TaskRouter(nn.Module):
    """logits = W_gate e_b        e_b = embedding[ids_b], the mean over the ids of a row [L]

    ids [B] or [B, L] -> [B, E]. The gate of MOELoRA: task ids run from 1 to num_tasks; row 0 of the
    embedding is reserved, and 0 in a row of several ids is padding, left out of the mean.
    `set_tasks` gives the ids. One router serves every layer it is given to.
    """

    def __init__(self, num_tasks, embedding_dim, num_experts, *, device=None, dtype=None):
        super().__init__()
        self.num_tasks = num_tasks
        self.embedding = nn.Embedding(num_tasks + 1, embedding_dim, device=device, dtype=dtype)
        self.gate = nn.Linear(embedding_dim, num_experts, bias=False, device=device, dtype=dtype)
        # No buffer: DistributedDataParallel sends those of the first process to all others.
        self.task_ids: Tensor | None = None

    def check_tasks(self, ids: Tensor) -> None:
        """Raise unless ids are [B], 1 to num_tasks, or [B, L], 0 to num_tasks, no row all 0."""
        if ids.dim() not in (1, 2) or ids.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                "ids: expected whole numbers [batch] or [batch, tasks of a sequence], "
                f"got {ids.dtype} {[*ids.shape]}"
            )
        several = ids.dim() == 2
        valid = ((ids >= 0) & (ids <= self.num_tasks)).all()
        # A sequence without a task has no gate: the mean over no embeddings.
        valid = valid & ((ids != 0).any(dim=1) if several else ids != 0).all()
        expected = f"1 to {self.num_tasks}" + (", and 0 beside them as padding" if several else "")
        if ids.device.type == "cpu":
            if not valid:
                raise ValueError(f"ids: expected {expected}, got {ids.tolist()}")
        else:
            torch._assert_async(valid, f"ids: expected {expected}")

    def hold_tasks(self, ids: Tensor) -> None:
        """Keep ids that `check_tasks` let pass for the coming forwards."""
        self.task_ids = _beside(ids, self.gate.weight)

    def forward(self) -> Tensor:
        """Logits [B, E] of the tasks set last."""
        if self.task_ids is None:
            raise RuntimeError("the task gate has no tasks: call set_tasks(model, ids) first")
        # The router may have been moved since.
        ids = self.task_ids.to(self.gate.weight.device)
        tasks = self.embedding(ids)
        if ids.dim() == 2:
            tasks = tasks.to(torch.promote_types(tasks.dtype, torch.float32))
            is_task = (ids != 0)[..., None]
            tasks = torch.where(is_task, tasks, 0).sum(dim=1) / is_task.sum(dim=1)
        return wide_linear(tasks, self.gate)


class TokenTaskRouter(nn.Module):
    """p = (1 - s) softmax(token(x)) + s softmax(task(t)), s = sigmoid(share)        [T, E]

    The gate of HMoRA (ICLR 2025), x [T, I] a token and t [B, D] the task vector of its
    sequence: `set_tasks(model, vectors)` gives them, with their graph, so that the encoder they
    come from trains. Returns probabilities: use score="identity", and normalize="softmax" with
    top_k for the original's second softmax. One instance as `router=` of several layers is shared
    by them, as q, k, v and gate, up share it there.

    Args:
        in_features: I.
        task_features: D.
        num_experts: E.
        hidden: of MLPs of two layers with a ReLU between; None: linear, with bias.
        share: the start of the learned mixture; the original's rises from -2 in the first layer of
            a model to 2 in the last.
    """

    def __init__(
        self,
        in_features,
        task_features,
        num_experts,
        hidden=None,
        share=0.0,
        *,
        device=None,
        dtype=None,
    ):
        super().__init__()

        def gate(features):
            if hidden is None:
                return nn.Linear(features, num_experts, device=device, dtype=dtype)
            return MlpRouter(
                features,
                num_experts,
                hidden,
                activation=nn.functional.relu,
                device=device,
                dtype=dtype,
            )

        self.token, self.task = gate(in_features), gate(task_features)
        self.task_features = task_features
        # Beside the two gates, not in their parent: PEFT names tensors by the module that has them.
        start = torch.full((), float(share), device=device, dtype=dtype)
        self.mixture = nn.ParameterDict({"share": start})
        self.task_vectors: Tensor | None = None

    def check_tasks(self, vectors: Tensor) -> None:
        """Raise unless vectors are [B, D]."""
        if vectors.dim() != 2 or vectors.shape[1] != self.task_features:
            raise ValueError(
                f"tasks: expected vectors [batch, {self.task_features}], got {[*vectors.shape]}"
            )

    def hold_tasks(self, vectors: Tensor) -> None:
        """Keep vectors [B, D] that `check_tasks` let pass for the coming forwards."""
        self.task_vectors = _beside(vectors, self.mixture["share"])

    def check_batch(self, sequences: int) -> None:
        """Raise unless there is a task vector for each of that many sequences, or one for all."""
        count = sequences if self.task_vectors is None else self.task_vectors.shape[0]
        if count not in (1, sequences):
            raise ValueError(
                f"tasks: {count} task vectors for {sequences} sequences; expected one for each or "
                "one for all; where generate makes n sequences of each prompt (beams, samples), "
                "set_tasks takes vectors.repeat_interleave(n, dim=0)"
            )

    def __getstate__(self) -> dict:
        return state_without_graph(self, "task_vectors")

    def forward(self, x: Tensor) -> Tensor:
        """x [T, I] -> probabilities [T, E], in float32."""
        if self.task_vectors is None:
            raise RuntimeError("the gate has no task vectors: call set_tasks(model, vectors) first")
        tokens, batch = x.shape[0], self.task_vectors.shape[0]
        if tokens % batch:
            raise ValueError(f"tasks: {batch} task vectors do not share out over {tokens} tokens")
        own = router_logits(self.token, x).softmax(dim=1)
        task = router_logits(self.task, self.task_vectors).to(own).softmax(dim=1)
        share = self.mixture["share"].to(own.dtype).sigmoid()
        return (1 - share) * own + share * task.repeat_interleave(tokens // batch, dim=0)
