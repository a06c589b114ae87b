"""Build the router of a config, and compute the logits of a layer."""

from __future__ import annotations

import inspect

from torch import Tensor, nn

from moelora_kernels.config import MoeLoraConfig
from moelora_kernels.nn.routers.balanced import BalancedRouter
from moelora_kernels.nn.routers.logits import float32_product, router_logits
from moelora_kernels.nn.routers.task import TaskRouter, TokenTaskRouter
from moelora_kernels.nn.routers.token import MlpRouter, PrototypeRouter, ThresholdRouter
from moelora_kernels.nn.samples import Samples, mean_of_samples, sample_of_tokens


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


def inner_gate(router: nn.Module) -> nn.Module:
    """Return the router inside a ThresholdRouter or a BalancedRouter, else `router`."""
    return router.gate if isinstance(router, (ThresholdRouter, BalancedRouter)) else router


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
    gate = inner_gate(router)
    if isinstance(gate, TokenTaskRouter):
        vectors = layer.task_vectors if gate.layers_have_vectors else gate.held
        if vectors is None:
            raise RuntimeError(NO_VECTORS)
        samples = _samples_of_vectors(layer, vectors.tensor, x, source)
        logits = router(source, samples, vectors.tensor)
    elif layer.has_inner_task_routers:
        logits = router(source, *_samples_of_inner(layer, x, source))
    else:
        logits = router_logits(router, source)
    columns = config.num_experts + (config.select == "learned_threshold")
    if logits.shape != (source.shape[0], columns):
        raise ValueError(
            f"router: expected logits [{source.shape[0]}, {columns}], got {[*logits.shape]}"
        )
    return logits


NO_VECTORS = (
    "the gate has no task vectors for this layer: call set_tasks(model, vectors) first, on the "
    "whole model or on the part with this layer"
)


def _samples_of_vectors(
    layer: nn.Module, vectors: Tensor, x: Tensor, source: Tensor
) -> Tensor | None:
    """Return the row of `vectors` [B, D] of each row of `source`, [T].

    None if there is one vector, or if the rows of a sample are neighbours of equal number.

    Raises:
        ValueError: x and `layer.samples` do not tell it; see `set_samples`.
    """
    config, count = layer.config, vectors.shape[0]
    if config.granularity == "sequence":
        # One row of `source` is one sample, in the order of the task vectors.
        if count not in (1, source.shape[0]):
            raise ValueError(
                f"tasks: {count} task vectors for {source.shape[0]} sequences; expected one for "
                "each, or one for all"
            )
        return None
    is_regular = not isinstance(layer.samples, Samples)
    if count == 1 and is_regular:
        return None
    samples = sample_of_tokens(
        x.shape, count, config.batch_dim, layer.samples, x.device, "tasks", "task vectors"
    )
    return None if is_regular and config.batch_dim == 0 else samples


def _samples_of_inner(layer: nn.Module, x: Tensor, source: Tensor) -> tuple[Tensor, ...]:
    """Return the arguments after `source` of a user's router that contains TokenTaskRouters.

    The inner routers use the vectors that `set_tasks` set last.

    Raises:
        ValueError: x and `layer.samples` do not tell the samples, or the router cannot take them.
        RuntimeError: there are no task vectors, or they were set for another part of the model.
    """
    arguments: tuple[Tensor, ...] = ()
    gate = inner_gate(layer.router)
    for inner in task_routers(gate):
        if inner.held is None:
            raise RuntimeError(NO_VECTORS)
        if inner.layers_have_vectors and inner.held is not layer.task_vectors:
            raise RuntimeError(
                f"router: {type(gate).__name__} contains a TokenTaskRouter that another "
                "part of the model shares, and set_tasks was called last on that part without "
                "this layer; call set_tasks on a part with all layers that share the router, or "
                "give each part a router"
            )
        samples = _samples_of_vectors(layer, inner.held.tensor, x, source)
        if samples is not None:
            arguments = (samples,)
    if arguments and "samples" not in inspect.signature(gate.forward).parameters:
        raise ValueError(
            f"router: {type(gate).__name__} contains a TokenTaskRouter, which needs the "
            "sample of each token here (batch_dim=1, or numbers in set_samples); define "
            "forward(self, x, samples=None) and pass samples to the TokenTaskRouter"
        )
    return arguments


def task_routers(router: nn.Module) -> list[TokenTaskRouter]:
    """Return the TokenTaskRouters in a router, each once."""
    return [module for module in router.modules() if isinstance(module, TokenTaskRouter)]
