"""Train models with mixture layers with Hugging Face's `Trainer` or TRL's `SFTTrainer`.

    trainer = Trainer(model, args, train_dataset=dataset)  # or SFTTrainer(...)
    attach(trainer)
    trainer.train()

`attach` changes this trainer object, not its class:

    compute_loss    adds the auxiliary losses of the layers in training
    tasks           the column "task_ids" of the dataset is passed to `set_tasks`
    logs            get the auxiliary loss and the expert load
    saving          works if layers share a router

This module needs transformers and accelerate.
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
from moelora_kernels.nn.routing_record import RoutedCall, record_routing
from moelora_kernels.nn.tasks import set_tasks
from moelora_kernels.nn.wrappers import named_modules


def attach(trainer: Trainer, *, task_column: str = "task_ids") -> MoeLoraCallback:
    """Prepare a `Trainer`, or an object of any subclass, for a model that has mixture layers.

    Auxiliary losses
        loss = trainer.compute_loss(...) + collect_aux_loss(model, attention_mask) / N

        The loss of a step is the mean over its micro-batches. Some trainers divide by the number
        of micro-batches themselves; N is then 1. Others expect a loss that is already divided
        (causal language models, which divide by the tokens of all micro-batches); N is then the
        number of micro-batches. Each process computes the loss of its own tokens, and data
        parallelism averages over processes. The logged training loss contains the auxiliary loss;
        the evaluation loss does not.

    Tasks
        If the model has task gates, every sample needs a column `task_column`: a task id, or
        anything else that `set_tasks` accepts for one sequence. All have the same length.
        remove_unused_columns keeps the column. The collator puts the tasks into the batch, and
        `set_tasks` is called when the model is called with that batch. So the tasks are always
        those of the batch, even if batches are fetched ahead, gradients are accumulated or
        activations are recomputed in backward, and in evaluation too. A sample without the column
        raises ValueError.

    Logs
        Written with each training loss, over all steps since the previous one and all processes:

        aux_loss                the mean of the auxiliary loss
        expert_load_max         the largest share of an expert, averaged over layers
        expert_load_entropy     H(shares) / log E, averaged over layers: 1 if the load is balanced
        experts_unused          the number of experts, over all layers, that no token was routed to

        The share of an expert is the sum of its gate weights divided by the sum over all experts
        of the layer. Padding tokens and a shared expert are not counted. The callback's `load`
        holds the shares of every layer. The numbers are copied from the device once per log, not
        at each step.

    Args:
        trainer: a trainer that has not trained yet. Its model may be a PeftModel.
        task_column: the name of the column in the samples and in the batch.

    Returns:
        The callback. It is the trainer's first one, so all other callbacks see its logs.

    Raises:
        ValueError: the model has no mixture layer, `attach` was called on this trainer before, or
            the trainer would use nn.DataParallel (start one process per GPU with torchrun).

    Example:
        >>> from moelora_kernels import MoeLoraConfig, replace_linears
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> replace_linears(model, MoeLoraConfig.preset("ming"), ["0"])
        ['0']
        >>> from transformers import TrainingArguments
        >>> trainer = Trainer(model, TrainingArguments("out", report_to=[], use_cpu=True))
        >>> attach(trainer).load  # empty before the first log
        {}
    """
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
    callback = MoeLoraCallback(trainer, task_column)
    trainer.compute_loss = callback.compute_loss
    callbacks.insert(0, callback)
    if any(layer.config.router == "task" and layer.is_selected for layer in layers):
        trainer.data_collator = TaskCollator(trainer.data_collator, task_column)
        # The columns that remove_unused_columns keeps. SFTTrainer fills the list differently.
        trainer._set_signature_columns_if_needed()
        trainer._signature_columns.append(task_column)
    return callback


class TaskCollator:
    """A data collator that adds the tasks of the samples to the batch of another collator.

    It does not call `set_tasks`, because collators run before the model, in worker processes. The
    model calls it (see `attach`).

    Args:
        collator: any collator of samples that are mappings. It gets the samples without `column`.
        column: the name of the task column in the samples and in the batch.
    """

    def __init__(self, collator: Callable, column: str = "task_ids") -> None:
        self.collator = collator
        self.column = column
        # Trainer saves the tokenizer of its collator with the model.
        self.tokenizer = getattr(collator, "tokenizer", None)

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Return the collator's batch with the tasks [B] or [B, ...] under `column`."""
        missing = [sample for sample in samples if self.column not in sample]
        if missing:
            raise ValueError(
                f"{self.column}: a model with task gates needs this column in every sample, got "
                f"one with {', '.join(missing[0])} (a packed sample has no single task)"
            )
        tasks = [torch.as_tensor(sample[self.column]) for sample in samples]
        if len(shapes := {task.shape for task in tasks}) > 1:
            raise ValueError(
                f"{self.column}: expected one length in a batch (pad ids with 0), got "
                f"{sorted([*shape] for shape in shapes)}"
            )
        rest = [{k: v for k, v in sample.items() if k != self.column} for sample in samples]
        batch = self.collator(rest)
        batch[self.column] = torch.stack(tasks)
        return batch


