"""How A and B start: drawn, or from the base's singular values with a reduced base under them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from moelora_kernels.config import MoeLoraConfig
from moelora_kernels.nn.base_linear import is_plain_linear, linear_with

RHO = 10.0


def draw_a(lora_a: Tensor, config: MoeLoraConfig) -> None:
    """Draw A [R, I] in place: N(0, 0.01^2) for init="normal", else U(-1, 1) / sqrt(I) as PEFT.

    init="sparse": I K // E places of each row, at least one, from N(0, 1 / R^2), the others zero.
    """
    if config.init == "normal":
        lora_a.normal_(std=0.01)
    elif config.init == "sparse":
        total, features = lora_a.shape
        kept = max(1, features * config.top_k // config.num_experts)
        places = torch.rand(total, features, device=lora_a.device).topk(kept, dim=1).indices
        values = torch.randn(total, kept, device=lora_a.device) / sum(config.ranks())
        lora_a.zero_().scatter_(1, places, values.to(lora_a.dtype))
    else:
        bound = 1.0 / math.sqrt(lora_a.shape[1])
        lora_a.uniform_(-bound, bound)


def start_from_svd(
    base: nn.Module, config: MoeLoraConfig, lora_a: Tensor, lora_b: Tensor
) -> nn.Module:
    """Write init="svd_segments" into A and B; returns the reduced base that goes with them.

        W = sum_i sigma_i u_i v_i^T                       sigma falling, in float64
        segment e: r_e indices i from e L, L = min(I, O) // E
        A_e = sqrt(sigma_i / (s_e rho)) v_i^T             B_e = sqrt(sigma_i / (s_e rho)) u_i
        W_reduced = W - c sum_e s_e B_e A_e               c = 1 / E, the mean gate of an expert
                                                          (1 where router=None makes every gate 1)

    The reduction is exact for gates of c, and for top-k gates in the mean over balanced routings:
    then E[gate_e] = 1 / E, and E[y] = x Wt + b. A single routing starts away from the base, by
    sum_e (gate_e - c) s_e B_e A_e x. A shared expert is no segment: its B is zero.

    The reduced weight is a new one: the module that was given, and what else holds its weight (a
    tied embedding), stay as they are. It follows from the weight and the options alone, so an
    adapter saved by `save_adapter`, without the base, belongs on a layer made anew over the same
    weight in the same dtype; a state dict with the reduced weight in it fits any layer. On the meta
    device nothing is reduced: call the layer's `reset_parameters` once the base has its values and
    before an adapter is loaded.

    Args:
        base: a plain dense nn.Linear, weight [O, I].
        config: the layer's options.
        lora_a: A [R, I] of the layer, changed in place.
        lora_b: B [O, R] of the layer, changed in place.

    Raises:
        ValueError: the base is quantised, hooked, sharded or otherwise not a plain float nn.Linear,
            or too small for the ranks.
        RuntimeError: the base is one that has been reduced before.

    Source: arXiv 2502.16894 (GOAT).
    """
    weight = base.weight if is_plain_linear(base) else None
    is_dense = type(weight) in (nn.Parameter, Tensor)
    # A float of one byte is a quantised weight: it has no room for a small difference.
    if not (is_dense and weight.is_floating_point() and weight.itemsize > 1):
        raise ValueError(
            "init: 'svd_segments' changes the base's weight, so it needs a plain nn.Linear with a "
            f"dense float weight, got {type(base)} with {type(getattr(base, 'weight', None))}"
        )
    if getattr(base, "is_reduced", False):
        raise RuntimeError(
            "init: 'svd_segments' has reduced this base already; make the layer anew over the "
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
        chosen = [e * length + i for e, rank in enumerate(ranks) for i in range(rank)]
        index = torch.tensor(chosen, device=weight.device)
        factors = zip(config.scales(base.in_features), ranks, strict=False)
        scales = values.new_tensor([factor for factor, rank in factors for _ in range(rank)])
        root = (values[index] / (scales * (config.svd_rho or RHO))).sqrt()
        own_a, own_b = lora_a[: len(chosen)], lora_b[:, : len(chosen)]
        own_a.copy_(root[:, None] * right[index])
        own_b.copy_(left[:, index] * root)
        # From A and B as they are stored: what their dtype rounds off is not taken from the base.
        mean_gate = 1.0 if config.router is None else 1 / experts
        delta = (own_b.double() * (mean_gate * scales)) @ own_a.double()
        reduced = linear_with(base, (weight.double() - delta).to(weight.dtype))
        reduced.is_reduced = True
        return reduced
