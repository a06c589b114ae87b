"""A linear under the adapters of a PeftModel, and one of these adapters."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from moelora_kernels.config import MoeLoraConfig
from moelora_kernels.nn.base_linear import adapter_device_dtype, float_weight
from moelora_kernels.nn.forward import forward_siblings
from moelora_kernels.nn.layer import LoraLayer
from moelora_kernels.nn.merge import Task, delta_weight, why_no_task_gate
from moelora_kernels.nn.routers import TaskRouter


class MoeLoraExperts(LoraLayer):
    """One adapter of a tuner layer: the A, B, router and record of a MoeLoraLinear.

    Its base is what the tuner layer puts below it: the frozen linear, or the adapter that is active
    before it, so that several add up. The base and the router are no children of this module: the
    tuner layer holds them, and the task gate of an adapter is held by its first layer alone, so
    that each tensor has one name in a state dict.
    """

    def __init__(
        self, layer: MoeLoraTunerLinear, name: str, config: MoeLoraConfig, router: TaskRouter | None
    ) -> None:
        super().__init__()
        # Past nn.Module, which would make a child of it.
        object.__setattr__(self, "tuner_layer", layer)
        self.name = name
        self._add_experts(layer.base_layer, config, layer.in_features, layer.out_features)
        if router is not None:
            self._set_router(router)

    def _set_router(self, router: nn.Module | None) -> None:
        # The tuner layer holds the router. nn.Module.__setattr__ would make it a child of this
        # module too.
        object.__setattr__(self, "router", router)

    def forward(self, x: Tensor, gates: Tensor | None = None) -> Tensor:
        """x [..., I] -> y [..., O]; gates as in MoeLoraLinear."""
        return forward_siblings((self,), x, gates)[0]

    @property
    def base_layer(self) -> nn.Module:
        """The module whose output the experts add to."""
        return self.tuner_layer.below(self.name)

    @property
    def is_selected(self) -> bool:
        """Whether this adapter is one of the active ones, and not part of a merged weight."""
        return self.name in self.tuner_layer.active_adapters and not self.tuner_layer.merged

    @property
    def is_running(self) -> bool:
        """Whether the coming forwards use this adapter."""
        return self.name in self.tuner_layer.running()

    def task(self) -> Task | None:
        """The one task, or the one gate, that `set_tasks` has set; None where the gate needs none.

        Raises RuntimeError where none is set, or several.
        """
        if self.config.router is None:
            return None
        external = self.config.router == "external"
        rows = self.external_gates if external else self.router.task_ids
        if rows is None:
            raise RuntimeError("the gate has no task to merge: call set_tasks(model, [task]) first")
        if not (rows == rows[:1]).all():
            raise RuntimeError(
                "a weight holds one task, and the samples of the last set_tasks differ: call "
                "set_tasks(model, [task]) first"
            )
        return rows[0] if external else rows[0].tolist()


class MoeLoraTunerLinear(nn.Module, BaseTunerLayer):
    """A linear under the adapters of a PeftModel: y = base(x) + the sum of the active ones."""

    adapter_layer_names = ("moelora_experts",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.moelora_experts = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        # The base's weight before a merge: subtracting the delta again would not give its bits.
        self.register_buffer("unmerged_weight", None, persistent=False)
        self.train(base_layer.training)

    def update_layer(
        self, adapter_name: str, config: MoeLoraConfig, router: TaskRouter | None = None
    ) -> None:
        """Add an adapter, with a task gate that layers share if there is one."""
        experts = MoeLoraExperts(self, adapter_name, config, router)
        # Injected a second time under its name: what its last router left here is not saved again.
        kept = set() if router is None else set(router.modules())
        for held in (self._modules[key] for key in self.adapter_layer_names[1:]):
            if adapter_name in held and held[adapter_name] not in kept:
                del held[adapter_name]
        self.moelora_experts[adapter_name] = experts
        if experts.router is not None and router is None:
            self._hold_router(adapter_name, experts.router)
        self.train(self.training)

    def _hold_router(self, adapter_name: str, router: nn.Module) -> None:
        """Make children of the parts of a router that have tensors, by path and adapter.

        PEFT tells adapters apart by keys of the form path.adapter.tensor, one level deep.
        """
        for path, part in router.named_modules():
            own = ["." not in key for key in part.state_dict()]
            if not any(own):
                continue
            if not all(own):
                raise TypeError(
                    f"router: {type(part)} has tensors of its own and in its parts; PEFT has no "
                    "names for both"
                )
            key = "_".join(["moelora_router", *path.split(".")]).rstrip("_")
            if key not in self._modules:
                self.add_module(key, nn.ModuleDict())
                self.adapter_layer_names = (*self.adapter_layer_names, key)
            self._modules[key][adapter_name] = part

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make adapters the active ones; those train, but for what their `freeze` names."""
        super().set_adapter(adapter_names, inference_mode)
        self._keep_frozen()

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        """Make adapters train or not, but for what their `freeze` names."""
        super().set_requires_grad(adapter_names, requires_grad)
        self._keep_frozen()

    def _keep_frozen(self) -> None:
        for experts in self.moelora_experts.values():
            if experts.config.freeze != "none":
                experts.lora_A.requires_grad_(False)
            if experts.config.freeze == "AB":
                experts.lora_B.requires_grad_(False)

    def running(self) -> list[str]:
        """The adapters that a forward adds to the base, in their order."""
        if self.disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if name in self.moelora_experts]

    def below(self, adapter_name: str) -> nn.Module:
        """What an adapter adds to: the one that runs before it, else the base."""
        running = self.running()
        place = running.index(adapter_name) if adapter_name in running else 0
        return self.moelora_experts[running[place - 1]] if place else self.base_layer

    def forward(self, x: Tensor) -> Tensor:
        """x [..., I] -> y [..., O]."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        running = self.running()
        return self.moelora_experts[running[-1]](x) if running else self.base_layer(x)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """What an adapter adds to the base's weight for the task that is set, [O, I] in float64.

        Raises RuntimeError where the gate depends on x, or no task or several are set.
        """
        experts = self._mergeable(adapter_name)
        return delta_weight(experts, experts.task())

    def check_merge(self, adapter_names: Sequence[str] | None = None) -> None:
        """Raise RuntimeError where `merge` would, with nothing computed."""
        for name in self.active_adapters if adapter_names is None else adapter_names:
            if name in self.moelora_experts and name not in self.merged_adapters:
                self._dense_base_weight()
                self._mergeable(name).task()

    def _mergeable(self, adapter_name: str) -> MoeLoraExperts:
        experts = self.moelora_experts[adapter_name]
        if reason := why_no_task_gate(experts):
            raise RuntimeError(f"adapter {adapter_name!r} cannot be merged: {reason}")
        return experts

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base's weight, for the task that `set_tasks` has set.

        Args:
            safe_merge: raise ValueError, with nothing changed, if the result is not finite.
            adapter_names: the adapters; None is the active ones.

        Raises RuntimeError as `get_delta_weight`, or if the base's weight is not a dense float.
        """
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self.moelora_experts]
        if not names:
            return
        weight = self._dense_base_weight()
        delta = torch.stack([self.get_delta_weight(name) for name in names]).sum(dim=0)
        merged = (weight.double() + delta.to(weight.device)).to(weight.dtype)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"safe_merge: adapters {names} make weights that are not finite")
        if not self.merged:
            self.unmerged_weight = weight.clone()
        weight.copy_(merged)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Give the base back the weight it had before `merge`, bit by bit."""
        if not self.merged:
            warnings.warn("Already unmerged, nothing to do.", stacklevel=2)
            return
        self._dense_base_weight().copy_(self.unmerged_weight)
        self.unmerged_weight = None
        self.merged_adapters.clear()

    def _dense_base_weight(self) -> Tensor:
        """The base's weight [O, I], to be changed in place."""
        weight = float_weight(self.base_layer)
        if type(weight) not in (nn.Parameter, Tensor):
            raise RuntimeError(
                "adapters can be merged into a dense float weight only, this base is a "
                f"{type(self.base_layer)}"
            )
        return weight.data

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # PEFT asks every layer once a file is loaded, those without this adapter as well.
        parts = {
            key: self._modules[key][adapter_name]
            for key in self.adapter_layer_names
            if adapter_name in self._modules[key]
        }
        tensors = [(f"{key}.{n}", t) for key, p in parts.items() for n, t in p.state_dict().items()]
        if missing := [name for name, tensor in tensors if tensor.is_meta]:
            # A product with a tensor that has no memory is noise, not an error.
            raise RuntimeError(
                f"adapter {adapter_name!r}: the file has no values for {', '.join(missing)} of a "
                f"linear {self.in_features} to {self.out_features}, made with low_cpu_mem_usage"
            )
        # The dtype stays: PEFT's would round an adapter that was loaded in float32.
        for part in parts.values():
            config = self.moelora_experts[adapter_name].config
            part.to(device or adapter_device_dtype(self.base_layer, config)[0])
