"""Mixtures of LoRA experts as a method of PEFT: `import moelora_kernels.peft` registers it.

    from peft import get_peft_model
    from moelora_kernels.peft import MoeLoraPeftConfig

    model = get_peft_model(model, MoeLoraPeftConfig(preset="ming", target_modules=["q_proj"]))

Saving, loading, several adapters and merging are PEFT's own; `set_tasks`, `record_routing`,
`collect_aux_loss`, `warmup` and `adapter_parameters` of this package find the active adapters.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import (
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
    register_peft_method,
)
from torch import Tensor, nn

from moelora_kernels.config import MoeLoraConfig
from moelora_kernels.nn.base import adapter_place, missing_size
from moelora_kernels.nn.linear import MoeLoraLinear
from moelora_kernels.nn.model import WEIGHT_READERS
from moelora_kernels.nn.routers import TaskRouter
from moelora_kernels.presets import OF_FFNS

# What an option is before `preset` and the defaults of MoeLoraConfig settle it; None is a value.
_UNSET = object()
_OPTIONS = tuple(field.name for field in dataclasses.fields(MoeLoraConfig))
_Options = dataclasses.make_dataclass(
    "_Options",
    [(name, Any, dataclasses.field(default=_UNSET, kw_only=True)) for name in _OPTIONS],
)


def _add_peft_type(name: str) -> PeftType:
    """The member `name` of PEFT's enum of methods; an enum has no way of its own to grow."""
    if name not in PeftType.__members__:
        member = str.__new__(PeftType, name)
        member._name_ = member._value_ = name
        PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
        PeftType._member_names_.append(name)
        type.__setattr__(PeftType, name, member)
    return PeftType[name]


MOELORA = _add_peft_type("MOELORA")


