"""From a token, a sequence or a task to its logits: the routers. `gates` makes the gate of them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moelora_kernels.config import MoeLoraConfig
from moelora_kernels.nn.base_linear import dense_weight, float_weight, state_without_graph
from moelora_kernels.numerics import is_autocast


def wide_linear(x: Tensor, linear: nn.Linear) -> Tensor:
    """x Wt + b in float32 (float64 for float64 x) whatever autocast says: logits need it."""
    return _wide_product(x, linear.weight, linear.bias)


def _wide_product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)
    bias = None if bias is None else bias.to(dtype)
    if not is_autocast(x.device):
        return nn.functional.linear(x.to(dtype), weight.to(dtype), bias)
    with torch.autocast(x.device.type, enabled=False):
        return nn.functional.linear(x.to(dtype), weight.to(dtype), bias)


def _beside(tensor: Tensor, parameter: Tensor) -> Tensor:
    """A tensor on the device of a parameter; as it is while that waits for its values on meta."""
    return tensor if parameter.is_meta else tensor.to(parameter.device)


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
        return _wide_product(x, self.prototypes).abs()


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


def router_logits(router: nn.Module, x: Tensor) -> Tensor:
    """The logits of any router that reads x; those of a linear one in float32."""
    if dense_weight(router) is not None:
        return wide_linear(x, router)
    weight = float_weight(router) if isinstance(router, nn.Linear) else None
    return router(x if weight is None else x.to(weight.dtype))


def build_router(config: MoeLoraConfig, in_features: int, device, dtype) -> nn.Module | None:
    """The router of `config`, under a learned threshold where it selects by one."""
    router = _build_gate(config, in_features, device, dtype)
    if config.select == "learned_threshold":
        return ThresholdRouter(router, in_features, device=device, dtype=dtype)
    if config.balance_rate is not None:
        return BalancedRouter(router, config.num_experts, device=device)
    return router


def _build_gate(config: MoeLoraConfig, in_features: int, device, dtype) -> nn.Module | None:
    """The router that `config` names, or the module it holds; None where gates need none."""
    if isinstance(config.router, nn.Module):
        if isinstance(config.router, nn.Linear):
            shape, given = [config.num_experts, in_features], [*config.router.weight.shape]
            if given != shape:
                raise ValueError(f"router: expected a weight {shape}, got {given}")
        return config.router
    if config.router == "linear":
        return nn.Linear(
            in_features, config.num_experts, config.router_bias, device=device, dtype=dtype
        )
    if config.router == "mlp":
        return MlpRouter(
            in_features, config.num_experts, config.router_hidden, device=device, dtype=dtype
        )
    if config.router == "task":
        return TaskRouter(
            config.num_tasks,
            config.task_embedding_dim,
            config.num_experts,
            device=device,
            dtype=dtype,
        )
    if config.router == "prototype":
        return PrototypeRouter(in_features, config.num_experts, device=device, dtype=dtype)
    if config.router == "token_task":
        return TokenTaskRouter(
            in_features,
            config.task_embedding_dim,
            config.num_experts,
            config.router_hidden,
            device=device,
            dtype=dtype,
        )
    return None


def layer_logits(layer: nn.Module, x: Tensor, tokens: Tensor) -> Tensor:
    """Router logits [G, E] in float32: of every token or sequence, or the tasks that are set.

    [G, E + 1] where the threshold is learned.
    """
    config, router = layer.config, layer.router
    if config.router == "task":
        # One gate serves all layers of a model, also of one that is spread over devices.
        return router().to(x.device)
    if config.router == "self":
        return _wide_product(tokens.detach(), layer.lora_A.detach())
    source = tokens
    if config.granularity == "sequence":
        sequences = tokens[None]
        if x.dim() > 2:
            sequences = x.movedim(config.batch_dim, 0).flatten(1, -2)
        # The mean of no positions is 0, not 0 / 0.
        source = sequences.mean(dim=1) if sequences.shape[1] else sequences.sum(dim=1)
    gate = getattr(router, "gate", router)
    if isinstance(gate, TokenTaskRouter) and x.dim() > 2:
        gate.check_batch(x.shape[0])
    logits = router_logits(router, source)
    columns = config.num_experts + (config.select == "learned_threshold")
    if logits.shape != (source.shape[0], columns):
        raise ValueError(
            f"router: expected logits [{source.shape[0]}, {columns}], got {[*logits.shape]}"
        )
    return logits
