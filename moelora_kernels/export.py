"""Export one task of an adapter as a plain LoRA in PEFT's format.

    python -m moelora_kernels.export --task N IN OUT

IN is a file of `save_adapter`, a folder of `moelora_kernels.peft`, or a folder of MOELoRA-peft. The
base model is not needed. The command writes the directory OUT with adapter_config.json and
adapter_model.safetensors. `PeftModel.from_pretrained(base, OUT)` then computes the same as the
mixture does for task N. Leave --task out if no gate depends on the task (plain LoRA).

The directory meets vLLM's conditions: it holds lora_A and lora_B of linears and nothing else (no
modules_to_save, no DoRA, no biases), and lora_alpha / r is 1 for every layer. The command prints r;
vLLM's `--max-lora-rank` must be at least r.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from moelora_kernels.checkpoints import load_adapter_state_dict
from moelora_kernels.checkpoints.description import build
from moelora_kernels.checkpoints.files import load_safetensors
from moelora_kernels.checkpoints.folders import read_folder
from moelora_kernels.nn.merge import REDUCED_BASE, Task
from moelora_kernels.nn.merge_model import task_layers

# Name of a linear -> A [R, I] and B [O, R] of y = x Wt + b + (x At) Bt.
PlainLora = dict[str, tuple[Tensor, Tensor]]


def lora_of_model(model: nn.Module, task: Task | None = None) -> PlainLora:
    """Return the plain LoRA of one task for every layer of `model` (`MoeLoraLinear.export_lora`).

    Raises:
        ValueError: a layer is not a plain LoRA, for example because its gate depends on x (the
            message names every such layer); or `task` is missing, out of range, or used by no
            layer.
    """
    layers, problems = task_layers(model, task)
    names: dict[nn.Module, str] = {}
    for name, layer in layers.items():
        if not name:
            raise ValueError("model: expected a model, got a layer; use layer.export_lora(task)")
        if layer.config.init == "svd_segments":
            problems.append(f"{name}: {REDUCED_BASE}")
        if names.setdefault(layer, name) != name:
            problems.append(
                f"{name}: the same layer as {names[layer]}, but PEFT would adapt only one of them"
            )
    if problems:
        raise ValueError("model: not a plain LoRA:\n  " + "\n  ".join(problems))
    return {name: layer.export_lora(task) for name, layer in layers.items()}


def lora_config(
    lora: PlainLora, base_model: str | None = None, task_type: str | None = None
) -> dict[str, Any]:
    """Return the adapter_config.json of a PEFT LoRA with these tensors and scaling 1.

    r is the largest rank. If ranks differ, rank_pattern and alpha_pattern list the rank of every
    layer. PEFT uses the first pattern that a name ends with, so longer names come first.
    """
    ranks = {name: a.shape[0] for name, (a, _) in lora.items()}
    largest = max(ranks.values())
    by_length = sorted(ranks, key=len, reverse=True)
    pattern = {} if len({*ranks.values()}) == 1 else {name: ranks[name] for name in by_length}
    return {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "target_modules": [*ranks],
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }


def export_lora(
    model: nn.Module,
    path: str | os.PathLike,
    task: Task | None = None,
    *,
    base_model: str | None = None,
    task_type: str | None = None,
) -> dict[str, Any]:
    """Write one task of `model` as a PEFT LoRA: adapter_config.json, adapter_model.safetensors.

    Args:
        model: a model whose gates do not depend on x. The base weights are not read.
        path: the directory to create.
        task: as in `MoeLoraLinear.merge`.
        base_model: base_model_name_or_path of the config: the name or path of the base model.
        task_type: PEFT's task type, such as "CAUSAL_LM"; None for a plain PeftModel.

    Returns:
        The config that was written.

    Raises:
        ValueError: `lora_of_model` raises; or A or B is not finite in the adapter's dtype, or is on
            the meta device.
        FileExistsError: `path` exists.

    Example:
        >>> import tempfile
        >>> from moelora_kernels import MoeLoraConfig, replace_linears
        >>> model = nn.Sequential(nn.Linear(8, 8))
        >>> replace_linears(model, MoeLoraConfig.preset("moelora", num_experts=2, rank=4), ["0"])
        ['0']
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     config = export_lora(model, f"{folder}/task3", task=3)
        >>> config["r"], config["target_modules"]
        (8, ['0'])
    """
    if Path(path).exists():
        raise FileExistsError(f"{os.fspath(path)}: it exists; pass a path that does not exist")
    lora = lora_of_model(model, task)
    state = {}
    for name, matrices in lora.items():
        for key, matrix in zip("AB", matrices, strict=True):
            if matrix.is_meta:
                raise ValueError(f"{name}: lora_{key} is on the meta device, without values")
            if not matrix.isfinite().all():
                raise ValueError(
                    f"{name}: lora_{key} of task {task!r} has values that are not finite"
                )
            state[f"base_model.model.{name}.lora_{key}.weight"] = matrix.contiguous().cpu()
    config = lora_config(lora, base_model, task_type)
    Path(path).mkdir(parents=True)
    save_file(state, Path(path) / "adapter_model.safetensors", metadata={"format": "pt"})
    (Path(path) / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
    return config


def read_adapter(path: str | os.PathLike) -> nn.Module:
    """Return a model that has the layers of an adapter under their names, without base weights.

    path: a file of `save_adapter`, or a folder (see `checkpoints.folders`).

    Raises:
        ValueError: the file is not a safetensors file, has no description of its layers (see
            `checkpoints.description`) or one that cannot be read, its tensors do not fit the
            description, or a layer needs its base.
        OSError: a file cannot be opened.
    """
    try:
        return read_folder(path) if Path(path).is_dir() else _read_file(path)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        # Any type of error: a damaged file can hold any JSON value as an option or a size.
        reason = f"{type(error).__name__}: {error}"
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        reason = str(error)
    raise ValueError(f"{os.fspath(path)}: the layers that it describes cannot be built ({reason})")


def _read_file(path: str | os.PathLike) -> nn.Module:
    """Return a model that has the layers of a file of `save_adapter`."""
    state = load_safetensors(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    if "layout" not in metadata:
        raise ValueError(
            f"{os.fspath(path)}: it has no description of its layers; load it into its model, "
            "then save it again with save_adapter, or export it with export_lora"
        )
    model = build(json.loads(metadata["layout"]))
    load_adapter_state_dict(model, state)
    return model


def main(arguments: list[str] | None = None) -> None:
    """Read the adapter IN, write the LoRA OUT, and print its number of linears and its rank."""
    parser = argparse.ArgumentParser(
        prog="python -m moelora_kernels.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--task", type=int, metavar="N", help="task id, from 1")
    parser.add_argument("--base-model", metavar="NAME", help="name or path of the base model")
    parser.add_argument("--task-type", metavar="TYPE", help="task type of PEFT, such as CAUSAL_LM")
    parser.add_argument("adapter", metavar="IN", help="a file of save_adapter, or a folder")
    parser.add_argument("out", metavar="OUT", help="the directory to create")
    args = parser.parse_args(arguments)
    try:
        config = export_lora(
            read_adapter(args.adapter),
            args.out,
            args.task,
            base_model=args.base_model,
            task_type=args.task_type,
        )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{args.out}: LoRA of {len(config['target_modules'])} linears, r = {config['r']}")


if __name__ == "__main__":
    main()
