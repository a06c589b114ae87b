"""Train a tiny model with Trainer, started by `accelerate launch` or `torchrun`.

    accelerate launch --multi_gpu --num_processes 2 tests/support/trainer_program.py FOLDER

Writes the adapter of the first process, and the batches and losses of each process, to FOLDER.
Started with --use_deepspeed, it trains with DeepSpeed on a CPU.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import torch

from moelora_kernels import adapter_parameters, save_adapter
from support.engines import use_deepspeed
from support.trainers import batches_of, make_model, make_trainer

OPTIONS = dict(top_k=1, normalize="none", score="softmax")


def main(folder: Path) -> None:
    """Train three steps."""
    # accelerate sets it.
    with_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
    if with_deepspeed:
        use_deepspeed()
        options = dict(use_cpu=False, bf16=False)
    else:
        options = dict(ddp_find_unused_parameters=False)
    model = make_model("ming", **OPTIONS)
    trainer = make_trainer(model, folder, **options)
    trainer.train()
    logs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    torch.save((batches_of(trainer), logs), folder / f"{os.environ['RANK']}.pt")
    with all_values(model) if with_deepspeed else contextlib.nullcontext():
        if trainer.is_world_process_zero():
            save_adapter(model, folder / "adapter")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def all_values(model: torch.nn.Module) -> contextlib.AbstractContextManager:
    """Return the context in which a process holds the adapters that ZeRO-3 shards."""
    import deepspeed

    return deepspeed.zero.GatheredParameters(adapter_parameters(model))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
