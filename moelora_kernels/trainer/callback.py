"""MoeLoraCallback: the loss, the tasks and the logs of a trainer."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from transformers import PreTrainedModel, Trainer, TrainerCallback

from moelora_kernels.nn.aux_loss import collect_aux_loss_of_parts
from moelora_kernels.nn.freezing import keep_frozen
from moelora_kernels.nn.layer import adapter_parameters, mixture_layers, selected_layers
from moelora_kernels.nn.recorded_forwards import all_forwards, last_calls, record_routing
from moelora_kernels.nn.routing_report import RoutingCounter, RoutingReport
from moelora_kernels.nn.token_masks import follow_masks
from moelora_kernels.trainer.first_step import FirstStep
from moelora_kernels.trainer.tasks import TaskSetter


class MoeLoraCallback(TrainerCallback):
    """The callback that `attach` adds to a trainer.

    load: name of a layer -> the shares [E] of its experts at the last log, on the CPU. They sum to
        1, or are all 0 if no token was counted. Layers with one expert are left out.
    report: the RoutingReport of the last log; None before the first.
    """

    def __init__(self, trainer: Trainer, tasks: TaskSetter) -> None:
        self.load: dict[str, Tensor] = {}
        self.report: RoutingReport | None = None
        self._trainer = trainer
        self._tasks = tasks
        self._compute_loss = trainer.compute_loss
        self._prediction_step = trainer.prediction_step
        self._model: nn.Module | None = None
        self._was_reached = False
        self._was_computed = False
        self._has_warned = False
        self._prepare(trainer.model)

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs) -> None:
        """Start counting, and let the optimizer keep frozen experts.

        A trainer with model_init has built a new model by now.

        Raises:
            ValueError: experts are frozen, and DeepSpeed's optimizer decays weights.
        """
        model = self._trainer.model
        self._prepare(model)
        if any(layer.config.frozen_experts for layer in selected_layers(model)):
            self._keep_frozen(model, optimizer)

    def _keep_frozen(self, model: nn.Module, optimizer: Any) -> None:
        """Let the optimizer keep frozen experts. One of DeepSpeed must not decay weights."""
        if self._trainer.is_deepspeed_enabled:
            if any(group.get("weight_decay") for group in optimizer.param_groups):
                raise ValueError(
                    "trainer: weight decay would move frozen experts, and an optimizer of "
                    "DeepSpeed steps on copies, which cannot keep them; use weight_decay=0"
                )
            return
        try:
            keep_frozen(model, optimizer)
        except (TypeError, ValueError) as error:
            warnings.warn(f"trainer: weight decay can move frozen experts ({error})", stacklevel=3)

    def _prepare(self, model: nn.Module) -> None:
        self._aux: Tensor | float = 0.0
        self._batches = 0
        self._counter = RoutingCounter(model)
        follow_masks(model)
        if model is self._model:
            return
        self._model = model
        self._first_step = FirstStep(model)
        self._tasks.follow(model)
        if self._trainer.args.world_size > 1:
            model.register_forward_hook(connect_output)
        if isinstance(model, PreTrainedModel):
            declare_shared(model)

    @contextlib.contextmanager
    def _tasks_of(self, inputs: Any, generates: bool = False) -> Iterator[Any]:
        """Set the tasks of the batch `inputs` at each call of the model in the context.

        The result is the batch for the trainer. It has no task column if the trainer would pass it
        to `generate` or to a reference model.
        """
        tasks, column = self._tasks, self._tasks.column
        if not isinstance(inputs, Mapping) or column not in inputs:
            yield inputs
            return
        previous = tasks.tasks, tasks.generates
        tasks.tasks, tasks.generates = inputs[column], generates
        try:
            if generates or getattr(self._trainer, "ref_model", None) is not None:
                inputs = {k: v for k, v in inputs.items() if k != column}
            yield inputs
        finally:
            tasks.tasks, tasks.generates = previous

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, *args, **options
    ):
        """Return the trainer's prediction, with the tasks of the batch."""
        generates = bool(getattr(self._trainer.args, "predict_with_generate", False))
        generates = generates and not prediction_loss_only
        with self._tasks_of(inputs, generates) as batch:
            if generates and self._tasks.tasks is not None:
                # The encoder runs before the model is called.
                self._tasks.set(self._model, self._tasks.tasks, batch)
            return self._prediction_step(model, batch, prediction_loss_only, *args, **options)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ):
        """Return the trainer's loss. In training, add the auxiliary losses and count the load."""
        options = {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}
        with self._tasks_of(inputs) as batch:
            if not (model.training and torch.is_grad_enabled()):
                return self._compute_loss(model, batch, **options)
            self._was_computed = True
            with record_routing(self._model):
                with self._first_step.watch(), all_forwards(self._model):
                    result = self._compute_loss(model, batch, **options)
                self._counter.add_records(self._model)
                loss = result[0] if return_outputs else result
                loss = self._connected(loss)
                if self._has_aux():
                    aux = collect_aux_loss_of_parts(self._model)
                    self._aux, self._batches = self._aux + aux.detach(), self._batches + 1
                    loss = loss + aux.to(loss.device) / self._micro_batches(num_items_in_batch)
        return (loss, *result[1:]) if return_outputs else loss

    def _has_aux(self) -> bool:
        return any(layer.config.aux for layer in mixture_layers(self._model))

    def _connected(self, loss: Tensor) -> Tensor:
        """Return a loss that backward accepts, also if this forward left out all layers.

        LayerDrop can leave out all of them. The loss has then no graph, and there is nothing to
        train. If no forward reached a layer yet, the loss stays, and backward raises.
        """
        if loss.requires_grad:
            self._was_reached = True
        elif self._was_reached:
            calls = last_calls(self._model, mixture_layers(self._model))
            if not any(calls.values()):
                return loss.detach().requires_grad_()
        return loss

    def _micro_batches(self, num_items_in_batch: Tensor | int | None) -> int:
        """Return the number of micro-batches of the step, or 1 if the trainer divides by it."""
        trainer = self._trainer
        # Newer versions of transformers have this attribute. The rule below is that of older ones.
        scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
        if scaled is None:
            per_item = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = per_item or trainer.compute_loss_func is not None
        return trainer.current_gradient_accumulation_steps if scaled else 1

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        """Name the adapters and routers that the first training step gave no gradient.

        Raises:
            RuntimeError: the trainer did not call `compute_loss`, and the layers have auxiliary
                losses. Without auxiliary losses it is a warning.
        """
        if not self._was_computed:
            name = type(self._trainer).__name__
            text = f"trainer: the training_step of {name} does not call compute_loss, so attach "
            if self._has_aux():
                raise RuntimeError(
                    f"{text}can neither add the auxiliary losses nor count the load of the "
                    "experts; use a trainer that calls compute_loss, or train without attach and, "
                    "in training_step, add collect_aux_loss(model) to the loss"
                )
            if not self._has_warned:
                self._has_warned = True
                warnings.warn(
                    f"{text}cannot count the load of the experts, and does not check which layers "
                    "train; check_trainable(model, batch) does",
                    stacklevel=2,
                )
            return
        self._first_step.finish(self._trainer)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Name the adapters whose gradient was zero in all steps."""
        self._first_step.end(self._trainer)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Add the counted numbers to the logs of a training loss, and start counting again."""
        if "loss" not in logs:
            return
        device = args.device
        aux = torch.as_tensor(self._aux, dtype=torch.float32, device=device).reshape(1)
        batches = torch.tensor([float(self._batches)], device=device)
        # One sum over the processes, and one copy from the device for all numbers. Its size depends
        # on the model alone, because the processes may have run other layers.
        flat = torch.cat([aux, batches, self._counter.flat(device)])
        flat = self._trainer.accelerator.reduce(flat, "sum").cpu()
        self._aux, self._batches = 0.0, 0
        self.report = self._counter.report(flat[2:])
        self.load = {name: layer.load for name, layer in self.report.layers.items()}
        if flat[1] > 0:
            logs["aux_loss"] = (flat[0] / flat[1]).item()
        logs.update(load_logs(self.report))
        # The history holds a copy of the logs that was made before the callbacks ran.
        state.log_history[-1].update(logs)


