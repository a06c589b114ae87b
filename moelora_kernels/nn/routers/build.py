"""Build the router of a config, and compute the logits of a layer."""

from __future__ import annotations

from torch import Tensor, nn

from moelora_kernels.config import MoeLoraConfig
from moelora_kernels.nn.routers.balanced import BalancedRouter
from moelora_kernels.nn.routers.logits import router_logits, wide_product
from moelora_kernels.nn.routers.task import TaskRouter, TokenTaskRouter
from moelora_kernels.nn.routers.token import MlpRouter, PrototypeRouter, ThresholdRouter


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
        return wide_product(tokens.detach(), layer.lora_A.detach())
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
