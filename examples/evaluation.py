"""Evaluate each task, measure which experts it uses, and show both in a table and plots."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from promptcblue import IGNORED, Batch, Encoder, Sample

from moelora_kernels import MoeLoraLinear, record_routing

EVAL_BATCH = 16


def token_losses(model, batch: Batch, tasks: Callable | None):
    """Return the losses, whether the prediction is right, and which tokens count: [B, L-1] each.

    The loss of a token that does not count is 0.
    """
    if tasks is not None:
        tasks(model, batch.task_ids)
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    labels = batch.labels[:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
    return losses, logits.argmax(-1) == labels, labels != IGNORED


def in_batches(items: list, size: int = EVAL_BATCH) -> Iterator[list]:
    """Yield consecutive slices of `items`."""
    return (items[start : start + size] for start in range(0, len(items), size))


@torch.no_grad()
def evaluate(
    model,
    encoder: Encoder,
    samples: list[Sample],
    tasks: Callable | None,
    rank_choices: bool = True,
) -> dict[str, dict]:
    """Return for each task the mean target loss, the token accuracy and the choices ranked right.

    A choice is scored by the log-likelihood of its tokens. A sample is ranked right if its target
    has the highest score; samples whose target is not one of their answer_choices are left out.
    """
    model.eval()
    zero = {"loss": 0.0, "token_accuracy": 0.0, "tokens": 0, "choices_right": 0, "choices": 0}
    table = {task: dict(zero) for task in encoder.task_ids}
    for group in in_batches(samples):
        losses, hits, counted = token_losses(model, encoder.batch(group), tasks)
        sums = torch.stack([losses.sum(1), (hits & counted).sum(1), counted.sum(1)], 1).tolist()
        for sample, (loss, right, tokens) in zip(group, sums, strict=True):
            row = table[sample.task]
            row["loss"] += loss
            row["token_accuracy"] += right
            row["tokens"] += int(tokens)
    for row in table.values():
        for key in ("loss", "token_accuracy"):
            # A task may have no dev sample: null in metrics.json.
            row[key] = row[key] / row["tokens"] if row["tokens"] else None
    if not rank_choices:
        return table

    ranked = [sample for sample in samples if sample.is_choice]
    candidates = [replace(s, target=choice) for s in ranked for choice in s.answer_choices]
    scores = []
    for group in in_batches(candidates):
        losses, _, _ = token_losses(model, encoder.batch(group), tasks)
        scores += (-losses.sum(1)).tolist()
    for sample in ranked:
        sample_scores = [scores.pop(0) for _ in sample.answer_choices]
        best = sample.answer_choices[sample_scores.index(max(sample_scores))]
        table[sample.task]["choices"] += 1
        table[sample.task]["choices_right"] += best == sample.target
    return table


@torch.no_grad()
def expert_load(
    model, encoder: Encoder, samples: list[Sample], layers: list[str], tasks: Callable | None
) -> torch.Tensor:
    """Return the mean gate weight [task, layer, expert] over all tokens of each task."""
    model.eval()
    row_of = {task_id: row for row, task_id in enumerate(encoder.task_ids.values())}
    totals, counts = 0.0, torch.zeros(len(row_of))
    with record_routing(model):
        for group in in_batches(samples):
            batch = encoder.batch(group)
            token_losses(model, batch, tasks)
            mask = batch.attention_mask.bool().flatten().cpu()
            rows = torch.tensor([row_of[task_id] for task_id in batch.task_ids.tolist()])
            rows = rows[:, None].expand(batch.input_ids.shape).flatten()[mask]
            gates = [dense_gates(model.get_submodule(name), len(mask))[mask] for name in layers]
            # [task, T]: row n selects the tokens of task n.
            member = F.one_hot(rows, len(row_of)).T.float()
            totals = totals + torch.einsum("nt,lte->nle", member, torch.stack(gates))
            counts += member.sum(1)
    return totals / counts[:, None, None].clamp_min(1)


def dense_gates(layer: MoeLoraLinear, tokens: int) -> torch.Tensor:
    """Return the gates [T, E] of a layer's last forward, in float32 on the CPU."""
    weights, indices = layer.record.weights.float().cpu(), layer.record.indices
    if indices is None:
        # If there are fewer rows than tokens, a row belongs to a sequence or to all tokens.
        return weights.repeat_interleave(tokens // len(weights), dim=0)
    # An expert outside [0, E) means "not routed": such slots go to column E, which is cut off.
    experts = len(layer.config.ranks())
    indices = indices.long().cpu()
    indices = torch.where((indices < 0) | (indices >= experts), experts, indices)
    return torch.zeros(tokens, experts + 1).scatter_add_(1, indices, weights)[:, :experts]


def format_table(train: dict, before: dict, after: dict) -> str:
    """Return a table with one row per task: the train loss, and the dev results before -> after."""

    def pair(row: dict, next_row: dict, key: str, form: str) -> str:
        values = (row[key], next_row[key])
        return " -> ".join("-" if value is None else format(value, form) for value in values)

    def choices(row: dict, next_row: dict) -> str:
        if not row["choices"]:
            return "-"
        return f"{row['choices_right']} -> {next_row['choices_right']} of {row['choices']}"

    def mean(table: dict) -> dict:
        rows = [row for row in table.values() if row["tokens"]]
        means = {k: sum(r[k] for r in rows) / len(rows) for k in ("loss", "token_accuracy")}
        return means | {k: sum(r[k] for r in rows) for k in ("choices", "choices_right")}

    train, before, after = ({**t, "mean over tasks": mean(t)} for t in (train, before, after))
    width = max(map(len, train))
    lines = [
        f"{'task':{width}}  train loss  {'dev loss':>16}  {'token accuracy':>17}  choices right"
    ]
    for task, row in train.items():
        old, new = before[task], after[task]
        loss = pair(old, new, "loss", ".3f")
        accuracy = pair(old, new, "token_accuracy", ".1%")
        lines.append(
            f"{task:{width}}  {row['loss']:10.3f}  {loss:>16}  {accuracy:>17}  "
            f"{choices(old, new):>13}"
        )
    return "\n".join(lines)


def plot_loss(path: Path, curve: list[float], before: dict, after: dict, title: str) -> None:
    """Plot the training loss of each step and smoothed, and the dev loss before and after."""
    steps = range(1, len(curve) + 1)
    window = max(1, len(curve) // 20)
    smooth = [
        sum(curve[max(0, i - window) : i]) / len(curve[max(0, i - window) : i]) for i in steps
    ]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, curve, color="tab:blue", alpha=0.3, linewidth=1, label="train, each step")
    axes.plot(steps, smooth, color="tab:blue", label=f"train, mean of {window} steps")
    ends = []
    for table in (before, after):
        losses = [row["loss"] for row in table.values() if row["loss"] is not None]
        ends.append(sum(losses) / len(losses))
    axes.plot([1, len(curve)], ends, "o", color="tab:orange", label="dev, mean over tasks")
    axes.set(title=title, xlabel="step", ylabel="target loss (nats per token)", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def plot_expert_load(
    path: Path, load: torch.Tensor, tasks: list[str], layers: list[str], title: str
) -> None:
    """Plot the mean gate weight as a heat map, task x expert.

    The first map is the mean over the layers. If every layer has a separate router, expert 3 of one
    layer is unrelated to expert 3 of another layer, so the mean hides differences. A second map
    then shows the layer in which the tasks differ most.

    load: [task, layer, expert], as `expert_load` returns it.
    """
    maps = [(f"{title}: mean over {len(layers)} linears", load.mean(1))]
    if (load != load[:, :1]).any():
        spread = load.std(dim=0, correction=0).sum(-1)
        chosen = int(spread.argmax())
        maps.append((layers[chosen].removeprefix("model."), load[:, chosen]))
    num_tasks, experts = maps[0][1].shape
    size = (2.5 + len(maps) * (1.2 + 0.55 * experts), 1.5 + 0.32 * num_tasks)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, len(maps), sharey=True, squeeze=False)[0]
    for axes, (name, values) in zip(panels, maps, strict=True):
        picture = axes.imshow(values.numpy(), aspect="auto", cmap="viridis", vmin=0)
        axes.set(title=name, xlabel="expert", xticks=range(experts))
        axes.set_yticks(range(num_tasks), tasks)
        half = values.max() / 2
        for (task, expert), value in np.ndenumerate(values.numpy()):
            style = {"color": "white" if value < half else "black", "fontsize": 7}
            axes.text(expert, task, f"{value:.2f}", ha="center", va="center", **style)
        figure.colorbar(picture, ax=axes, label="mean gate weight of a token")
    figure.savefig(path, dpi=150)
