"""MoeLoraAdapter: gated adapters with an activation, on the output of a module."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moelora_kernels.autograd.frozen import without_frozen
from moelora_kernels.config import MoeLoraConfig
from moelora_kernels.nn.base_linear import (
    check_adapters,
    check_dtype,
    check_input,
    flat_rows,
    float_weight,
    given_input,
)
from moelora_kernels.nn.forward import keep_routing, siblings_gate
from moelora_kernels.nn.layer import LoraLayer
from moelora_kernels.numerics import active_dtype
from moelora_kernels.reference import compute_dtype, dense_gate, rank_gate
from moelora_kernels.types import ExternalGates

ACTIVATIONS = {
    "gelu": nn.functional.gelu,
    "relu": nn.functional.relu,
    "silu": nn.functional.silu,
}


class MoeLoraAdapter(LoraLayer):
    """Add gated adapters with an activation to the output of a module, as in PESC.

        y = z + u Bt        u = scale * gate (.) act(z At)        z = base(x), gate = router(x)

    The parameters are those of MoeLoraLinear: `lora_A` [R, I], `lora_B` [I, R] (zero at the start)
    and `router`. Checkpoints, `set_tasks` and auxiliary losses work in the same way. The layer
    calls the base and does not freeze it: freeze it yourself. To train LoRA inside the base, call
    `replace_linears` before you add the adapter, because it does not enter a mixture layer.

    The forward is plain PyTorch and computes all experts for every token. Besides z and the
    parameters, backward saves rank-space tensors only.

    Args:
        base: maps x [..., I] to z [..., I].
        hidden_size: I.
        config: a MoeLoraConfig with a `rank_activation`. With adapter_dtype=None, A and B are
            float32 unless the base has a float `weight`.
        **options: fields of MoeLoraConfig; they replace the fields of `config`.

    Raises:
        ValueError: an option is not supported. Forward raises it if the base changes the shape.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from moelora_kernels import MoeLoraAdapter, MoeLoraConfig
        >>> ffn = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16))
        >>> layer = MoeLoraAdapter(ffn, 16, MoeLoraConfig.preset("pesc"), num_experts=4, rank=2)
        >>> layer(torch.randn(3, 5, 16)).shape
        torch.Size([3, 5, 16])

    Source: arXiv 2401.02731 (PESC).
    """

    def __init__(
        self,
        base: nn.Module,
        hidden_size: int,
        config: MoeLoraConfig | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        config = MoeLoraConfig.of(config, options)
        self.base_layer = base
        self._add_experts(base, config, hidden_size, hidden_size)
        self.train(base.training)

    @classmethod
    def _check_config(cls, config: MoeLoraConfig) -> None:
        if config.rank_activation is None:
            raise ValueError(
                "rank_activation: expected an activation, got None; for experts without an "
                "activation use MoeLoraLinear on the linears of the FFN"
            )
        if config.router in (None, "task", "prototype", "self"):
            raise ValueError(f"router: {config.router!r} is not supported by MoeLoraAdapter")
        refused = {
            "share": (config.share, "none"),
            "grad_gate": (config.grad_gate, "gate"),
            "dropout": (config.dropout, 0),
            "impl": (config.impl, "auto"),
        }
        for name, (value, expected) in refused.items():
            if value != expected:
                raise ValueError(
                    f"{name}: expected {expected!r} with rank_activation, got {value!r}"
                )
        if config.init == "svd_segments":
            raise ValueError(
                "init: 'svd_segments' needs the weight of a base linear, and an adapter has none"
            )

    def input_like(self) -> tuple[int, torch.dtype]:
        """Return the width and the dtype of an x that the layer accepts."""
        weights = map(float_weight, self.base_layer.modules())
        weight = next((weight for weight in weights if weight is not None), self.lora_A)
        return self.in_features, weight.dtype

    def forward(
        self,
        x: Tensor | None = None,
        gates: ExternalGates | None = None,
        *,
        input: Tensor | None = None,
    ) -> Tensor:
        """Return y [..., I] for x [..., I]. `input` is another name of x.

        gates: only for router="external"; [..., E], [B, E] or [1, E], or weights and indices
        [..., K], [B, K] or [1, K]; see `set_tasks`. None means the gates that `set_tasks` set.
        """
        if x is None or input is not None:
            x = given_input(x, input)
        config = self.config
        check_input(x, self.in_features, gates, config.router)
        check_adapters(self.lora_A, x)
        tokens = flat_rows(x).to(active_dtype(x))
        try:
            z = self.base_layer(x)
        except RuntimeError:
            check_dtype(x, self.input_like()[1])
            raise
        if z.shape != x.shape:
            raise ValueError(f"base: expected an output {[*x.shape]}, got {[*z.shape]}")
        gate = siblings_gate((self,), x, tokens, gates)
        keep_routing(self, gate, x.shape[:-1])
        mixture, count = self.mixture, tokens.shape[0]
        dense = dense_gate(gate, count, 1, len(mixture.ranks), compute_dtype(tokens))
        # [T, R]: scale * gate, repeated over the ranks of each expert.
        factors = rank_gate(dense, mixture.ranks, mixture.scaling)[:, 0]
        flat = flat_rows(z)
        lora_a, lora_b = without_frozen(
            self.lora_A, self.lora_B, mixture.ranks, config.frozen_experts
        )
        h = nn.functional.linear(flat, lora_a.to(flat.dtype))
        activated = ACTIVATIONS[config.rank_activation](h.to(factors.dtype))
        # `where` and not a product alone, so that a NaN of an expert with gate 0 does not spread.
        u = torch.where(factors == 0, 0, factors * activated).to(flat.dtype)
        return torch.addmm(flat, u, lora_b.to(flat.dtype).t()).view(z.shape)
