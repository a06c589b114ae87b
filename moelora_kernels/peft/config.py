"""MoeLoraPeftConfig: the options of a mixture as a config of PEFT."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Mapping
from operator import attrgetter
from typing import Any

from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner

from moelora_kernels.config import MoeLoraConfig
from moelora_kernels.presets import FFN_PRESETS, check_preset

# The default of an option that the caller did not pass. None is a valid value of some options.
_UNSET = object()
_OPTIONS = tuple(field.name for field in dataclasses.fields(MoeLoraConfig))
# The names of options in PEFT's LoraConfig, and their names here.
SECOND_NAMES = {"r": "rank", "lora_alpha": "alpha", "lora_dropout": "dropout"}
_Options = dataclasses.make_dataclass(
    "_Options",
    [(name, Any, dataclasses.field(default=_UNSET, kw_only=True)) for name in _OPTIONS],
)


def _add_peft_type(name: str) -> PeftType:
    """Return the member `name` of PEFT's enum of methods. Add it if it does not exist."""
    if name not in PeftType.__members__:
        # Python has no public way to add a member to an enum.
        member = str.__new__(PeftType, name)
        member._name_ = member._value_ = name
        PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
        PeftType._member_names_.append(name)
        type.__setattr__(PeftType, name, member)
    return PeftType[name]


MOELORA = _add_peft_type("MOELORA")