def connect_output(model: nn.Module, args: tuple, output: Any) -> Any:
    """Return an output with a graph if this training forward reached no trainable parameter.

    LayerDrop can leave out all layers on one process. Without a graph that process would not take
    part in the sum of gradients, and the others would wait for it.
    """
    if not (model.training and torch.is_grad_enabled()):
        return output
    values, tree = tree_flatten(output)
    if any(isinstance(value, Tensor) and value.requires_grad for value in values):
        return output
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    values = [_with_graph(value, trained) for value in values]
    return tree_unflatten(values, tree)


def _with_graph(value: Any, parameters: list[nn.Parameter]) -> Any:
    """Return a float tensor plus 0 times the sum of all parameters; other values unchanged."""
    if not (isinstance(value, Tensor) and value.is_floating_point()):
        return value
    return value + sum(0 * parameter.sum().to(value) for parameter in parameters)


def load_logs(report: RoutingReport) -> dict[str, float]:
    """Return the numbers of a report that a trainer logs; see `attach`."""
    layers = [layer for layer in report.layers.values() if layer.is_counted]
    if not layers:
        return {}
    logs = {
        "expert_load_max": _mean([layer.top1_share for layer in layers]),
        "expert_load_entropy": _mean([layer.entropy for layer in layers]),
        "experts_unused": sum(len(layer.unused) for layer in layers),
    }
    drifts = [layer.drift for layer in layers if layer.drift is not None]
    if drifts:
        logs["expert_load_drift"] = _mean(drifts)
    return logs


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


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
