"""Adapter folders of others as layouts: of `moelora_kernels.peft`, and of MOELoRA-peft itself.

adapter_config.json     peft_type MOELORA: every option under its own name
                        peft_type MMOELORAS or MMOELORA: expert_num, r, lora_alpha, task_num, ...
adapter_model           .safetensors or .bin
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from moelora_kernels.checkpoints import load_adapter_state_dict, load_moelora_peft
from moelora_kernels.checkpoints.description import model_of
from moelora_kernels.checkpoints.files import read
from moelora_kernels.config import MoeLoraConfig

_OF_PEFT = re.compile(r"base_model\.model\.(.+)\.moelora_(experts|router)(?:_(.+))?\.([^.]+)$")
_OF_ORIGINAL = re.compile(
    r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.[^.]+)?\.lora[AB]\.0\.(?:mlp\.)?weight$"
)


def read_folder(path: str | Path) -> nn.Module:
    """The layers of an adapter folder under their names, over a `MissingBase` each.

    Raises ValueError for another peft_type, tensors that are no part of the layers (of
    modules_to_save, biases), and whatever does not fit the config.
    """
    config = json.loads((Path(path) / "adapter_config.json").read_text())
    kind, state = config.get("peft_type"), read(path)
    if kind == "MOELORA":
        layout, own = _layout_of_peft(config, state)
        model = model_of(layout)
        load_adapter_state_dict(model, own)
        return model
    if kind in ("MMOELORAS", "MMOELORA"):
        model = model_of(_layout_of_original(config, state))
        load_moelora_peft(model, state)
        return model
    raise ValueError(f"{path}: expected peft_type MOELORA, MMOELORAS or MMOELORA, got {kind!r}")


def _layout_of_peft(
    values: Mapping[str, Any], state: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Layout and state, under our names, of a folder that `moelora_kernels.peft` saved."""
    options = {f.name for f in dataclasses.fields(MoeLoraConfig)}
    config = MoeLoraConfig.from_dict({k: v for k, v in values.items() if k in options})
    own: dict[str, Tensor] = {}
    routed: list[str] = []
    for key, tensor in state.items():
        found = _OF_PEFT.match(key)
        if found is None:
            raise ValueError(f"{key}: no tensor of an adapter, a LoRA has no place for it")
        name, part, path, leaf = found.groups()
        inner = (
            "" if part == "experts" else "router." + (f"{path.replace('_', '.')}." if path else "")
        )
        own[f"{name}.{inner}{leaf}"] = tensor
        if part == "router":
            routed.append(name)
    names = [k.removesuffix(".lora_A") for k in own if k.endswith(".lora_A")]
    pairs = {n: (own[f"{n}.lora_A"], own[f"{n}.lora_B"]) for n in names if f"{n}.lora_B" in own}
    if not pairs:
        raise ValueError("adapter_model: no moelora_experts.lora_A and lora_B of any layer in it")
    return _layout(config, pairs, [name for name in routed if name in pairs]), own


def _layout_of_original(values: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """The layout of a folder of MOELoRA-peft: r is the total rank, task ids from 1 to task_num."""
    shapes: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        if found := _OF_ORIGINAL.match(key):
            shapes.setdefault(found[1], {})[found[2]] = tensor
    top = {key.removeprefix("base_model.model.") for key in state}
    shared = any(key.startswith("lora_gate.") for key in top)
    needed = ("expert_num", "r", "lora_alpha", "task_num", "task_embedding_dim")
    if missing := [name for name in needed if name not in values]:
        raise ValueError(f"adapter_config.json: it lacks {', '.join(missing)}")
    experts = values["expert_num"]
    if experts < 1 or values["r"] % experts:
        raise ValueError(
            f"adapter_config.json: r = {values['r']} is the rank of all experts together and no "
            f"multiple of expert_num = {experts}"
        )
    config = MoeLoraConfig.preset(
        "moelora",
        num_experts=experts,
        rank=values["r"] // experts,
        alpha=float(values["lora_alpha"]),
        num_tasks=values["task_num"],
        task_embedding_dim=values["task_embedding_dim"],
        task_gate="shared" if shared else "per_layer",
    )
    pairs = {n: (pair["A"], pair["B"]) for n, pair in shapes.items() if len(pair) == 2}
    if not pairs:
        raise ValueError("adapter_model: no lora_A.loraA.0 and lora_B.loraB.0 of any layer in it")
    return _layout(config, pairs, () if shared else pairs)


def _layout(
    config: MoeLoraConfig, pairs: Mapping[str, tuple[Tensor, Tensor]], routed: Iterable[str]
) -> dict[str, Any]:
    """The layout of layers of one config; a layer without a router of its own uses the first's."""
    routed = dict.fromkeys(routed)
    # The layer that owns a shared router comes first, as in `adapter_state_dict`.
    names = [*routed, *(name for name in pairs if name not in routed)]
    layers = [
        {
            "names": [name],
            "type": "MoeLoraLinear",
            "dtype": str(pairs[name][0].dtype).removeprefix("torch."),
            "in_features": pairs[name][0].shape[1],
            "out_features": pairs[name][1].shape[0],
            "config": 0,
            "router": name if name in routed else names[0],
        }
        for name in names
    ]
    return {"configs": [config.to_dict()], "layers": layers}
