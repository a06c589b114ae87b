"""The tasks of the samples, from the dataset to the call of the model."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from moelora_kernels.nn.layer import selected_layers
from moelora_kernels.nn.routers import TokenTaskRouter
from moelora_kernels.nn.tasks import set_tasks
from moelora_kernels.numerics import host_tensor

# model, tasks [n, ...] of the samples, arguments of the model's call -> None
SetTasks = Callable[[nn.Module, Tensor, Mapping[str, Any]], None]
# Trainers that call the model with rows [chosen; rejected], and those that make their own batches.
PAIRS = {"DPOTrainer", "RewardTrainer", "CPOTrainer", "ORPOTrainer"}
# The arguments of a model whose first dimension counts rows, in the order of preference.
INPUTS = (
    "input_ids", "inputs_embeds", "decoder_input_ids", "decoder_inputs_embeds", "input_features",
    "input_values", "pixel_values", "attention_mask",
)  # fmt: skip


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
        """Return the collator's batch with the tasks [B] or [B, ...] under `column`.

        Raises:
            ValueError: there are no samples, a sample has no task, or the tasks have several
                lengths.
            TypeError: a sample or the batch of the collator is not a mapping, or a task is neither
                a number nor a list of numbers.
        """
        if not len(samples):
            raise ValueError("samples: expected at least one sample, got none")
        for sample in samples:
            if not isinstance(sample, Mapping):
                raise TypeError(
                    f"samples: expected mappings with a value for {self.column!r}, got a "
                    f"{type(sample).__name__}; {NO_COLUMN}"
                )
        missing = [sample for sample in samples if self.column not in sample]
        if missing:
            raise ValueError(
                f"{self.column}: a model with task gates needs this column in every sample, got "
                f"one with {', '.join(missing[0])} (a packed sample has no single task)"
            )
        tasks = [self._task(sample[self.column]) for sample in samples]
        if len(shapes := {task.shape for task in tasks}) > 1:
            raise ValueError(
                f"{self.column}: expected one length in a batch (pad ids with 0), got "
                f"{sorted([*shape] for shape in shapes)}"
            )
        rest = [{k: v for k, v in sample.items() if k != self.column} for sample in samples]
        batch = self.collator(rest)
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"data_collator: expected a batch that is a mapping, got {type(batch).__name__}, "
                f"which cannot hold the tasks of its samples; {NO_COLUMN}"
            )
        batch[self.column] = torch.stack(tasks)
        return batch

    def _task(self, value: Any) -> Tensor:
        """Return the tasks of one sample as a tensor."""
        try:
            task = host_tensor(value)
        except (TypeError, ValueError, RuntimeError):
            task = None
        if task is None or task.numel() == 0:
            raise TypeError(
                f"{self.column}: expected a task id, a list of ids (0 pads) or a gate for each "
                f"sample, got {value!r}"
            )
        return task


NO_COLUMN = (
    "use a router that reads tokens (router='linear', preset 'ming'), or call "
    "set_tasks(model, ids) yourself before each call of the model"
)


def task_problem(trainer: Trainer) -> str | None:
    """Return why the gates of samples do not work with the trainer; None if they do."""
    layers = selected_layers(trainer.model)
    per_task = [layer for layer in layers if layer.config.router == "task"]
    per_sample = per_task + [x for x in layers if x.config.granularity == "sequence"]
    if per_sample and (packing := _packing(trainer)):
        return (
            f"{packing} puts several samples into one row, but the model has one gate for each "
            "row (granularity='task' or 'sequence'); train without packing, or use "
            "granularity='token'"
        )
    if per_task and getattr(trainer.data_collator, "__name__", "") == "identity":
        return (
            f"{type(trainer).__name__} makes its own batches, so a task column cannot follow its "
            f"rows; {NO_COLUMN}"
        )
    return None


def _packing(trainer: Trainer) -> str | None:
    """Return the option that packs several samples into one row, or None."""
    for name in ("packing", "padding_free", "eval_packing"):
        if getattr(trainer.args, name, None):
            return f"{name}=True"
    collator = trainer.data_collator
    if getattr(collator, "padding_free", False):
        return f"{type(collator).__name__}(padding_free=True)"
    names = {cls.__name__ for cls in type(collator).__mro__}
    return "DataCollatorWithFlattening" if "DataCollatorWithFlattening" in names else None


def takes_tasks(model: nn.Module) -> bool:
    """Return whether `set_tasks` has an effect on the model."""
    layers = selected_layers(model)
    return any(layer.config.router in ("task", "external") for layer in layers) or any(
        isinstance(module, TokenTaskRouter) for module in model.modules()
    )


class TaskSetter:
    """Sets the tasks of a batch when the model is called with it.

    Args:
        trainer: the trainer.
        column: the name of the task column in the batch.
        set_tasks: sets the tasks of the rows of a call; None means `set_row_tasks`.
    """

    def __init__(self, trainer: Trainer, column: str, set_tasks: SetTasks | None) -> None:
        self.column = column
        self.set_tasks = set_tasks
        self.is_paired = any(cls.__name__ in PAIRS for cls in type(trainer).__mro__)
        # The tasks of the batch that the trainer is working on.
        self.tasks: Tensor | None = None
        self.generates = False

    def follow(self, model: nn.Module) -> None:
        """Add the hook that sets the tasks when `model` is called, if it takes tasks."""
        if self.set_tasks is None and not takes_tasks(model):
            return
        model.register_forward_pre_hook(TaskHook(self), with_kwargs=True)

    def set(self, model: nn.Module, tasks: Tensor, inputs: Mapping[str, Any]) -> None:
        """Set the tasks of a call of `model` with `inputs`."""
        if self.set_tasks is not None:
            self.set_tasks(model, tasks, inputs)
            return
        rows = _rows(inputs)
        count = len(tasks) if tasks.dim() else 1
        if rows is not None and count > 1 and rows != count:
            tasks = self._repeated(tasks, count, rows)
        set_tasks(model, tasks)

    def _repeated(self, tasks: Tensor, count: int, rows: int) -> Tensor:
        if rows % count == 0 and self.generates:
            # generate makes several sequences of each prompt, as neighbours.
            return tasks.repeat_interleave(rows // count, dim=0)
        if rows == 2 * count and self.is_paired:
            return torch.cat([tasks, tasks])
        raise ValueError(
            f"{self.column}: the batch has tasks of {count} samples, but the model is called with "
            f"{rows} rows; pass set_tasks=function to attach, which gets (model, tasks, inputs of "
            "the model) and calls moelora_kernels.set_tasks with one task for each row"
        )


class TaskHook:
    """The hook of a model that sets the tasks of each call.

    A copy of the model has a hook that only removes the column, because it has no trainer.
    """

    def __init__(self, setter: TaskSetter | None = None, column: str = "task_ids") -> None:
        self.setter = (lambda: None) if setter is None else weakref.ref(setter)
        self.column = column if setter is None else setter.column

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Set the tasks of a call, and remove them from its arguments."""
        setter = self.setter()
        tasks = kwargs.pop(self.column, None)
        if setter is not None:
            tasks = setter.tasks if tasks is None else tasks
            if tasks is not None:
                inputs = kwargs or dict(enumerate(args))
                setter.set(model, tasks, inputs)
        elif tasks is not None:
            set_tasks(model, tasks)
        return args, kwargs

    def __reduce__(self):
        return TaskHook, (None, self.column)


def _rows(inputs: Mapping[Any, Any]) -> int | None:
    """Return the number of rows of a call with `inputs`; None if it is not known."""
    tensors = [inputs.get(name) for name in INPUTS] + list(inputs.values())
    sizes = [len(t) for t in tensors if isinstance(t, Tensor) and t.dim() > 0]
    return sizes[0] if sizes else None
