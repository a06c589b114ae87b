"""Generate with a mixture of LoRA experts, and measure how much of the base's speed is left.

    python examples/generate.py                              # a small Qwen2 with random weights
    python examples/generate.py --adapter out/ming           # what finetune_multitask.py wrote
    python examples/generate.py --model PATH --dtype bf16 --batch 1,16 --static
    python examples/generate.py --preset ming --loop         # beside a loop over the experts

First the model with experts streams an answer to --prompt. Then each model generates --tokens
tokens for every prompt of a batch, greedily, one model after the other, --repeats times. The table
has the median tokens per second, and as `retention` the median over the repetitions of

    tokens per second with experts / tokens per second of the base

A time contains the prompt, which all models read in one call. Without --adapter the experts are
new, and B is random. The models share the frozen weights.

--static generates with a static cache. On a GPU, transformers then compiles the model.
"""

import argparse
import copy
import json
import time
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from command_line import DTYPES, positive
from finetune_multitask import PLANS, Placement, add_adapters, make_base, make_plan, read_base
from promptcblue import ByteTokenizer
from torch import Tensor, nn
from transformers import AutoTokenizer, CompileConfig, TextStreamer

from moelora_kernels import MoeLoraConfig, MoeLoraLinear, link_siblings, load_adapter, set_tasks

MAX_LENGTH = 4096


class ExpertLoop(nn.Module):
    """A MoeLoraLinear in plain PyTorch: a loop over the experts, each on its own tokens."""

    def __init__(self, layer: MoeLoraLinear):
        super().__init__()
        config, experts = layer.config, layer.config.num_experts
        self.base, self.router, self.top_k = layer.base_layer, layer.router, config.top_k
        self.scale = config.alpha / config.rank
        self.a = nn.ParameterList(block.clone() for block in layer.lora_A.chunk(experts))
        self.b = nn.ParameterList(block.clone() for block in layer.lora_B.chunk(experts, dim=1))

    def expert(self, x: Tensor, e: int) -> Tensor:
        """Return scale * B_e A_e x."""
        x = x.to(self.a[e].dtype)
        return F.linear(F.linear(x, self.a[e]) * self.scale, self.b[e])

    def forward(self, x: Tensor) -> Tensor:
        rows, y = x.flatten(0, -2), self.base(x)
        out = y.flatten(0, -2)
        if self.router is None:
            return (out + self.expert(rows, 0).to(y.dtype)).view_as(y)
        logits = self.router(rows.to(self.router.weight.dtype))
        top, experts = logits.float().topk(self.top_k, dim=-1)
        weights = top.softmax(dim=-1)
        for e in range(len(self.a)):
            token, slot = torch.where(experts == e)
            delta = self.expert(rows[token], e) * weights[token, slot, None]
            out = out.index_add(0, token, delta.to(y.dtype))
        return out.view_as(y)


def loop_problem(plan: list[Placement]) -> str:
    """Return why `ExpertLoop` does not compute the layers of a plan, or ""."""
    for config, _ in plan:
        is_plain = config.router is None and config.num_experts == 1
        is_routed = config.router == "linear" and config.top_k is not None
        if not (is_plain or is_routed) or config.share != "none" or config.scaling != "alpha/r":
            return "expected experts that a linear router chooses with top-k"
    return ""


