"""One task of an adapter as a plain LoRA that PEFT and what reads its files can load.

    python -m moelora_kernels.export --task N IN OUT

IN is a file of `save_adapter`, a folder of `moelora_kernels.peft` or one of MOELoRA-peft; the base
model is not needed. OUT becomes a directory with
adapter_config.json and adapter_model.safetensors: PEFT's LoRA with scaling 1, where
`PeftModel.from_pretrained(base, OUT)` computes what the mixture computes for task N. --task is left
out where no gate depends on it (plain LoRA).

What vLLM asks of such a directory holds: tensors are lora_A and lora_B of linears and nothing else
(no modules_to_save, DoRA or biases), and lora_alpha / r, by which it scales every layer, is 1 for
all of them. Its `--max-lora-rank` must reach r, which the command prints.
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

# name of a linear -> A [R, I] and B [O, R] of y = x Wt + b + (x At) Bt.
PlainLora = dict[str, tuple[Tensor, Tensor]]


def lora_of_model(model: nn.Module, task: Task | None = None) -> PlainLora:
    """What one task makes of every layer of `model`, see `MoeLoraLinear.export_lora`.

    Raises ValueError that names each layer whose gate depends on x, or which is no plain LoRA for
    another reason; and for a task that is missing, out of range or read by no layer.
    """
    layers, problems = task_layers(model, task)
    names: dict[nn.Module, str] = {}
    for name, layer in layers.items():
        if not name:
            raise ValueError("model: it is a layer without a name; use layer.export_lora(task)")
        if layer.config.init == "svd_segments":
            problems.append(f"{name}: {REDUCED_BASE}")
        if names.setdefault(layer, name) != name:
            problems.append(f"{name}: it is {names[layer]} as well, and PEFT adapts one of the two")
    if problems:
        raise ValueError("model: it is no plain LoRA:\n  " + "\n  ".join(problems))
    return {name: layer.export_lora(task) for name, layer in layers.items()}


def lora_config(
    lora: PlainLora, base_model: str | None = None, task_type: str | None = None
) -> dict[str, Any]:
    """The adapter_config.json of a PEFT LoRA with these tensors and scaling 1.

    r is the largest rank; where ranks differ, rank_pattern and alpha_pattern give that of every
    layer. PEFT takes the first pattern that ends a name, so that longer names come first.
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
        model: a model whose gates do not depend on x. Only its layers are read, never their bases.
        path: the directory to make.
        task: as in `MoeLoraLinear.merge`.
        base_model: base_model_name_or_path of the config, the name or path of the plain model.
        task_type: PEFT's, such as "CAUSAL_LM"; None for a plain PeftModel.

    Returns:
        The config as written.

    Raises:
        ValueError: as `lora_of_model`; or a value that is not finite in the dtype of the adapter,
            or an adapter without values (meta device).
        FileExistsError: there is something at `path`.
    """
    if Path(path).exists():
        raise FileExistsError(f"{os.fspath(path)}: it exists, give a path where nothing is")
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
    """The layers of an adapter under their names, without the model around and under them.

    path: a file of `save_adapter`, or a folder, see `folders`.

    Raises ValueError where `path` is no safetensors file, has no layout in it (see `layout`) or one
    that cannot be read, or holds other tensors than its layout says, or layers that are nothing
    without their base.
    """
    try:
        return read_folder(path) if Path(path).is_dir() else _read_file(path)
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        # Of whatever type: anything may stand where options and sizes are expected.
        reason = f"{type(error).__name__}: {error}"
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        reason = str(error)
    raise ValueError(f"{os.fspath(path)}: the layers it describes cannot be made ({reason})")


def _read_file(path: str | os.PathLike) -> nn.Module:
    """The layers of a file of `save_adapter`."""
    state = load_safetensors(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata() or {}
    if "layout" not in metadata:
        raise ValueError(
            f"{os.fspath(path)}: it does not say which options its layers have; load it into its "
            "model and save it anew with save_adapter, or export from there with export_lora"
        )
    model = build(json.loads(metadata["layout"]))
    load_adapter_state_dict(model, state)
    return model


def main(arguments: list[str] | None = None) -> None:
    """Read IN, write OUT, print what it is."""
    parser = argparse.ArgumentParser(
        prog="python -m moelora_kernels.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--task", type=int, metavar="N", help="task id, from 1")
    parser.add_argument("--base-model", metavar="NAME", help="name or path of the plain model")
    parser.add_argument("--task-type", metavar="TYPE", help="of PEFT, such as CAUSAL_LM")
    parser.add_argument("adapter", metavar="IN", help="a file of save_adapter, or a folder")
    parser.add_argument("out", metavar="OUT", help="the directory to make")
    given = parser.parse_args(arguments)
    try:
        config = export_lora(
            read_adapter(given.adapter),
            given.out,
            given.task,
            base_model=given.base_model,
            task_type=given.task_type,
        )
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{given.out}: LoRA of {len(config['target_modules'])} linears, r = {config['r']}")


if __name__ == "__main__":
    main()
