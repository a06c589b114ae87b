"""Load and export checkpoints in the key layouts of MOELoRA-peft and of MING-MOE.

`original_keys` lists the keys of a layout for one model. `_match` compares them with a checkpoint.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moelora_kernels.checkpoints.files import State, read, same_bits, tensor_problem, unfit_problems
from moelora_kernels.checkpoints.original_keys import Layout, ming_layout, moelora_peft_layout
from moelora_kernels.nn.layer import adapter_parameters
from moelora_kernels.nn.layer_tensors import layer_tensors
from moelora_kernels.nn.linear import MoeLoraLinear
from moelora_kernels.nn.merge import merged_with
from moelora_kernels.nn.wrappers import named_modules, portable_state_dict

log = logging.getLogger(__name__)

# PEFT writes this prefix before the names of the model's modules.
PREFIX = "base_model.model."
# The keys of a PeftModel's state dict contain the adapter's name; save_pretrained removes it.
_ADAPTER_NAME = re.compile(
    r"((?:^|\.)lora_(?:A|B|gate|task_embedding))"
    r"\.(?!lora[AB]\.|GateL\.|weight$)([^.]+)\.(?=lora[AB]\.|GateL\.|weight$)"
)
_PLAIN_LORA = re.compile(r"\.lora_[AB]\.weight$")


def load_moelora_peft(model: nn.Module, state_dict: State) -> None:
    """Copy a checkpoint of MOELoRA-peft into the layers of `model`.

    First replace the linears, with the options of the training run:

        replace_linears(model, MoeLoraConfig.preset("moelora"), ["query_key_value", "dense", ...])
        load_moelora_peft(model, "path/to/adapter_model.bin")

    Keys (P is the name of a linear, e is an expert, D is task_embedding_dim):

        P.lora_A.loraA.{e}.mlp.weight [R/E, I]        P.lora_B.loraB.{e}.mlp.weight [O, R/E]
        the same without `mlp`                        aliases: one of the two is enough; if both are
                                                      there, their bits must be equal
        lora_task_embedding.weight [num_tasks + 1, D] lora_gate.GateL.weight [E, D]
        P.lora_task_embedding.weight                  P.lora_gate.GateL.weight

    The last line is the gate of a layer with task_gate="per_layer". If the layers share one gate,
    the original writes these keys too and never reads them: they are ignored and logged.
    A key may begin with "base_model.model.". The name of one adapter may follow lora_A, lora_B,
    lora_task_embedding and lora_gate. Layers of preset "lora" read P.lora_A.weight and
    P.lora_B.weight, as PEFT writes them. Weights of the frozen model are not copied; their bits
    must be equal to those of `model`. A state dict does not contain the scaling, the dropout and
    batch_dim (1 for ChatGLM): the options of the layers set them.

    Args:
        model: a model whose linears are replaced by layers with router="task".
        state_dict: tensors by key; or a file (.safetensors, or one that torch.load reads with
            weights_only=True); or a folder with adapter_model and non_lora_trainables
            (.safetensors before .bin); or a list of these.

    Raises:
        ValueError: a key is missing, unexpected or stored twice, has another shape or dtype, or
            differs from its alias or from the frozen model; a file cannot be read or holds
            anything but tensors; or the layout cannot store a layer of the model. The message
            names every key, and the model is unchanged.

    Example:
        >>> from moelora_kernels import MoeLoraConfig, MoeLoraLinear
        >>> from moelora_kernels.checkpoints import export_moelora_peft, load_moelora_peft
        >>> options = MoeLoraConfig.preset("moelora", num_experts=2, rank=4, num_tasks=3)
        >>> trained, fresh = (nn.Sequential(MoeLoraLinear(8, 8, config=options)) for _ in range(2))
        >>> load_moelora_peft(fresh, export_moelora_peft(trained))
        >>> bool((fresh[0].lora_A == trained[0].lora_A).all())
        True

    Source: the layout of github.com/liuqidong07/MOELoRA-peft (arXiv 2310.18339).
    """
    _load(model, moelora_peft_layout(model), state_dict)


def export_moelora_peft(model: nn.Module, like: State | None = None) -> dict[str, Tensor]:
    """Return the adapters of `model` in the layout that `load_moelora_peft` reads.

    Every tensor is a copy in the model's dtype.

    Args:
        model: as in `load_moelora_peft`.
        like: None, or a checkpoint of the layout. With None the keys are as in the original's
            adapter_model.bin: with "base_model.model.", without the name of an adapter, with
            aliases, and without the keys that the original never reads. With a checkpoint they
            are its keys, and tensors that the model does not have are copied from it.

    Raises:
        ValueError: the layout cannot store a layer of the model, or `like` does not fit the model.

    Example:
        >>> from moelora_kernels import MoeLoraConfig, MoeLoraLinear
        >>> from moelora_kernels.checkpoints import export_moelora_peft
        >>> options = MoeLoraConfig.preset("moelora", num_experts=1, rank=4, num_tasks=3)
        >>> model = nn.Sequential(MoeLoraLinear(8, 8, config=options))
        >>> for key in sorted(export_moelora_peft(model)):
        ...     print(key)
        base_model.model.0.lora_A.loraA.0.mlp.weight
        base_model.model.0.lora_A.loraA.0.weight
        base_model.model.0.lora_B.loraB.0.mlp.weight
        base_model.model.0.lora_B.loraB.0.weight
        lora_gate.GateL.weight
        lora_task_embedding.weight
    """
    return _export(model, moelora_peft_layout(model), like)


def load_ming(model: nn.Module, state_dict: State) -> None:
    """Copy a checkpoint of MING-MOE into the layers of `model`.

    First replace the linears, with the options of the training run:

        mixture = MoeLoraConfig.preset("ming")
        replace_linears(model, mixture, ["gate_proj", "up_proj", "down_proj"])
        replace_linears(model, MoeLoraConfig.preset("lora"), ["q_proj", "k_proj", ...])
        load_ming(model, "path/to/folder")

    Keys (P is the name of a linear, e is an expert, n is the number of shared experts); a key may
    begin with "base_model.model.":

        P.experts.{e}.lora_A_{e}.weight [r, I]        P.experts.{e}.lora_B_{e}.weight [O, r]
        P.switch.weight [E, I]                        P.switch.bias [E]
        P.share_experts.lora_A.weight [n r, I]        P.share_experts.lora_B.weight [O, n r]
        P.lora_A.weight, P.lora_B.weight              layers of preset "lora" (attention)

    share_experts needs shared_expert="always" and shared_rank=n r. The original scales it like the
    other experts, so it needs `scaling` as a number too: alpha / r. The original stores attention
    and mixtures in two files: pass the folder, or a list of both. LoRA keys of a linear that is not
    replaced raise. Everything else is as in `load_moelora_peft`.

    Example:
        >>> from moelora_kernels import MoeLoraConfig, MoeLoraLinear
        >>> from moelora_kernels.checkpoints import export_ming, load_ming
        >>> options = MoeLoraConfig.preset("ming", num_experts=2, rank=4)
        >>> trained, fresh = (nn.Sequential(MoeLoraLinear(8, 8, config=options)) for _ in range(2))
        >>> load_ming(fresh, export_ming(trained))
        >>> bool((fresh[0].router.weight == trained[0].router.weight).all())
        True

    Source: the layout of github.com/MediaBrain-SJTU/MING (arXiv 2404.09027).
    """
    _load(model, ming_layout(model), state_dict)


def export_ming(model: nn.Module, like: State | None = None) -> dict[str, Tensor]:
    """Return the adapters of `model` in the layout that `load_ming` reads.

    The arguments and errors are as in `export_moelora_peft`. The original reads the keys of
    attention (P.lora_A.weight, P.lora_B.weight) from adapter_model.bin, and all other keys from
    non_lora_trainables.bin.

    Example:
        >>> from moelora_kernels import MoeLoraConfig, MoeLoraLinear
        >>> from moelora_kernels.checkpoints import export_ming
        >>> options = MoeLoraConfig.preset("ming", num_experts=1, rank=4, top_k=1)
        >>> for key in export_ming(nn.Sequential(MoeLoraLinear(8, 8, config=options))):
        ...     print(key)
        base_model.model.0.experts.0.lora_A_0.weight
        base_model.model.0.experts.0.lora_B_0.weight
        base_model.model.0.switch.weight
        base_model.model.0.switch.bias
    """
    return _export(model, ming_layout(model), like)


def _load(model: nn.Module, layout: Layout, state_dict: State) -> None:
    if computed := [key for key, tensor in layer_tensors(model).items() if tensor.direct is None]:
        raise ValueError(
            f"model: {', '.join(computed)}: parametrized, pruned or normed; load the checkpoint "
            "before that"
        )
    state = read(state_dict)
    targets, ignored = _match(model, layout, state)
    for reason, keys in ignored.items():
        first = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
        log.warning("%d keys not used, %s: %s", len(keys), reason, first)
    with torch.no_grad():
        for key, target in targets.items():
            target.copy_(state[key])


def _export(model: nn.Module, layout: Layout, like: State | None) -> dict[str, Tensor]:
    if like is None:
        aliased = {alias: layout.targets[key] for alias, key in layout.aliases.items()}
        named = {**layout.targets, **aliased}
        tensors = {k if k in layout.top else PREFIX + k: tensor for k, tensor in named.items()}
    else:
        state = read(like)
        tensors = {**state, **_match(model, layout, state)[0]}
    # Return copies, because safetensors does not save one storage under two names.
    return {k: t.detach().clone(memory_format=torch.contiguous_format) for k, t in tensors.items()}


def _match(
    model: nn.Module, layout: Layout, state: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Return the model's tensor for each key of `state`, and the ignored keys by reason.

    Raises ValueError that names every key that does not fit.
    """
    saved_keys, problems = _strip_keys(state)
    targets: dict[str, Tensor] = {}
    alias_of = {key: alias for alias, key in layout.aliases.items()}
    for key, target in layout.targets.items():
        names = [saved_keys.pop(name) for name in (key, alias_of.get(key)) if name in saved_keys]
        if not names:
            problems.append(f"missing: {key}")
        for name in names:
            targets[name] = target
            problems += unfit_problems(name, target, state[name])
            if not same_bits(state[name], state[names[0]]):
                problems.append(f"{name}: differs from its alias {names[0]}")

    adapter_ids = {id(parameter) for parameter in adapter_parameters(model)}
    frozen = {
        key.replace("base_layer.", ""): tensor
        for key, tensor in portable_state_dict(model).items()
        if id(tensor) not in adapter_ids
    }
    ignored: dict[str, list[str]] = {}
    for key, saved_key in saved_keys.items():
        if key in layout.unread:
            ignored.setdefault("copies of the shared gate that no forward reads", []).append(
                saved_key
            )
        elif key not in frozen:
            hint = ""
            if _PLAIN_LORA.search(key):
                hint = " (a plain LoRA: replace that linear with MoeLoraConfig.preset('lora', ...))"
            problems.append(f"unexpected: {saved_key}{hint}")
        elif not same_bits(state[saved_key], frozen[key]):
            problems.append(f"{saved_key}: this frozen weight differs from the model's")
        else:
            ignored.setdefault("frozen weights that equal the model's", []).append(saved_key)
    for name, layer in named_modules(model):
        if isinstance(layer, MoeLoraLinear) and layer.merged:
            problems.append(f"{name or 'model'}: {merged_with(layer)}, unmerge first")
    if problems:
        raise ValueError("checkpoint does not fit the model:\n  " + "\n  ".join(problems))
    return targets, ignored


def _strip_keys(state: Mapping[str, Tensor]) -> tuple[dict[str, str], list[str]]:
    """Return (key without PREFIX and adapter name) -> key in `state`; and a list of problems."""
    saved_keys: dict[str, str] = {}
    problems: list[str] = []
    # Name of an adapter -> a key that contains the name.
    adapters: dict[str, str] = {}
    for saved_key, tensor in state.items():
        if problem := tensor_problem(saved_key, tensor):
            problems.append(problem)
            continue
        key = saved_key.removeprefix(PREFIX)
        if match := _ADAPTER_NAME.search(key):
            adapters.setdefault(match[2], saved_key)
            key = _ADAPTER_NAME.sub(r"\1.", key)
        if key in saved_keys:
            problems.append(f"stored twice: {saved_key} and {saved_keys[key]}")
        saved_keys[key] = saved_key
    if len(adapters) > 1:
        problems.append(f"several adapters, expected one: {', '.join(adapters.values())}")
    return saved_keys, problems
