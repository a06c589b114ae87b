"""The arguments that let a Trainer use DDP, FSDP or ZeRO in several processes on a CPU."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

ENGINES = {DistributedDataParallel: "ddp", FullyShardedDataParallel: "fsdp1", FSDPModule: "fsdp2"}

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="needs deepspeed: pip install deepspeed"
)


def engines_of(model: torch.nn.Module) -> set[str]:
    """Return the engines that a prepared model has."""
    if hasattr(model, "zero_optimization_stage"):
        return {f"zero{model.zero_optimization_stage()}"}
    return {name for kind, name in ENGINES.items() if isinstance(model, kind)}


def use_fsdp():
    """Let accelerate use FSDP on a CPU. It has FSDP for accelerators only, and takes DDP else."""
    from accelerate.state import AcceleratorState, DistributedType, PartialState

    start = AcceleratorState.__init__

    def start_with_fsdp(self, *args, **kwargs):
        state = PartialState(cpu=True)
        if state.distributed_type is DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.MULTI_GPU
            # FSDP1 compares it with the device of the Parameters.
            state.device = torch.device("cpu")
        start(self, *args, **kwargs)

    AcceleratorState.__init__ = start_with_fsdp


def use_deepspeed():
    """Let accelerate use DeepSpeed on a CPU. It finds no backend there, and takes one process."""
    from accelerate.state import DistributedType, PartialState

    os.environ |= {"DS_ACCELERATOR": "cpu", "ACCELERATE_TORCH_DEVICE": "cpu"}
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_CPU)


def engine_arguments(engine):
    if engine == "ddp":
        return dict(ddp_backend="gloo", ddp_find_unused_parameters=False)
    if engine.startswith("zero"):
        use_deepspeed()
        # "auto" copies the values of TrainingArguments.
        config = {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "zero_optimization": {"stage": int(engine[-1])},
        }
        return dict(use_cpu=False, bf16=False, deepspeed=config)
    use_fsdp()
    config = dict(version=int(engine[-1]), transformer_layer_cls_to_wrap=["Qwen2DecoderLayer"])
    if engine == "fsdp1":
        config |= dict(use_orig_params=True, sync_module_states=False)
    return dict(fsdp=True, fsdp_config=config)
