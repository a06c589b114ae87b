"""MoeLoraFFN: a frozen gated MLP whose experts are whole FFNs, each with adapters of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moelora_kernels.autograd.ffn import RouterLogits, ffn_experts
from moelora_kernels.config import MoeLoraConfig
from moelora_kernels.nn.base_linear import (
    adapter_device_dtype,
    call_base,
    check_adapters,
    check_input,
    dense_weight,
    float_weight,
    missing_size,
)
from moelora_kernels.nn.gates import gate_rows
from moelora_kernels.nn.initialization import draw_a
from moelora_kernels.nn.layer import MixtureLayer
from moelora_kernels.numerics import active_dtype, compute_dtype, dropout_seed
from moelora_kernels.types import NO_DROPOUT, Dropout, FfnMixture, FfnTensors, Gate

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "relu": nn.ReLU,
}


class MoeLoraFFN(MixtureLayer):
    """Drop-in for a gated MLP with whole-FFN experts over its frozen linears, as in MixLoRA.

        w [T, K], experts e(t, k)                                       from one router per FFN
        a_tk = act(Wg x_t + bg + s Bg_e Ag_e x_t) * (Wu x_t + bu + s Bu_e Au_e x_t)
        y_t  = sum_k w_tk (Wd a_tk + bd + s Bd_e Ad_e a_tk)
             = Wd (sum_k w_tk a_tk) + bd sum_k w_tk + sum_k w_tk s Bd_e Ad_e a_tk

    Wd is linear, so that each frozen product runs once per token: 3 of them, where experts one by
    one make 3 K. An expert is scaled as a whole, its part of the frozen FFN included, so a new
    layer equals its base where the weights of a token sum to 1 (top-k or all, normalize="sum").

    Parameters: `gate_lora_A`, `up_lora_A` [R, I], `gate_lora_B`, `up_lora_B` [F, R], `down_lora_A`
    [R, F], `down_lora_B` [I, R], expert-major, B zero at the start; `router` where the gate has
    one; `gate_proj`, `up_proj`, `down_proj` the frozen linears under their own names, so that
    checkpoints of the base fit. These are called, never read: any modules with in_features and
    out_features will do (quantised, hooked). `down_proj` must be affine, with its offset in
    `down_proj.bias`: called on the weighted sum it adds bd once, and bd (sum_k w_tk - 1) corrects.

    An expert that a token is not routed to has no part in its y and gradients. Where gates are
    dense (all, top-p, threshold, external) every expert is a slot of every token, at the cost that
    K = E has; an external gate of zero adds zero and has its gradient, so that such an expert runs:
    a NaN in its `down_lora_B` reaches y, one in its `gate_lora_A` or `up_lora_A` dx.

    Saved for backward, next to x and rank space: two [T K, F]; with `recompute` two [T, F] instead,
    for one more expand of gate and up. Neither grows with E.

    Args:
        hidden_size: I.
        intermediate_size: F.
        bias, device, dtype: of the frozen linears, as nn.Linear.
        activation: "silu", "gelu", "gelu_tanh", "relu", or any elementwise module or function that
            leaves its input as it is.
        config: a MoeLoraConfig; `options` are its fields, in place of it or changing it. rank,
            scaling and dropout are those of each of the three linears; in training gate and up
            share the mask of x.
        recompute: make the activations of the experts anew in backward; the results do not change.

    Raises ValueError or TypeError that names the option, what was given and what is expected.

    Source: arXiv 2404.15159 (MixLoRA), arXiv 2401.16160 (LLaVA-MoLE: top-1 of weight 1).
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        bias: bool = False,
        *,
        activation: str | Callable[[Tensor], Tensor] = "silu",
        config: MoeLoraConfig | None = None,
        device=None,
        dtype=None,
        recompute: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        if isinstance(activation, str) and activation not in ACTIVATIONS:
            raise ValueError(
                f"activation: expected one of {', '.join(ACTIVATIONS)} or a module, "
                f"got {activation!r}"
            )
        act_fn = ACTIVATIONS[activation]() if isinstance(activation, str) else activation
        gate, up = (
            nn.Linear(hidden_size, intermediate_size, bias, device=device, dtype=dtype)
            for _ in range(2)
        )
        down = nn.Linear(intermediate_size, hidden_size, bias, device=device, dtype=dtype)
        self._attach((gate, up, down), act_fn, config, options, recompute)

    @classmethod
    def from_mlp(
        cls,
        mlp: nn.Module,
        config: MoeLoraConfig | None = None,
        *,
        recompute: bool = False,
        **options: Any,
    ) -> MoeLoraFFN:
        """Put experts over an existing MLP, whose linears and activation are kept and frozen.

        mlp: down_proj(act_fn(gate_proj(x)) * up_proj(x)), as Llama, Qwen2, Mistral, Gemma have it.
        """
        if problem := why_no_ffn(mlp):
            raise TypeError(f"mlp: {problem}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        bases = tuple(getattr(mlp, name) for name in PROJECTIONS)
        layer._attach(bases, mlp.act_fn, config, options, recompute)
        return layer.train(mlp.training)

    @classmethod
    def _check_config(cls, config: MoeLoraConfig) -> None:
        if config.share == "A":
            raise ValueError(
                "share: 'A' does not go with whole-FFN experts: each down projection reads the "
                "activation of its own expert"
            )
        if config.router in ("prototype", "self"):
            raise ValueError(
                f"router: {config.router!r} is computed from the A of one linear; "
                "whole-FFN experts have three"
            )
        for name, plain in (("freeze", "none"), ("grad_gate", "gate"), ("rank_activation", None)):
            if getattr(config, name) != plain:
                raise ValueError(
                    f"{name}: {getattr(config, name)!r} is not supported for whole-FFN experts"
                )
        if config.init == "svd_segments":
            raise ValueError(
                "init: 'svd_segments' does not go with whole-FFN experts: every expert contains "
                "the whole frozen FFN, so reducing a weight would reduce it for all experts"
            )
        if config.impl not in ("auto", "grouped", "reference"):
            raise ValueError(
                f"impl: {config.impl!r} does not go with whole-FFN experts: their activation lies "
                "between the products, so each expert runs on its own tokens (grouped)"
            )
        if config.router is None and config.num_experts > 1:
            raise ValueError(
                "router: None gives every expert the weight 1, so the frozen FFN would be added "
                "once per expert; use it with num_experts=1"
            )
        if config.shared_expert == "always":
            raise ValueError(
                "shared_expert: 'always' would add the frozen FFN a second time; use 'complement', "
                "which gives the shared expert the weight that is left"
            )

    def _attach(self, bases, act_fn, config, options: dict, recompute: bool) -> None:
        self.config = config = MoeLoraConfig.of(config, options)
        self._check_config(config)
        if not callable(act_fn):
            raise TypeError(f"activation: expected a module or a function, got {type(act_fn)}")
        if getattr(act_fn, "inplace", False):
            raise ValueError("activation: expected one that leaves its input as it is (inplace)")
        gate = bases[0]
        self.hidden_size, self.intermediate_size = gate.in_features, gate.out_features
        self.mixture = FfnMixture(
            config.ranks(),
            config.scales(),
            bool(recompute),
        )
        device, dtype = adapter_device_dtype(gate, config)
        total = sum(self.mixture.ranks)
        for name, base in zip(PROJECTIONS, bases, strict=True):
            setattr(self, name, base.requires_grad_(False))
            stem = name.removesuffix("_proj")
            for matrix, shape in (
                ("A", (total, base.in_features)),
                ("B", (base.out_features, total)),
            ):
                parameter = nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
                setattr(self, f"{stem}_lora_{matrix}", parameter)
        self.act_fn = act_fn.requires_grad_(False) if isinstance(act_fn, nn.Module) else act_fn
        self._add_router(self.hidden_size, device, dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw every A anew and zero every B; the router keeps its own initialisation."""
        adapters = self.ffn_tensors()
        with torch.no_grad():
            for matrix in (adapters.gate_a, adapters.up_a, adapters.down_a):
                draw_a(matrix, self.config)
            for matrix in (adapters.gate_b, adapters.up_b, adapters.down_b):
                matrix.zero_()

    def ffn_tensors(self) -> FfnTensors:
        """Return A and B of the three linears."""
        return FfnTensors(
            self.gate_lora_A, self.gate_lora_B, self.up_lora_A, self.up_lora_B,
            self.down_lora_A, self.down_lora_B,
        )  # fmt: skip

    def forward(self, x: Tensor, gates: Tensor | None = None) -> Tensor:
        """x [..., I] -> y [..., I]; gates ([T, E], [B, E] or [1, E]) only for router="external"."""
        config, dtype = self.config, active_dtype(x)
        check_input(x, self.hidden_size, gates, config.router)
        tokens = x.reshape(-1, self.hidden_size).to(dtype)
        inner = self.intermediate_size
        gate, up = (call_base(base, x, inner).to(dtype) for base in (self.gate_proj, self.up_proj))
        check_adapters(self.gate_lora_A, x)
        slots = self.token_slots(x, tokens, gates)
        dropout_x = dropout_a = NO_DROPOUT
        if config.dropout > 0.0 and self.training:
            dropout_x, dropout_a = (
                Dropout(
                    config.dropout,
                    config.dropout_mask == "per_expert",
                    dropout_seed(config.dropout, None, x.device),
                )
                for _ in range(2)
            )
        impl = "reference" if config.impl == "reference" else "grouped"
        summed, delta = ffn_experts(
            self.mixture, self.act_fn, tokens, gate, up, slots, self.ffn_tensors(),
            dropout_x, dropout_a, impl,
        )  # fmt: skip
        y = call_base(self.down_proj, summed.view(*x.shape[:-1], inner), self.hidden_size)
        offset = _bias_correction(self.down_proj, slots.weights)
        delta = delta if offset is None else delta + offset
        return (y + delta.to(y.dtype)).view(x.shape)

    def router_logits(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Return the router's logits [G, E] in float32; see `routers.layer_logits`."""
        if self.config.granularity == "token" and dense_weight(self.router) is not None:
            return RouterLogits.apply(tokens, self.router.weight, self.router.bias)
        return super().router_logits(x, tokens)

    def token_slots(self, x: Tensor, tokens: Tensor, gates: Tensor | None = None) -> Gate:
        """Return the gate of every token as K slots: weights [T, K] and experts [T, K].

        A dense gate has K = E slots. The weights are in the compute dtype.

        Args:
            x: [..., I], the input of the layer.
            tokens: [T, I], x in the dtype the layer computes in.
            gates: external gates [..., E]; None means those that `set_tasks` set.
        """
        config = self.config
        gate = self.make_gate(x, tokens, gates)
        source = "set_tasks" if gates is None else "gates"
        gate_rows(gate.weights, x.shape, x.device, source, config)
        if config.aux or self.record.wanted:
            self.record.keep(gate.weights, gate.experts, gate.logits)
        weights, experts = gate.weights, gate.experts
        if experts is None:
            weights, experts = _dense_slots(weights, config)
        weights = weights.to(compute_dtype(tokens))
        steps = x.shape[0] if config.batch_dim == 1 and x.dim() > 2 else 1
        return Gate(*(_expand_rows(t, tokens.shape[0], steps) for t in (weights, experts)))

    def input_like(self) -> tuple[int, torch.dtype]:
        """Return the width and the dtype of an x that the layer accepts."""
        weight = float_weight(self.gate_proj)
        return self.hidden_size, (self.gate_lora_A if weight is None else weight).dtype

    def extra_repr(self) -> str:
        """Return the sizes and the options that matter most."""
        sizes = self._describe(
            hidden_size=self.hidden_size, intermediate_size=self.intermediate_size
        )
        return sizes + (", recompute=True" if self.mixture.recompute else "")


def _dense_slots(weights: Tensor, config: MoeLoraConfig) -> tuple[Tensor, Tensor]:
    """Dense gates [G, E] as slots: the K that a top-k gate kept, else one for every expert."""
    if config.select == "topk":
        slots = config.top_k + (config.shared_expert != "none")
        # Kept scores may be negative (identity), those not kept are zero.
        indices = weights.detach().abs().topk(slots, dim=1).indices
        return weights.gather(1, indices), indices
    indices = torch.arange(weights.shape[1], device=weights.device).expand(weights.shape)
    if config.select != "all":
        # Not routed rather than of weight zero: such pairs cost nothing where kernels serve.
        indices = torch.where(weights != 0, indices, -1)
    return weights, indices


def _expand_rows(rows: Tensor, tokens: int, steps: int) -> Tensor:
    """One row for each token from rows of all tokens, of sequences, or one for all.

    The tokens are those of the sequences, one sequence after the other, in each of `steps` steps.
    """
    count, slots = rows.shape
    if count == tokens:
        return rows
    inner = tokens // max(steps * count, 1)
    return rows[None, :, None].expand(steps, count, inner, slots).reshape(tokens, slots)


def _bias_correction(down: nn.Module, weights: Tensor) -> Tensor | None:
    """bd (sum_k w_tk - 1), [T, I]: the call of the base added bd once, every expert has its own."""
    bias = getattr(down, "bias", None)
    if bias is None:
        return None
    if bias.is_meta and not weights.is_meta:
        # Offloaded: the values are there within a call alone, and the base of zero is its bias.
        bias = down(weights.new_zeros((1, down.in_features), dtype=bias.dtype))
    return (weights.sum(dim=1, keepdim=True) - 1.0) * bias


def why_no_ffn(mlp: nn.Module) -> str:
    """Why whole-FFN experts cannot be put over `mlp`; empty where they can."""
    if isinstance(mlp, MixtureLayer):
        return "it has whole-FFN experts already"
    kind = f"{type(mlp).__name__}, expected a gated MLP"
    for name in PROJECTIONS:
        base = getattr(mlp, name, None)
        if isinstance(base, MixtureLayer):
            return f"its {name} has experts already"
        if not isinstance(base, nn.Module):
            return f"{kind} with {name}"
        if missing := missing_size(base):
            return f"{kind} whose {name} has {missing}, got {type(base).__name__}"
    if not callable(getattr(mlp, "act_fn", None)):
        return f"{kind} with act_fn"
    gate, up, down = (getattr(mlp, name) for name in PROJECTIONS)
    sizes = [(base.in_features, base.out_features) for base in (gate, up, down)]
    if not sizes[0] == sizes[1] == sizes[2][::-1]:
        return f"{kind}, got (in_features, out_features) {sizes} of gate_proj, up_proj, down_proj"
    hooks = (mlp._forward_hooks, mlp._forward_pre_hooks, mlp._backward_hooks)
    if any(hooks) or mlp._backward_pre_hooks or "forward" in mlp.__dict__:
        return f"{type(mlp).__name__} has hooks or a patched forward, which would be lost"
    return ""