def _first_names(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return `options` with `rank` for `r`, and so on. A second name that is None is left out.

    Raises ValueError if an option has two values.
    """
    result = {name: value for name, value in options.items() if name not in SECOND_NAMES}
    for second, name in SECOND_NAMES.items():
        if (value := options.get(second)) is None:
            continue
        first = result.setdefault(name, value)
        # A JSON file has a list for a tuple.
        pair = [tuple(v) if isinstance(v, list) else v for v in (first, value)]
        if pair[0] != pair[1]:
            raise ValueError(
                f"{second}: another name of {name}, so give one of them; got {second}={value!r} "
                f"and {name}={first!r}"
            )
    return result


def _take_second_names(cls: type) -> type:
    """Let a config class take the options by their second names too, and have them as attributes.

    They are not fields, so a saved config has each option once.
    """
    init = cls.__init__
    parameters = inspect.signature(init).parameters.values()
    second = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Any)
        for name in SECOND_NAMES
    ]

    @functools.wraps(init)
    def __init__(self, *args: Any, **options: Any) -> None:
        init(self, *args, **_first_names(options))

    __init__.__signature__ = inspect.Signature([*parameters, *second], return_annotation=None)
    cls.__init__ = __init__
    for name, first in SECOND_NAMES.items():
        setattr(cls, name, _alias(first))
    return cls


def _alias(name: str) -> property:
    """Return a property that reads and sets the attribute `name`."""

    def set_value(config: Any, value: Any) -> None:
        setattr(config, name, value)

    return property(attrgetter(name), set_value)


@_take_second_names
@dataclasses.dataclass
class MoeLoraPeftConfig(_Options, PeftConfig):
    """The options of `MoeLoraConfig`, under the same names, and the modules that PEFT adapts.

    Args:
        preset: the name of a published method. Its options are the defaults of the options that
            are not passed.
        target_modules: a list of names, a regular expression that matches full names, or
            "all-linear". None: the names that PEFT's LoRA uses for the model's type.
        exclude_modules: names, or a regular expression, of modules to leave out.
        layers_to_transform: one or several indices of layers to adapt. Needs target_modules as
            names.
        layers_pattern: the name of the module list that these indices count. None: the first list
            in a module's name.
        bias: which biases are trained: "none", "all", or "moelora_only" (those of the adapted
            linears). Values other than "none" need PEFT 0.21, which saves the biases.
        modules_to_save: names of other modules to train and to save completely.
        init_weights: True: B is zero, so a new adapter does not change the output. False: B is
            drawn like the weight of an `nn.Linear` with R inputs.
        link_siblings: True: linears that read the same x (q/k/v, gate/up) run together while the
            adapter is the only one that runs. Outputs and gradients are the same up to rounding; in
            training these linears then share the dropout mask of x. False: they run one by one.
        r, lora_alpha, lora_dropout: PEFT's names of `rank` (of one expert), `alpha` and `dropout`.

    After construction every option holds its final value, and the saved config holds these values.
    So an adapter does not change if a later version changes its preset.

    Raises:
        TypeError: an option does not exist, or the router is a module, which has no JSON form.
        ValueError: an option is out of range (as in `MoeLoraConfig`); it has two values under its
            two names; or it cannot be used under PEFT: init="svd_segments", rank_activation, and
            presets with whole-FFN experts.

    Example:
        >>> from peft import get_peft_model
        >>> from torch import nn
        >>> config = MoeLoraPeftConfig(preset="ming", num_experts=4, target_modules=["0"])
        >>> config.num_experts, config.top_k, config.router
        (4, 2, 'linear')
        >>> model = get_peft_model(nn.Sequential(nn.Linear(8, 8)), config)
    """

    preset: str | None = None
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    bias: str = "none"
    modules_to_save: list[str] | None = None
    init_weights: bool = True
    link_siblings: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MOELORA
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), (list, tuple)):
                setattr(self, name, set(getattr(self, name)))
        if isinstance(self.preset, str) and self.preset in FFN_PRESETS:
            raise ValueError(
                f"preset: {self.preset!r} has whole-FFN experts, and PEFT adapts single linears; "
                "use replace_ffns"
            )
        options = {name: getattr(self, name) for name in _OPTIONS}
        options = {name: value for name, value in options.items() if value is not _UNSET}
        if self.preset is None:
            config = MoeLoraConfig(**options)
        else:
            config = MoeLoraConfig.preset(self.preset, **options)
        if config.init == "svd_segments":
            raise ValueError(
                "init: 'svd_segments' changes the base weight, and under PEFT other adapters, "
                "disable_adapter and unload use the same base weight; use replace_linears"
            )
        if config.rank_activation is not None:
            raise ValueError(
                f"rank_activation: {config.rank_activation!r} needs MoeLoraAdapter, which reads "
                "the output of an FFN; PEFT adapts single linears"
            )
        for name, value in {"frozen_experts": [], **config.to_dict()}.items():
            setattr(self, name, value)
        if not isinstance(self.init_weights, bool):
            raise ValueError(
                f"init_weights: expected True (B is zero) or False (B is drawn), got "
                f"{self.init_weights!r}; the option init says how A starts"
            )
        if not isinstance(self.link_siblings, bool):
            raise ValueError(f"link_siblings: expected True or False, got {self.link_siblings!r}")
        self._check_targets()

    def _check_targets(self) -> None:
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name}: needs target_modules as a list of names, got a pattern"
                    )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern: needs layers_to_transform, which is None")
        if self.bias not in ("none", "all", "moelora_only"):
            raise ValueError(
                f"bias: expected one of 'none', 'all', 'moelora_only', got {self.bias!r}"
            )
        if self.bias != "none" and not hasattr(BaseTuner, "_get_learnable_bias_state_dict"):
            raise ValueError(
                f"bias: {self.bias!r} needs PEFT 0.21 or newer, which saves the biases, got PEFT "
                f"{self.peft_version}"
            )

    @classmethod
    def check_kwargs(cls, **kwargs: Any) -> dict[str, Any]:
        """Raise ValueError if a saved config has unknown options. PEFT would ignore them."""
        if unknown := sorted(set(kwargs) - set(inspect.signature(cls).parameters)):
            raise ValueError(f"adapter config: unknown options: {', '.join(unknown)}")
        return super().check_kwargs(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain values for JSON.

        `init_weights`, `link_siblings` and `frozen_experts` are in it only if they differ from
        their defaults, because earlier versions of this package do not know them.
        """
        values = super().to_dict()
        for name in ("init_weights", "link_siblings"):
            if values[name]:
                del values[name]
        if not self.frozen_experts:
            del values["frozen_experts"]
        return values

    def moe_lora_config(self) -> MoeLoraConfig:
        """Return the options as the `MoeLoraConfig` of the layers."""
        return MoeLoraConfig.from_dict({name: getattr(self, name) for name in _OPTIONS})


def _preset(cls: type[MoeLoraPeftConfig], name: str, **options: Any) -> MoeLoraPeftConfig:
    """Return the options of a published method, with `options` changed."""
    check_preset(name)
    return cls(preset=name, **options)


# Like `MoeLoraConfig.preset`. A config has its field `preset` in the place of this method.
MoeLoraPeftConfig.preset = classmethod(_preset)
