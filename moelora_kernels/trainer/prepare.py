"""attach: prepare a trainer for a model with mixture layers."""

from __future__ import annotations

from torch import nn
from transformers import Trainer

from moelora_kernels.nn.layer import mixture_layers
from moelora_kernels.nn.wrappers import named_modules
from moelora_kernels.trainer.callback import MoeLoraCallback
from moelora_kernels.trainer.tasks import SetTasks, TaskCollator, TaskSetter, task_problem


def attach(
    trainer: Trainer, *, task_column: str = "task_ids", set_tasks: SetTasks | None = None
) -> MoeLoraCallback:
    """Prepare a `Trainer`, or an object of any subclass, for a model that has mixture layers.

    Auxiliary losses
        loss = trainer.compute_loss(...) + auxiliary losses / N

        The loss of a step is the mean over its micro-batches. Some trainers divide by the number
        of micro-batches themselves; N is then 1. Others expect a loss that is already divided
        (causal language models, which divide by the tokens of all micro-batches); N is then the
        number of micro-batches. Each process computes the loss of its local tokens, and data
        parallelism averages over processes. The logged training loss contains the auxiliary loss;
        the evaluation loss does not.

    Which tokens count
        The masks are those that the model is called with. attention_mask belongs to the language
        model or the encoder, and to the cross-attention linears that read the encoder's output;
        decoder_attention_mask belongs to the rest of a decoder. In all other parts (vision towers,
        projectors), and if a mask has not the shape of a layer's tokens, every token counts.

    Tasks
        If the model has task gates, every sample needs a column `task_column`: a task id, or
        anything else that `set_tasks` accepts for one sequence. All have the same length.
        remove_unused_columns keeps the column. The collator puts the tasks into the batch, and
        they are set when the model is called with that batch. So the tasks are always those of the
        batch, even if batches are fetched ahead, gradients are accumulated or activations are
        recomputed in backward, and in evaluation too. A sample without the column raises
        ValueError.

        The model gets one row for each sample; two if the trainer compares chosen and rejected
        answers (TRL's DPOTrainer, RewardTrainer), or one for each beam if it generates. For other
        rows, pass `set_tasks`.

    Logs
        Written with each training loss, over all steps since the previous one and all processes:

        aux_loss                the mean of the auxiliary loss
        expert_load_max         the largest share of an expert, averaged over layers
        expert_load_entropy     H(shares) / log E, averaged over layers: 1 if the load is balanced
        experts_unused          the number of experts, over all layers, that no token was routed to
        expert_load_drift       sum |share - last share| / 2, averaged over layers; from the second
                                log on

        The share of an expert is the sum of its gate weights divided by the sum over all experts
        of the layer. Padding tokens and a shared expert are not counted. A layer without counted
        tokens is left out of the averages. The callback's `load` holds the shares of every layer,
        and its `report` the whole RoutingReport. The numbers are copied from the device once per
        log, not at each step.

    First step
        Before the first optimizer step, a warning of the logger names the adapters and routers that
        got no gradient: a layer that is not called, whose weight is read instead, or whose output
        does not reach the loss. If the gradients of all adapters are zero (equal rewards in GRPO),
        they are named after ten such steps. `check_trainable` tells more.

    Args:
        trainer: a trainer that has not trained yet. Its model may be a PeftModel.
        task_column: the name of the column in the samples and in the batch.
        set_tasks: a function (model, tasks, inputs) that sets the tasks before each call of the
            model. `tasks` are those of the batch, `inputs` the arguments of the call. For example
            it calls `moelora_kernels.set_tasks` on parts of the model that have other rows.

    Returns:
        The callback. It is the trainer's first one, so all other callbacks see its logs.

    Raises:
        ValueError: the model has no mixture layer, `attach` was called on this trainer before, the
            trainer would use nn.DataParallel (start one process per GPU with torchrun), the trainer
            packs or makes batches in a way that gates of samples do not work with, or its loss
            reads the weight of an lm_head that has experts (TRL's trainers).
        RuntimeError: in the first step, if the layers have auxiliary losses and the trainer's
            training_step does not call compute_loss
            (TRL's OnlineDPOTrainer).

    Example:
        >>> from torch import nn
        >>> from transformers import Trainer, TrainingArguments
        >>> from moelora_kernels import MoeLoraConfig, replace_linears
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> replace_linears(model, MoeLoraConfig.preset("ming"), ["0"])
        ['0']
        >>> trainer = Trainer(model, TrainingArguments("out", report_to=[], use_cpu=True))
        >>> attach(trainer).load  # empty before the first log
        {}
    """
    if not isinstance(trainer, Trainer):
        raise TypeError(
            f"trainer: expected a transformers.Trainer, got {type(trainer)}; attach(trainer) takes "
            "the trainer that holds the model"
        )
    layers = mixture_layers(trainer.model)
    if not layers:
        raise ValueError(
            "trainer: expected a model with mixture layers, got none; call replace_linears first"
        )
    callbacks = trainer.callback_handler.callbacks
    if any(isinstance(callback, MoeLoraCallback) for callback in callbacks):
        raise ValueError("trainer: attach was already called on it")
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"trainer: nn.DataParallel over {trainer.args.n_gpu} GPUs is not supported, because "
            "the parts of a batch share one routing record; start one process per GPU with torchrun"
        )
    if problem := task_problem(trainer):
        raise ValueError(f"trainer: {problem}")
    if name := head_of_fused_loss(trainer.model):
        raise ValueError(
            f"trainer: {type(trainer).__name__} multiplies by {name}.weight and does not call "
            f"{name}, so its experts would have no effect; leave {name} out of target_modules"
        )
    callback = MoeLoraCallback(trainer, TaskSetter(trainer, task_column, set_tasks))
    trainer.compute_loss = callback.compute_loss
    callbacks.insert(0, callback)
    if any(layer.config.router == "task" and layer.is_selected for layer in layers):
        trainer.prediction_step = callback.prediction_step
        # A caller may have added the collator already.
        if not _adds_tasks(trainer.data_collator, task_column):
            trainer.data_collator = TaskCollator(trainer.data_collator, task_column)
        # The columns that remove_unused_columns keeps. SFTTrainer fills the list differently.
        trainer._set_signature_columns_if_needed()
        trainer._signature_columns.append(task_column)
    return callback


def _adds_tasks(collator: object, task_column: str) -> bool:
    """Return whether a collator puts the tasks into the batch already."""
    return isinstance(collator, TaskCollator) and collator.column == task_column


def head_of_fused_loss(model: nn.Module) -> str | None:
    """Return the name of an lm_head with experts that a loss of TRL does not call; or None.

    TRL's `add_fused_lm_head` patches the forward of a model. The patch has an argument
    `fused_lm_head`.
    """
    for name, module in named_modules(model):
        code = getattr(getattr(module.__dict__.get("forward"), "__func__", None), "__code__", None)
        if code is None or "fused_lm_head" not in code.co_varnames:
            continue
        head = module.get_output_embeddings()
        if head is not None and mixture_layers(head):
            inner = next(child for child, m in named_modules(module) if m is head)
            return f"{name}.{inner}".lstrip(".")
    return None
