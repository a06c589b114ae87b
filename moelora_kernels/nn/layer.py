"""The base classes of the layers: MixtureLayer, and LoraLayer for experts over one base module.

MixtureLayer                config, router, gate, routing record
MoeLoraFFN              A and B for each of the three linears of an MLP
LoraLayer               one A and one B over one base module
MoeLoraLinear       also merges, exports and links
MoeLoraAdapter      an activation between A and the gate
peft.MoeLoraExperts one adapter of a PeftModel
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from moelora_kernels.config import MoeLoraConfig
from moelora_kernels.nn.base_linear import (
    adapter_device_dtype,
    dense_weight,
    float_weight,
    member,
    state_without_graph,
)
from moelora_kernels.nn.batch_rows import check_rows
from moelora_kernels.nn.gates import gate_from
from moelora_kernels.nn.initialization import draw_a
from moelora_kernels.nn.recorded_forwards import follow_forwards
from moelora_kernels.nn.router_warnings import warn_if_untrained
from moelora_kernels.nn.routers import TaskVectors, build_router, layer_logits, task_routers
from moelora_kernels.nn.routing_record import RoutingRecord
from moelora_kernels.nn.samples import Samples
from moelora_kernels.nn.token_order import TokenOrder
from moelora_kernels.nn.weight_readers import note_read
from moelora_kernels.types import ExternalGates, Gate, Mixture

# The weight and the bias of a linear.
WeightBias = tuple[Tensor, Tensor | None]

# The options that the parameters and the router of a layer were built for.
BUILT_OPTIONS = (
    "num_experts", "rank", "share", "shared_expert", "shared_rank", "rank_activation", "router",
    "router_bias", "router_hidden", "num_tasks", "task_embedding_dim", "task_gate", "granularity",
    "max_threshold", "balance_rate",
)  # fmt: skip


class MixtureLayer(nn.Module):
    """The base class of every layer with a mixture of LoRA experts.

    Attributes:
        config: the MoeLoraConfig of the layer.
        router: the module that returns logits [T, E]; None if the gate needs no router.
        record: the RoutingRecord of the last forward of the model. It is filled inside
            `record_routing`, and always if the config has auxiliary losses.
        external_gates, external_experts: the gates that `set_tasks` set for router="external", or
            None: [..., E] and None, or weights and indices [..., K].
        task_ids: the task ids that `set_tasks` set for router="task", or None.
        task_vectors: the task vectors that `set_tasks` set for a TokenTaskRouter, or None.
        has_inner_task_routers: whether the router is a user's module with a TokenTaskRouter inside.
        samples: which sample each token belongs to; see `set_samples`.
        token_order: a hint that x has its tokens in another order than the model, or None.
        checks_rows: whether calls are checked with `check_rows`.
        is_selected: whether `set_tasks`, trainers and `adapter_parameters` include the layer. Only
            an inactive adapter of a PeftModel is left out.
        is_running: whether the next forward of the model runs the layer. Only adapters of a
            PeftModel can be switched off.
        is_peft_adapter: whether the layer is an adapter of a PeftModel, which PEFT merges.
    """

    config: MoeLoraConfig
    router: nn.Module | None
    # The names of A and B.
    tensor_names: tuple[str, ...] = ()
    is_selected: bool = True
    is_running: bool = True
    is_peft_adapter: bool = False

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "config" and "config" in self.__dict__:
            self._check_config(value)
            for option in BUILT_OPTIONS:
                if getattr(value, option) != getattr(self.config, option):
                    raise ValueError(
                        f"config: a layer keeps the {option} it was built with, "
                        f"{getattr(self.config, option)!r}; build another layer for "
                        f"{getattr(value, option)!r}"
                    )
            if bool(value.aux) != bool(self.config.aux):
                raise ValueError(
                    "aux: a layer records its routing from its first forward on, or never; build "
                    "another layer to begin or end auxiliary losses"
                )
        super().__setattr__(name, value)
        if name == "config":
            self._derive_options()

    def _derive_options(self) -> None:
        """Compute the attributes that follow from `self.config`, which is new."""

    @classmethod
    def _check_config(cls, config: MoeLoraConfig) -> None:
        """Raise ValueError if an option of `config` is not supported by this kind of layer."""

    def _add_router(self, in_features: int, device: torch.device, dtype: torch.dtype) -> None:
        """Build the router of `self.config`, with an empty record and no external gates."""
        router = build_router(self.config, in_features, device, dtype)
        warn_if_untrained(self.config, router)
        self._set_router(router)
        # Searched once, and not in each forward.
        is_user_module = isinstance(self.config.router, nn.Module)
        self.has_inner_task_routers = is_user_module and bool(task_routers(router))
        self.record = RoutingRecord(always=bool(self.config.aux))
        self.external_gates: Tensor | None = None
        self.external_experts: Tensor | None = None
        self.task_ids: Tensor | None = None
        self.task_vectors: TaskVectors | None = None
        self.samples: Samples | str | None = None
        self.set_token_order(None)

    def set_token_order(self, order: TokenOrder | None) -> None:
        """Set how the tokens of x are ordered, as far as the source above the layer tells."""
        self.token_order = order
        self.checks_rows = order is not None or self.config.granularity == "sequence"

    def _set_router(self, router: nn.Module | None) -> None:
        self.router = router

    def router_logits(self, x: Tensor, tokens: Tensor) -> Tensor:
        """Return the router's logits [G, E] in float32; see `routers.layer_logits`."""
        return layer_logits(self, x, tokens)

    def current_task_ids(self) -> Tensor | None:
        """Return the task ids [B] or [B, J] of the coming forward; None without router="task"."""
        if self.config.router != "task":
            return None
        return self.task_ids if self.router.layers_have_ids else self.router.task_ids

    def make_gate(self, x: Tensor, tokens: Tensor, gates: ExternalGates | None = None) -> Gate:
        """Return the gate of this layer for one forward, without `rows`.

        Args:
            x: [..., I], the input of the layer.
            tokens: [T, I], x in the dtype the layer computes in.
            gates: external gates; None means the gates that `set_tasks` set.

        Returns:
            Gate with weights and experts [T, K] if each token selects K < E experts, [G, K] of
            sparse external gates; else weights [G, E]. E and K count a shared expert.
        """
        config = self.config
        logits, external = None, gates
        if config.router == "external":
            held, experts = self.external_gates, self.external_experts
            external = (held if experts is None else (held, experts)) if gates is None else gates
        elif config.router is not None:
            logits = self.router_logits(x, tokens)
        gate = gate_from(
            config, logits, external, router=self.router, training=self.training, device=x.device
        )
        if self.checks_rows:
            vectors = self.task_vectors
            check_rows(self, x, len(gate.weights if vectors is None else vectors.tensor))
        return gate

    def _check_direct(self) -> None:
        """Raise RuntimeError if A or B is not a Parameter, so that new values would be lost."""
        if computed := [name for name in self.tensor_names if name not in self._parameters]:
            raise RuntimeError(
                f"{', '.join(computed)}: parametrized, pruned or normed, so it cannot be reset; "
                "reset the layer before that"
            )

    def first_tensor(self) -> Tensor:
        """Return A, or a Parameter that it is computed from, for its dtype and device."""
        name = self.tensor_names[0]
        if is_parametrized(self, name):
            # Access to a parametrized tensor computes it, and may change a spectral norm.
            return next(self.parametrizations[name].parameters())
        return getattr(self, name)

    def linear_problem(self) -> str | None:
        """Return why the layer is not a sum of linear experts; None if it is one."""
        return f"the experts of a {type(self).__name__} are not linear"

    def input_like(self) -> tuple[int, torch.dtype]:
        """Return the width and the dtype of an x that the layer accepts."""
        raise NotImplementedError

    def __prepare_scriptable__(self) -> nn.Module:
        # torch.jit.script calls this method.
        raise RuntimeError(
            f"{type(self).__name__}: torch.jit.script is not supported; use torch.compile, or "
            "torch.export.export"
        )

    def __getstate__(self) -> dict:
        return state_without_graph(self, "external_gates")

    def _describe(self, **sizes: Any) -> str:
        """Return the text of `extra_repr`: the sizes, then the options that matter most."""
        config = self.config
        router = config.router
        options = {
            "num_experts": config.num_experts,
            "rank": config.rank,
            "router": type(router).__name__ if isinstance(router, nn.Module) else router,
            "select": config.select,
        }
        if config.top_k:
            options["top_k"] = config.top_k
        return ", ".join(f"{name}={value}" for name, value in (sizes | options).items())


