"""The layer that PEFT puts around a linear, and one adapter in it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from moelora_kernels.config import MoeLoraConfig
from moelora_kernels.nn.base_linear import adapter_device_dtype, float_weight, given_input
from moelora_kernels.nn.external_gates import dense_rows
from moelora_kernels.nn.forward import forward_siblings
from moelora_kernels.nn.layer import LoraLayer
from moelora_kernels.nn.linear import forget_outputs
from moelora_kernels.nn.merge import Task, delta_weight, task_gate_problem
from moelora_kernels.nn.routers import TaskRouter
from moelora_kernels.nn.sharding import HiddenFromFsdp1
from moelora_kernels.nn.weight_readers import note_read


class MoeLoraExperts(LoraLayer):
    """One adapter of a `MoeLoraTunerLinear`: A, B, the router and the routing record.

    Its base is the frozen linear. If several adapters are active, its base is the adapter before
    it, so the outputs of all active adapters are added. The base and the router are not children of
    this module, but of the tuner layer. Only the first layer of an adapter has the shared task gate
    as a child. So each tensor has one name in the state dict.
    """

    is_peft_adapter = True

    def __init__(
        self, layer: MoeLoraTunerLinear, name: str, config: MoeLoraConfig, router: TaskRouter | None
    ) -> None:
        super().__init__()
        # nn.Module.__setattr__ would make the tuner layer a child of this module.
        object.__setattr__(self, "tuner_layer", layer)
        self.name = name
        self._add_experts(layer.base_layer, config, layer.in_features, layer.out_features)
        if router is not None:
            self._set_router(router)

    def _set_router(self, router: nn.Module | None) -> None:
        # The router is a child of the tuner layer. nn.Module.__setattr__ would make it a child of
        # this module too.
        object.__setattr__(self, "router", router)

    def forward(self, x: Tensor, gates: Tensor | None = None) -> Tensor:
        """x [..., I] -> y [..., O]; gates as in MoeLoraLinear."""
        if self.link is not None and self._runs_alone():
            return self.link.forward(self, x, gates)
        return forward_siblings((self,), x, gates)[0]

    def _runs_alone(self) -> bool:
        """Return whether no other adapter of the layer runs, so that the base is the linear."""
        return self.tuner_layer.running() == [self.name]

    def can_run_for_sibling(self) -> bool:
        """Return whether a call of a sibling may run this adapter too, without calling it."""
        layer = self.tuner_layer
        has_hooks = layer._forward_pre_hooks or "forward" in layer.__dict__
        return not has_hooks and super().can_run_for_sibling() and self._runs_alone()

    def has_hooks_after_call(self) -> bool:
        """Return whether hooks read or change what a call of the adapter or its linear returns."""
        return bool(self.tuner_layer._forward_hooks) or super().has_hooks_after_call()

    def parts(self) -> list[nn.Module | None]:
        """Return the modules that a forward reads if no other adapter runs."""
        return [self.tuner_layer._modules["base_layer"], self.router, *self._modules.values()]

    @property
    def base_layer(self) -> nn.Module:
        """The module whose output the experts add to."""
        return self.tuner_layer.below(self.name)

    @property
    def is_selected(self) -> bool:
        """Whether this adapter is one of the active ones, and not part of the merged weight."""
        layer = self.tuner_layer
        return self.name in layer.active_adapters and self.name not in layer.merged_adapters

    @property
    def is_running(self) -> bool:
        """Whether the coming forwards use this adapter."""
        return self.name in self.tuner_layer.running()

    def merged_problem(self) -> str | None:
        """Return why the experts cannot change because they are merged; None if they can."""
        if self.name not in self.tuner_layer.merged_adapters:
            return None
        return f"adapter {self.name!r} is merged; call peft_model.unmerge_adapter() first"

    def check_merged_task(self, tasks: Tensor) -> None:
        """Raise ValueError if the adapter is merged and takes tasks of this kind."""
        kind = "external" if tasks.is_floating_point() else "task"
        if self.config.router == kind and (problem := self.merged_problem()):
            raise ValueError(f"tasks: {problem}")

    def task(self) -> Task | None:
        """Return the task or the gate that `set_tasks` has set; None if the adapter has no gate.

        Raises RuntimeError if no task is set, or if the samples have different tasks.
        """
        if self.config.router is None:
            return None
        external = self.config.router == "external"
        rows = self.external_gates if external else self.current_task_ids()
        if external and self.external_experts is not None:
            rows = dense_rows(rows, self.external_experts, self.config.num_experts)
        if rows is None:
            raise RuntimeError("no task is set: call set_tasks(model, [task]) before a merge")
        if not (rows == rows[:1]).all():
            raise RuntimeError(
                "a merge needs one task, but the last set_tasks got different ones: call "
                "set_tasks(model, [task]) first"
            )
        return rows[0] if external else rows[0].tolist()


class RouterParts(HiddenFromFsdp1, nn.ModuleDict):
    """The parts of a router by adapter."""


class MoeLoraTunerLinear(nn.Module, BaseTunerLayer):
    """A linear with adapters: y = base(x) + the sum of the active adapters' outputs."""

    adapter_layer_names = ("moelora_experts",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.moelora_experts = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        # The base weight before a merge: subtracting the delta would not restore its bits.
        self.register_buffer("unmerged_weight", None, persistent=False)
        self.train(base_layer.training)

    @property
    def weight(self) -> Tensor:
        """The base's weight [O, I]."""
        for experts in self.moelora_experts.values():
            note_read(experts)
        # PEFT's property. `super().weight` would break a compiled graph.
        return BaseTunerLayer.weight.fget(self)

    def update_layer(
        self, adapter_name: str, config: MoeLoraConfig, router: TaskRouter | None = None
    ) -> None:
        """Add an adapter. `router` is the task gate that it shares with earlier layers, or None."""
        experts = MoeLoraExperts(self, adapter_name, config, router)
        # If the adapter is added again under its name, remove the parts of its previous router.
        current_parts = set() if router is None else set(router.modules())
        for parts in (self._modules[key] for key in self.adapter_layer_names[1:]):
            if adapter_name in parts and parts[adapter_name] not in current_parts:
                del parts[adapter_name]
        self.moelora_experts[adapter_name] = experts
        if experts.router is not None and router is None:
            self._hold_router(adapter_name, experts.router)
        self.train(self.training)

    def _hold_router(self, adapter_name: str, router: nn.Module) -> None:
        """Add the parts of a router that have tensors as children, by path and adapter.

        PEFT recognises the tensors of an adapter by keys of the form path.adapter.tensor, with one
        level after the adapter's name.
        """
        for path, part in router.named_modules():
            is_direct = ["." not in key for key in part.state_dict()]
            if not any(is_direct):
                continue
            if not all(is_direct):
                raise TypeError(
                    f"router: {type(part)} has tensors in itself and in its child modules; PEFT "
                    "has no names for both"
                )
            key = "_".join(["moelora_router", *path.split(".")]).rstrip("_")
            if key not in self._modules:
                self.add_module(key, RouterParts())
                self.adapter_layer_names = (*self.adapter_layer_names, key)
            self._modules[key][adapter_name] = part

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate adapters. They train, except for the tensors that their `freeze` names."""
        super().set_adapter(adapter_names, inference_mode)
        self._keep_frozen()

    def set_requires_grad(
        self, adapter_names: str | Sequence[str], requires_grad: bool = True
    ) -> None:
        """Set whether adapters train. The tensors that their `freeze` names never train."""
        super().set_requires_grad(adapter_names, requires_grad)
        self._keep_frozen()

    def _keep_frozen(self) -> None:
        for experts in self.moelora_experts.values():
            if experts.config.freeze != "none":
                experts.lora_A.requires_grad_(False)
            if experts.config.freeze == "AB":
                experts.lora_B.requires_grad_(False)

    def running(self) -> list[str]:
        """Return the names of the adapters that a forward uses, in their order."""
        if self.disable_adapters:
            return []
        # A difference of sets would break a compiled graph.
        return [
            name
            for name in self.active_adapters
            if name in self.moelora_experts and name not in self.merged_adapters
        ]

    def below(self, adapter_name: str) -> nn.Module:
        """Return the module whose output an adapter adds to: the adapter before it, or the base."""
        running = self.running()
        index = running.index(adapter_name) if adapter_name in running else 0
        return self.moelora_experts[running[index - 1]] if index else self.base_layer

    def forward(self, x: Tensor | None = None, *, input: Tensor | None = None) -> Tensor:
        """x [..., I] -> y [..., O]; `input` is another name of x, as in nn.Linear."""
        if x is None or input is not None:
            x = given_input(x, input)
        if self.disable_adapters and self.merged:
            self.unmerge()
        running = self.running()
        if running:
            return self.moelora_experts[running[-1]](x)
        if self.merged and self.training and torch.is_grad_enabled():
            self._warn_that_merged_adapters_do_not_train()
        return self.base_layer(x)

    def _warn_that_merged_adapters_do_not_train(self) -> None:
        if not torch.compiler.is_compiling():
            warnings.warn(
                f"adapters {self.merged_adapters} are merged, so this forward does not train them; "
                "call peft_model.unmerge_adapter() before training, or peft_model.eval()",
                stacklevel=2,
            )

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args) -> None:
        # The base weight contains the merged adapters.
        if self.merged:
            merged = [f".{name}." for name in self.merged_adapters]
            for key in state_dict:
                is_base = key.startswith(f"{prefix}base_layer.")
                if is_base or (key.startswith(prefix) and any(name in key for name in merged)):
                    raise RuntimeError(
                        f"{key}: adapters {self.merged_adapters} are merged; call "
                        "peft_model.unmerge_adapter() before other values are loaded"
                    )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """Return the delta of the base weight for one adapter and the set task, [O, I] float64.

        Raises RuntimeError if the gate depends on x, or if not exactly one task is set.
        """
        experts = self._mergeable(adapter_name)
        return delta_weight(experts, experts.task())

    def check_merge(
        self, adapter_names: Sequence[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Raise the error that `merge` would raise. Only safe_merge computes the merged weight."""
        names = self.active_adapters if adapter_names is None else adapter_names
        present = self.moelora_experts.keys() - self.merged_adapters
        if names := [name for name in names if name in present]:
            weight = self._dense_base_weight()
            for name in names:
                self._mergeable(name).task()
            # The weight of an offloaded base is on the meta device until `merge` loads it.
            if safe_merge and not weight.is_meta:
                self._merged_weight(names, safe_merge)

    def _mergeable(self, adapter_name: str) -> MoeLoraExperts:
        experts = self.moelora_experts[adapter_name]
        if problem := task_gate_problem(experts):
            raise RuntimeError(f"adapter {adapter_name!r} cannot be merged: {problem}")
        return experts

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base weight, for the task that `set_tasks` has set.

        Args:
            safe_merge: check that the merged weight is finite.
            adapter_names: the adapters; None means the active ones.

        Raises (the weight is then unchanged):
            RuntimeError: as `get_delta_weight`; or the base weight is not a dense float tensor.
            ValueError: safe_merge is set and the merged weight is not finite.
        """
        names = check_adapters_to_merge(self, adapter_names)
        names = [name for name in names if name in self.moelora_experts]
        if not names:
            return
        weight = self._dense_base_weight()
        merged = self._merged_weight(names, safe_merge)
        if not self.merged:
            self.unmerged_weight = weight.clone()
        self._change_base_weight(merged)
        self.merged_adapters.extend(names)

    def _merged_weight(self, adapter_names: Sequence[str], safe_merge: bool) -> Tensor:
        weight = self._dense_base_weight()
        delta = torch.stack([self.get_delta_weight(name) for name in adapter_names]).sum(dim=0)
        merged = (weight.double() + delta.to(weight.device)).to(weight.dtype)
        if safe_merge and not torch.isfinite(merged).all():
            raise ValueError(f"safe_merge: the weight is not finite after merging {adapter_names}")
        return merged

    def unmerge(self) -> None:
        """Restore the bits that the base weight had before `merge`."""
        if not self.merged:
            warnings.warn("Already unmerged, nothing to do.", stacklevel=2)
            return
        self._change_base_weight(self.unmerged_weight)
        self.unmerged_weight = None
        self.merged_adapters.clear()

    def _change_base_weight(self, values: Tensor) -> None:
        # The weight's version does not tell linked siblings of a change through `.data`.
        forget_outputs(self.moelora_experts.values())
        self._dense_base_weight().copy_(values)

    def _dense_base_weight(self) -> Tensor:
        """Return the base weight [O, I]; writing to it changes the base."""
        weight = float_weight(self.base_layer)
        if type(weight) not in (nn.Parameter, Tensor):
            raise RuntimeError(
                f"merge: expected a base with a dense float weight, got a {type(self.base_layer)}"
            )
        return weight.data

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # After loading a file PEFT calls this on every layer, with or without this adapter.
        parts = {
            key: self._modules[key][adapter_name]
            for key in self.adapter_layer_names
            if adapter_name in self._modules[key]
        }
        tensors = [(f"{key}.{n}", t) for key, p in parts.items() for n, t in p.state_dict().items()]
        if missing := [name for name, tensor in tensors if tensor.is_meta]:
            # A product with a meta tensor would give wrong values without an error.
            raise RuntimeError(
                f"adapter {adapter_name!r}: the file has no values for {', '.join(missing)} of a "
                f"linear {self.in_features} to {self.out_features}, and low_cpu_mem_usage gives "
                "them no initial values"
            )
        # Only the device changes: PEFT would also round a float32 adapter to the base's dtype.
        for part in parts.values():
            config = self.moelora_experts[adapter_name].config
            part.to(device or adapter_device_dtype(self.base_layer, config)[0])
