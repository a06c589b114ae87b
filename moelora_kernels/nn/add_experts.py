"""add_experts: more experts for the layers of a model, beside those that it has."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from moelora_kernels.config import MoeLoraConfig
from moelora_kernels.nn.base_linear import dense_weight
from moelora_kernels.nn.freezing import active_layers, adapter_configs
from moelora_kernels.nn.initialization import draw_a
from moelora_kernels.nn.layer import LoraLayer, MixtureLayer
from moelora_kernels.nn.linear import forget_outputs
from moelora_kernels.nn.routers import (
    BalancedRouter,
    MlpRouter,
    PrototypeRouter,
    TaskRouter,
    ThresholdRouter,
    TokenTaskRouter,
)
from moelora_kernels.nn.routers.balanced import Balance
from moelora_kernels.nn.sharding import fsdp_types, is_dtensor
from moelora_kernels.value_checks import COUNT, check_number

# The rows of a router for new experts are drawn from this share of the range of an nn.Linear. So
# the logits are near 0, and the new experts of a token are not equal, which top-k would order by
# their numbers.
ROUTER_SHARE = 0.01


# A Parameter that is made in inference mode can never train.
@torch.inference_mode(False)
@torch.no_grad()
def add_experts(model: nn.Module, n: int, *, rank: int | None = None) -> None:
    """Add n experts to all layers of `model`, after the experts that they have.

    The A of a new expert is drawn like that of a new layer, and its B is zero. The experts that
    exist keep their values, scales and numbers; a shared expert moves from number E to E + n. A
    router gets n rows with values near 0, so it gives a new expert a logit near 0:

        select="all": the gates of the old experts are multiplied by about S / (S + n exp(0)) for
            the softmax, where S is the sum of the exponentials of the old logits.
        select="topk": a token whose K-th largest logit is below 0 selects a new expert instead.

    Gates that you pass (router="external") and router=None change nothing.

    A, B and the routers are new Parameters: make the optimizer afterwards. Layers keep what
    `set_tasks` set, except for dense gates, which have E columns: set them again. Linked siblings
    stay linked. `config.num_experts` is E + n; with scaling="alpha/R" `config.scaling` becomes the
    numbers that it stood for. The config of a PeftModel's adapter changes too, so the adapter can
    be saved and loaded.

    Args:
        model: a model with mixture layers, with all layers that share a task gate. In a PeftModel
            the active adapters get experts.
        n: the number of new experts.
        rank: the rank of each new expert. None: the rank of all experts.

    Raises (the model is then unchanged):
        ValueError: n or rank is not a whole number from 1; the model has no active layer, or is in
            DistributedDataParallel or FSDP; `model` is a part of a PeftModel; or a layer cannot
            get experts: it is merged or counted, A, B or the router is computed, sharded or your
            module, the experts have different ranks (pass `rank`) or scales, init="svd_segments",
            freeze="AB", or an option does not work with more experts. The message names the layer.

    Example:
        >>> import torch
        >>> from moelora_kernels import MoeLoraLinear, add_experts, freeze_experts
        >>> layer = MoeLoraLinear(16, 32, num_experts=2, rank=2)
        >>> add_experts(layer, 1)
        >>> layer.lora_A.shape, layer.router.weight.shape
        (torch.Size([6, 16]), torch.Size([3, 16]))
        >>> freeze_experts(layer, [0, 1])
    """
    layers = active_layers(model)
    check_number("n", n, COUNT)
    if rank is not None:
        check_number("rank", rank, COUNT)
    _check_model(model)
    configs: dict[MixtureLayer, MoeLoraConfig] = {}
    for name, layer in layers.items():
        try:
            if problem := _problem(layer):
                raise ValueError(problem)
            configs[layer] = _larger(layer.config, n, rank)
            layer._check_config(configs[layer])
        except ValueError as error:
            raise ValueError(f"model: {name or type(layer).__name__}: {error}") from None
    saved_configs = adapter_configs(model, layers.values())
    if any(layer.is_peft_adapter for layer in layers.values()) and not saved_configs:
        raise ValueError(
            "model: expected the whole PeftModel, got a part of it; its config counts the experts "
            "of all layers"
        )

    larger = [_larger(saved.moe_lora_config(), n, rank).to_dict() for saved in saved_configs]

    forget_outputs(model.modules())
    parts = [part for layer in layers.values() for part in _parts(layer.router)]
    for part in dict.fromkeys(parts):
        _add_rows(part, n)
    for layer, config in configs.items():
        _add_to_layer(layer, config)
    for saved, options in zip(saved_configs, larger, strict=True):
        for option, value in options.items():
            setattr(saved, option, value)


def _check_model(model: nn.Module) -> None:
    """Raise ValueError if an engine of several processes holds the Parameters of the model."""
    engines = (nn.parallel.DistributedDataParallel, *fsdp_types())
    for module in model.modules():
        if isinstance(module, engines):
            raise ValueError(
                f"model: it is in a {type(module).__name__}, which does not know new Parameters; "
                "add the experts first, then wrap or shard the model"
            )


def _problem(layer: MixtureLayer) -> str | None:
    """Return why a layer cannot get experts; None if it can."""
    config = layer.config
    if isinstance(layer, LoraLayer) and (merged := layer.merged_problem()):
        return merged
    if layer.record.on_call is not None:
        return "count_routing counts its experts; leave the context first"
    if config.init == "svd_segments":
        return "init='svd_segments' has divided the singular values among the experts that exist"
    if config.freeze == "AB":
        return (
            "freeze='AB' is for LoRAs that exist, and new experts would never train; build the "
            "layer again with MoeLoraLinear.from_loras"
        )
    if isinstance(config.router, nn.Module):
        return (
            "its router is a module that you passed, which returns E logits; build layers with a "
            "router for more experts, and load A and B into them"
        )
    for key in layer.tensor_names:
        if problem := _tensor_problem(layer, key):
            return problem
    for part in _parts(layer.router):
        if isinstance(part, nn.Linear) and dense_weight(part) is None:
            return f"its router has a {type(part).__name__} that is not a plain nn.Linear"
        if isinstance(part, nn.Linear) and (problem := _tensor_problem(part, "weight")):
            return f"router: {problem}"
        if not isinstance(part, (nn.Linear, PrototypeRouter, Balance)):
            return f"its router has a {type(part).__name__}, which has no rows of experts"
    return None


def _tensor_problem(module: nn.Module, name: str) -> str | None:
    parameter = module._parameters.get(name)
    if parameter is None:
        return f"{name} is computed from other tensors (parametrized, pruned or normed)"
    if is_dtensor(parameter) or hasattr(parameter, "ds_id") or parameter.dim() != 2:
        return f"{name} is sharded; add the experts before the model is sharded"
    return None


def _larger(config: MoeLoraConfig, n: int, rank: int | None) -> MoeLoraConfig:
    """Return the options of a layer with n more experts. The old experts keep their scales."""
    E = config.num_experts
    ranks = config.ranks()[:E]
    options: dict[str, object] = {"num_experts": E + n}
    if rank is None and len({*ranks}) > 1:
        raise ValueError(f"rank: the experts have ranks {[*ranks]}; pass the rank of the new ones")
    rank = ranks[0] if rank is None else rank
    if isinstance(config.rank, tuple) or rank != config.rank:
        options["rank"] = (*ranks, *[rank] * n)
        if config.shared_expert != "none":
            options["shared_rank"] = config.ranks()[E]
    if config.scaling == "alpha/R" or isinstance(config.scaling, tuple):
        scales = config.scales()
        if len({*scales[:E]}) > 1:
            raise ValueError(
                f"scaling: the experts have scales {[*scales[:E]]}, so that of a new one is not "
                'known; set a rule first, such as layer.config.replace(scaling="alpha/r")'
            )
        options["scaling"] = (*scales[:E], *[scales[0]] * n, *scales[E:])
    if config.select == "learned_threshold" and config.max_threshold is None:
        options["max_threshold"] = 1.0 / E
    options["frozen_experts"] = tuple([e if e < E else e + n for e in config.frozen_experts])
    return config.replace(**options)


def _parts(router: nn.Module | None) -> list[nn.Module]:
    """Return the modules of a router that have a row or an entry for each expert."""
    if router is None:
        return []
    if isinstance(router, ThresholdRouter):
        return _parts(router.gate)
    if isinstance(router, BalancedRouter):
        return [router.balance, *_parts(router.gate)]
    if isinstance(router, TokenTaskRouter):
        return [*_parts(router.token), *_parts(router.task)]
    if isinstance(router, MlpRouter):
        return [router.fc2]
    return [router.gate if isinstance(router, TaskRouter) else router]


def _add_rows(part: nn.Module, n: int) -> None:
    """Add n rows to a module of `_parts`."""
    if isinstance(part, Balance):
        part.bias, part.load = torch.cat([part.bias, part.bias.new_zeros(n)]), None
    elif isinstance(part, PrototypeRouter):
        rows = part.prototypes.new_zeros(n, part.prototypes.shape[1])
        part.prototypes = torch.cat([part.prototypes, rows])
    elif isinstance(part, nn.Linear):
        bound = ROUTER_SHARE / math.sqrt(max(part.in_features, 1))
        rows = part.weight.new_empty(n, part.in_features).uniform_(-bound, bound)
        part.weight = _parameter(torch.cat([part.weight, rows]), part.weight)
        if part.bias is not None:
            part.bias = _parameter(torch.cat([part.bias, part.bias.new_zeros(n)]), part.bias)
        part.out_features += n


def _parameter(values: Tensor, previous: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(values, requires_grad=previous.requires_grad)


def _add_to_layer(layer: MixtureLayer, config: MoeLoraConfig) -> None:
    """Add the experts that `config` has more than the layer, before a shared expert."""
    E = layer.config.num_experts
    old_rank, new_rank = sum(layer.config.ranks()[:E]), sum(config.ranks()[E : config.num_experts])
    for name in layer.tensor_names:
        matrix, dim = layer._parameters[name], int(name.endswith("lora_B"))
        if dim == 0 and config.share == "A":
            continue
        shape = [*matrix.shape]
        shape[dim] = new_rank
        new = matrix.new_zeros(shape)
        if dim == 0:
            draw_a(new, config)
        parts = [matrix.narrow(dim, 0, old_rank), new]
        parts.append(matrix.narrow(dim, old_rank, matrix.shape[dim] - old_rank))
        setattr(layer, name, _parameter(torch.cat(parts, dim=dim), matrix))
    # A layer refuses another config with other numbers of experts.
    del layer.config
    layer.config = config
    if layer.external_experts is None:
        layer.external_gates = None
    layer.record.reset()
