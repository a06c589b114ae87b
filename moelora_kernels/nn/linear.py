"""MoeLoraLinear: a frozen linear under a gated mixture of LoRA experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moelora_kernels.config import MoeLoraConfig
from moelora_kernels.nn.base_linear import missing_size
from moelora_kernels.nn.forward import forward_siblings
from moelora_kernels.nn.initialization import start_from_svd
from moelora_kernels.nn.layer import LoraLayer
from moelora_kernels.nn.merge import (
    REDUCED_BASE,
    Task,
    held_task,
    lora_of_task,
    merged_weight,
    merged_with,
)
from moelora_kernels.nn.pretrained_loras import set_prototypes, stack_loras


class MoeLoraLinear(LoraLayer):
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

    Raises ValueError or TypeError that names the option, what was given and what is expected; so
    does a forward for x, gates or tasks that do not fit, and RuntimeError for tasks never set.

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

    @classmethod
    def from_loras(
        cls,
        linear: nn.Module,
        loras: Sequence[tuple[Tensor, Tensor, float]],
        config: MoeLoraConfig | None = None,
        **options: Any,
    ) -> MoeLoraLinear:
        """Put LoRAs that exist already over a linear, as its experts.

            layer = MoeLoraLinear.from_loras(
                linear, [(a, b, alpha), ...], MoeLoraConfig.preset("arrow")
            )

        Args:
            linear: as in `from_linear`.
            loras: A_e [r_e, I], B_e [O, r_e] and alpha_e of each; ranks and alphas may differ.
            config: a MoeLoraConfig whose scaling is "alpha/r" or "alpha/sqrt(r)"; num_experts, rank
                and scaling become those of `loras`. Prototypes are set where the router has them.
            **options: its fields, in place of it or changing it.

        Raises:
            ValueError: no LoRA, one of another shape, another scaling, or experts of the config
                that `loras` has not: share="A", a shared expert, init="svd_segments".
        """
        config = MoeLoraConfig.of(config, options)
        made, lora_a, lora_b = stack_loras(linear, loras, config)
        layer = cls.from_linear(linear, made)
        with torch.no_grad():
            layer.lora_A.copy_(lora_a)
            layer.lora_B.copy_(lora_b)
        if made.router == "prototype":
            set_prototypes(layer)
        return layer

    def _attach(self, base: nn.Module, config: MoeLoraConfig | None, options: dict) -> None:
        config = MoeLoraConfig.of(config, options)
        self.base_layer = base
        # The SiblingLink that runs this layer together with its siblings; see `link_siblings`.
        self.link = None
        self.merged = False
        self.merged_task: Task | None = None
        self.register_buffer("merged_weight", None, persistent=False)
        self._add_experts(base, config, base.in_features, base.out_features)
        base.requires_grad_(False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw A again and set B to zero; the router keeps its values.

        With init="svd_segments" A and B come from the base's weight, which is reduced in exchange.

        Raises:
            RuntimeError: init="svd_segments" has reduced the base already.
        """
        super().reset_parameters()
        if self.config.init == "svd_segments":
            self.base_layer = start_from_svd(self.base_layer, self.config, self.lora_A, self.lora_B)

    @torch.no_grad()
    def merge(self, task: Task | None = None) -> None:
        """Add the experts of one task to the weight, until `unmerge`; forward is then one linear.

            y = x (W + delta W)t + b        delta W = sum_e scale_e gate_e B_e A_e

        The gate is that of evaluation (no noise, no dropout). The sum is made in float64 and
        rounded once. Base and adapters stay as they are, and so does the state dict; a merged layer
        holds a second weight beside the base's. It serves what it was merged with: gates, or tasks
        set to others, raise ValueError, and so does a forward that trains (RuntimeError).

        Args:
            task: with router="task" the id, 1 to num_tasks; with router="external" the gate, floats
                [E]; nothing with router=None.

        Raises:
            ValueError: the gate depends on x (one per token or sequence); the task is missing or
                out of range; the base is no plain nn.Linear with a dense float weight; the sum is
                not finite.
            RuntimeError: the layer is merged already.
        """
        if self.merged:
            raise RuntimeError(f"{merged_with(self)} already; unmerge() first")
        self._check_linear()
        self.merged_weight = merged_weight(self, task)
        self._set_merged(True, held_task(task))

    def unmerge(self) -> None:
        """Take the merged task out again, exactly: the base was never changed.

        Raises RuntimeError where nothing is merged.
        """
        if not self.merged:
            raise RuntimeError("the layer is not merged")
        self.merged_weight = None
        self._set_merged(False, None)

    def _set_merged(self, merged: bool, task: Task | None) -> None:
        self.merged, self.merged_task = merged, task
        if self.link is not None:
            self.link.forget()

    def linear_problem(self) -> str | None:
        """Return why the layer is not a sum of linear experts; None if it is one."""
        if type(self).forward is MoeLoraLinear.forward:
            return None
        return super().linear_problem()

    def _check_linear(self) -> None:
        if self.linear_problem():
            raise ValueError(
                f"layer: {type(self).__name__} overrides forward, so no single weight or LoRA "
                "equals it"
            )

    @torch.no_grad()
    def export_lora(self, task: Task | None = None) -> tuple[Tensor, Tensor]:
        """The experts of one task as a plain LoRA over the base: y = x Wt + b + (x At) Bt.

        Returns A [R, I] and B [O, R] in the dtype of the adapter, scale and gate in B, so that the
        scaling is 1 and only B is rounded. With share="A" they are [r, I] and [O, r]. An expert
        that the task does not use keeps its place, as zeros.

        Arguments and errors as `merge`, but any base will do. init="svd_segments" raises
        ValueError: it has changed the base, and no other base has its LoRA.
        """
        if self.config.init == "svd_segments":
            raise ValueError(f"config: {REDUCED_BASE}; merge() adds them to the reduced one")
        self._check_linear()
        a, b = lora_of_task(self, task)
        return a.to(self.lora_A.dtype), b.to(self.lora_B.dtype)

    def _load_from_state_dict(self, *args) -> None:
        if self.merged:
            raise RuntimeError(f"{merged_with(self)}; unmerge() before other values are loaded")
        super()._load_from_state_dict(*args)

    @property
    def weight(self) -> Tensor:
        """The base's weight, with the merged task in it where there is one."""
        return self.merged_weight if self.merged else self.base_layer.weight

    def forward(self, x: Tensor, gates: Tensor | None = None) -> Tensor:
        """x [..., I] -> y [..., O]; gates ([T, E], [B, E] or [1, E]) only for router="external"."""
        # A compiled graph has no version counter that tells whether x was changed between calls.
        if self.link is not None and not torch.compiler.is_compiling():
            return self.link.forward(self, x, gates)
        return forward_siblings((self,), x, gates)[0]

    def extra_repr(self) -> str:
        """Return the sizes, the options that matter most, and the merged task."""
        merged = f", merged_task={self.merged_task!r}" if self.merged else ""
        return super().extra_repr() + merged
