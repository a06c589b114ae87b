"""The checkpoints of MOELoRA-peft and of MING-MOE: read and written in their own layouts."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from moelora_kernels.checkpoints.files import (
    State,
    read,
    same_bits,
    why_no_tensor,
    why_unfit,
)
from moelora_kernels.nn.ffn import MoeLoraFFN
from moelora_kernels.nn.layer import adapter_parameters
from moelora_kernels.nn.linear import MoeLoraLinear
from moelora_kernels.nn.merge import merged_with
from moelora_kernels.nn.routers import TaskRouter
from moelora_kernels.reference import blocks

log = logging.getLogger(__name__)

# What PEFT puts in front of the names of the model's modules.
PREFIX = "base_model.model."
# PEFT keeps the adapters of a module in a dictionary by name, which save_pretrained leaves out.
_ADAPTER_NAME = re.compile(
    r"((?:^|\.)lora_(?:A|B|gate|task_embedding))"
    r"\.(?!lora[AB]\.|GateL\.|weight$)([^.]+)\.(?=lora[AB]\.|GateL\.|weight$)"
)
_PLAIN_LORA = re.compile(r"\.lora_[AB]\.weight$")


class _Layout(NamedTuple):
    """The keys of a foreign layout for one model, without PREFIX and name of the adapter."""

    # Key -> the block of a parameter that it holds, a view.
    places: dict[str, Tensor]
    # Second name -> first name of the same tensor.
    aliases: dict[str, str]
    # Keys of tensors that nothing reads.
    dead: set[str]
    # Keys that stand outside of the base model, without PREFIX.
    top: set[str]


def load_moelora_peft(model: nn.Module, state_dict: State) -> None:
    """Copy a checkpoint of MOELoRA-peft into the layers of `model`.

        replace_linears(model, MoeLoraConfig.preset("moelora"), ["query_key_value", "dense", ...])
        load_moelora_peft(model, "path/to/adapter_model.bin")

    Keys, P the name of a linear, e an expert; each may begin with "base_model.model.", and the name
    of one adapter may follow lora_A, lora_B, lora_task_embedding and lora_gate:

        P.lora_A.loraA.{e}.mlp.weight [R/E, I]        P.lora_B.loraB.{e}.mlp.weight [O, R/E]
        the same without `mlp`                        second names; equal bit by bit, or alone
        lora_task_embedding.weight [num_tasks + 1, D] lora_gate.GateL.weight [E, D]
        P.lora_task_embedding.weight                  P.lora_gate.GateL.weight

    The last two are the gates of layers with task_gate="per_layer". Beside a gate that layers share
    they are copies that no forward reads: ignored, with a notice. Layers of preset "lora" take
    P.lora_A.weight and P.lora_B.weight as stock PEFT writes them. Weights of the frozen model are
    checked to be those of `model`, bit by bit, and not copied. Scaling, dropout and the order of x
    (batch_dim=1 for ChatGLM) are no part of a state dict: they are those of the layers' options.

    Args:
        model: a model whose linears have been replaced, with router="task".
        state_dict: tensors by key, or a file (.safetensors, or one that torch.load reads as tensors
            alone), or a folder with adapter_model and non_lora_trainables (.safetensors before
            .bin), or several of those.

    Raises:
        ValueError: naming every key that is missing, unexpected, double, different from its second
            name or from the frozen model, or does not fit in shape or dtype; a file that cannot be
            read or holds more than tensors; layers that the layout has no place for. The model is
            then unchanged.

    Source: the layout of github.com/liuqidong07/MOELoRA-peft (arXiv 2310.18339).
    """
    _load(model, _moelora_peft(model), state_dict)


def export_moelora_peft(model: nn.Module, like: State | None = None) -> dict[str, Tensor]:
    """The adapters of `model` in the layout that `load_moelora_peft` reads, every tensor its own.

    Without `like` the keys are those of the original's adapter_model.bin: with "base_model.model.",
    without the name of an adapter, with second names, and without the copies that nothing reads.
    With `like`, a checkpoint of the layout, they are its keys, and what the model does not hold
    (the copies) is taken from it. Tensors have the model's dtypes.

    Raises ValueError for layers that the layout has no place for, and if `like` does not fit.
    """
    return _export(model, _moelora_peft(model), like)


def load_ming(model: nn.Module, state_dict: State) -> None:
    """Copy a checkpoint of MING-MOE into the layers of `model`.

        mixture = MoeLoraConfig.preset("ming")
        replace_linears(model, mixture, ["gate_proj", "up_proj", "down_proj"])
        replace_linears(model, MoeLoraConfig.preset("lora"), ["q_proj", "k_proj", ...])
        load_ming(model, "path/to/folder")

    Keys, P the name of a linear, e an expert; each may begin with "base_model.model.":

        P.experts.{e}.lora_A_{e}.weight [r, I]        P.experts.{e}.lora_B_{e}.weight [O, r]
        P.switch.weight [E, I]                        P.switch.bias [E]
        P.share_experts.lora_A.weight [n r, I]        P.share_experts.lora_B.weight [O, n r]
        P.lora_A.weight, P.lora_B.weight              of layers of preset "lora" (attention)

    share_experts needs shared_expert="always", shared_rank=n r and, as its factor there is that of
    the other experts, scaling=alpha/r as a number. Attention and mixtures lie in two files: give
    the folder or both; LoRA keys of a linear that has no layer raise. The rest is as in
    `load_moelora_peft`.

    Source: the layout of github.com/MediaBrain-SJTU/MING (arXiv 2404.09027).
    """
    _load(model, _ming(model), state_dict)


def export_ming(model: nn.Module, like: State | None = None) -> dict[str, Tensor]:
    """The adapters of `model` in the layout that `load_ming` reads; see `export_moelora_peft`.

    The original reads the keys of attention, "P.lora_A.weight" and "P.lora_B.weight", from
    adapter_model, and all others from non_lora_trainables.bin.
    """
    return _export(model, _ming(model), like)


def _moelora_peft(model: nn.Module) -> _Layout:
    places, aliases, dead, top = {}, {}, set(), {}
    shared = None
    for prefix, layer in _layers(model, "MOELoRA-peft"):
        if _is_plain_lora(layer):
            places |= _plain_lora(prefix, layer)
            continue
        _check_layer(prefix, layer, "MOELoRA-peft")
        router = layer.router
        if not isinstance(router, TaskRouter) or layer.config.shared_expert != "none":
            raise ValueError(
                f"{prefix[:-1]}: MOELoRA-peft has task gates (router='task') and no shared expert"
            )
        for e, *pair in _experts(layer):
            for letter, block in zip("AB", pair, strict=True):
                stem = f"{prefix}lora_{letter}.lora{letter}.{e}"
                places[f"{stem}.mlp.weight"] = block
                aliases[f"{stem}.weight"] = f"{stem}.mlp.weight"
        gate = {
            "lora_task_embedding.weight": router.embedding.weight.detach(),
            "lora_gate.GateL.weight": router.gate.weight.detach(),
        }
        if not layer.config.shares_gate():
            places |= {prefix + key: tensor for key, tensor in gate.items()}
            continue
        if shared not in (None, router):
            raise ValueError(f"{prefix[:-1]}: MOELoRA-peft has one gate that all layers share")
        shared, top = router, gate
        dead |= {prefix + key for key in gate}
    return _Layout(places | top, aliases, dead - set(top), set(top))


def _ming(model: nn.Module) -> _Layout:
    places: dict[str, Tensor] = {}
    for prefix, layer in _layers(model, "MING"):
        if _is_plain_lora(layer):
            places |= _plain_lora(prefix, layer)
            continue
        _check_layer(prefix, layer, "MING")
        router, config = layer.router, layer.config
        if not isinstance(router, nn.Linear) or router.bias is None:
            raise ValueError(f"{prefix[:-1]}: MING has linear routers with router_bias=True")
        if config.shared_expert == "complement":
            raise ValueError(f"{prefix[:-1]}: MING has shared experts of weight 1 ('always')")
        for e, a, b in _experts(layer):
            stem, tail = (
                (f"{prefix}experts.{e}", f"_{e}")
                if e < config.num_experts
                else (f"{prefix}share_experts", "")
            )
            places[f"{stem}.lora_A{tail}.weight"] = a
            places[f"{stem}.lora_B{tail}.weight"] = b
        places[f"{prefix}switch.weight"] = router.weight.detach()
        places[f"{prefix}switch.bias"] = router.bias.detach()
    return _Layout(places, {}, set(), set())


def _layers(model: nn.Module, layout: str) -> Iterator[tuple[str, MoeLoraLinear]]:
    """The layers of `model` and what their keys begin with."""
    empty = True
    for name, layer in model.named_modules():
        if isinstance(layer, MoeLoraFFN):
            raise ValueError(f"{name}: {layout} has experts over linears, not over whole FFNs")
        if isinstance(layer, MoeLoraLinear):
            empty = False
            yield f"{name}." if name else "", layer
    if empty:
        raise ValueError("model: it has no MoeLoraLinear layer")


def _check_layer(prefix: str, layer: MoeLoraLinear, layout: str) -> None:
    """Raise where neither layout can hold what the layer is."""
    config = layer.config
    if config.share == "A" or len(set(config.ranks()[: config.num_experts])) > 1:
        raise ValueError(f"{prefix[:-1]}: {layout} has an A for each expert, all of one rank")
    if config.init == "svd_segments":
        raise ValueError(f"{prefix[:-1]}: {layout} has no reduced base (init='svd_segments')")


def _experts(layer: MoeLoraLinear) -> Iterator[tuple[int, Tensor, Tensor]]:
    """A [r, I] and B [O, r] of every expert, the shared one last, as views of the parameters."""
    a, b = layer.lora_A.detach(), layer.lora_B.detach()
    for e, block in enumerate(blocks(layer.config.ranks())):
        yield e, a[block], b[:, block]


def _is_plain_lora(layer: MoeLoraLinear) -> bool:
    return layer.router is None and layer.config.num_experts == 1 and len(layer.mixture.ranks) == 1


def _plain_lora(prefix: str, layer: MoeLoraLinear) -> dict[str, Tensor]:
    pair = {"A": layer.lora_A.detach(), "B": layer.lora_B.detach()}
    return {f"{prefix}lora_{letter}.weight": tensor for letter, tensor in pair.items()}


def _load(model: nn.Module, layout: _Layout, state_dict: State) -> None:
    state = read(state_dict)
    used, ignored = _match(model, layout, state)
    for reason, keys in ignored.items():
        first = ", ".join(keys[:3]) + (", ..." if len(keys) > 3 else "")
        log.warning("%d keys not used, %s: %s", len(keys), reason, first)
    with torch.no_grad():
        for key, block in used.items():
            block.copy_(state[key])


def _export(model: nn.Module, layout: _Layout, like: State | None) -> dict[str, Tensor]:
    """A tensor of its own under every key: safetensors refuses two names of one storage."""
    if like is None:
        found = layout.places | {name: layout.places[of] for name, of in layout.aliases.items()}
        found = {k if k in layout.top else PREFIX + k: block for k, block in found.items()}
    else:
        state = read(like)
        found = {**state, **_match(model, layout, state)[0]}
    return {k: t.detach().clone(memory_format=torch.contiguous_format) for k, t in found.items()}


def _match(
    model: nn.Module, layout: _Layout, state: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """What each key of `state` is copied into, and the keys that are not copied by the reason.

    Raises ValueError that names every key in the way.
    """
    problems: list[str] = []
    names: dict[str, str] = {}
    adapters: dict[str, str] = {}
    for given, tensor in state.items():
        if problem := why_no_tensor(given, tensor):
            problems.append(problem)
            continue
        key = given.removeprefix(PREFIX)
        if found := _ADAPTER_NAME.search(key):
            adapters.setdefault(found[2], given)
            key = _ADAPTER_NAME.sub(r"\1.", key)
        if key in names:
            problems.append(f"double: {given} is {names[key]}")
        names[key] = given
    if len(adapters) > 1:
        problems.append(f"several adapters, expected one: {', '.join(adapters.values())}")

    used: dict[str, Tensor] = {}
    both = {of: name for name, of in layout.aliases.items()}
    for key, block in layout.places.items():
        given = [names.pop(name) for name in (key, both.get(key)) if name in names]
        if not given:
            problems.append(f"missing: {key}")
        for name in given:
            used[name] = block
            problems += why_unfit(name, block, state[name])
            if not same_bits(state[name], state[given[0]]):
                problems.append(f"{name}: differs from {given[0]}, its other name")

    own = {id(p) for p in adapter_parameters(model)}
    frozen = {
        k.replace("base_layer.", ""): t
        for k, t in model.state_dict(keep_vars=True).items()
        if id(t) not in own
    }
    ignored: dict[str, list[str]] = {}
    for key, given in names.items():
        if key in layout.dead:
            reason = "copies of the shared gate that no forward reads"
        elif key not in frozen:
            hint = ""
            if _PLAIN_LORA.search(key):
                hint = " (plain LoRA: put MoeLoraConfig.preset('lora', ...) over that linear)"
            problems.append(f"unexpected: {given}{hint}")
            continue
        elif not same_bits(state[given], frozen[key]):
            problems.append(f"{given}: a frozen weight, and not that of the model")
            continue
        else:
            reason = "frozen weights that are those of the model"
        ignored.setdefault(reason, []).append(given)
    for name, layer in model.named_modules():
        if isinstance(layer, MoeLoraLinear) and layer.merged:
            problems.append(f"{name or 'model'}: {merged_with(layer)}, unmerge first")
    if problems:
        raise ValueError("checkpoint does not fit the model:\n  " + "\n  ".join(problems))
    return used, ignored
