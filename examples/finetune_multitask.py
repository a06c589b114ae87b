"""Fine-tune a language model on many tasks at once with a mixture of LoRA experts.

    python examples/finetune_multitask.py --preset ming --data FOLDER # train.jsonl, dev.jsonl
    python examples/finetune_multitask.py --preset moelora            # generated toy tasks
    python examples/finetune_multitask.py --preset ming --aux load_balance --trainer

With --trainer, Hugging Face's Trainer trains in the same steps as the loop below. Its logs, with
the expert load, are written to metrics.json.

Without --model the script builds a small Qwen2 over UTF-8 bytes and trains it for --pretrain-steps
on the *prompts* of the training set. It is then frozen, and has seen no answer: like a real model
it knows the language of the prompts but not the tasks. After that only the adapters are trained,
and only on the answers. The numbers under "before" belong to the frozen model.

The script writes to --out: adapter.safetensors, adapter_config.json, metrics.json, loss_curve.png,
expert_load.png and, without --model, base/. At the end it loads the base and the adapter from disk
and checks that the logits have the same bits.

On a CPU, build the native library first. Without it the dropout masks of the moelora preset, one
per expert, take most of the time of a step (--dropout 0 switches them off).
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from command_line import DTYPES, parse_arguments
from evaluation import (
    EVAL_BATCH,
    evaluate,
    expert_load,
    format_table,
    plot_expert_load,
    plot_loss,
    token_losses,
)
from promptcblue import (
    IGNORED,
    Batch,
    ByteTokenizer,
    DataError,
    Encoder,
    Sample,
    generate,
    load_folder,
    shuffled,
)
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM
from transformers.utils.logging import disable_progress_bar

from moelora_kernels import (
    MoeLoraConfig,
    adapter_parameters,
    collect_aux_loss,
    load_adapter,
    replace_linears,
    save_adapter,
    set_tasks,
)

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FFN = ["gate_proj", "up_proj", "down_proj"]
# Name of --preset -> (preset, linears), the mixture first. MING puts a plain LoRA on attention;
# LoRAMoE and HydraLoRA do not adapt attention.
PLANS = {
    "moelora": [("moelora", ATTENTION + FFN)],
    "ming": [("ming", FFN), ("lora", ATTENTION)],
    "loramoe": [("loramoe", FFN)],
    "hydralora": [("hydralora", FFN)],
    "mola": [("mola", ATTENTION + FFN)],
    "lora": [("lora", ATTENTION + FFN)],
}

Placement = tuple[MoeLoraConfig, list[str]]


@dataclass(frozen=True)
class Schedule:
    """AdamW with a linear warm-up and a cosine decay to zero."""

    steps: int
    lr: float
    warmup: float = 0.05
    weight_decay: float = 0.0
    max_norm: float = 1.0

    def factor(self, step: int) -> float:
        """Return the learning rate of `step` as a fraction of the peak."""
        warmup = max(1, round(self.warmup * self.steps))
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.steps - warmup)))

    def optimizers(self, parameters: list[torch.nn.Parameter]):
        """Return the optimizer of `parameters` and its learning rate scheduler."""
        optimizer = torch.optim.AdamW(
            parameters, lr=self.lr, betas=(0.9, 0.95), weight_decay=self.weight_decay
        )
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, self.factor)


def make_base(vocab_size: int, max_length: int, hidden: int, layers: int) -> Qwen2ForCausalLM:
    """Return a small Qwen2 with random weights, grouped-query attention and biases on q, k, v."""
    heads = hidden // 32
    config = Qwen2Config(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 16 * 16,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=1 if heads % 2 else 2,
        max_position_embeddings=max_length,
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=ByteTokenizer.bos_token_id,
        eos_token_id=ByteTokenizer.eos_token_id,
        pad_token_id=ByteTokenizer.pad_token_id,
    )
    return Qwen2ForCausalLM(config)


def add_adapters(model: torch.nn.Module, plan: list[Placement]) -> list[list[str]]:
    """Freeze `model`, add the adapters, and return the layer names of each entry of the plan."""
    model.requires_grad_(False)
    return [replace_linears(model, config, targets) for config, targets in plan]


def fit(
    model: torch.nn.Module,
    parameters: Iterable[torch.nn.Parameter],
    batches: Iterable[Batch],
    schedule: Schedule,
    *,
    tasks: Callable | None = None,
    aux_loss: Callable | None = None,
    title: str = "fit",
) -> list[float]:
    """Train `parameters` and return the target loss of each step.

    tasks(model, ids) is called before each forward. aux_loss(model, mask) is called after it and
    added to the loss that is minimised; the returned losses do not contain it.
    """
    parameters = list(parameters)
    optimizer, scheduler = schedule.optimizers(parameters)
    model.train()
    curve = []
    progress = tqdm(batches, total=schedule.steps, desc=title, unit="step", disable=None)
    for batch in progress:
        losses, _, counted = token_losses(model, batch, tasks)
        loss = losses.sum() / counted.sum()
        total = loss if aux_loss is None else loss + aux_loss(model, batch.attention_mask.bool())
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, schedule.max_norm)
        optimizer.step()
        scheduler.step()
        curve.append(loss.item())
        if not math.isfinite(curve[-1]):
            raise FloatingPointError(f"{title}: the loss is {curve[-1]} at step {len(curve)}")
        progress.set_postfix(loss=f"{curve[-1]:.3f}")
    return curve


def prompts_only(batch: Batch) -> Batch:
    """Return the batch with labels on the prompts and none on the answers.

    input_ids keeps the answers: no position of a prompt attends to them.
    """
    is_prompt = (batch.labels == IGNORED) & (batch.attention_mask == 1)
    return batch._replace(labels=torch.where(is_prompt, batch.input_ids, IGNORED))


def make_plan(
    preset: str, num_tasks: int, aux: str | None = None, dropout: float | None = None
) -> list[Placement]:
    """Return the configs of a preset, each with the names of the linears that it adapts."""
    # In bfloat16, rounding would lose most updates of the adapters.
    (name, targets), *others = PLANS[preset]
    mixture = MoeLoraConfig.preset(name, adapter_dtype="float32")
    if mixture.router == "task":
        mixture = mixture.replace(num_tasks=num_tasks)
    if aux is not None:
        if mixture.granularity != "token" or mixture.router is None:
            raise ValueError(f"aux: expected a preset with a router per token, got {preset}")
        mixture = mixture.replace(aux=tuple(aux.split(",")))
    plan = [(mixture, targets)]
    plan += [(MoeLoraConfig.preset(n, adapter_dtype="float32"), names) for n, names in others]
    if dropout is not None:
        plan = [(config.replace(dropout=dropout), names) for config, names in plan]
    return plan


def read_base(path: str | Path, args: argparse.Namespace) -> torch.nn.Module:
    """Return the model stored at `path`, in the dtype and on the device of `args`."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[args.dtype])
    model.config.use_cache = False
    return model.to(args.device)


