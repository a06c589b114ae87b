"""MoeLoraLinear: a frozen linear plus a gated mixture of LoRA experts."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moelora_kernels.config import MoeLoraConfig
from moelora_kernels.nn.base_linear import conv1d_remedy, given_input, missing_size
from moelora_kernels.nn.forward import forward_siblings
from moelora_kernels.nn.initialization import start_from_svd
from moelora_kernels.nn.layer import LoraLayer
from moelora_kernels.nn.layer_tensors import tensor_value
from moelora_kernels.nn.merge import (
    REDUCED_BASE,
    Task,
    check_merged_task,
    copy_task,
    lora_of_task,
    merged_weight,
    merged_with,
)
from moelora_kernels.nn.pretrained_loras import set_prototypes, stack_loras
from moelora_kernels.nn.weight_readers import note_read
from moelora_kernels.types import ExternalGates


class MoeLoraLinear(LoraLayer):
    """Replace an nn.Linear by the frozen linear plus a gated mixture of LoRA experts.

        logits = router(x)
        gate = normalize(select(score(logits / temperature)))
        u = scale * gate (.) (dropout(x) At)
        y = x Wt + b + u Bt

    Parameters, all expert-major:
        lora_A: [R, I]; [r, I] with share="A".
        lora_B: [O, R], zero at the start, so that a new layer returns the base's output (except
            with init="svd_segments").
    Children:
        base_layer: the frozen base. If it is a plain dense nn.Linear in x's dtype, the layer reads
            its weight, and one op computes the base and the experts. Any other module with
            in_features and out_features (quantised, hooked, cast by autocast) is called once per
            forward.
        router: the module that computes the logits; absent if the gate needs none.

    An expert that a token does not select adds exactly zero to the token's y, as long as A and B
    are finite. impl="wide" multiplies all experts, so a NaN in an expert's B reaches the y of every
    token, and a NaN in its A reaches the dx of every token. With impl="grouped" the NaN reaches
    only the tokens that select the expert.

    Args:
        in_features: I.
        out_features: O.
        bias, device, dtype: of the base, as in nn.Linear.
        config: a MoeLoraConfig; None means the defaults.
        **options: fields of MoeLoraConfig; they replace the fields of `config`.

    Raises:
        ValueError, TypeError: an option is not valid.

    Example:
        >>> import torch
        >>> from moelora_kernels import MoeLoraLinear
        >>> layer = MoeLoraLinear(16, 32, num_experts=4, rank=2, top_k=2)
        >>> layer(torch.randn(3, 5, 16)).shape
        torch.Size([3, 5, 32])
        >>> layer.lora_A.shape, layer.lora_B.shape
        (torch.Size([8, 16]), torch.Size([32, 8]))

    Source: arXiv 2310.18339 (MOELoRA), arXiv 2404.09027 (MING-MOE); the presets name others.
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
        """Put experts over an existing linear. The layer keeps the linear and freezes it.

        Args:
            linear: any module with in_features and out_features.
            config: a MoeLoraConfig; None means the defaults.
            **options: fields of MoeLoraConfig; they replace the fields of `config`.

        Raises:
            TypeError: `linear` has no in_features or no out_features.

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from moelora_kernels import MoeLoraLinear
            >>> layer = MoeLoraLinear.from_linear(nn.Linear(16, 32), num_experts=4, rank=2)
            >>> layer(torch.randn(3, 16)).shape
            torch.Size([3, 32])
        """
        if missing := missing_size(linear):
            raise TypeError(
                f"linear: expected a module with {missing}, got {type(linear)}"
                f"{conv1d_remedy(linear)}"
            )
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
        """Put existing LoRAs over a linear, as its experts.

        Args:
            linear: as in `from_linear`.
            loras: for each expert A_e [r_e, I], B_e [O, r_e] and alpha_e. Ranks and alphas may
                differ.
            config: a MoeLoraConfig with scaling "alpha/r" or "alpha/sqrt(r)". Its num_experts, rank
                and scaling are replaced by those of `loras`.
            **options: fields of MoeLoraConfig; they replace the fields of `config`.

        If the router is "prototype", its prototypes are computed from the LoRAs.

        Raises:
            ValueError: `loras` is empty, a LoRA has another shape, or the config has another
                scaling, share="A", a shared expert or init="svd_segments".

        Example:
            >>> import torch
            >>> from torch import nn
            >>> from moelora_kernels import MoeLoraConfig, MoeLoraLinear
            >>> loras = [(torch.randn(2, 16), torch.randn(32, 2), 4.0) for _ in range(3)]
            >>> config = MoeLoraConfig.preset("arrow", top_k=2)
            >>> MoeLoraLinear.from_loras(nn.Linear(16, 32), loras, config).lora_A.shape
            torch.Size([6, 16])
        """
        config = MoeLoraConfig.of(config, options)
        config, lora_a, lora_b = stack_loras(linear, loras, config)
        layer = cls.from_linear(linear, config)
        with torch.no_grad():
            layer.lora_A.copy_(lora_a)
            layer.lora_B.copy_(lora_b)
        if config.router == "prototype":
            set_prototypes(layer)
        return layer

    def _attach(self, base: nn.Module, config: MoeLoraConfig | None, options: dict) -> None:
        """Make this the layer over `base`: freeze the base, and add experts, router and record."""
        config = MoeLoraConfig.of(config, options)
        self.base_layer = base
        self.merged_task: Task | None = None
        self.register_buffer("merged_weight", None, persistent=False)
        self._add_experts(base, config, base.in_features, base.out_features)
        base.requires_grad_(False)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw A again and set B to zero; the router keeps its values.

        With init="svd_segments" A and B are computed from the base's weight, which is then reduced.

        Raises:
            RuntimeError: init="svd_segments" has reduced the base already.
        """
        super().reset_parameters()
        if self.config.init == "svd_segments":
            self.base_layer = start_from_svd(self.base_layer, self.config, self.lora_A, self.lora_B)

    @torch.no_grad()
    def merge(self, task: Task | None = None) -> None:
        """Add the experts of one task to the weight, until `unmerge`. Forward is then one linear.

            y = x (W + delta W)t + b        delta W = sum_e scale_e gate_e B_e A_e

        The gate is the one of evaluation, without noise and dropout. The sum is computed in float64
        and rounded once. The base, the adapters and the state dict do not change: a merged layer
        has a second weight. A merged layer computes only the merged task. It raises ValueError for
        gates or other tasks, and RuntimeError for a forward that trains.

        Args:
            task: with router="task" the task id, 1 to num_tasks; with router="external" the gate,
                floats [E]; None with router=None.

        Raises:
            ValueError: each token or sequence has its own gate; the task is missing or out of
                range; the base is not a plain nn.Linear with a dense float weight; the sum is not
                finite.
            RuntimeError: the layer is already merged.

        Example:
            >>> import torch
            >>> from moelora_kernels import MoeLoraLinear
            >>> layer = MoeLoraLinear(16, 32, num_experts=4, rank=2, router="task", num_tasks=3)
            >>> layer.merge(task=2)
            >>> layer.eval()(torch.randn(3, 16)).shape
            torch.Size([3, 32])
            >>> layer.unmerge()
        """
        if self.merged:
            raise RuntimeError(f"{merged_with(self)} already; unmerge() first")
        self._check_linear()
        self.merged_weight = merged_weight(self, task)
        self._set_merged(True, copy_task(task))

    def unmerge(self) -> None:
        """Drop the merged weight. The base was never changed, so its weight has the same bits.

        Raises:
            RuntimeError: the layer is not merged.
        """
        if not self.merged:
            raise RuntimeError("the layer is not merged")
        self.merged_weight = None
        self._set_merged(False, None)

    def merged_problem(self) -> str | None:
        """Return why the experts cannot change because they are merged; None if they can."""
        return f"{merged_with(self)}, unmerge first" if self.merged else None

    def check_merged_task(self, tasks: Tensor) -> None:
        """Raise ValueError if the layer is merged with another task than `tasks`."""
        if self.merged:
            check_merged_task(self, tasks)

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
        """Return the experts of one task as a plain LoRA over the base: y = x Wt + b + (x At) Bt.

        B contains the scale and the gate, so the LoRA's scaling is 1. An expert that the task does
        not use stays in A and B as zeros.

        Args:
            task: as in `merge`.

        Returns:
            A [R, I] and B [O, R] in the dtype of the adapter; [r, I] and [O, r] with share="A".

        Raises:
            ValueError: the gate depends on x; the task is missing or out of range; or
                init="svd_segments", because the LoRA would fit only the reduced base.

        The base can be of any kind.

        Example:
            >>> from moelora_kernels import MoeLoraLinear
            >>> layer = MoeLoraLinear(16, 32, num_experts=4, rank=2, router="task", num_tasks=3)
            >>> a, b = layer.export_lora(task=2)
            >>> a.shape, b.shape
            (torch.Size([8, 16]), torch.Size([32, 8]))
        """
        if self.config.init == "svd_segments":
            raise ValueError(f"config: {REDUCED_BASE}; merge() adds them to the reduced one")
        self._check_linear()
        a, b = lora_of_task(self, task)
        return a.to(tensor_value(self, "lora_A").dtype), b.to(tensor_value(self, "lora_B").dtype)

    def _load_from_state_dict(self, *args) -> None:
        if self.merged:
            raise RuntimeError(f"{merged_with(self)}; unmerge() before other values are loaded")
        super()._load_from_state_dict(*args)

    @property
    def weight(self) -> Tensor:
        """The base's weight [O, I], or the merged weight of a merged layer."""
        note_read(self)
        return self.merged_weight if self.merged else self.base_layer.weight

    def forward(
        self,
        x: Tensor | None = None,
        gates: ExternalGates | None = None,
        *,
        input: Tensor | None = None,
    ) -> Tensor:
        """Return y [..., O] for x [..., I]. `input` is another name of x, as in nn.Linear.

        gates: only for router="external"; [..., E], [B, E] or [1, E], or weights and indices
        [..., K], [B, K] or [1, K]; see `set_tasks`. None means the gates that `set_tasks` set.

        Raises:
            ValueError, TypeError: x, gates or tasks do not fit the layer.
            RuntimeError: router="task" and `set_tasks` has not set the tasks.
        """
        if x is None or input is not None:
            x = given_input(x, input)
        if self.link is not None:
            return self.link.forward(self, x, gates)
        return forward_siblings((self,), x, gates)[0]

    def extra_repr(self) -> str:
        """Return the sizes, the options that matter most, and the merged task."""
        merged = f", merged_task={self.merged_task!r}" if self.merged else ""
        return super().extra_repr() + merged


def forget_outputs(modules: Iterable[nn.Module]) -> None:
    """Drop the outputs that linked siblings in `modules` keep for one another."""
    for layer in modules:
        if isinstance(layer, LoraLayer) and layer.link is not None:
            layer.link.forget()