class LoraLayer(MixtureLayer):
    """A layer with E experts B_e A_e over one base module, `base_layer`.

    Parameters: `lora_A` [R, I] ([r, I] with share="A") and `lora_B` [O, R], expert-major.

    Attributes:
        mixture: the static options that `run_layer` needs. Its router_top_k is 0, because the layer
            passes a gate.
        fused_mixture: the same with router_top_k = K, for a forward in which the op computes the
            logits and the gate; None if the op cannot compute a gate with these options. It is also
            set for a router that is not linear, or None: `fused_router` checks the router.
        link: the SiblingLink that runs the layer together with its siblings, or None; see
            `nn/sibling_link.py`.
        merged: whether the experts of one task are part of the base's weight. Only a MoeLoraLinear
            can be merged.
    """

    base_layer: nn.Module
    tensor_names = ("lora_A", "lora_B")

    @classmethod
    def _check_config(cls, config: MoeLoraConfig) -> None:
        if config.rank_activation is not None:
            raise ValueError(
                f"rank_activation: {config.rank_activation!r} needs a MoeLoraAdapter; the experts "
                "of a linear have no activation between A and B"
            )

    def _derive_options(self) -> None:
        config = self.config
        self.mixture = Mixture(
            config.ranks(),
            config.scales(self.in_features),
            share_a=config.share == "A",
            renormalize=config.renormalize(),
            temperature=config.temperature,
        )
        is_fusable = (
            config.granularity == "token"
            and config.is_topk_gate()
            and config.shared_expert == "none"
            and config.grad_gate == "gate"
        )
        top_k = config.top_k or config.num_experts
        self.fused_mixture = self.mixture._replace(router_top_k=top_k) if is_fusable else None

    def _add_experts(
        self, base: nn.Module, config: MoeLoraConfig, in_features: int, out_features: int
    ) -> None:
        """Create the parameters, the router and the record of E experts over `base`."""
        self._check_config(config)
        self.link: Any = None
        self.merged = False
        self.in_features, self.out_features = in_features, out_features
        self.config = config
        ranks = config.ranks()
        device, dtype = adapter_device_dtype(base, config)
        a_rows = ranks[0] if config.share == "A" else sum(ranks)
        self.lora_A = nn.Parameter(torch.empty(a_rows, in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(
            torch.empty(out_features, sum(ranks), device=device, dtype=dtype)
        )
        self.lora_A.requires_grad_(config.freeze == "none")
        self.lora_B.requires_grad_(config.freeze != "AB")
        self._add_router(in_features, device, dtype)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw A again and set B to zero; the router keeps its values."""
        self._check_direct()
        draw_a(self.lora_A, self.config)
        self.lora_B.zero_()

    @property
    def weight(self) -> Tensor:
        """The base's weight [O, I]."""
        note_read(self)
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        """The base's bias [O], or None."""
        return self.base_layer.bias

    def parts(self) -> list[nn.Module | None]:
        """Return the modules that a forward of the layer reads."""
        return [*self._modules.values()]

    def can_run_for_sibling(self) -> bool:
        """Return whether a call of a sibling may run this layer too, without calling it.

        Hooks before a call (offloading, FSDP, ZeRO-3) load the tensors of one layer.
        """
        return not self._forward_pre_hooks and "forward" not in self.__dict__

    def has_hooks_after_call(self) -> bool:
        """Return whether hooks read or change what a call of the layer returns."""
        return bool(self._forward_hooks)

    def merged_problem(self) -> str | None:
        """Return why the experts cannot change because they are merged; None if they can."""
        return None

    def check_merged_task(self, tasks: Tensor) -> None:
        """Raise ValueError if the layer is merged and `set_tasks` cannot set `tasks`."""

    def fused_router(self) -> WeightBias | None:
        """Return weight and bias of a router whose logits the op computes in the next forward.

        None if the op cannot: it can if the gate is a top-k gate per token, the router is a plain
        dense nn.Linear, and no noise is added to the logits.
        """
        if self.fused_mixture is None or (self.training and self.config.noise > 0):
            return None
        router = member(self, "router")
        weight = dense_weight(router)
        return None if weight is None else (weight, member(router, "bias"))

    def input_like(self) -> tuple[int, torch.dtype]:
        """Return the width and the dtype of an x that the layer accepts."""
        weight = float_weight(self.base_layer)
        return self.in_features, (self.lora_A if weight is None else weight).dtype

    def extra_repr(self) -> str:
        """Return the sizes and the options that matter most."""
        return self._describe(in_features=self.in_features, out_features=self.out_features)


def mixture_layers(model: nn.Module) -> list[MixtureLayer]:
    """Return every mixture layer of `model`, each once, inactive adapters of PEFT included."""
    return [module for module in model.modules() if isinstance(module, MixtureLayer)]


def selected_layers(model: nn.Module) -> list[MixtureLayer]:
    """Return the mixture layers of `model` without inactive adapters of PEFT."""
    return [layer for layer in mixture_layers(model) if layer.is_selected]


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the A, B and router parameters of all layers of `model`, each once.

    In a PeftModel these are the parameters of the active adapters. If a tensor is parametrized
    (`torch.nn.utils.parametrize`), they are the Parameters that it is computed from.

    If a layer of `model` has auxiliary losses, the model gets the hooks of `follow_forwards`, so
    that `collect_aux_loss` knows its forwards.

    Example:
        >>> from moelora_kernels import MoeLoraLinear, adapter_parameters
        >>> layer = MoeLoraLinear(8, 6, num_experts=2, rank=2)
        >>> [tuple(p.shape) for p in adapter_parameters(layer)]
        [(4, 8), (6, 4), (2, 8)]
    """
    follow_forwards(model)
    parameters: dict[int, nn.Parameter] = {}
    for layer in mixture_layers(model):
        if layer.is_selected:
            layer_parameters = list(layer.parameters(recurse=False))
            if is_parametrized(layer):
                layer_parameters += layer.parametrizations.parameters()
            if layer.router is not None:
                layer_parameters += layer.router.parameters()
            parameters.update((id(p), p) for p in layer_parameters)
    return list(parameters.values())
