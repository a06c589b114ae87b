"""The options of a mixture as a config of PEFT, and the member of PEFT's enum that names it."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner

from moelora_kernels.config import MoeLoraConfig
from moelora_kernels.presets import FFN_PRESETS

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
            the base under all adapters; rank_activation, and the preset of a method with whole-FFN
            experts.
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
        if self.preset in FFN_PRESETS:
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
        if config.rank_activation is not None:
            raise ValueError(
                f"rank_activation: {config.rank_activation!r} goes with MoeLoraAdapter, which "
                "reads what an FFN returns; this adapts single linears"
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
