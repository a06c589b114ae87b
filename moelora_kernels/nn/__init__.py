"""The layers."""

from moelora_kernels.nn.ffn import MoeLoraFFN
from moelora_kernels.nn.group import MoeLoraGroup, link_siblings
from moelora_kernels.nn.linear import MoeLoraLinear
from moelora_kernels.nn.model import adapter_parameters, replace_ffns, replace_linears, set_tasks
from moelora_kernels.nn.record import collect_aux_loss, record_routing
from moelora_kernels.nn.routers import MlpRouter, TaskRouter, ThresholdRouter
from moelora_kernels.nn.serving import merge_adapter, merge_and_unload, unmerge_adapter
from moelora_kernels.nn.warmup import warmup

__all__ = [
    "MlpRouter",
    "MoeLoraFFN",
    "MoeLoraGroup",
    "MoeLoraLinear",
    "TaskRouter",
    "ThresholdRouter",
    "adapter_parameters",
    "collect_aux_loss",
    "link_siblings",
    "merge_adapter",
    "merge_and_unload",
    "record_routing",
    "replace_ffns",
    "replace_linears",
    "set_tasks",
    "unmerge_adapter",
    "warmup",
]