def pretrain(encoder: Encoder, train: list[Sample], args: argparse.Namespace):
    """Return the small model, trained on the prompts."""
    model = make_base(ByteTokenizer.vocab_size, args.max_length, args.hidden, args.layers)
    model.to(args.device)
    if args.pretrain_steps:
        groups = shuffled(train, args.batch, args.pretrain_steps, args.seed)
        batches = (prompts_only(encoder.batch(group)) for group in groups)
        schedule = Schedule(args.pretrain_steps, args.pretrain_lr)
        curve = fit(model, model.parameters(), batches, schedule, title="pre-train on prompts")
        print(f"pre-training on the prompts: loss {curve[0]:.3f} -> {curve[-1]:.3f}")
    return model


def write_json(path: Path, content: dict) -> None:
    """Write `content` as indented, strict JSON (NaN raises)."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def check_reload(model, plan: list[Placement], path: Path, base_path, args, batch: Batch, tasks):
    """Assert that the stored base with the stored adapter gives the same bits as `model`."""
    fresh = read_base(base_path, args)
    stored = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    restored = [
        (MoeLoraConfig.from_dict(entry["config"]), entry["target_modules"])
        for entry in stored["adapters"]
    ]
    assert restored == plan, "adapter_config.json does not restore the configs"
    add_adapters(fresh, restored)
    load_adapter(fresh, path / "adapter.safetensors")
    logits = []
    for network in (model, fresh):
        network.eval()
        if tasks is not None:
            tasks(network, batch.task_ids)
        with torch.no_grad():
            logits.append(network(batch.input_ids, attention_mask=batch.attention_mask).logits)
    assert torch.equal(*logits), "the reloaded adapter gives different logits"
    print("reload: identical")


def main(argv: list[str] | None = None) -> dict:
    """Run the example and return the content of metrics.json."""
    args = parse_arguments(argv, sorted(PLANS))
    # fit shows its own progress bar.
    disable_progress_bar()
    start = time.perf_counter()
    try:
        make_plan(args.preset, 1, args.aux, args.dropout)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    try:
        if args.data is None:
            print("no --data: training on five generated toy tasks, not on real text")
            train, dev = generate(args.seed)
        else:
            train, dev = load_folder(args.data)
    except DataError as error:
        raise SystemExit(f"error in the data, nothing was written:\n{error}") from None
    task_names = sorted({sample.task for sample in train})
    # Id 0 is reserved for "no task".
    task_ids = {name: number for number, name in enumerate(task_names, 1)}
    print(f"{len(train)} training and {len(dev)} dev samples of {len(task_ids)} tasks")

    tokenizer = ByteTokenizer() if args.model is None else AutoTokenizer.from_pretrained(args.model)
    if tokenizer.eos_token_id is None:
        raise SystemExit(f"error: the tokenizer of {args.model} has no end-of-sequence token")
    encoder = Encoder(tokenizer, task_ids, args.max_length, args.device)
    cut = sum(encoder.is_cut(sample) for sample in train + dev)
    if cut:
        print(f"{cut} targets are longer than --max-length {args.max_length} allows: end cut off")

    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SystemExit(f"error: --out: {error}") from None

    plan = make_plan(args.preset, len(task_ids), args.aux, args.dropout)
    tasks = set_tasks if any(config.router == "task" for config, _ in plan) else None
    torch.manual_seed(args.seed)
    if args.model is None:
        base_path = args.out / "base"
        pretrain(encoder, train, args).save_pretrained(base_path)
    else:
        base_path = args.model
    model = read_base(base_path, args)

    torch.manual_seed(args.seed)
    names = add_adapters(model, plan)
    trainable = sum(parameter.numel() for parameter in adapter_parameters(model))
    frozen = sum(parameter.numel() for parameter in model.parameters()) - trainable
    print(
        f"{args.preset}: adapters in {sum(map(len, names))} linears, {trainable:,} trainable "
        f"and {frozen:,} frozen parameters, {args.dtype} on {args.device}"
    )

    before = evaluate(model, encoder, dev, tasks)
    groups = shuffled(train, args.batch, args.steps, args.seed + 1)
    schedule, title, logs = Schedule(args.steps, args.lr), f"fine-tune {args.preset}", {}
    fit_start = time.perf_counter()
    if args.trainer:
        # Imported only if it is used: it needs accelerate.
        from with_trainer import fit_with_trainer

        optimizers = schedule.optimizers(adapter_parameters(model))
        curve, logs["trainer_logs"] = fit_with_trainer(
            model, encoder, groups, optimizers, args, max_norm=schedule.max_norm, title=title
        )
    else:
        curve = fit(
            model,
            adapter_parameters(model),
            map(encoder.batch, groups),
            schedule,
            tasks=tasks,
            aux_loss=collect_aux_loss,
            title=title,
        )
    seconds = time.perf_counter() - fit_start
    after = evaluate(model, encoder, dev, tasks)
    train_after = evaluate(model, encoder, train, tasks, rank_choices=False)
    print(format_table(train_after, before, after))
    load = expert_load(model, encoder, dev, names[0], tasks)

    save_adapter(model, args.out / "adapter.safetensors")
    adapters = [{"config": config.to_dict(), "target_modules": targets} for config, targets in plan]
    description = {
        "preset": args.preset,
        "base": str(args.model or "base"),
        "task_ids": task_ids,
        "adapters": adapters,
    }
    metrics = {
        "command": {key: str(value) for key, value in vars(args).items()},
        "trainable_parameters": trainable,
        "frozen_parameters": frozen,
        "seconds_per_step": seconds / args.steps,
        "train_loss": curve,
        **logs,
        "train_after": train_after,
        "dev_before": before,
        "dev_after": after,
        "expert_load": {
            "axes": ["task", "layer", "expert"],
            "tasks": task_names,
            "layers": names[0],
            "values": load.tolist(),
        },
    }
    write_json(args.out / "adapter_config.json", description)
    write_json(args.out / "metrics.json", metrics)
    plot_loss(args.out / "loss_curve.png", curve, before, after, args.preset)
    plot_expert_load(args.out / "expert_load.png", load, task_names, names[0], args.preset)
    check_reload(model, plan, args.out, base_path, args, encoder.batch(dev[:EVAL_BATCH]), tasks)
    print(f"{args.out}: written, {time.perf_counter() - start:.0f} s in all")
    return metrics


if __name__ == "__main__":
    main()
