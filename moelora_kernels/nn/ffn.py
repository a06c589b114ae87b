"""MoeLoraFFN: a frozen gated MLP whose experts are whole FFNs (MixLoRA)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moelora_kernels.autograd.ffn import ffn_experts
from moelora_kernels.autograd.router import RouterLogits
from moelora_kernels.config import MoeLoraConfig
from moelora_kernels.nn.base_linear import (
    adapter_device_dtype,
    call_base,
    check_adapters,
    check_input,
    dense_weight,
    flat_rows,
    float_weight,
    given_input,
    missing_size,
)
from moelora_kernels.nn.gates import row_of_tokens, slots_of_tokens
from moelora_kernels.nn.initialization import draw_a
from moelora_kernels.nn.layer import MixtureLayer
from moelora_kernels.numerics import active_dtype, compute_dtype, dropout_seed
from moelora_kernels.ops.apply import apply
from moelora_kernels.types import (
    NO_DROPOUT,
    Dropout,
    ExternalGates,
    FfnMixture,
    FfnTensors,
    Gate,
)

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "relu": nn.ReLU,
}


class MoeLoraFFN(MixtureLayer):
    """Replace a gated MLP by experts that are whole FFNs over its frozen linears, as in MixLoRA.

        w [T, K], experts e(t, k)                                    one router per FFN
        a_tk = act(Wg x_t + bg + s Bg_e Ag_e x_t) * (Wu x_t + bu + s Bu_e Au_e x_t)
        y_t  = sum_k w_tk (Wd a_tk + bd + s Bd_e Ad_e a_tk)
             = Wd (sum_k w_tk a_tk) + bd sum_k w_tk + sum_k w_tk s Bd_e Ad_e a_tk

    Wd is linear, so each frozen linear runs once per token: 3 products instead of 3 K. The gate
    weight scales a whole expert, its frozen part included. So a new layer equals its base only if
    the weights of a token sum to 1 (top-k or all, with normalize="sum").

    Parameters, all expert-major, every B zero at the start:
        gate_lora_A, up_lora_A: [R, I].
        gate_lora_B, up_lora_B: [F, R].
        down_lora_A: [R, F].
        down_lora_B: [I, R].
    Children:
        gate_proj, up_proj, down_proj: the frozen linears under the names they have in the base, so
            that checkpoints of the base fit. The layer calls them and does not read their weights,
            so quantised and hooked modules with in_features and out_features work. `down_proj` must
            be affine, with its offset in `down_proj.bias`: the call adds bd once, and the layer
            adds bd (sum_k w_tk - 1).
        router: the module that computes the logits; absent if the gate needs none.

    An expert that a token does not select has no effect on the token's y and gradients. Dense gates
    (all, top-p, threshold, external) cost as much as K = E. An external gate of zero adds zero but
    has a gradient, so its expert runs: a NaN in its `down_lora_B` reaches y, and a NaN in its
    `gate_lora_A` or `up_lora_A` reaches dx. On a GPU, a layer that runs fused multiplies with all
    experts: a NaN or infinity in any A or B reaches every token with a weight.

    Besides x and rank-space tensors, two [T, F] tensors are saved for backward if the layer runs
    fused (`dispatch.choose_ffn`; a named activation). Otherwise two [T K, F] are saved; with
    `recompute` two [T, F], and backward repeats the expand of gate and up. None grows with E.

    Args:
        hidden_size: I.
        intermediate_size: F.
        bias, device, dtype: of the frozen linears, as in nn.Linear.
        activation: "silu", "gelu", "gelu_tanh", "relu", or an elementwise module or function that
            does not change its input in place.
        config: a MoeLoraConfig; None means the defaults. rank, scaling and dropout apply to each of
            the three linears. In training gate and up share the dropout mask of x.
        recompute: recompute the experts' activations in backward. The results do not change. The
            fused form always recomputes them.
        **options: fields of MoeLoraConfig; they replace the fields of `config`.

    Raises:
        ValueError, TypeError: an option is not valid or not supported for whole-FFN experts.

    Example:
        >>> import torch
        >>> from moelora_kernels import MoeLoraConfig, MoeLoraFFN
        >>> layer = MoeLoraFFN(16, 64, config=MoeLoraConfig.preset("mixlora", rank=2))
        >>> layer(torch.randn(3, 5, 16)).shape
        torch.Size([3, 5, 16])

    Source: arXiv 2404.15159 (MixLoRA), arXiv 2401.16160 (LLaVA-MoLE: top-1 with weight 1).
    """

    tensor_names = (
        "gate_lora_A", "gate_lora_B", "up_lora_A", "up_lora_B", "down_lora_A", "down_lora_B"
    )  # fmt: skip

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
        gate_proj, up_proj = (
            nn.Linear(hidden_size, intermediate_size, bias, device=device, dtype=dtype)
            for _ in range(2)
        )
        down_proj = nn.Linear(intermediate_size, hidden_size, bias, device=device, dtype=dtype)
        self._attach((gate_proj, up_proj, down_proj), act_fn, config, options, recompute)

    @classmethod
    def from_mlp(
        cls,
        mlp: nn.Module,
        config: MoeLoraConfig | None = None,
        *,
        recompute: bool = False,
        **options: Any,
    ) -> MoeLoraFFN:
        """Put experts over an existing MLP. The layer keeps its linears and activation, frozen.

        Args:
            mlp: computes down_proj(act_fn(gate_proj(x)) * up_proj(x)), like the MLPs of Llama,
                Qwen2, Mistral and Gemma.
            config: a MoeLoraConfig; None means the defaults.
            recompute: as in MoeLoraFFN.
            **options: fields of MoeLoraConfig; they replace the fields of `config`.

        Raises:
            TypeError: `mlp` is not a gated MLP, has experts already, or has hooks.
        """
        if problem := ffn_problem(mlp):
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
                "share: 'A' is not supported for whole-FFN experts: the A of down_proj reads a "
                "different input for every expert"
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
                "init: 'svd_segments' is not supported for whole-FFN experts: every expert "
                "contains the frozen FFN, so a reduced weight would be reduced for all experts"
            )
        if config.impl not in ("auto", "grouped", "reference"):
            raise ValueError(
                f"impl: {config.impl!r} is not supported for whole-FFN experts: the activation "
                "needs the output of one expert at a time; use 'auto'"
            )
        if config.router is None and config.num_experts > 1:
            raise ValueError(
                "router: None gives every expert the weight 1, so the frozen FFN would be added "
                "once per expert; use it with num_experts=1"
            )
        if config.shared_expert == "always":
            raise ValueError(
                "shared_expert: 'always' would add the frozen FFN a second time; use 'complement', "
                "which gives the shared expert the remaining weight"
            )

    def _derive_options(self) -> None:
        config = self.config
        self.mixture = FfnMixture(
            config.ranks(), config.scales(), self.recompute, config.frozen_experts
        )

    def _attach(self, bases, act_fn, config, options: dict, recompute: bool) -> None:
        self.recompute = bool(recompute)
        config = MoeLoraConfig.of(config, options)
        self._check_config(config)
        self.config = config
        if not callable(act_fn):
            raise TypeError(f"activation: expected a module or a function, got {type(act_fn)}")
        if getattr(act_fn, "inplace", False):
            raise ValueError(
                "activation: expected one that does not change its input, got inplace=True"
            )
        gate_proj = bases[0]
        self.hidden_size, self.intermediate_size = gate_proj.in_features, gate_proj.out_features
        device, dtype = adapter_device_dtype(gate_proj, config)
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
        """Draw every A again and set every B to zero; the router keeps its values."""
        self._check_direct()
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
        check_input(x, self.hidden_size, gates, config.router)
        dtype = active_dtype(x)
        tokens = flat_rows(x).to(dtype)
        inner = self.intermediate_size
        gate_out, up_out = (
            call_base(base, x, inner).to(dtype) for base in (self.gate_proj, self.up_proj)
        )
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
        summed, delta = ffn_experts(
            self.mixture, self.act_fn, tokens, gate_out, up_out, slots, self.ffn_tensors(),
            dropout_x, dropout_a, config.impl,
        )  # fmt: skip
        y = call_base(self.down_proj, summed.view(*x.shape[:-1], inner), self.hidden_size)
        offset = _bias_correction(self.down_proj, slots.weights)
        delta = delta if offset is None else delta + offset
        return (y + delta.to(y.dtype)).view(x.shape)

    def router_logits(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Return the router's logits [G, E] in float32; see `routers.layer_logits`."""
        if self.config.granularity == "token" and dense_weight(self.router) is not None:
            return apply(RouterLogits, tokens, self.router.weight, self.router.bias)
        return super().router_logits(x, tokens)

    def token_slots(self, x: Tensor, tokens: Tensor, gates: ExternalGates | None = None) -> Gate:
        """Return the gate of every token as K slots: weights [T, K] and experts [T, K].

        A dense gate has K = E slots. The weights are in the compute dtype.

        Args:
            x: [..., I], the input of the layer.
            tokens: [T, I], x in the dtype the layer computes in.
            gates: external gates; None means the gates that `set_tasks` set.
        """
        config = self.config
        gate = self.make_gate(x, tokens, gates)
        source = "set_tasks" if gates is None else "gates"
        rows = row_of_tokens(gate.weights, x.shape, x.device, source, config, self.samples)
        weights, experts = gate.weights, gate.experts
        if experts is None:
            weights, experts = _dense_slots(weights, config)
        slots = Gate(weights.to(compute_dtype(tokens)), experts)
        slots = slots_of_tokens(slots, rows, x.shape, config.batch_dim, self.samples)
        if self.record.is_on:
            is_dense = gate.experts is None
            kept = gate._replace(rows=rows) if is_dense else slots._replace(logits=gate.logits)
            self.record.keep(kept, x.shape[:-1], self.current_task_ids())
        return slots

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
    """Return dense gates [G, E] as slots: weights [G, K] and experts [G, K].

    The slots are the K experts that a top-k gate kept, else all E experts.
    """
    if config.select == "topk":
        slots = config.top_k + (config.shared_expert != "none")
        # Kept scores may be negative (score="identity"); scores that are not kept are zero.
        experts = weights.detach().abs().topk(slots, dim=1).indices
        return weights.gather(1, experts), experts
    experts = torch.arange(weights.shape[1], device=weights.device).expand(weights.shape)
    if config.select != "all":
        # Expert -1 is "not routed". The kernels skip it, but compute an expert of weight zero.
        experts = torch.where(weights != 0, experts, -1)
    return weights, experts


def _bias_correction(down: nn.Module, weights: Tensor) -> Tensor | None:
    """Return bd (sum_k w_tk - 1), [T, I], or None without a bias; the base has added bd once."""
    bias = getattr(down, "bias", None)
    if callable(bias):
        # A linear of torch.ao.quantization has a method in place of the parameter.
        bias = bias()
    if bias is None:
        return None
    if bias.is_meta and not weights.is_meta:
        # An offloaded bias has values only during a call of down_proj. down_proj(0) is the bias.
        bias = down(weights.new_zeros((1, down.in_features), dtype=bias.dtype))
    return (weights.sum(dim=1, keepdim=True) - 1.0) * bias


def ffn_problem(mlp: nn.Module) -> str | None:
    """Return why whole-FFN experts cannot be put over `mlp`; None if they can."""
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
        return f"{type(mlp).__name__} has hooks or a patched forward, which the layer would drop"
    return None
