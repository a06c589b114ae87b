"""Read an adapter folder without its base model, for `moelora_kernels.export`.

    adapter_config.json     peft_type MOELORA (of `moelora_kernels.peft`): the options by name
                            peft_type MMOELORAS or MMOELORA (of MOELoRA-peft): expert_num, r,
                            lora_alpha, task_num, task_embedding_dim
    adapter_model           the tensors: .safetensors or .bin

Both are turned into the description of `checkpoints.description`, from which layers are built.
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
from moelora_kernels.checkpoints.description import build
from moelora_kernels.checkpoints.files import read
from moelora_kernels.config import MoeLoraConfig
from moelora_kernels.nn.wrappers import without_wrapped

_PEFT_KEY = re.compile(r"base_model\.model\.(.+)\.moelora_(experts|router)(?:_(.+))?\.([^.]+)$")
_ORIGINAL_KEY = re.compile(
    r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.[^.]+)?\.lora[AB]\.0\.(?:mlp\.)?weight$"
)


def read_folder(path: str | Path) -> nn.Module:
    """Return a model that has the layers of an adapter folder, each over a `MissingBase`.

    Raises:
        ValueError: the folder has another peft_type, tensors that do not belong to an adapter
            layer (modules_to_save, biases), or tensors that do not fit the config.
    """
    config = json.loads((Path(path) / "adapter_config.json").read_text())
    kind, state = config.get("peft_type"), read(path)
    if kind == "MOELORA":
        description, adapter = _describe_peft(config, state)
        model = build(description)
        load_adapter_state_dict(model, adapter)
        return model
    if kind in ("MMOELORAS", "MMOELORA"):
        model = build(_describe_original(config, state))
        load_moelora_peft(model, state)
        return model
    raise ValueError(f"{path}: expected peft_type MOELORA, MMOELORAS or MMOELORA, got {kind!r}")


def _describe_peft(
    values: Mapping[str, Any], state: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the description and the adapter tensors of a folder of `moelora_kernels.peft`.

    The tensors get the names that `adapter_state_dict` gives them.
    """
    options = {f.name for f in dataclasses.fields(MoeLoraConfig)}
    config = MoeLoraConfig.from_dict({k: v for k, v in values.items() if k in options})
    adapter: dict[str, Tensor] = {}
    routed: list[str] = []
    for key, tensor in state.items():
        match = _PEFT_KEY.match(key)
        if match is None:
            raise ValueError(
                f"{key}: expected a tensor of an adapter layer; a LoRA cannot store other tensors"
            )
        name, part, path, leaf = match.groups()
        # PEFT keeps the children of wrappers in its names (get_peft_model of a compiled model).
        name = without_wrapped(name, keep_module=True)
        if part == "router":
            routed.append(name)
            leaf = f"router.{path.replace('_', '.')}.{leaf}" if path else f"router.{leaf}"
        adapter[f"{name}.{leaf}"] = tensor
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    for key, lora_a in adapter.items():
        name = key.removesuffix(".lora_A")
        if name != key and f"{name}.lora_B" in adapter:
            pairs[name] = (lora_a, adapter[f"{name}.lora_B"])
    if not pairs:
        raise ValueError("adapter_model: expected moelora_experts.lora_A and lora_B, got neither")
    return _description(config, pairs, [name for name in routed if name in pairs]), adapter


def _describe_original(values: Mapping[str, Any], state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the description of a folder of MOELoRA-peft.

    In its config r is the sum of the ranks of all experts. Task ids go from 1 to task_num.
    """
    # Linear -> the A and B of its first expert.
    first_experts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        if match := _ORIGINAL_KEY.match(key):
            first_experts.setdefault(match[1], {})[match[2]] = tensor
    top = {key.removeprefix("base_model.model.") for key in state}
    shared = any(key.startswith("lora_gate.") for key in top)
    required = ("expert_num", "r", "lora_alpha", "task_num", "task_embedding_dim")
    if missing := [name for name in required if name not in values]:
        raise ValueError(f"adapter_config.json: missing: {', '.join(missing)}")
    experts = values["expert_num"]
    if experts < 1 or values["r"] % experts:
        raise ValueError(
            "adapter_config.json: expected r (the rank of all experts together) to be a multiple "
            f"of expert_num, got r = {values['r']} and expert_num = {experts}"
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
    pairs = {n: (pair["A"], pair["B"]) for n, pair in first_experts.items() if len(pair) == 2}
    if not pairs:
        raise ValueError("adapter_model: expected lora_A.loraA.0 and lora_B.loraB.0, got neither")
    return _description(config, pairs, () if shared else pairs)


def _description(
    config: MoeLoraConfig, pairs: Mapping[str, tuple[Tensor, Tensor]], routed: Iterable[str]
) -> dict[str, Any]:
    """Return the description of layers that have one config.

    pairs:  linear -> (A, B), for the sizes and the dtype.
    routed: the linears that have a router in the file. The others use the router of the first.
    """
    owners = dict.fromkeys(routed)
    # The layer that owns a shared router comes first, as in `adapter_state_dict`.
    names = [*owners, *(name for name in pairs if name not in owners)]
    layers = [
        {
            "names": [name],
            "type": "MoeLoraLinear",
            "dtype": str(pairs[name][0].dtype).removeprefix("torch."),
            "in_features": pairs[name][0].shape[1],
            "out_features": pairs[name][1].shape[0],
            "config": 0,
            "router": name if name in owners else names[0],
        }
        for name in names
    ]
    return {"configs": [config.to_dict()], "layers": layers}
