"""Fine-tune a language model on many tasks at once with a mixture of LoRA experts.

    python examples/finetune_multitask.py --preset ming --data ../shared/data/promptcblue
    python examples/finetune_multitask.py --preset moelora            # generated toy tasks
    python examples/finetune_multitask.py --preset ming --aux load_balance --trainer

With --trainer Hugging Face's Trainer does the training, in the same steps as the loop below; its
logs, with the expert load, are in metrics.json.

Without --model there is no pre-trained model to adapt, so the script makes one: a small Qwen2 over
UTF-8 bytes, trained for --pretrain-steps as a plain language model on the *prompts* of the training
set. It never sees an answer before it is frozen, which imitates the real situation: a model that
knows the language of the prompts but not the tasks. From then on the adapters alone are trained,
on the answers alone. Every number printed under "before" belongs to that frozen model.

Written to --out: adapter.safetensors, adapter_config.json, metrics.json, loss_curve.png,
expert_load.png and, for a model made here, base/. The adapter is then loaded into a base read
afresh from disk, whose logits must be the same bits.

On a CPU build the native library first: without it the dropout masks of the moelora preset, one per
expert, take most of the time of a step (--dropout 0 does without them).
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
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
# preset -> what goes where, the mixture first. MING puts plain LoRA on the attention; LoRAMoE and
# HydraLoRA leave it alone.
PLANS = {
    "moelora": [("moelora", ATTENTION + FFN)],
    "ming": [("ming", FFN), ("lora", ATTENTION)],
    "loramoe": [("loramoe", FFN)],
    "hydralora": [("hydralora", FFN)],
    "mola": [("mola", ATTENTION + FFN)],
    "lora": [("lora", ATTENTION + FFN)],
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

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
        """The learning rate of `step` as a fraction of the highest."""
        warmup = max(1, round(self.warmup * self.steps))
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.steps - warmup)))

    def optimizers(self, parameters: list[torch.nn.Parameter]):
        """The optimizer of `parameters`, and what sets its learning rate."""
        optimizer = torch.optim.AdamW(
            parameters, lr=self.lr, betas=(0.9, 0.95), weight_decay=self.weight_decay
        )
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, self.factor)


def make_base(vocab_size: int, max_length: int, hidden: int, layers: int) -> Qwen2ForCausalLM:
    """A small Qwen2 with random weights: grouped-query attention, and biases on q, k, v."""
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
    """Freeze `model` and put the plan's adapters into it; the names of the layers of each entry."""
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

    tasks(model, ids) is called before each forward, aux_loss(model, mask) after it; its value is
    minimised with the target loss but not part of what is returned.
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
    """The same batch with the loss on the prompts alone: the answers have no label.

    The answers may stay in input_ids, because no position of the prompt looks ahead to them.
    """
    is_prompt = (batch.labels == IGNORED) & (batch.attention_mask == 1)
    return batch._replace(labels=torch.where(is_prompt, batch.input_ids, IGNORED))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Fine-tune a causal language model on many tasks with LoRA experts.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    def positive(text: str) -> int:
        if (value := int(text)) < 1:
            raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
        return value

    def natural(text: str) -> int:
        if (value := int(text)) < 0:
            raise argparse.ArgumentTypeError(f"must not be negative, got {value}")
        return value

    def rate(text: str) -> float:
        if not 0.0 < (value := float(text)) < float("inf"):
            raise argparse.ArgumentTypeError(f"must be positive and finite, got {text}")
        return value

    add = parser.add_argument
    add("--data", type=Path, help="folder with train.jsonl and dev.jsonl; default: toy tasks")
    add("--preset", choices=sorted(PLANS), default="moelora", help="which mixture to train")
    add("--aux", help="auxiliary losses of the routers, comma separated: load_balance,z")
    add("--dropout", type=float, help="on the input of the adapters; default: the preset's")
    add("--model", help="a local folder or a hub name; default: a small model made here")
    add("--hidden", type=positive, default=128, help="width of the model made here")
    add("--layers", type=positive, default=4, help="depth of the model made here")
    add("--pretrain-steps", type=natural, default=100, help="for the model made here")
    add("--pretrain-lr", type=rate, default=3e-3, help="peak learning rate of that")
    add("--steps", type=positive, default=200, help="fine-tuning steps")
    add("--lr", type=rate, default=5e-3, help="peak learning rate; 2e-4 suits a real model")
    add("--batch", type=positive, default=8, help="samples in a batch, all tasks mixed")
    add("--max-length", type=positive, default=256, help="tokens of prompt and target")
    add("--out", type=Path, help="folder for the results; default: out/<preset>")
    add("--seed", type=int, default=0, help="of the weights, the order and the toy tasks")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--dtype", choices=sorted(DTYPES), default="fp32", help="of the frozen model")
    add("--trainer", action="store_true", help="train with Hugging Face's Trainer (and accelerate)")
    args = parser.parse_args(argv)
    if args.max_length < 8:
        parser.error(f"argument --max-length: must be at least 8, got {args.max_length}")
    if args.hidden % 32:
        parser.error(f"argument --hidden: must be a multiple of 32, got {args.hidden}")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.trainer and args.device not in ("cpu", "cuda"):
        parser.error(f"argument --device: with --trainer cpu or cuda, got {args.device}")
    args.out = args.out or Path("out") / args.preset
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"argument --out: {args.out} exists and is not a folder")
    return args


