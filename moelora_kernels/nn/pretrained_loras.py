"""Build a mixture from existing LoRAs.

Stack their A and B, and compute the prototype of each expert: the input direction that it amplifies
most.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moelora_kernels.config import MoeLoraConfig
from moelora_kernels.nn.layer import mixture_layers
from moelora_kernels.nn.layer_tensors import tensor_value
from moelora_kernels.nn.routers import PrototypeRouter
from moelora_kernels.reference.gates import blocks

_SCALES = {"alpha/r": lambda rank: rank, "alpha/sqrt(r)": math.sqrt}


def stack_loras(
    linear: nn.Module, loras: Sequence[tuple[Tensor, Tensor, float]], config: MoeLoraConfig
) -> tuple[MoeLoraConfig, Tensor, Tensor]:
    """Return the config, A [R, I] and B [O, R] of a layer whose experts are `loras`.

    The arguments and errors are as in `MoeLoraLinear.from_loras`.
    """
    loras = list(loras)
    if not loras:
        raise ValueError("loras: expected at least one, got none")
    if config.scaling not in _SCALES:
        raise ValueError(
            f"scaling: expected {' or '.join(map(repr, _SCALES))} with from_loras, "
            f"got {config.scaling!r}"
        )
    for option, plain in (("share", "none"), ("shared_expert", "none")):
        if getattr(config, option) != plain:
            raise ValueError(
                f"{option}: not supported with from_loras, which takes exactly the given LoRAs as "
                "experts"
            )
    if config.init == "svd_segments":
        raise ValueError(
            "init: 'svd_segments' is not supported with from_loras: it would replace the LoRAs"
        )
    ranks, scales = [], []
    for i, (a, b, alpha) in enumerate(loras):
        rank = a.shape[0] if a.dim() == 2 else 0
        expected = [rank, linear.in_features], [linear.out_features, rank]
        if not rank or ([*a.shape], [*b.shape]) != expected:
            raise ValueError(
                f"loras[{i}]: expected A [r, {linear.in_features}] and B "
                f"[{linear.out_features}, r], got {[*a.shape]} and {[*b.shape]}"
            )
        ranks.append(rank)
        scales.append(alpha / _SCALES[config.scaling](rank))
    config = config.replace(num_experts=len(loras), rank=tuple(ranks), scaling=tuple(scales))
    lora_a, lora_b = zip(*[lora[:2] for lora in loras], strict=True)
    return config, torch.cat(lora_a), torch.cat(lora_b, dim=1)


def lora_prototypes(lora_a: Tensor, lora_b: Tensor, ranks: Sequence[int]) -> Tensor:
    """Return the prototype v_e of every expert: the first right singular vector of B_e A_e.

        B_e = Qb Rb,  A_e^T = Qa Ra        B_e A_e = Qb (Rb Ra^T) Qa^T        v_e = Qa v(Rb Ra^T)

    Only an r x r matrix is decomposed, in float64. The sign of v_e is arbitrary; v_e is zero if
    B_e A_e is zero.

    Args:
        lora_a: [R, I].
        lora_b: [O, R].
        ranks: E ints whose sum is R.

    Returns:
        [E, I] in lora_a's dtype.

    Example:
        >>> import torch
        >>> from moelora_kernels.nn import lora_prototypes
        >>> lora_prototypes(torch.randn(6, 16), torch.randn(32, 6), ranks=[2, 4]).shape
        torch.Size([2, 16])
    """
    rows = []
    for block in blocks(ranks):
        qa, ra = torch.linalg.qr(lora_a[block].detach().double().t())
        _, rb = torch.linalg.qr(lora_b[:, block].detach().double())
        _, values, right = torch.linalg.svd(rb @ ra.t(), full_matrices=False)
        rows.append(torch.where(values[0] > 0, qa @ right[0], 0))
    return torch.stack(rows).to(lora_a.dtype)


def set_prototypes(model: nn.Module) -> None:
    """Set the prototypes of every layer of `model` with router="prototype" from its A and B.

    Call it when A and B have their values, and again after they change. `MoeLoraLinear.from_loras`
    calls it. The prototypes are saved with the adapter.

    Raises:
        ValueError: no layer has router="prototype".

    Example:
        >>> from moelora_kernels import MoeLoraConfig, MoeLoraLinear, set_prototypes
        >>> config = MoeLoraConfig.preset("arrow", num_experts=4, rank=2)
        >>> layer = MoeLoraLinear(16, 32, config=config)
        >>> set_prototypes(layer)
        >>> layer.router.prototypes.shape
        torch.Size([4, 16])
    """
    layers = [layer for layer in mixture_layers(model) if layer.config.router == "prototype"]
    if not layers:
        raise ValueError("model: no layer with router='prototype'")
    for layer in layers:
        router = layer.router if isinstance(layer.router, PrototypeRouter) else layer.router.gate
        # A pruning hook leaves an older A and B on the layer until the next forward.
        config, lora_a = layer.config, tensor_value(layer, "lora_A")
        if config.share == "A":
            lora_a = lora_a.repeat(config.num_experts, 1)
        experts = config.ranks()[: config.num_experts]
        router.prototypes.copy_(lora_prototypes(lora_a, tensor_value(layer, "lora_B"), experts))