def sharing(model: nn.Module) -> nn.Module:
    """Return a copy of a model that has the same parameters, not copies of them."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def with_loops(model: nn.Module) -> nn.Module:
    """Return a copy of a model in which an `ExpertLoop` stands in the place of each layer."""
    model = sharing(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, MoeLoraLinear):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, ExpertLoop(layer))
    return model


def check_loops(model: nn.Module, loops: nn.Module, ids: Tensor) -> None:
    """Assert that a model and its loops agree on the logits of a prompt, but for rounding."""
    with torch.no_grad():
        actual, expected = (network(ids).logits.float() for network in (model, loops))
    error = (actual - expected).norm() / expected.norm()
    assert error < 0.05, f"the loop over the experts gives other logits: off by {error:.1e}"


def read_adapter(folder: Path) -> tuple[list[Placement], str]:
    """Return the plan and the base of a folder that finetune_multitask.py wrote."""
    stored = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    plan = [
        (MoeLoraConfig.from_dict(entry["config"]), entry["target_modules"])
        for entry in stored["adapters"]
    ]
    return plan, str(folder / "base") if stored["base"] == "base" else stored["base"]


def make_models(args: argparse.Namespace) -> tuple[dict[str, nn.Module], object]:
    """Return the models by name, base first, and the tokenizer."""
    torch.manual_seed(args.seed)
    options = {
        name: value
        for name in ("num_experts", "rank", "top_k")
        if (value := getattr(args, name)) is not None
    }
    if args.adapter:
        plan, path = read_adapter(args.adapter)
    else:
        plan, path = make_plan(args.preset, num_tasks=1), args.model
        plan[0] = plan[0][0].replace(**options), plan[0][1]
    has_bytes = path is None or (args.adapter and path == str(args.adapter / "base"))
    tokenizer = ByteTokenizer() if has_bytes else AutoTokenizer.from_pretrained(path)
    if args.loop and (problem := loop_problem(plan)):
        raise ValueError(f"--loop: {problem}")
    if path is None:
        base = make_base(ByteTokenizer.vocab_size, MAX_LENGTH, args.hidden, args.layers)
        base = base.to(args.device, DTYPES[args.dtype])
    else:
        base = read_base(path, args)
    base.eval()
    model = sharing(base)
    add_adapters(model, plan)
    if args.adapter:
        load_adapter(model, args.adapter / "adapter.safetensors")
    else:
        for layer in (module for module in model.modules() if isinstance(module, MoeLoraLinear)):
            nn.init.normal_(layer.lora_B, std=0.02)
    models = {"base": base, "experts": model.eval()}
    if args.loop:
        models["loop"] = with_loops(model)
    link_siblings(model)
    args.has_tasks = any(config.router == "task" for config, _ in plan)
    return models, tokenizer


def generate(name: str, model: nn.Module, ids: Tensor, args: argparse.Namespace, **options):
    """Generate args.tokens tokens for every prompt of ids [B, L]; return [B, L + tokens]."""
    if name == "experts" and args.has_tasks:
        set_tasks(model, [args.task] * len(ids))
    if args.static:
        # The host of a loop waits for the device, which a graph cannot do.
        compiled = {"compile_config": CompileConfig(fullgraph=True)}
        options |= {"disable_compile": True} if name == "loop" else compiled
        options["cache_implementation"] = "static"
    return model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=args.tokens,
        min_new_tokens=args.tokens,
        do_sample=False,
        use_cache=True,
        **options,
    )


def tokens_per_second(
    models: dict[str, nn.Module], ids: Tensor, args: argparse.Namespace
) -> dict[str, list[float]]:
    """Return a sample of each model per repetition; the models take turns."""
    samples: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(1 + args.repeats):
        for name, model in models.items():
            start = time.perf_counter()
            generate(name, model, ids, args)
            if ids.is_cuda:
                torch.cuda.synchronize(ids.device)
            samples[name].append(len(ids) * args.tokens / (time.perf_counter() - start))
    # The first repetition warms up.
    return {name: values[1:] for name, values in samples.items()}


def ratio(samples: dict[str, list[float]], name: str, over: str) -> float:
    """Return the median over the repetitions of one model's speed over another's."""
    return median(a / b for a, b in zip(samples[name], samples[over], strict=True))


def table_row(batch: int, samples: dict[str, list[float]]) -> dict[str, float]:
    """Return the entries of a line of the table by the names of their columns."""
    row = {"batch": batch} | {f"{name} tok/s": median(v) for name, v in samples.items()}
    row["retention"] = ratio(samples, "experts", "base")
    if "loop" in samples:
        row["loop's retention"] = ratio(samples, "loop", "base")
        row["experts / loop"] = ratio(samples, "experts", "loop")
    return row


def format_row(row: dict[str, float]) -> str:
    """Return the entries of a line, each below the name of its column."""
    shown = []
    for name, value in row.items():
        percent = "retention" in name
        text = f"{value:.1%}" if percent else f"{value:.2f}" if "/ " in name else f"{value:.0f}"
        shown.append(text.rjust(len(name)))
    return "  ".join(shown)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the checked arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--adapter", type=Path, help="a folder of finetune_multitask.py: base and experts")
    add("--model", help="a local folder or a hub name; default: a small model built here")
    add("--hidden", type=positive, default=256, help="width of the small model: 256")
    add("--layers", type=positive, default=4, help="depth of the small model: 4")
    add("--preset", choices=sorted(PLANS), default="ming", help="the mixture: ming")
    add("--experts", type=positive, dest="num_experts", help="default: the preset's")
    add("--rank", type=positive, help="rank of one expert; default: the preset's")
    add("--top-k", type=positive, help="experts per token; default: the preset's")
    add("--task", type=positive, default=1, help="task of all prompts, for a gate of tasks: 1")
    add("--prompt", default="Which of 12 and 7 is larger?", help="the text before the answer")
    add("--tokens", type=positive, default=32, help="new tokens of each prompt: 32")
    add("--batch", default="1,8,16,32,64", help="prompts at a time: 1,8,16,32,64")
    add("--repeats", type=positive, default=5, help="samples of each model: 5")
    add("--static", action="store_true", help="a static cache; on a GPU also torch.compile")
    add("--loop", action="store_true", help="also measure a loop over the experts")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    add("--dtype", choices=sorted(DTYPES), default="fp32", help="dtype of the frozen model")
    add("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.hidden % 32:
        parser.error(f"argument --hidden: must be a multiple of 32, got {args.hidden}")
    try:
        args.batch = [positive(part) for part in args.batch.split(",")]
    except (ValueError, argparse.ArgumentTypeError) as error:
        parser.error(f"argument --batch: {error}")
    mixture = ("model", "num_experts", "rank", "top_k")
    if args.adapter and any(getattr(args, name) is not None for name in mixture):
        parser.error("argument --adapter: has a base and a mixture; expected no option for these")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    return args


def main(argv: list[str] | None = None) -> list[dict[str, float]]:
    """Run the example and return the lines of the table."""
    args = parse_arguments(argv)
    try:
        models, tokenizer = make_models(args)
    except (OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    prompt = tokenizer.encode(args.prompt, add_special_tokens=False)
    if tokenizer.bos_token_id is not None:
        prompt = [tokenizer.bos_token_id, *prompt]
    ids = torch.tensor([prompt], device=args.device)
    if "loop" in models:
        check_loops(models["experts"], models["loop"], ids)
    print(args.prompt, end=" ", flush=True)
    generate("experts", models["experts"], ids, args, streamer=TextStreamer(tokenizer, True))

    rows = []
    for batch in args.batch:
        rows.append(table_row(batch, tokens_per_second(models, ids.repeat(batch, 1), args)))
        if len(rows) == 1:
            print("\n" + "  ".join(rows[0]))
        print(format_row(rows[-1]), flush=True)
    return rows


if __name__ == "__main__":
    main()
