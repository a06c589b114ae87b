"""The command line of finetune_multitask.py, and the types of its numbers."""

import argparse
from pathlib import Path

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def positive(text: str) -> int:
    """Parse an integer of at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def natural(text: str) -> int:
    """Parse an integer of at least 0."""
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {value}")
    return value


def rate(text: str) -> float:
    """Parse a positive, finite number."""
    if not 0.0 < (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"must be positive and finite, got {text}")
    return value


def parse_arguments(argv: list[str] | None, presets: list[str]) -> argparse.Namespace:
    """Return the checked arguments. presets: the choices of --preset."""
    parser = argparse.ArgumentParser(
        description="Fine-tune a causal language model on many tasks with LoRA experts.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, help="folder with train.jsonl and dev.jsonl; default: toy tasks")
    add("--preset", choices=presets, default="moelora", help="which mixture to train")
    add("--aux", help="auxiliary losses of the routers, comma separated: load_balance,z")
    add("--dropout", type=float, help="dropout on the input of the adapters; default: the preset's")
    add("--model", help="a local folder or a hub name; default: a small model built here")
    add("--hidden", type=positive, default=128, help="width of the small model")
    add("--layers", type=positive, default=4, help="depth of the small model")
    add("--pretrain-steps", type=natural, default=100, help="training steps of the small model")
    add("--pretrain-lr", type=rate, default=3e-3, help="peak learning rate of these steps")
    add("--steps", type=positive, default=200, help="fine-tuning steps")
    add("--lr", type=rate, default=5e-3, help="peak learning rate; 2e-4 suits a real model")
    add("--batch", type=positive, default=8, help="samples in a batch, all tasks mixed")
    add("--max-length", type=positive, default=256, help="tokens of prompt and target")
    add("--out", type=Path, help="folder for the results; default: out/<preset>")
    add("--seed", type=int, default=0, help="seed of the weights, the order and the toy tasks")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--dtype", choices=sorted(DTYPES), default="fp32", help="dtype of the frozen model")
    add("--trainer", action="store_true", help="train with Hugging Face's Trainer (and accelerate)")
    args = parser.parse_args(argv)
    if args.max_length < 8:
        parser.error(f"argument --max-length: must be at least 8, got {args.max_length}")
    if args.hidden % 32:
        parser.error(f"argument --hidden: must be a multiple of 32, got {args.hidden}")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.trainer and args.device not in ("cpu", "cuda"):
        parser.error(f"argument --device: with --trainer must be cpu or cuda, got {args.device}")
    args.out = args.out or Path("out") / args.preset
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"argument --out: {args.out} exists and is not a folder")
    return args
