"""The tuner: it puts adapters into a model, and implements PEFT's methods for the whole model."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from peft import PeftType
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn

from moelora_kernels.config import MoeLoraConfig
from moelora_kernels.nn.group import link_named
from moelora_kernels.nn.initialization import draw_b
from moelora_kernels.nn.replace import (
    check_layout,
    fitting_task_router,
    follow_calls,
    sample_order,
)
from moelora_kernels.nn.router_warnings import router_warnings
from moelora_kernels.nn.routers import TaskRouter
from moelora_kernels.nn.weight_readers import check_target, warn_of_readers
from moelora_kernels.nn.wrappers import named_modules, portable_name, unwrap
from moelora_kernels.peft.config import MoeLoraPeftConfig
from moelora_kernels.peft.layer import MoeLoraExperts, MoeLoraTunerLinear
from moelora_kernels.peft.state import state_to_load, state_to_save


class MoeLoraModel(BaseTuner):
    """A model whose linears have mixtures of LoRA experts; see `MoeLoraPeftConfig`."""

    prefix = "moelora_"
    tuner_layer_cls = MoeLoraTunerLinear
    target_module_mapping: Mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Put an adapter into `model`. Its forwards begin the routing records of the layers."""
        # An adapter that is loaded for inference does not train.
        with router_warnings(are_hidden=self.peft_config[adapter_name].inference_mode):
            super().inject_adapter(model, adapter_name, *args, **kwargs)
        names = [portable_name(model, name) for name in self.targeted_module_names]
        warn_of_readers(dict(named_modules(model)), names)
        for config in self.peft_config.values():
            follow_calls(model, config.moe_lora_config())
        if self.peft_config[adapter_name].link_siblings:
            _link_siblings(model, adapter_name)

    def _check_target_module_compatiblity(
        self, peft_config: MoeLoraPeftConfig, model: nn.Module, target_name: str
    ) -> None:
        # PEFT refuses linears that its LoRA cannot adapt. The same hold for our layers.
        lora = SimpleNamespace(peft_type=PeftType.LORA)
        super()._check_target_module_compatiblity(lora, model, target_name)

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
        name = portable_name(self.model, current_key)
        above = _modules_above(self.model, current_key)
        check_layout(name, above, config)
        if not isinstance(target, MoeLoraTunerLinear):
            check_target(name, target, above)
            layer = MoeLoraTunerLinear(target)
        layer.update_layer(adapter_name, config, self._task_router(adapter_name, config))
        experts = layer.moelora_experts[adapter_name]
        experts.set_token_order(sample_order(name, above, config))
        if not peft_config.init_weights:
            draw_b(experts.lora_B.data)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    def _task_router(self, adapter_name: str, config: MoeLoraConfig) -> TaskRouter | None:
        """Return the task gate that the layers of an adapter share; None for its first layer."""
        experts = [
            module
            for module in self.model.modules()
            if isinstance(module, MoeLoraExperts) and module.name == adapter_name
        ]
        return fitting_task_router(experts, config)

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: MoeLoraPeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        # PEFT would write the names of wrappers, and leave out computed tensors.
        return state_to_save(model, adapter_name, state_dict, config.bias)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: MoeLoraPeftConfig,
        adapter_name: str,
        state_dict: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        def file_key(key: str) -> str:
            return cls._remove_adapter_name_from_key(key, adapter_name)

        return state_to_load(model, adapter_name, state_dict, file_key)

    def merge_adapter(
        self, adapter_names: list[str] | None = None, safe_merge: bool = False
    ) -> None:
        """Merge adapters into the base weights for the task that `set_tasks` has set.

        `unmerge_adapter` restores the base weights.

        Raises (the model is then unchanged):
            ValueError: a name in adapter_names is unknown; or safe_merge is set and a merged weight
                is not finite.
            RuntimeError: a gate depends on x, no task is set, or a base weight is not dense.

        Warns if another module shares a base weight, because that module changes too.
        """
        self._check_merge(adapter_names, safe_merge)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_merge(adapter_names, safe_merge)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)

    def _check_merge(self, adapter_names: list[str] | None, safe_merge: bool) -> None:
        if unknown := sorted(set(adapter_names or ()) - set(self.peft_config)):
            raise ValueError(
                f"adapter_names: expected names from {sorted(self.peft_config)}, got {unknown}"
            )
        layers = {
            name: module
            for name, module in named_modules(self.model)
            if isinstance(module, MoeLoraTunerLinear)
        }
        for layer in layers.values():
            layer.check_merge(adapter_names, safe_merge)
        owners: dict[int, list[str]] = {}
        for name, module in named_modules(self.model):
            if isinstance(weight := module._parameters.get("weight"), nn.Parameter):
                owners.setdefault(id(weight), []).append(name)
        for name, layer in layers.items():
            base = [f"{name}.base_layer"]
            weight = getattr(layer.base_layer, "weight", None)
            if others := [n for n in owners.get(id(weight), base) if n not in base]:
                warnings.warn(
                    f"merge: {', '.join(others)} shares the weight of {name}, so the merge changes "
                    "it too; untie the weights before the merge",
                    stacklevel=3,
                )

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(
        self, *_: Any, adapter_names: Sequence[str] | None = None, **__: Any
    ) -> Iterator[None]:
        # Without this check PEFT would ignore the argument.
        if adapter_names is not None:
            raise ValueError(
                "adapter_names: all samples of a batch use the active adapters; choose them with "
                "set_adapter"
            )
        yield

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        # PEFT must not change a dtype that the config names.
        has_dtype = self.peft_config[adapter_name].adapter_dtype is not None
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype and not has_dtype)


def _link_siblings(model: nn.Module, adapter_name: str) -> None:
    """Let the linears of an adapter that read the same x run together."""
    modules = dict(named_modules(model))
    experts = {
        name: module.moelora_experts[adapter_name]
        for name, module in modules.items()
        if isinstance(module, MoeLoraTunerLinear) and adapter_name in module.moelora_experts
    }
    link_named(modules, experts)


def _modules_above(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """Return the modules that contain the module `name` of `model`, by their portable names."""
    parts = name.split(".")
    names = [".".join(parts[:depth]) for depth in range(len(parts))]
    return {portable_name(model, name): unwrap(model.get_submodule(name)) for name in names}
