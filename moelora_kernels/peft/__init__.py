"""Mixtures of LoRA experts as a PEFT method. Importing this package registers the method.

    from peft import get_peft_model
    from moelora_kernels.peft import MoeLoraPeftConfig

    model = get_peft_model(model, MoeLoraPeftConfig(preset="ming", target_modules=["q_proj"]))

PEFT saves, loads, switches and merges the adapters. `set_tasks`, `record_routing`,
`collect_aux_loss`, `warmup` and `adapter_parameters` of this package work on the active adapters.
"""

from __future__ import annotations

from peft.utils import register_peft_method

from moelora_kernels.peft.config import MoeLoraPeftConfig
from moelora_kernels.peft.layer import MoeLoraExperts, MoeLoraTunerLinear
from moelora_kernels.peft.model import MoeLoraModel

__all__ = ["MoeLoraExperts", "MoeLoraModel", "MoeLoraPeftConfig", "MoeLoraTunerLinear"]

register_peft_method(
    name="moelora",
    config_cls=MoeLoraPeftConfig,
    model_cls=MoeLoraModel,
    prefix=MoeLoraModel.prefix,
)
