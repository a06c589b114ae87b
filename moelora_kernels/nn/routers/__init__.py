"""Routers: from a token, a sequence or a task to the logits of the experts."""

from moelora_kernels.nn.routers.balanced import Balance, BalancedRouter
from moelora_kernels.nn.routers.build import build_router, layer_logits, task_routers
from moelora_kernels.nn.routers.logits import float32_linear
from moelora_kernels.nn.routers.sequence import SequenceGate
from moelora_kernels.nn.routers.task import TaskRouter, TaskVectors, TokenTaskRouter
from moelora_kernels.nn.routers.token import MlpRouter, PrototypeRouter, ThresholdRouter

__all__ = [
    "Balance",
    "BalancedRouter",
    "MlpRouter",
    "PrototypeRouter",
    "SequenceGate",
    "TaskRouter",
    "TaskVectors",
    "ThresholdRouter",
    "TokenTaskRouter",
    "build_router",
    "float32_linear",
    "layer_logits",
    "task_routers",
]
