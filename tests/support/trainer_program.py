"""Train a tiny model with Trainer, started by `accelerate launch` or `torchrun`.

    accelerate launch --multi_gpu --num_processes 2 tests/support/trainer_program.py FOLDER

Writes the adapter of the first process, and the batches and losses of each process, to FOLDER.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from moelora_kernels import save_adapter
from support.trainers import batches_of, make_model, make_trainer

OPTIONS = dict(top_k=1, normalize="none", score="softmax")


def main(folder: Path) -> None:
    """Train three steps."""
    model = make_model("ming", **OPTIONS)
    trainer = make_trainer(model, folder, ddp_find_unused_parameters=False)
    trainer.train()
    logs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    torch.save((batches_of(trainer), logs), folder / f"{os.environ['RANK']}.pt")
    if trainer.is_world_process_zero():
        save_adapter(model, folder / "adapter")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
