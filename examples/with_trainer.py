"""Fine-tune with Hugging Face's Trainer: the same batches and steps as finetune_multitask.py."""

import argparse
import math
from collections.abc import Iterable

import torch
from promptcblue import IGNORED, Encoder, Sample, collate, encode_pair
from tqdm import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from moelora_kernels.trainer import attach


class Stream(torch.utils.data.IterableDataset):
    """The samples in the given order, each with token ids, labels and its task id."""

    def __init__(self, encoder: Encoder, groups: Iterable[list[Sample]]) -> None:
        self.encoder, self.groups = encoder, groups

    def __iter__(self):
        """Yield one dictionary per sample."""
        encoder = self.encoder
        for sample in (sample for group in self.groups for sample in group):
            ids, answer = encode_pair(
                encoder.tokenizer, sample.input, sample.target, encoder.max_length
            )
            labels = [IGNORED] * (len(ids) - answer) + ids[len(ids) - answer :]
            task = encoder.task_ids[sample.task]
            yield {"input_ids": ids, "labels": labels, "task_ids": task}


class Padding:
    """A collator that pads tokens and labels on the right. `attach` adds the task ids."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer

    def __call__(self, samples: list[dict]) -> dict[str, torch.Tensor]:
        """Return a batch as keyword arguments of the model."""
        answers = [sum(label != IGNORED for label in sample["labels"]) for sample in samples]
        pairs = [(sample["input_ids"], n) for sample, n in zip(samples, answers, strict=True)]
        batch = collate(self.tokenizer, pairs, [0] * len(pairs), "cpu")._asdict()
        return {name: batch[name] for name in ("input_ids", "attention_mask", "labels")}


class Bar(TrainerCallback):
    """A progress bar with the loss and the expert load, which `attach` adds to the logs."""

    def __init__(self, steps: int, title: str) -> None:
        self.bar = tqdm(total=steps, desc=title, unit="step", disable=None)

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        """Advance the bar by one step."""
        if "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise FloatingPointError(f"the loss is {logs['loss']} at step {state.global_step}")
        self.bar.update()
        shown = {k: logs[k] for k in ("loss", "expert_load_max") if k in logs}
        self.bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items()})

    def on_train_end(self, args, state, control, **kwargs) -> None:
        """Close the bar."""
        self.bar.close()


def fit_with_trainer(
    model: torch.nn.Module,
    encoder: Encoder,
    groups: Iterable[list[Sample]],
    optimizers: tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR],
    args: argparse.Namespace,
    *,
    max_norm: float,
    title: str,
) -> tuple[list[float], list[dict]]:
    """Train the parameters of the optimizer. Return the target loss and the logs of each step.

    args: the command line; `steps`, `batch`, `seed` and `out` are used.
    """
    arguments = TrainingArguments(
        output_dir=str(args.out),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        max_grad_norm=max_norm,
        seed=args.seed,
        use_cpu=encoder.device == "cpu",
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=Stream(encoder, groups),
        data_collator=Padding(encoder.tokenizer),
        optimizers=optimizers,
        callbacks=[Bar(args.steps, title)],
    )
    trainer.remove_callback(PrinterCallback)
    # Mixture layers need this line: it adds tasks, auxiliary losses and the expert load.
    attach(trainer)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    # The trainer's loss contains the auxiliary losses.
    return [entry["loss"] - entry.get("aux_loss", 0.0) for entry in logs], logs
