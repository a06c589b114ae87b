"""Train models with mixture layers with Hugging Face's `Trainer`, its subclasses or TRL's trainers.

    trainer = Trainer(model, args, train_dataset=dataset)  # or SFTTrainer(...), DPOTrainer(...)
    attach(trainer)
    trainer.train()

`attach` changes this trainer object, not its class:

    compute_loss    adds the auxiliary losses of the layers in training
    tasks           the column "task_ids" of the dataset is passed to `set_tasks`
    logs            get the auxiliary loss and the expert load
    saving          works if layers share a router

This module needs transformers and accelerate.
"""

from moelora_kernels.trainer.callback import MoeLoraCallback, declare_shared
from moelora_kernels.trainer.prepare import attach
from moelora_kernels.trainer.tasks import TaskCollator

__all__ = ["MoeLoraCallback", "TaskCollator", "attach", "declare_shared"]
