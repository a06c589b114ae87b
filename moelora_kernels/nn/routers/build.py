"""Build the router of a config, and compute the logits of a layer."""

from __future__ import annotations

from torch import Tensor, nn

from moelora_kernels.config import MoeLoraConfig
from moelora_kernels.nn.routers.balanced import BalancedRouter
from moelora_kernels.nn.routers.logits import float32_product, router_logits
from moelora_kernels.nn.routers.task import TaskRouter, TokenTaskRouter
from moelora_kernels.nn.routers.token import MlpRouter, PrototypeRouter, ThresholdRouter
from moelora_kernels.nn.samples import Samples, mean_of_samples


def build_router(config: MoeLoraConfig, in_features: int, device, dtype) -> nn.Module | None:
    """Return the router of `config`, or None if the gate needs none.

    With select="learned_threshold" it is in a ThresholdRouter, with `balance_rate` in a
    BalancedRouter.
    """
    router = _build_gate(config, in_features, device, dtype)
    if config.select == "learned_threshold":
        return ThresholdRouter(router, in_features, device=device, dtype=dtype)
    if config.balance_rate is not None:
        return BalancedRouter(router, config.num_experts, device=device)
    return router


def _build_gate(config: MoeLoraConfig, in_features: int, device, dtype) -> nn.Module | None:
    """Return the router that `config.router` names or is; None if the gate needs none."""
    if isinstance(config.router, nn.Module):
        if isinstance(config.router, nn.Linear):
            expected, shape = [config.num_experts, in_features], [*config.router.weight.shape]
            if shape != expected:
                raise ValueError(f"router: expected a weight {expected}, got {shape}")
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
    """Return the router logits [G, E] of a layer in float32; [G, E + 1] with a learned threshold.

    There is one row per token, per sequence (granularity="sequence") or per task of `set_tasks`.

    Args:
        layer: a MixtureLayer with a router.
        x: [..., I], the input of the layer.
        tokens: [T, I], x in the dtype the layer computes in.

    Raises:
        ValueError: the router returned another shape.
        RuntimeError: the tasks are not set.
    """
    config, router = layer.config, layer.router
    if config.router == "task":
        # All layers share the router, also if the model is spread over several devices.
        ids = layer.current_task_ids()
        if ids is None:
            raise RuntimeError(
                "the task gate has no tasks for this layer: call set_tasks(model, ids) first, on "
                "the whole model or on the part with this layer"
            )
        return router(ids).to(x.device)
    if config.router == "self":
        return float32_product(tokens.detach(), layer.lora_A.detach())
    source = tokens
    if config.granularity == "sequence":
        source = mean_of_samples(x, tokens, config.batch_dim, layer.samples)
    gate = getattr(router, "gate", router)
    if isinstance(gate, TokenTaskRouter) and config.granularity == "sequence":
        # One row of `source` is one sample, in the order of the task vectors.
        gate.check_batch(source.shape[0])
        logits = router(source)
    elif isinstance(gate, TokenTaskRouter):
        ids = gate.sample_of_tokens(x, config.batch_dim, layer.samples)
        # Neighbours of equal length need no table: the router repeats the task vectors.
        is_regular = config.batch_dim == 0 and not isinstance(layer.samples, Samples)
        logits = router(source) if ids is None or is_regular else router(source, ids)
    else:
        logits = router_logits(router, source)
    columns = config.num_experts + (config.select == "learned_threshold")
    if logits.shape != (source.shape[0], columns):
        raise ValueError(
            f"router: expected logits [{source.shape[0]}, {columns}], got {[*logits.shape]}"
        )
    return logits
