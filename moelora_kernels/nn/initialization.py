"""The initial values of A and B: random, or from the singular values of the base's weight."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from moelora_kernels.config import MoeLoraConfig
from moelora_kernels.nn.base_linear import is_plain_linear, linear_with
from moelora_kernels.nn.sharding import is_zero3_shard

# The value of svd_rho=None.
RHO = 10.0


def draw_a(lora_a: Tensor, config: MoeLoraConfig) -> None:
    """Draw A [R, I] in place.

    init="kaiming"   U(-1, 1) / sqrt(I), the initialisation of PEFT
    init="normal"    N(0, 0.01^2)
    init="sparse"    I K // E random positions of each row (at least one) from N(0, 1 / R^2),
                     zero elsewhere
    """
    if lora_a.numel() == 0:
        return
    if config.init == "normal":
        lora_a.normal_(std=0.01)
    elif config.init == "sparse":
        total, features = lora_a.shape
        count = max(1, features * config.top_k // config.num_experts)
        positions = torch.rand(total, features, device=lora_a.device).topk(count, dim=1).indices
        values = torch.randn(total, count, device=lora_a.device) / sum(config.ranks())
        lora_a.zero_().scatter_(1, positions, values.to(lora_a.dtype))
    else:
        bound = 1.0 / math.sqrt(lora_a.shape[1])
        lora_a.uniform_(-bound, bound)


def draw_b(lora_b: Tensor) -> None:
    """Draw B [O, R] in place from U(-1, 1) / sqrt(R), like the weight of an `nn.Linear`."""
    bound = 1.0 / math.sqrt(lora_b.shape[1])
    lora_b.uniform_(-bound, bound)


def start_from_svd(
    base: nn.Module, config: MoeLoraConfig, lora_a: Tensor, lora_b: Tensor
) -> nn.Module:
    """Set A and B from segments of the base's singular values, and return the reduced base.

        W = sum_i sigma_i u_i v_i^T                       sigma descending, in float64
        segment e: r_e indices i from e L, L = min(I, O) // E
        A_e = sqrt(sigma_i / (s_e rho)) v_i^T             B_e = sqrt(sigma_i / (s_e rho)) u_i
        W_reduced = W - c sum_e s_e B_e A_e               c = 1 / E, the mean gate of an expert
                                                          (c = 1 if router=None: all gates are 1)

    If every gate is c, a new layer returns the output of the base. With top-k gates this is true on
    average over balanced routings: E[gate_e] = 1 / E, so E[y] = x Wt + b. A single routing differs
    from the base by sum_e (gate_e - c) s_e B_e A_e x. A shared expert has no segment; its B is
    zero.

    The reduced weight is a new tensor: `base`, and other modules that share its weight (a tied
    embedding), do not change. The reduced weight depends only on the weight and the options. So an
    adapter that `save_adapter` wrote without the base fits a new layer over the same weight in the
    same dtype. On the meta device nothing is reduced: call the layer's `reset_parameters` after the
    base has its values and before you load an adapter.

    Args:
        base: a plain dense nn.Linear, weight [O, I].
        config: the layer's options.
        lora_a: A [R, I] of the layer, changed in place.
        lora_b: B [O, R] of the layer, changed in place.

    Raises:
        ValueError: the base is not a plain nn.Linear with a dense float weight, ZeRO-3 shards the
            weight, or it is too small for the ranks.
        RuntimeError: the base is already reduced.

    Source: arXiv 2502.16894 (GOAT).
    """
    weight = base.weight if is_plain_linear(base) else None
    is_dense = type(weight) in (nn.Parameter, Tensor)
    # A one-byte float is a quantised weight. It is too coarse for a small difference.
    if not (is_dense and weight.is_floating_point() and weight.itemsize > 1):
        raise ValueError(
            "init: 'svd_segments' changes the base's weight, so it needs a plain nn.Linear with a "
            f"dense float weight, got {type(base)} with {type(getattr(base, 'weight', None))}"
        )
    if is_zero3_shard(weight):
        raise ValueError(
            "init: ZeRO-3 shards the base's weight, which 'svd_segments' must read; make this call "
            "inside `with deepspeed.zero.GatheredParameters([*model.parameters()]):`"
        )
    if getattr(base, "is_reduced", False):
        raise RuntimeError(
            "init: 'svd_segments' has reduced this base already; create a new layer over the "
            "original linear"
        )
    experts = config.num_experts
    ranks = config.ranks()[:experts]
    length = min(weight.shape) // experts
    if max(ranks) > length:
        raise ValueError(
            f"rank: init='svd_segments' has min(I, O) // E = {length} singular values for each "
            f"expert of a weight {[*weight.shape]}, got rank {max(ranks)}"
        )
    if weight.is_meta:
        return base

    with torch.no_grad():
        left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
        selected = [e * length + i for e, rank in enumerate(ranks) for i in range(rank)]
        index = torch.tensor(selected, device=weight.device)
        factors = zip(config.scales(base.in_features), ranks, strict=False)
        scales = values.new_tensor([factor for factor, rank in factors for _ in range(rank)])
        root = (values[index] / (scales * (config.svd_rho or RHO))).sqrt()
        segments_a, segments_b = lora_a[: len(selected)], lora_b[:, : len(selected)]
        segments_a.copy_(root[:, None] * right[index])
        segments_b.copy_(left[:, index] * root)
        # Subtract the product of the rounded A and B, so that their rounding error cancels.
        mean_gate = 1.0 if config.router is None else 1 / experts
        delta = (segments_b.double() * (mean_gate * scales)) @ segments_a.double()
        reduced = linear_with(base, (weight.double() - delta).to(weight.dtype))
        reduced.is_reduced = True
        return reduced
