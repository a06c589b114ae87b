"""Mixture-of-LoRA-experts layers: drop-in replacements for nn.Linear and for whole FFNs."""

from moelora_kernels.checkpoints import (
    adapter_state_dict,
    load_adapter,
    load_adapter_state_dict,
    save_adapter,
)
from moelora_kernels.config import MoeLoraConfig
from moelora_kernels.functional import moe_lora_linear
from moelora_kernels.nn import (
    MoeLoraAdapter,
    MoeLoraFFN,
    MoeLoraGroup,
    MoeLoraLinear,
    adapter_parameters,
    check_trainable,
    collect_aux_loss,
    count_routing,
    freeze_experts,
    link_siblings,
    merge_adapter,
    merge_and_unload,
    plot_routing,
    record_routing,
    replace_ffns,
    replace_linears,
    routing_report,
    set_prototypes,
    set_samples,
    set_tasks,
    unmerge_adapter,
    update_balance,
    warmup,
)

__version__ = "0.1.0"

__all__ = [
    "MoeLoraAdapter",
    "MoeLoraConfig",
    "MoeLoraFFN",
    "MoeLoraGroup",
    "MoeLoraLinear",
    "adapter_parameters",
    "adapter_state_dict",
    "check_trainable",
    "collect_aux_loss",
    "count_routing",
    "freeze_experts",
    "link_siblings",
    "load_adapter",
    "load_adapter_state_dict",
    "merge_adapter",
    "merge_and_unload",
    "moe_lora_linear",
    "plot_routing",
    "record_routing",
    "replace_ffns",
    "replace_linears",
    "routing_report",
    "save_adapter",
    "set_prototypes",
    "set_samples",
    "set_tasks",
    "unmerge_adapter",
    "update_balance",
    "warmup",
]