@dataclasses.dataclass
class MoeLoraPeftConfig(_Options, PeftConfig):
    """The options of `MoeLoraConfig` under their own names (rank, alpha), and where PEFT puts them.

    Args:
        preset: a published method whose options are the start; options given replace its own.
        target_modules: names, a regular expression that matches whole names, or "all-linear"; None
            takes those of PEFT's LoRA for the model's type.
        exclude_modules: names or a regular expression of modules to leave out.
        layers_to_transform: an index or indices of the layers to adapt (target_modules as names).
        layers_pattern: the name of the list that these indices count, if not the first in a name.
        bias: which biases train as well: "none", "all", or "moelora_only" for those of the adapted
            linears. PEFT saves them from 0.21 on; with earlier versions other than "none" raises.
        modules_to_save: names of other modules to train and save as a whole.

    After construction every option has its settled value, which is what the file of the config
    holds: a preset that changes in a later version does not change an adapter saved with it.

    Raises:
        TypeError: an option that does not exist, or a router that is a module: it has no JSON form.
        ValueError: an option out of range, as `MoeLoraConfig`; init="svd_segments", which changes
            the base under all adapters; the preset of a method with whole-FFN experts.
    """

    preset: str | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    bias: str = "none"
    modules_to_save: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MOELORA
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), (list, tuple)):
                setattr(self, name, set(getattr(self, name)))
        if self.preset in OF_FFNS:
            raise ValueError(
                f"preset: the experts of {self.preset!r} are whole FFNs, which replace_ffns puts "
                "into a model; this adapts single linears"
            )
        given = {name: getattr(self, name) for name in _OPTIONS}
        given = {name: value for name, value in given.items() if value is not _UNSET}
        make = MoeLoraConfig if self.preset is None else MoeLoraConfig.preset
        config = make(*[self.preset] * (self.preset is not None), **given)
        if config.init == "svd_segments":
            raise ValueError(
                "init: 'svd_segments' reduces the base's weight, but under PEFT the base is what "
                "disable_adapter, unload and other adapters see; use replace_linears"
            )
        for name, value in config.to_dict().items():
            setattr(self, name, value)
        self._check_targets()

    def _check_targets(self) -> None:
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(f"{name}: goes with target_modules as names, not as a pattern")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern: goes with layers_to_transform, which is None")
        if self.bias not in ("none", "all", "moelora_only"):
            raise ValueError(
                f"bias: expected one of 'none', 'all', 'moelora_only', got {self.bias!r}"
            )
        if self.bias != "none" and not hasattr(BaseTuner, "_get_learnable_bias_state_dict"):
            raise ValueError(
                f"bias: PEFT saves the biases of this method from 0.21 on, got bias={self.bias!r} "
                f"with PEFT {self.peft_version}"
            )

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Raise ValueError for options in a file that do not exist; PEFT would drop them."""
        if unknown := sorted(set(kwargs) - set(inspect.signature(cls).parameters)):
            raise ValueError(f"adapter config: unknown options: {', '.join(unknown)}")
        return super().check_kwargs(**kwargs)

    def moe_lora_config(self) -> MoeLoraConfig:
        """The options as the layers of this package take them."""
        return MoeLoraConfig.from_dict({name: getattr(self, name) for name in _OPTIONS})


class MoeLoraExperts(MoeLoraLinear):
    """One adapter of a tuner layer: the A, B, router and record of a MoeLoraLinear.

    Its base is what the tuner layer puts below it: the frozen linear, or the adapter that is active
    before it, so that several add up. Neither is a child of this module, nor is the task gate that
    it shares with the first layer of the adapter: each tensor has one name in a state dict. Keys
    have one level ("router_fc1_weight"): PEFT before 0.21 tells adapters apart by it.
    """

    def __init__(
        self, layer: MoeLoraTunerLinear, name: str, config: MoeLoraConfig, router: TaskRouter | None
    ) -> None:
        nn.Module.__init__(self)
        # Past nn.Module, which would make a child of it.
        object.__setattr__(self, "tuner_layer", layer)
        self.name = name
        self._add_experts(layer.base_layer, config)
        if router is not None:
            del self.router
            object.__setattr__(self, "router", router)
        self.train(layer.training)

    @property
    def base_layer(self) -> nn.Module:
        """The module whose output the experts add to."""
        return self.tuner_layer.below(self.name)

    @property
    def is_selected(self) -> bool:
        """Whether this adapter is one of the active ones."""
        return self.name in self.tuner_layer.active_adapters

    @property
    def is_running(self) -> bool:
        """Whether the coming forwards use this adapter."""
        return self.name in self.tuner_layer.running()

    def state_dict(self, *args: Any, prefix: str = "", **kwargs: Any) -> dict[str, Any]:
        """As nn.Module, with keys of one level."""
        state = super().state_dict(*args, prefix=prefix, **kwargs)
        for nested, flat in self._flat_keys(prefix).items():
            state[flat] = state.pop(nested)
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for nested, flat in self._flat_keys(prefix).items():
            if flat in state_dict:
                state_dict[nested] = state_dict.pop(flat)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _flat_keys(self, prefix: str) -> dict[str, str]:
        keys = [
            f"{name}.{key}" for name, child in self.named_children() for key in child.state_dict()
        ]
        return {prefix + key: prefix + key.replace(".", "_") for key in keys}


class MoeLoraTunerLinear(nn.Module, BaseTunerLayer):
    """A linear under the adapters of a PeftModel: y = base(x) + the sum of the active ones."""

    adapter_layer_names = ("moelora_experts",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.moelora_experts = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self.train(base_layer.training)

    def update_layer(
        self, adapter_name: str, config: MoeLoraConfig, router: TaskRouter | None = None
    ) -> None:
        """Add an adapter, with a task gate that layers share if there is one."""
        self.moelora_experts[adapter_name] = MoeLoraExperts(self, adapter_name, config, router)
        self.set_adapter(self.active_adapters)

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

    def _move_adapter_to_device_of_base_layer(
        self, adapter_name: str, device: torch.device | None = None
    ) -> None:
        # The dtype stays: PEFT's would round an adapter that was loaded in float32.
        experts = self.moelora_experts[adapter_name]
        if not any(p.is_meta for p in experts.parameters()):
            experts.to(device or adapter_place(self.base_layer, experts.config)[0])


class MoeLoraModel(BaseTuner):
    """A model with mixtures of LoRA experts over some of its linears; see `MoeLoraPeftConfig`."""

    prefix = "moelora_"
    tuner_layer_cls = MoeLoraTunerLinear
    target_module_mapping: Mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _create_and_replace(
        self,
        peft_config: MoeLoraPeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        **_: Any,
    ) -> None:
        config = peft_config.moe_lora_config()
        layer = target
        if not isinstance(target, MoeLoraTunerLinear):
            if missing := missing_size(target):
                raise TypeError(
                    f"target_modules: expected modules with in_features and out_features, but "
                    f"{current_key} is a {type(target)} without {missing}"
                )
            if isinstance(parent, WEIGHT_READERS):
                raise TypeError(
                    f"target_modules: {current_key} lies in a {type(parent)}, which reads its "
                    "weight without calling it: its experts would be left out"
                )
            layer = MoeLoraTunerLinear(target)
        layer.update_layer(adapter_name, config, self._task_router(adapter_name))
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _task_router(self, adapter_name: str) -> TaskRouter | None:
        """The task gate that the layers of an adapter share, once its first layer has made it."""
        for module in self.model.modules():
            if isinstance(module, MoeLoraExperts) and module.name == adapter_name:
                return module.router if isinstance(module.router, TaskRouter) else None
        return None

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # A dtype that was asked for by name is not PEFT's to choose.
        chosen = self.peft_config[adapter_name].adapter_dtype is not None
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype and not chosen)


register_peft_method(
    name="moelora",
    config_cls=MoeLoraPeftConfig,
    model_cls=MoeLoraModel,
    prefix=MoeLoraModel.prefix,
)
