"""Routers that use the task of a sequence, which `set_tasks` sets."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from moelora_kernels.nn.routers.logits import float32_linear, router_logits
from moelora_kernels.nn.routers.token import MlpRouter
from moelora_kernels.nn.sharding import HiddenFromFsdp1, caller


def _on_device_of(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Move a tensor to the device of a parameter, unless the parameter is on the meta device."""
    return tensor if parameter.is_meta else tensor.to(parameter.device)


class TaskRouter(HiddenFromFsdp1):
    """Compute logits from the task embedding of a sequence, as in MOELoRA.

        logits = W_gate e_b        e_b = embedding[ids_b]; for [B, J] the mean over the ids of a row

    `set_tasks` sets the ids, [B] or [B, J]. They run from 1 to num_tasks. In a row of several ids 0
    is padding, which the mean leaves out; row 0 of the embedding is not used. Several layers can
    share one router.

    Example:
        >>> import torch
        >>> from moelora_kernels.nn import TaskRouter
        >>> router = TaskRouter(num_tasks=3, embedding_dim=8, num_experts=4)
        >>> router.hold_tasks(torch.tensor([1, 3]))
        >>> router().shape
        torch.Size([2, 4])

    Source: arXiv 2310.18339 (MOELoRA).
    """

    def __init__(self, num_tasks, embedding_dim, num_experts, *, device=None, dtype=None):
        super().__init__()
        self.num_tasks = num_tasks
        self.embedding = nn.Embedding(num_tasks + 1, embedding_dim, device=device, dtype=dtype)
        self.gate = nn.Linear(embedding_dim, num_experts, bias=False, device=device, dtype=dtype)
        # Not a buffer: DistributedDataParallel copies buffers of the first process to all others.
        self.task_ids: Tensor | None = None
        # Whether the layers have task ids of their own, which `set_tasks` gave them.
        self.layers_have_ids = False

    def check_tasks(self, ids: Tensor) -> None:
        """Raise ValueError unless ids are [B], 1 to num_tasks, or [B, J], 0 to num_tasks.

        A row of only zeros is an error. On a GPU a bad value fails at the next synchronisation.
        """
        if ids.dim() not in (1, 2) or ids.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                "ids: expected whole numbers [batch] or [batch, tasks of a sequence], "
                f"got {ids.dtype} {[*ids.shape]}"
            )
        several = ids.dim() == 2
        valid = ((ids >= 0) & (ids <= self.num_tasks)).all()
        # A sequence without a task has no gate: the mean of zero embeddings is 0 / 0.
        valid = valid & ((ids != 0).any(dim=1) if several else ids != 0).all()
        expected = f"1 to {self.num_tasks}" + (", with 0 as padding" if several else "")
        if ids.device.type == "cpu":
            if not valid:
                raise ValueError(f"ids: expected {expected}, got {ids.tolist()}")
        else:
            torch._assert_async(valid, f"ids: expected {expected}")

    def hold_tasks(self, ids: Tensor) -> None:
        """Store ids that passed `check_tasks` for the coming forwards of all layers."""
        self.task_ids = _on_device_of(ids, self.embedding.weight)
        self.layers_have_ids = False

    def forward(self, ids: Tensor | None = None) -> Tensor:
        """Return the logits [B, E] of `ids` in float32; None means those of `hold_tasks`."""
        ids = self.task_ids if ids is None else ids
        if ids is None:
            raise RuntimeError("the task gate has no tasks: call set_tasks(model, ids) first")
        self._check_whole()
        # The router may have moved to another device since `hold_tasks`.
        ids = ids.to(self.embedding.weight.device)
        tasks = self.embedding(ids)
        if ids.dim() == 2:
            tasks = tasks.to(torch.promote_types(tasks.dtype, torch.float32))
            is_task = (ids != 0)[..., None]
            tasks = torch.where(is_task, tasks, 0).sum(dim=1) / is_task.sum(dim=1)
        return float32_linear(tasks, self.gate)

    def children(self) -> Iterator[nn.Module]:
        """Return the modules of the gate. Raises if fully_shard would shard them a second time."""
        # fully_shard fails on them without naming a module, and asks every module for its children.
        # So do the functions of torch.distributed.checkpoint, which work.
        if caller(2).startswith("torch.distributed.fsdp._fully_shard"):
            self._check_whole()
        return super().children()

    def _check_whole(self) -> None:
        """Raise RuntimeError if the weights are shards that FSDP holds for another module."""
        weight = self.gate.weight
        remedy = (
            "Shard the whole model as one unit; or give each layer a gate, with "
            "task_gate='per_layer'"
        )
        if any(placement.is_shard() for placement in getattr(weight, "placements", ())):
            raise RuntimeError(
                "task gate: the blocks share it, and fully_shard has sharded it with one of them. "
                f"{remedy}; or, without PEFT, shard the gate first, fully_shard(layer.router), and "
                "then the blocks"
            )
        # FSDP1 leaves a part of the flat weight. ZeRO-3 does so too, and gathers it for the call.
        is_call_ready = not isinstance(self.gate, nn.Linear) or hasattr(weight, "ds_id")
        if getattr(weight, "ndim", 2) != 2 and not is_call_ready:
            raise RuntimeError(
                "task gate: the blocks share it, and FullyShardedDataParallel has sharded it with "
                f"one of them. {remedy}"
            )


