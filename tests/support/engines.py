"""The arguments that let a Trainer use DDP, FSDP1 or FSDP2 in several processes on a CPU."""

from __future__ import annotations

import torch
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

ENGINES = {DistributedDataParallel: "ddp", FullyShardedDataParallel: "fsdp1", FSDPModule: "fsdp2"}


def engines_of(model: torch.nn.Module) -> set[str]:
    """Return the engines that a prepared model has."""
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


def engine_arguments(engine):
    if engine == "ddp":
        return dict(ddp_backend="gloo", ddp_find_unused_parameters=False)
    use_fsdp()
    config = dict(version=int(engine[-1]), transformer_layer_cls_to_wrap=["Qwen2DecoderLayer"])
    if engine == "fsdp1":
        config |= dict(use_orig_params=True, sync_module_states=False)
    return dict(fsdp=True, fsdp_config=config)
