"""The layers, and functions on models that contain them; README.md shows how to use them."""

from moelora_kernels.nn.adapter import MoeLoraAdapter
from moelora_kernels.nn.add_experts import add_experts
from moelora_kernels.nn.aux_loss import collect_aux_loss
from moelora_kernels.nn.balance import update_balance
from moelora_kernels.nn.check import check_trainable
from moelora_kernels.nn.ffn import MoeLoraFFN
from moelora_kernels.nn.freezing import freeze_experts
from moelora_kernels.nn.group import MoeLoraGroup, link_siblings
from moelora_kernels.nn.layer import adapter_parameters
from moelora_kernels.nn.linear import MoeLoraLinear
from moelora_kernels.nn.merge_model import merge_adapter, merge_and_unload, unmerge_adapter
from moelora_kernels.nn.pretrained_loras import lora_prototypes, set_prototypes
from moelora_kernels.nn.recorded_forwards import record_routing
from moelora_kernels.nn.replace import replace_ffns, replace_linears
from moelora_kernels.nn.routers import (
    BalancedRouter,
    MlpRouter,
    PrototypeRouter,
    SequenceGate,
    TaskRouter,
    ThresholdRouter,
    TokenTaskRouter,
)
from moelora_kernels.nn.routing_plot import plot_routing
from moelora_kernels.nn.routing_report import count_routing, routing_report
from moelora_kernels.nn.tasks import set_samples, set_tasks
from moelora_kernels.nn.warmup import warmup

__all__ = [
    "BalancedRouter",
    "MlpRouter",
    "MoeLoraAdapter",
    "MoeLoraFFN",
    "MoeLoraGroup",
    "MoeLoraLinear",
    "PrototypeRouter",
    "SequenceGate",
    "TaskRouter",
    "ThresholdRouter",
    "TokenTaskRouter",
    "adapter_parameters",
    "add_experts",
    "check_trainable",
    "collect_aux_loss",
    "count_routing",
    "freeze_experts",
    "link_siblings",
    "lora_prototypes",
    "merge_adapter",
    "merge_and_unload",
    "plot_routing",
    "record_routing",
    "replace_ffns",
    "replace_linears",
    "routing_report",
    "set_prototypes",
    "set_samples",
    "set_tasks",
    "unmerge_adapter",
    "update_balance",
    "warmup",
]