class TaskVectors:
    """The task vectors [B, D] that one call of `set_tasks` gave to layers and their router.

    A copy or a pickle has them without their graph.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __reduce__(self):
        return TaskVectors, (self.tensor.detach(),)


class TokenTaskRouter(nn.Module):
    """Mix the probabilities of a token router and of a task router, as in HMoRA.

        p = (1 - s) softmax(token(x)) + s softmax(task(t))        s = sigmoid(share)

    x [T, I] are the tokens and t [B, D] the task vectors of their sequences, which
    `set_tasks(model, vectors)` sets. The vectors keep their graph, so the encoder that computed
    them trains. The router returns probabilities [T, E]: use score="identity", and for the second
    softmax of the original normalize="softmax" with top_k. Pass one instance as `router=` of
    several layers to share it; the original shares it among q, k, v and among gate, up.

    Args:
        in_features: I.
        task_features: D.
        num_experts: E.
        hidden: width of two-layer MLPs with a ReLU; None means linears with bias.
        share: the initial value of the learned `share`. In the original it rises from -2 in the
            first layer of a model to 2 in the last.

    Example:
        >>> import torch
        >>> from moelora_kernels.nn import TokenTaskRouter
        >>> router = TokenTaskRouter(16, task_features=8, num_experts=4)
        >>> router.hold_tasks(torch.randn(2, 8))
        >>> router(torch.randn(10, 16)).shape
        torch.Size([10, 4])

    Source: HMoRA (ICLR 2025).
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
        # In a ParameterDict, because PEFT cannot name a parameter of a module that has children.
        start = torch.full((), float(share), device=device, dtype=dtype)
        self.mixture = nn.ParameterDict({"share": start})
        self.held: TaskVectors | None = None
        # Whether the layers have task vectors of their own, which `set_tasks` gave them.
        self.layers_have_vectors = False

    @property
    def task_vectors(self) -> Tensor | None:
        """The task vectors [B, D] that were set last, or None."""
        return None if self.held is None else self.held.tensor

    def check_tasks(self, vectors: Tensor) -> None:
        """Raise ValueError unless vectors are [B, D]."""
        if vectors.dim() != 2 or vectors.shape[1] != self.task_features:
            raise ValueError(
                f"tasks: expected vectors [batch, {self.task_features}], got {[*vectors.shape]}"
            )

    def hold_tasks(self, vectors: Tensor | TaskVectors) -> TaskVectors:
        """Store vectors [B, D] that passed `check_tasks` for the coming forwards; return them."""
        if not isinstance(vectors, TaskVectors):
            vectors = TaskVectors(_on_device_of(vectors, self.mixture["share"]))
        self.held = vectors
        self.layers_have_vectors = False
        return vectors

    def forward(
        self, x: Tensor, samples: Tensor | None = None, vectors: Tensor | None = None
    ) -> Tensor:
        """Return probabilities [T, E] in float32 for x [T, I].

        samples: [T], the row of the task vectors of each token; a token with a number below 0 gets
            the probabilities of `token` alone. None means that the tokens of a sequence are
            neighbours, and that all sequences have the same length.
        vectors: [B, D]; None means those of `hold_tasks`.
        """
        vectors = self.task_vectors if vectors is None else vectors
        if vectors is None:
            raise RuntimeError("the gate has no task vectors: call set_tasks(model, vectors) first")
        # The router may be on another device than the vectors.
        vectors = vectors.to(x.device)
        tokens, batch = x.shape[0], vectors.shape[0]
        token = router_logits(self.token, x).softmax(dim=1)
        task = router_logits(self.task, vectors).to(token).softmax(dim=1)
        share = self.mixture["share"].to(token.dtype).sigmoid()
        if samples is not None:
            # A sum instead of an index, whose backward has no fixed order on a GPU.
            is_sample = (samples[:, None] == torch.arange(batch, device=x.device))[:, :, None]
            task = torch.where(is_sample, task, 0).sum(dim=1)
            share = torch.where(samples[:, None] < 0, 0, share)
            return (1 - share) * token + share * task
        if tokens % batch:
            raise ValueError(f"tasks: {batch} task vectors do not divide {tokens} tokens")
        return (1 - share) * token + share * task.repeat_interleave(tokens // batch, dim=0)
