"""Hugging Face's `Trainer` and TRL's `SFTTrainer` over models with mixture layers.

    trainer = Trainer(model, args, train_dataset=dataset)  # or SFTTrainer(...)
    attach(trainer)
    trainer.train()

The class stays the one it is. `attach` adds to this trainer

    the auxiliary losses    of the layers to what its `compute_loss` returns in training
    the tasks               of a batch, from the column "task_ids" of the dataset to `set_tasks`
    the expert load         to its logs

and lets the model be saved where layers share a router. Needs transformers (and accelerate).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainerCallback

from moelora_kernels.nn.aux_loss import collect_aux_loss
from moelora_kernels.nn.layer import adapter_parameters, mixture_layers
from moelora_kernels.nn.routing_record import RoutingRecord, record_routing
from moelora_kernels.nn.tasks import set_tasks


def attach(trainer: Trainer, *, task_column: str = "task_ids") -> MoeLoraCallback:
    """Let a `Trainer`, or any subclass of it, train a model that has mixture layers.

    Auxiliary losses
        loss = trainer.compute_loss(...) + collect_aux_loss(model, attention_mask) / N

        N is the number of micro-batches of the step where the trainer takes the loss as already
        scaled for gradient accumulation (a causal language model's, per token of all of them), and
        1 where it divides the sum itself: either way a step has the mean of its micro-batches. Each
        process makes the loss of its own tokens, and data parallelism takes the mean of those. It
        is part of the logged loss, and of no evaluation.

    Tasks
        For a model with task gates the samples have a column `task_column`: an id, or what else
        `set_tasks` takes for one sequence, all of one length. remove_unused_columns keeps it. The
        collator puts the ids into the batch, and the tasks are set when the model is called with
        them: also with batches fetched ahead, under gradient accumulation and in evaluation they
        are those of the batch at hand, and hold while activations are recomputed in its backward.
        A sample without the column raises ValueError.

    Logs, beside each training loss, over the steps since the one before (on all processes):
        aux_loss                the mean of the auxiliary loss
        expert_load_max         the largest share of an expert, the mean over layers
        expert_load_entropy     H(share) / log E, the mean over layers: 1 when balanced
        experts_unused          experts of all layers that no token was routed to

        The share of an expert is that of its gate weights in the sum of a layer's, over all tokens
        but the padding; a shared expert does not count. `load` of the callback has the shares of
        all layers. The numbers are read from the device when they are logged, not at each step.

    Args:
        trainer: before it trains. Its model may be a PeftModel.
        task_column: of the samples and of the batch.

    Returns:
        The callback, which is the first of the trainer's: every other sees what it logs.

    Raises:
        ValueError: the model has no mixture layer, the trainer has been attached to before, or it
            would use nn.DataParallel (launch one process per GPU with torchrun instead).
    """
    layers = mixture_layers(trainer.model)
    if not layers:
        raise ValueError("trainer: its model has no layer with experts")
    callbacks = trainer.callback_handler.callbacks
    if any(isinstance(callback, MoeLoraCallback) for callback in callbacks):
        raise ValueError("trainer: it has been attached to before")
    if trainer.args.n_gpu > 1:
        raise ValueError(
            f"trainer: nn.DataParallel over {trainer.args.n_gpu} GPUs shares the routing of a "
            "batch between its parts; launch one process per GPU with torchrun"
        )
    callback = MoeLoraCallback(trainer, task_column)
    trainer.compute_loss = callback.compute_loss
    callbacks.insert(0, callback)
    if any(layer.config.router == "task" and layer.is_selected for layer in layers):
        trainer.data_collator = TaskCollator(trainer.data_collator, task_column)
        # What remove_unused_columns keeps; SFTTrainer has a list of its own.
        trainer._set_signature_columns_if_needed()
        trainer._signature_columns.append(task_column)
    return callback


class TaskCollator:
    """A data collator that carries the tasks of the samples past another one, into the batch.

    Nothing is set here: the collator runs ahead of the model, in workers. What sets them is the
    call of a model that `attach` has prepared.

    Args:
        collator: any collator of samples that are mappings.
        column: of the samples; gone in those that `collator` gets, a tensor in its batch.
    """

    def __init__(self, collator: Callable, column: str = "task_ids") -> None:
        self.collator = collator
        self.column = column
        # Trainer saves the tokenizer of its collator beside the model.
        self.tokenizer = getattr(collator, "tokenizer", None)

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The batch of the collator, and under `column` the tasks [B] (or [B, ...])."""
        missing = [sample for sample in samples if self.column not in sample]
        if missing:
            raise ValueError(
                f"{self.column}: a model with task gates needs this column in every sample, got "
                f"one with {', '.join(missing[0])} (packed samples have no task of their own)"
            )
        tasks = [torch.as_tensor(sample[self.column]) for sample in samples]
        if len(shapes := {task.shape for task in tasks}) > 1:
            raise ValueError(
                f"{self.column}: expected one length in all samples of a batch (0 pads ids), got "
                f"{sorted([*shape] for shape in shapes)}"
            )
        rest = [{k: v for k, v in sample.items() if k != self.column} for sample in samples]
        batch = self.collator(rest)
        batch[self.column] = torch.stack(tasks)
        return batch


class MoeLoraCallback(TrainerCallback):
    """What `attach` adds to a trainer.

    load: the expert load at the last log, by the name of the layer: shares [E] that sum to 1 (all
    0 where no token counted), on the CPU. Layers of one expert have none.
    """

    def __init__(self, trainer: Trainer, task_column: str) -> None:
        self.load: dict[str, Tensor] = {}
        self._trainer = trainer
        self._task_column = task_column
        self._compute_loss = trainer.compute_loss
        self._model: nn.Module | None = None
        self._prepare(trainer.model)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Start counting; a trainer with model_init has made a new model."""
        self._prepare(self._trainer.model)

    def _prepare(self, model: nn.Module) -> None:
        self._start_counting()
        if model is self._model:
            return
        self._model = model
        layers = {id(layer) for layer in mixture_layers(model)}
        self._layers = {name: m for name, m in model.named_modules() if id(m) in layers}
        model.register_forward_pre_hook(self._set_tasks, with_kwargs=True)
        if isinstance(model, PreTrainedModel):
            declare_shared(model)

    def _set_tasks(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        if self._task_column in kwargs:
            set_tasks(model, kwargs.pop(self._task_column))
        return args, kwargs

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ):
        """The trainer's own; in training with the auxiliary losses, and the load is counted."""
        own = {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}
        if not (model.training and torch.is_grad_enabled()):
            return self._compute_loss(model, inputs, **own)
        mask = inputs.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            given = [*mask.shape] if isinstance(mask, Tensor) else type(mask)
            raise ValueError(f"attention_mask: expected [batch, sequence], got {given}")
        with record_routing(self._model):
            result = self._compute_loss(model, inputs, **own)
            self._count(mask)
            if not any(layer.config.aux for layer in self._layers.values()):
                return result
            aux = collect_aux_loss(self._model, mask)
        self._aux, self._batches = self._aux + aux.detach(), self._batches + 1
        aux = aux / self._micro_batches(num_items_in_batch)
        return (result[0] + aux, *result[1:]) if return_outputs else result + aux

    def _micro_batches(self, num_items_in_batch: Tensor | int | None) -> int:
        """The micro-batches of the step, or 1 where the trainer divides by them itself."""
        trainer = self._trainer
        # A trainer can say it in newer versions of transformers; else it is their common rule.
        scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
        if scaled is None:
            per_item = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = per_item or trainer.compute_loss_func is not None
        return trainer.current_gradient_accumulation_steps if scaled else 1

    def _start_counting(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._aux: Tensor | float = 0.0
        self._batches = 0

    def _count(self, mask: Tensor | None) -> None:
        for name, layer in self._layers.items():
            if layer.config.num_experts > 1 and layer.record.weights is not None:
                weights = expert_weights(layer.record, layer.config.num_experts, mask)
                self._sums[name] = self._sums[name] + weights if name in self._sums else weights

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Add to the logs of a training loss what has been counted, and start anew."""
        if "loss" not in logs or not (self._sums or self._batches):
            return
        sums = {"aux_loss": torch.as_tensor(self._aux).reshape(1), **self._sums}
        flat = torch.cat([s.to(args.device, torch.float32) for s in sums.values()])
        # One sum over the processes, one read from the device.
        accelerator = self._trainer.accelerator
        flat = accelerator.reduce(flat, "sum").cpu()
        aux, *counted = flat.split([len(s) for s in sums.values()])
        if self._batches:
            logs["aux_loss"] = aux.item() / (self._batches * accelerator.num_processes)
        if counted:
            shares = [c / c.sum().clamp_min(torch.finfo(c.dtype).tiny) for c in counted]
            self.load = dict(zip(self._sums, shares, strict=True))
            entropies = [torch.special.entr(s).sum() / math.log(len(s)) for s in shares]
            logs["expert_load_max"] = torch.stack([s.max() for s in shares]).mean().item()
            logs["expert_load_entropy"] = torch.stack(entropies).mean().item()
            logs["experts_unused"] = sum(int((s == 0).sum()) for s in shares)
        # The history has a copy of the logs, made before the callbacks are called.
        state.log_history[-1].update(logs)
        self._start_counting()


def expert_weights(record: RoutingRecord, num_experts: int, mask: Tensor | None = None) -> Tensor:
    """sum_t |gate[t, e]| over the tokens t of a record that count, [E] in float32.

    mask: [batch, sequence], not 0 where a token counts; None: each gate row counts once.

    Raises ValueError where the mask does not fit the gate rows.
    """
    weights = record.weights.float().abs()
    if record.indices is not None:
        experts = torch.arange(num_experts, device=weights.device)
        # No product: the weight of a slot that is not routed may be no number.
        routed = record.indices[:, :, None] == experts
        weights = torch.where(routed, weights[:, :, None], 0).sum(dim=1)
    # The last column of a mixture with a shared expert is that expert's.
    weights = weights[:, :num_experts]
    if mask is None:
        return weights.sum(dim=0)
    rows = weights.shape[0]
    if mask.numel() % rows:
        raise ValueError(f"attention_mask: {[*mask.shape]} does not fit {rows} gate rows")
    # One row may be that of a token, of a sequence or of all.
    counts = (mask != 0).reshape(rows, -1).sum(dim=1)
    return (counts[:, None] * weights).sum(dim=0)


def declare_shared(model: PreTrainedModel) -> None:
    """Tell transformers which adapter parameters have several names: it saves the first of them.

    Without it `save_pretrained` refuses a model whose layers share a router.
    """
    names: dict[int, str] = {id(p): "" for p in adapter_parameters(model)}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if names.get(id(parameter)) == "":
            names[id(parameter)] = name
        elif id(parameter) in names:
            tied[name] = names[id(parameter)]
    if tied:
        model._tied_weights_keys = {**(model._tied_weights_keys or {}), **tied}