def make_plan(
    preset: str, num_tasks: int, aux: str | None = None, dropout: float | None = None
) -> list[Placement]:
    """The configurations of a preset and the linears that each of them takes."""
    # Adapters in bfloat16 would lose most updates to rounding.
    (name, targets), *others = PLANS[preset]
    mixture = MoeLoraConfig.preset(name, adapter_dtype="float32")
    if mixture.router == "task":
        mixture = mixture.replace(num_tasks=num_tasks)
    if aux is not None:
        if mixture.granularity != "token" or mixture.router is None:
            raise ValueError(f"aux: {preset} has no router per token to regularise")
        mixture = mixture.replace(aux=tuple(aux.split(",")))
    rest = [(MoeLoraConfig.preset(n, adapter_dtype="float32"), where) for n, where in others]
    plan = [(mixture, targets), *rest]
    if dropout is not None:
        plan = [(config.replace(dropout=dropout), where) for config, where in plan]
    return plan


def read_base(path: str | Path, args: argparse.Namespace) -> torch.nn.Module:
    """The model stored at `path`, in the dtype and on the device asked for."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[args.dtype])
    model.config.use_cache = False
    return model.to(args.device)


def pretrain(encoder: Encoder, train: list[Sample], args: argparse.Namespace):
    """Make the small model and teach it the language of the prompts."""
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
    """Write `content` so that people can read it, and as strict JSON: no NaN."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def check_reload(model, plan: list[Placement], path: Path, base_path, args, batch: Batch, tasks):
    """Assert that a base read afresh plus the stored adapter gives the same bits as `model`."""
    fresh = read_base(base_path, args)
    stored = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    restored = [
        (MoeLoraConfig.from_dict(entry["config"]), entry["target_modules"])
        for entry in stored["adapters"]
    ]
    assert restored == plan, "adapter_config.json does not give the configurations back"
    add_adapters(fresh, restored)
    load_adapter(fresh, path / "adapter.safetensors")
    logits = []
    for each in (model, fresh):
        each.eval()
        if tasks is not None:
            tasks(each, batch.task_ids)
        with torch.no_grad():
            logits.append(each(batch.input_ids, attention_mask=batch.attention_mask).logits)
    assert torch.equal(*logits), "the reloaded adapter gives other logits"
    print("reload: identical")


def main(argv: list[str] | None = None) -> dict:
    """Run the example and return what metrics.json holds."""
    args = parse_arguments(argv)
    # One bar at a time: fit has its own.
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
        # It needs accelerate, which the loop does not.
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
    described = {
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
    write_json(args.out / "adapter_config.json", described)
    write_json(args.out / "metrics.json", metrics)
    plot_loss(args.out / "loss_curve.png", curve, before, after, args.preset)
    plot_expert_load(args.out / "expert_load.png", load, task_names, names[0], args.preset)
    check_reload(model, plan, args.out, base_path, args, encoder.batch(dev[:EVAL_BATCH]), tasks)
    print(f"{args.out}: written, {time.perf_counter() - start:.0f} s in all")
    return metrics


if __name__ == "__main__":
    main()
