"""MoeLoraLinear: a frozen linear under a gated mixture of LoRA experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moelora_kernels.autograd import Plan, Sibling
from moelora_kernels.config import MoeLoraConfig
from moelora_kernels.functional import active_dtype, apply, dropout_seed, is_autocast
from moelora_kernels.nn.initialization import start_from_svd
from moelora_kernels.nn.record import RoutingRecord
from moelora_kernels.nn.routers import (
    add_shared_expert,
    build_router,
    gate_of_logits,
    is_plain_linear,
    router_logits,
    rows_of_gates,
)


class MoeLoraLinear(nn.Module):
    """Drop-in for nn.Linear with a mixture of LoRA experts over its frozen weight.

        y = x Wt + b + u Bt        u = scale * gate (.) (dropout(x) At)        gate = router(x)

    Parameters: `lora_A` [R, I] (with share="A" [r, I]), `lora_B` [O, R], both expert-major and B
    zero at the start, so that a new layer equals its base (but see `nn.initialization` for
    init="svd_segments"); `router` where the gate has one; `base_layer` the frozen linear. Any
    callable module with in_features and out_features can be the base: a plain dense nn.Linear in
    x's dtype is read, everything else (quantised, hooked, cast by autocast) is called.

    A new layer, and an expert that a token is not routed to, add exactly nothing to its y, as long
    as A and B are finite: the products of impl="wide" run over all experts, so a NaN or infinity in
    an expert's B reaches y of every token, and one in its A dx of every token. With impl="grouped"
    it stays with the tokens that chose the expert.

    Args:
        in_features, out_features, bias, device, dtype: as nn.Linear.
        config: a MoeLoraConfig; `options` are its fields, in place of it or changing it.

    Source: arXiv 2310.18339 (MOELoRA), arXiv 2404.09027 (MING-MOE) and relatives; see presets.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        config: MoeLoraConfig | None = None,
        device=None,
        dtype=None,
        **options: Any,
    ) -> None:
        super().__init__()
        base = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self._attach(base, config, options)

    @classmethod
    def from_linear(
        cls, linear: nn.Module, config: MoeLoraConfig | None = None, **options: Any
    ) -> MoeLoraLinear:
        """Put experts over an existing linear, which is kept and frozen."""
        if missing := missing_size(linear):
            raise TypeError(f"linear: expected a module with {missing}, got {type(linear)}")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._attach(linear, config, options)
        return layer.train(linear.training)

    def _attach(self, base: nn.Module, config: MoeLoraConfig | None, options: dict) -> None:
        self.config = config = MoeLoraConfig.of(config, options)
        self.in_features, self.out_features = base.in_features, base.out_features
        ranks, renormalize = config.ranks(), config.renormalizes()
        self._plan = Plan(
            ranks,
            config.scales(self.in_features),
            share_a=config.share == "A",
            renormalize=renormalize is not False,
            temperature=config.temperature,
            dropout_per_expert=config.dropout_mask == "per_expert",
        )
        # Whether a linear router's logits can come out of the shrink, and the plan where they do.
        self._fusable = (
            config.granularity == "token"
            and renormalize is not None
            and config.shared_expert == "none"
        )
        self._fused_plan = self._plan._replace(top_k=config.top_k or config.num_experts)
        device, dtype = _adapter_place(base, config)
        self.base_layer = base.requires_grad_(False)
        rows = ranks[0] if config.share == "A" else sum(ranks)
        self.lora_A = nn.Parameter(torch.empty(rows, self.in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(
            torch.empty(self.out_features, sum(ranks), device=device, dtype=dtype)
        )
        self.router = build_router(config, self.in_features, device, dtype)
        self.record = RoutingRecord()
        self.external_gates: Tensor | None = None
        # Set by `link_siblings`: what runs this layer together with its siblings.
        self.link = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw A anew and zero B; the router keeps its own initialisation.

        With init="svd_segments" A and B come from the base, once: a second call raises.
        """
        with torch.no_grad():
            if self.config.init == "normal":
                self.lora_A.normal_(std=0.01)
            else:
                bound = 1.0 / math.sqrt(self.in_features)
                self.lora_A.uniform_(-bound, bound)
            self.lora_B.zero_()
            if self.config.init == "svd_segments":
                self.base_layer = start_from_svd(
                    self.base_layer, self.config, self.lora_A, self.lora_B
                )

    @property
    def weight(self) -> Tensor:
        """The base's weight."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias."""
        return self.base_layer.bias

    def forward(self, x: Tensor, gates: Tensor | None = None) -> Tensor:
        """x [..., I] -> y [..., O]; gates ([T, E], [B, E] or [1, E]) only for router="external"."""
        # A compiled graph has no version counter that tells whether x was changed between calls.
        if self.link is not None and not torch.compiler.is_compiling():
            return self.link.forward(self, x, gates)
        return forward_siblings((self,), x, gates)[0]

    def extra_repr(self) -> str:
        """Sizes and the options that set this layer apart."""
        c = self.config
        router = type(c.router).__name__ if isinstance(c.router, nn.Module) else c.router
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"num_experts={c.num_experts}, rank={c.rank}, router={router}, select={c.select}"
            + (f", top_k={c.top_k}" if c.top_k else "")
        )


def missing_size(module: nn.Module) -> str | None:
    """Which of in_features and out_features a module lacks to be the base of a layer."""
    for name in ("in_features", "out_features"):
        if not isinstance(getattr(module, name, None), int):
            return name
    return None


def _adapter_place(base: nn.Module, config: MoeLoraConfig) -> tuple[torch.device, torch.dtype]:
    """Device and dtype of A, B and router on top of `base`."""
    tensors = [*base.parameters(), *base.buffers()]
    device = tensors[0].device if tensors else torch.get_default_device()
    if config.adapter_dtype is not None:
        return device, getattr(torch, config.adapter_dtype)
    weight = float_weight(base)
    return device, torch.float32 if weight is None else weight.dtype


def float_weight(base: nn.Module) -> Tensor | None:
    """The base's weight where its dtype is one to compute in; None for quantised bases."""
    weight = getattr(base, "weight", None)
    is_float = isinstance(weight, Tensor) and weight.is_floating_point() and weight.itemsize > 1
    return weight if is_float else None


def _is_fused(layer: MoeLoraLinear) -> bool:
    """Whether the router's logits come out of the shrink: a bare linear router with a topk_gate."""
    return (
        layer._fusable
        and is_plain_linear(layer.router)
        and not (layer.training and layer.config.noise > 0)
    )


def forward_siblings(
    layers: Sequence[MoeLoraLinear], x: Tensor, gates: Tensor | None = None
) -> list[Tensor]:
    """The outputs of layers that read the same x and share their options, in one pass over x."""
    first = layers[0]
    config = first.config
    if x.dim() < 1 or x.shape[-1] != first.in_features:
        raise ValueError(f"x: expected [..., {first.in_features}], got {[*x.shape]}")
    if not x.is_floating_point():
        raise TypeError(f"x: expected a float dtype, got {x.dtype}")
    if gates is not None and config.router != "external":
        raise ValueError(f"gates: only router='external' takes gates, this is {config.router!r}")
    dtype = active_dtype(x)
    tokens = x if x.dim() == 2 else x.reshape(-1, first.in_features)
    tokens = tokens if tokens.dtype == dtype else tokens.to(dtype)
    fused = all(_is_fused(layer) for layer in layers)
    read = all(_is_read(layer.base_layer, tokens) for layer in layers) and (
        len(layers) == 1 or len({layer.bias is None for layer in layers}) == 1
    )
    siblings = [_sibling(layer, x, read, fused) for layer in layers]

    plan, seed = first._fused_plan if fused else first._plan, None
    if config.dropout > 0.0 and first.training:
        plan = plan._replace(dropout=config.dropout)
        seed = dropout_seed(config.dropout, None, x.device)
    indices = rows = logits = None
    if not fused:
        gates, indices, rows, logits = _gates(layers, x, tokens, gates)
    outputs, weights, chosen, fused_logits = apply(
        plan, tokens, siblings, gates, indices, rows, seed, config.impl
    )
    if config.aux or any(layer.record.wanted for layer in layers):
        if fused:
            indices = chosen if plan.top_k < config.num_experts else None
            gates, logits = weights, fused_logits
        _keep(layers, gates, indices, logits)
    return outputs if x.dim() == 2 else [y.view(*x.shape[:-1], y.shape[-1]) for y in outputs]


def _is_read(base: nn.Module, tokens: Tensor) -> bool:
    """Whether `base` is a plain dense nn.Linear, of the dtype and device of the layer's input."""
    weight = _dense_weight(base)
    return weight is not None and weight.dtype == tokens.dtype and weight.device == tokens.device


def _dense_weight(base: nn.Module) -> Tensor | None:
    """The weight of a plain nn.Linear that holds a plain tensor; None for every other base."""
    if not is_plain_linear(base):
        return None
    weight = base.weight
    return weight if type(weight) in (nn.Parameter, Tensor) else None


def _sibling(layer: MoeLoraLinear, x: Tensor, read: bool, fused: bool) -> Sibling:
    """The tensors of a layer; a base that is not to be read is called."""
    base, router = layer.base_layer, layer.router
    weight = bias = output = router_weight = router_bias = None
    if read:
        weight, bias = base.weight, base.bias
    else:
        _check_called(base, x)
        output = base(x)
        output = output.reshape(-1, output.shape[-1])
    if fused:
        router_weight, router_bias = router.weight, router.bias
    return Sibling(weight, bias, output, layer.lora_A, layer.lora_B, router_weight, router_bias)


def _check_called(base: nn.Module, x: Tensor) -> None:
    """Raise where a plain base would refuse x, by name instead of as an operand of a product."""
    weight = _dense_weight(base)
    if weight is None:
        return
    if weight.device != x.device:
        raise ValueError(f"x: expected the base's device {weight.device}, got {x.device}")
    if weight.dtype != x.dtype and not is_autocast(x.device):
        raise TypeError(f"x: expected the base's dtype {weight.dtype}, got {x.dtype}")


def _gates(
    layers: Sequence[MoeLoraLinear], x: Tensor, tokens: Tensor, gates: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gates (or weights), indices and rows of all siblings side by side, and their logits."""
    config = layers[0].config
    parts: list[tuple[Tensor, Tensor | None]] = []
    all_logits = []
    for layer in layers:
        logits, own = None, gates if gates is not None else layer.external_gates
        if config.router is None:
            gate = (x.new_ones((1, config.num_experts), dtype=torch.float32), None)
        elif config.router == "external":
            gate = _external(own, config.num_experts), None
        else:
            logits = _logits(layer, x, tokens)
            gate = gate_of_logits(logits, config, layer.training)
            all_logits.append(logits)
        parts.append(add_shared_expert(*gate, config))
    weights = torch.cat([w for w, _ in parts], dim=1) if len(parts) > 1 else parts[0][0]
    indices = None
    if parts[0][1] is not None:
        indices = torch.cat([i for _, i in parts], dim=1) if len(parts) > 1 else parts[0][1]
    rows = rows_of_gates(weights, x.shape, x.device, "set_tasks" if gates is None else "gates")
    return weights, indices, rows, torch.cat(all_logits, dim=1) if all_logits else None


def _external(gates: Tensor | None, num_experts: int) -> Tensor:
    if gates is None:
        raise ValueError(
            "gates: router='external' needs them: layer(x, gates) or set_tasks(model, gates)"
        )
    if gates.shape[-1] != num_experts or gates.dim() < 2 or not gates.is_floating_point():
        raise ValueError(
            f"gates: expected floats [..., {num_experts}], got {gates.dtype} {[*gates.shape]}"
        )
    return gates.reshape(-1, num_experts)


def _logits(layer: MoeLoraLinear, x: Tensor, tokens: Tensor) -> Tensor:
    """Router logits [G, E] in float32: of every token or sequence, or the tasks that are set.

    [G, E + 1] where the threshold is learned.
    """
    config, router = layer.config, layer.router
    if config.router == "task":
        # One gate serves all layers of a model, also of one that is spread over devices.
        return router().to(x.device)
    source = tokens
    if config.granularity == "sequence":
        sequences = x.flatten(1, -2) if x.dim() > 2 else tokens[None]
        # The mean of no positions is 0, not 0 / 0.
        source = sequences.mean(dim=1) if sequences.shape[1] else sequences.sum(dim=1)
    logits = router_logits(router, source)
    columns = config.num_experts + (config.select == "learned_threshold")
    if logits.shape != (source.shape[0], columns):
        raise ValueError(
            f"router: expected logits [{source.shape[0]}, {columns}], got {[*logits.shape]}"
        )
    return logits


def _keep(layers, gates: Tensor, indices: Tensor | None, logits: Tensor | None) -> None:
    n = len(layers)
    columns = [[None] * n if t is None else t.chunk(n, dim=1) for t in (gates, indices, logits)]
    for layer, own_gates, own_indices, own_logits in zip(layers, *columns, strict=True):
        layer.record.keep(own_gates, own_indices, own_logits)