class MoeLoraCallback(TrainerCallback):
    """The callback that `attach` adds to a trainer.

    load: name of a layer -> the shares [E] of its experts at the last log, on the CPU. They sum to
        1, or are all 0 if no token was counted. Layers with one expert are left out.
    """

    def __init__(self, trainer: Trainer, task_column: str) -> None:
        self.load: dict[str, Tensor] = {}
        self._trainer = trainer
        self._task_column = task_column
        self._compute_loss = trainer.compute_loss
        self._model: nn.Module | None = None
        self._prepare(trainer.model)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """Start counting. A trainer with model_init has built a new model by now."""
        self._prepare(self._trainer.model)

    def _prepare(self, model: nn.Module) -> None:
        self._start_counting()
        if model is self._model:
            return
        self._model = model
        layers = {id(layer) for layer in mixture_layers(model)}
        self._layers = {name: m for name, m in named_modules(model) if id(m) in layers}
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
        """Return the trainer's loss. In training, add the auxiliary losses and count the load."""
        options = {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}
        if not (model.training and torch.is_grad_enabled()):
            return self._compute_loss(model, inputs, **options)
        mask = inputs.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            shape = [*mask.shape] if isinstance(mask, Tensor) else type(mask)
            raise ValueError(f"attention_mask: expected [batch, sequence], got {shape}")
        with record_routing(self._model):
            result = self._compute_loss(model, inputs, **options)
            self._count(mask)
            if not any(layer.config.aux for layer in self._layers.values()):
                return result
            aux = collect_aux_loss(self._model, mask)
        self._aux, self._batches = self._aux + aux.detach(), self._batches + 1
        aux = aux / self._micro_batches(num_items_in_batch)
        return (result[0] + aux, *result[1:]) if return_outputs else result + aux

    def _micro_batches(self, num_items_in_batch: Tensor | int | None) -> int:
        """Return the number of micro-batches of the step, or 1 if the trainer divides by it."""
        trainer = self._trainer
        # Newer versions of transformers have this attribute. The rule below is that of older ones.
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
            if layer.config.num_experts > 1:
                for call in layer.record.calls() or ():
                    weights = expert_weights(call, layer.config.num_experts, mask)
                    self._sums[name] = self._sums[name] + weights if name in self._sums else weights

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Add the counted numbers to the logs of a training loss, and start counting again."""
        if "loss" not in logs or not (self._sums or self._batches):
            return
        sums = {"aux_loss": torch.as_tensor(self._aux).reshape(1), **self._sums}
        flat = torch.cat([s.to(args.device, torch.float32) for s in sums.values()])
        # One sum over the processes and one copy from the device for all numbers.
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
        # The history holds a copy of the logs that was made before the callbacks ran.
        state.log_history[-1].update(logs)
        self._start_counting()


def expert_weights(call: RoutedCall, num_experts: int, mask: Tensor | None = None) -> Tensor:
    """Return sum_t |gate[t, e]| over the counted tokens t, as [E] in float32.

    call: the routing of one call of a layer.
    mask: [batch, sequence]. A token with 0 is not counted. None counts each gate row once.

    Raises:
        ValueError: the number of tokens in `mask` is not a multiple of the number of gate rows.
    """
    weights = call.weights.float().abs()
    if call.experts is not None:
        experts = torch.arange(num_experts, device=weights.device)
        # `where` and not a product, because the weight of a slot that is not routed can be NaN.
        routed = call.experts[:, :, None] == experts
        weights = torch.where(routed, weights[:, :, None], 0).sum(dim=1)
    # A shared expert is the last column.
    weights = weights[:, :num_experts]
    if mask is None:
        return weights.sum(dim=0)
    rows = weights.shape[0]
    if mask.numel() % rows:
        raise ValueError(
            f"attention_mask: expected a multiple of {rows} tokens (gate rows), got {[*mask.shape]}"
        )
    # A gate row belongs to one token, to one sequence or to all tokens.
    counts = (mask != 0).reshape(rows, -1).sum(dim=1)
    return (counts[:, None] * weights).sum(dim=0)


def declare_shared(model: PreTrainedModel) -> None:
    """Declare the adapter parameters that have several names, as transformers expects it.

    `save_pretrained` then saves them under their first name. Without this it raises if layers
    share a router.
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
