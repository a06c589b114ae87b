"""From a token, a sequence or a task to its gate: routers, and the gate made of their logits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moelora_kernels import ops
from moelora_kernels.config import MoeLoraConfig
from moelora_kernels.functional import is_autocast
from moelora_kernels.nn.base import is_plain_linear


def wide_linear(x: Tensor, linear: nn.Linear) -> Tensor:
    """x Wt + b in float32 (float64 for float64 x) whatever autocast says: logits need it."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    bias = None if linear.bias is None else linear.bias.to(dtype)
    if not is_autocast(x.device):
        return nn.functional.linear(x.to(dtype), linear.weight.to(dtype), bias)
    with torch.autocast(x.device.type, enabled=False):
        return nn.functional.linear(x.to(dtype), linear.weight.to(dtype), bias)


class MlpRouter(nn.Module):
    """logits = W2 silu(W1 x + b1) + b2        x [T, I] -> [T, E]"""

    def __init__(self, in_features, num_experts, hidden, *, device=None, dtype=None):
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden, num_experts, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [T, I] -> logits [T, E]."""
        return wide_linear(nn.functional.silu(wide_linear(x, self.fc1)), self.fc2)


class TaskRouter(nn.Module):
    """logits = W_gate embedding[task]        ids [B] -> [B, E]

    The gate of MOELoRA: task ids run from 1 to num_tasks (row 0 of the embedding is reserved for
    padding); `set_tasks` gives the ids. One router serves every layer it is given to.
    """

    def __init__(self, num_tasks, embedding_dim, num_experts, *, device=None, dtype=None):
        super().__init__()
        self.num_tasks = num_tasks
        self.embedding = nn.Embedding(num_tasks + 1, embedding_dim, device=device, dtype=dtype)
        self.gate = nn.Linear(embedding_dim, num_experts, bias=False, device=device, dtype=dtype)
        # No buffer: DistributedDataParallel sends those of the first process to all others.
        self.task_ids: Tensor | None = None

    def check_tasks(self, ids: Tensor) -> None:
        """Raise unless ids are [B], from 1 to num_tasks."""
        if ids.dim() != 1 or ids.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"ids: expected whole numbers [batch], got {ids.dtype} {[*ids.shape]}")
        valid = ((ids >= 1) & (ids <= self.num_tasks)).all()
        if ids.device.type == "cpu":
            if not valid:
                raise ValueError(f"ids: expected 1 to {self.num_tasks}, got {ids.tolist()}")
        else:
            torch._assert_async(valid, f"ids: expected 1 to {self.num_tasks}")

    def hold_tasks(self, ids: Tensor) -> None:
        """Keep ids [B] that `check_tasks` let pass for the coming forwards."""
        self.task_ids = ids.to(self.gate.weight.device)

    def forward(self) -> Tensor:
        """Logits [B, E] of the tasks set last."""
        if self.task_ids is None:
            raise RuntimeError("the task gate has no tasks: call set_tasks(model, ids) first")
        # The router may have been moved since.
        return wide_linear(self.embedding(self.task_ids.to(self.gate.weight.device)), self.gate)


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


def router_logits(router: nn.Module, x: Tensor) -> Tensor:
    """The logits of any router that reads x; those of a linear one in float32."""
    if is_plain_linear(router):
        return wide_linear(x, router)
    if isinstance(router, nn.Linear):
        return router(x.to(router.weight.dtype))
    return router(x)


def build_router(config: MoeLoraConfig, in_features: int, device, dtype) -> nn.Module | None:
    """The router of `config`, under a learned threshold where it selects by one."""
    router = _build_gate(config, in_features, device, dtype)
    if config.select == "learned_threshold":
        return ThresholdRouter(router, in_features, device=device, dtype=dtype)
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
    return None


def layer_logits(layer: nn.Module, x: Tensor, tokens: Tensor) -> Tensor:
    """Router logits [G, E] in float32: of every token or sequence, or the tasks that are set.

    [G, E + 1] where the threshold is learned.
    """
    config, router = layer.config, layer.router
    if config.router == "task":
        # One gate serves all layers of a model, also of one that is spread over devices.
        return router().to(x.device)
    source = tokens
    if config.granularity == "sequence":
        sequences = x.flatten(1, -2) if x.dim() > 2 else tokens[None]
        # The mean of no positions is 0, not 0 / 0.
        source = sequences.mean(dim=1) if sequences.shape[1] else sequences.sum(dim=1)
    logits = router_logits(router, source)
    columns = config.num_experts + (config.select == "learned_threshold")
    if logits.shape != (source.shape[0], columns):
        raise ValueError(
            f"router: expected logits [{source.shape[0]}, {columns}], got {[*logits.shape]}"
        )
    return logits


def external_gates(gates: Tensor | None, num_experts: int) -> Tensor:
    """The gates that came from outside as rows [G, E], or what is wrong with them."""
    if gates is None:
        raise ValueError(
            "gates: router='external' needs them: layer(x, gates) or set_tasks(model, gates)"
        )
    if gates.shape[-1] != num_experts or gates.dim() < 2 or not gates.is_floating_point():
        raise ValueError(
            f"gates: expected floats [..., {num_experts}], got {gates.dtype} {[*gates.shape]}"
        )
    return gates.reshape(-1, num_experts)


def gate_of_logits(
    logits: Tensor, config: MoeLoraConfig, training: bool
) -> tuple[Tensor, Tensor | None]:
    """gate = normalize(select(score(logits / temperature) - tau)), in float32.

    logits [N, E], or [N, E + 1] with that of a learned threshold. Returns weights [N, K] with
    indices [N, K] for a top-k gate of tokens, else dense gates [N, E] with None.
    """
    logits = logits.float() if logits.dtype != torch.float64 else logits
    logits, tau = split_threshold(logits, config)
    if training and config.noise > 0:
        logits = logits + config.noise * torch.randn_like(logits)
    renormalize = config.renormalizes()
    if renormalize is not None:
        top_k = config.top_k or config.num_experts
        weights, indices = ops.topk_gate(logits, top_k, renormalize, config.temperature)
        if top_k == config.num_experts:
            return weights, None
        if config.granularity == "token":
            return weights, indices
        # Sparse weights have one row per token; few rows are as well dense.
        return weights.new_zeros(logits.shape).scatter(1, indices.long(), weights), None
    scaled = logits / config.temperature
    scores = {
        "softmax": lambda: scaled.softmax(dim=1),
        "sigmoid": scaled.sigmoid,
        "identity": lambda: scaled,
    }[config.score]()
    if tau is not None:
        scores = scores - tau
    keep = _selected(scores, config)
    if config.entropy_threshold is not None:
        uncertain = normalized_entropy(scaled.detach(), config.entropy_index)
        keep = keep | (uncertain > config.entropy_threshold)[:, None]
    if config.normalize == "softmax":
        weights = torch.where(keep, scores, -torch.inf).softmax(dim=1).nan_to_num(0.0)
    else:
        weights = torch.where(keep, scores, 0)
    if config.normalize == "sum":
        # A token that no expert passes the threshold for has the gate 0, not 0 / 0; one that is
        # passed with nothing to spare has a finite gradient.
        total = weights.sum(dim=1, keepdim=True)
        weights = weights / torch.where(total > 0, total, 1)
    # A select last: backward multiplies the gradients of all weights, and that of an expert which
    # is not kept may be no number.
    return torch.where(keep, weights, 0), None


def split_threshold(logits: Tensor, config: MoeLoraConfig) -> tuple[Tensor, Tensor | None]:
    """Logits [N, E], and tau [N, 1] = max_threshold * sigmoid(last) where it is learned."""
    if config.select != "learned_threshold":
        return logits, None
    limit = 1 / config.num_experts if config.max_threshold is None else config.max_threshold
    return logits[:, :-1], limit * logits[:, -1:].sigmoid()


def normalized_entropy(logits: Tensor, index: float) -> Tensor:
    """H(p) / max H of p = softmax(logits): 0 for one certain expert, 1 for all alike.

        H(p) = (1 - sum_e p_e^q) / (q - 1)        - sum_e p_e log p_e for q = 1

    logits [N, E], index q -> [N]. The Tsallis entropy of DynMoLE (arXiv 2504.00661).
    """
    # An expert masked with -inf adds 0, not 0 * inf.
    log_p = logits.log_softmax(dim=1).clamp_min(torch.finfo(logits.dtype).min)
    experts = logits.shape[1]
    if index == 1.0:
        return -(log_p.exp() * log_p).sum(dim=1) / math.log(experts)
    return (1 - (index * log_p).exp().sum(dim=1)) / (1 - experts ** (1 - index))


def _selected(scores: Tensor, config: MoeLoraConfig) -> Tensor:
    """Which experts are kept, [N, E] bool."""
    if config.select == "all":
        return torch.ones_like(scores, dtype=torch.bool)
    if config.select == "learned_threshold":
        return scores >= 0
    if config.select == "threshold" and config.keep_min is None:
        return scores >= config.threshold
    order = scores.detach().sort(dim=1, descending=True, stable=True)
    position = order.indices.argsort(dim=1)
    if config.select == "topk":
        return position < config.top_k
    least = position < (config.keep_min or 0)
    if config.select == "threshold":
        return (scores >= config.threshold) | least
    reached = order.values.cumsum(dim=1) - order.values < config.top_p * order.values.sum(
        dim=1, keepdim=True
    )
    return reached.gather(1, position) | least


def add_shared_expert(
    weights: Tensor, indices: Tensor | None, config: MoeLoraConfig
) -> tuple[Tensor, Tensor | None]:
    """The gate with the shared expert's weight as its last column: 1, or 1 - max(gate)."""
    if config.shared_expert == "none":
        return weights, indices
    own = torch.ones_like(weights[:, :1])
    if config.shared_expert == "complement":
        own = own - weights.amax(dim=1, keepdim=True)
    weights = torch.cat([weights, own], dim=1)
    if indices is not None:
        last = torch.full_like(indices[:, :1], config.num_experts)
        indices = torch.cat([indices, last], dim=1)
    return weights, indices


def rows_of_gates(
    gates: Tensor, x_shape: Sequence[int], device: torch.device, name: str
) -> Tensor | None:
    """The gate row of each token where x [B, S, I] has one gate row per sequence; else None.

    None means what `moe_lora_linear` takes it for: a gate row per token, or one for all tokens.
    """
    tokens = 1
    for size in x_shape[:-1]:
        tokens *= size
    count = gates.shape[0]
    if count in (1, tokens):
        return None
    if len(x_shape) < 3 or count != x_shape[0]:
        raise ValueError(
            f"{name}: {count} gate rows for x {[*x_shape]}; expected one for all, one per token, "
            "or one per sequence (the first dimension of x); where generate makes n sequences of "
            "each prompt (beams, samples), set_tasks takes ids.repeat_interleave(n)"
        )
    return torch.arange(tokens, device=device, dtype=torch.int32) // (tokens // count)
