"""MoeLoraAdapter: gated adapters with an activation in rank space, on what a module returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moelora_kernels.config import MoeLoraConfig
from moelora_kernels.nn.base_linear import check_input, float_weight
from moelora_kernels.nn.forward import keep_routing, siblings_gate
from moelora_kernels.nn.layer import LoraLayer
from moelora_kernels.numerics import active_dtype
from moelora_kernels.reference.gates import compute_dtype, dense_gate, rank_gate

ACTIVATIONS = {
    "gelu": nn.functional.gelu,
    "relu": nn.functional.relu,
    "silu": nn.functional.silu,
}


class MoeLoraAdapter(LoraLayer):
    """Experts that read what a frozen FFN returns, gated by what it is given, as in PESC.

        y = z + u Bt        u = scale * gate (.) act(z At)        z = base(x), gate = router(x)

        block.mlp = MoeLoraAdapter(block.mlp, hidden_size, MoeLoraConfig.preset("pesc"))

    Parameters as `MoeLoraLinear`, whose checkpoints, `set_tasks` and auxiliary losses it shares.
    The base is called and left as it is: freeze it, or train plain LoRA inside it (which has to be
    there first: `replace_linears` does not look into a layer of experts). Plain PyTorch,
    all experts for every token; saved for backward beside z and the parameters is what lives in
    rank space.

    Args:
        base: x [..., I] -> z [..., I].
        hidden_size: I.
        config: a MoeLoraConfig with a `rank_activation`; adapter_dtype None is float32, the base
            being any module.
        **options: its fields, in place of it or changing it.

    Raises ValueError that names the option, what was given and what is expected.

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
                "rank_activation: expected one; without it the experts belong on the FFN's linears"
            )
        if config.router in (None, "task", "prototype", "self"):
            raise ValueError(f"router: {config.router!r} does not gate what another module returns")
        refused = {
            "share": (config.share, "none"),
            "grad_gate": (config.grad_gate, "gate"),
            "dropout": (config.dropout, 0),
            "impl": (config.impl, "auto"),
        }
        for name, (given, expected) in refused.items():
            if given != expected:
                raise ValueError(
                    f"{name}: expected {expected!r} with rank_activation, got {given!r}"
                )
        if config.init == "svd_segments":
            raise ValueError(
                "init: 'svd_segments' splits the weight of a linear; an adapter has no weight"
            )

    def input_like(self) -> tuple[int, torch.dtype]:
        """Return the width and the dtype of an x that the layer accepts."""
        weights = map(float_weight, self.base_layer.modules())
        weight = next((weight for weight in weights if weight is not None), self.lora_A)
        return self.in_features, weight.dtype

    def forward(self, x: Tensor, gates: Tensor | None = None) -> Tensor:
        """x [..., I] -> y [..., I]; gates ([T, E], [B, E] or [1, E]) only for router="external"."""
        config = self.config
        check_input(x, self.in_features, gates, config.router)
        z = self.base_layer(x)
        if z.shape != x.shape:
            raise ValueError(f"base: expected an output {[*x.shape]}, got {[*z.shape]}")
        tokens = x.reshape(-1, self.in_features).to(active_dtype(x))
        routed = siblings_gate((self,), x, tokens, gates)
        if config.aux or self.record.wanted:
            keep_routing((self,), routed)
        mixture, count = self.mixture, tokens.shape[0]
        gate = dense_gate(*routed[:3], count, 1, len(mixture.ranks))
        gate = rank_gate(gate.to(compute_dtype(tokens)), mixture.ranks, mixture.scaling)[:, 0]
        flat = z.reshape(-1, self.in_features)
        h = nn.functional.linear(flat, self.lora_A.to(flat.dtype))
        activated = ACTIVATIONS[config.rank_activation](h.to(gate.dtype))
        # A select: a NaN in an expert nobody chose stays there.
        u = torch.where(gate == 0, 0, gate * activated).to(flat.dtype)
        return torch.addmm(flat, u, self.lora_B.to(flat.dtype).t()).view(z.shape)
