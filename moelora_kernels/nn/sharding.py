"""Tensors that FSDP or ZeRO-3 shards: gather them, or say how to."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

# The context in which a process holds all values.
GATHER = {
    "FSDP1": "FullyShardedDataParallel.summon_full_params(model)",
    "ZeRO-3": "deepspeed.zero.GatheredParameters(adapter_parameters(model), modifier_rank=0)",
}


def check_gathered(model: nn.Module, owners: Mapping[str, tuple[nn.Module, str]]) -> None:
    """Raise ValueError if this process does not hold all values of a tensor.

    Tensors of FSDP2 and tensor parallelism (DTensor) pass: `gathered` collects their values.

    Args:
        model: the model with its wrappers.
        owners: for each tensor its name in `model`, and the module that reads it as an attribute.
    """
    flattened = _fsdp1_tensors(model)
    problems: dict[str, list[str]] = {}
    for name, (module, attribute) in owners.items():
        if (id(module), attribute) in flattened:
            problems.setdefault("FSDP1", []).append(name)
        elif is_zero3_shard(module.__dict__["_parameters"].get(attribute)):
            problems.setdefault("ZeRO-3", []).append(name)
    for kind, names in problems.items():
        raise ValueError(
            f"model: {kind} shards {', '.join(names)}, so this process does not hold the values; "
            f"make this call inside `with {GATHER[kind]}:`, which every process must enter"
        )


def _fsdp1_tensors(model: nn.Module) -> set[tuple[int, str]]:
    """Return (id of the module, attribute) of the tensors of which FSDP1 holds a flat shard."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return set()
    sharded = set()
    for module in model.modules():
        handle = getattr(module, "_handle", None)
        if not isinstance(module, fsdp.FullyShardedDataParallel) or handle is None:
            continue
        flat = handle.flat_param
        is_open = module.training_state.name == "SUMMON_FULL_PARAMS" or (
            handle._use_orig_params and not handle.uses_sharded_strategy
        )
        for info, shape in zip(flat._param_infos, flat._shapes, strict=True):
            parameter = info.module._parameters.get(info.param_name)
            # With rank0_only=True the other processes hold shards inside summon_full_params too.
            if not is_open or parameter is None or parameter.shape != shape:
                sharded.add((id(info.module), info.param_name))
        if not is_open:
            sharded |= {(id(info.module), info.param_name) for info in flat._shared_param_infos}
    return sharded


def is_zero3_shard(parameter: Tensor | None) -> bool:
    """Return whether DeepSpeed ZeRO-3 has emptied a Parameter."""
    return hasattr(parameter, "ds_id") and parameter.numel() == 0


def fsdp_types() -> tuple[type, ...]:
    """Return the classes of modules that FSDP1 wraps and FSDP2 changes; none without FSDP."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return () if fsdp is None else (fsdp.FullyShardedDataParallel, fsdp.FSDPModule)


def warn_if_parallel(model: nn.Module) -> None:
    """Warn if several processes share `model` under DDP or FSDP already.

    Parameters that are added after the model was wrapped are not in its collectives, so the
    adapters of the processes would differ after a step.
    """
    distributed = torch.distributed
    if not distributed.is_available() or not distributed.is_initialized():
        return
    kinds = (nn.parallel.DistributedDataParallel, *fsdp_types())
    for module in model.modules() if distributed.get_world_size() > 1 else ():
        if isinstance(module, kinds):
            warnings.warn(
                f"model: a {type(module).__name__} does not average the gradients of adapters that "
                "are added later; to train, replace the modules first, then wrap or shard the "
                "model",
                stacklevel=3,
            )
            return


def is_dtensor(tensor: Tensor | None) -> bool:
    """Return whether FSDP2 or tensor parallelism holds the tensor in parts."""
    distributed = sys.modules.get("torch.distributed.tensor")
    return distributed is not None and isinstance(tensor, distributed.DTensor)


def check_dense(tensors: Mapping[str, Tensor | None]) -> None:
    """Raise ValueError if a tensor is a DTensor. None passes."""
    if sharded := [name for name, tensor in tensors.items() if is_dtensor(tensor)]:
        raise ValueError(
            f"model: FSDP2 or tensor parallelism shards {', '.join(sharded)}; "
            "save_adapter(model, path), called by every process, gathers the values: load the file "
            "into a model that is not sharded, or run `python -m moelora_kernels.export` on it"
        )


def gathered(tensor: Tensor) -> Tensor:
    """Return the full values of a DTensor, and any other tensor itself.

    For a DTensor this is a collective: every process of its mesh must call it.
    """
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


@torch.no_grad()
def copy_into(target: Tensor, values: Tensor) -> None:
    """Copy `values` into `target`. If that is a DTensor, each process copies its part."""
    if is_dtensor(target):
        distribute = sys.modules["torch.distributed.tensor"].distribute_tensor
        values = values.to(target.device, target.dtype)
        # src_data_rank=None: no process sends values, because each has all of them.
        values = distribute(values, target.device_mesh, target.placements, src_data_rank=None)
    target.data.copy_(values)


def reshard(model: nn.Module) -> None:
    """Let FSDP2 drop its unsharded copies of Parameters: values written to a copy are lost."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules() if fsdp is not None else ():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()


def caller(depth: int) -> str:
    """Return the name of the module whose code runs `depth` calls above, such as the caller's."""
    return sys._getframe(depth).f_globals.get("__name__", "")


class HiddenFromFsdp1(nn.Module):
    """A module whose children the wrap policies of FSDP1 do not see.

    A policy can make a unit of every linear that trains. Its values would be gathered when the unit
    is called, but a layer reads them. So they belong to the unit of their block.
    """

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Return the names and the children; none if FSDP1 looks for modules to wrap."""
        return iter(()) if caller(2) == "torch.distributed.fsdp.wrap" else super().named_children()
