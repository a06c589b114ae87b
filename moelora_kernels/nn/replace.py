"""A whole model: swap its linears, set the tasks of a batch, list what trains."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from moelora_kernels.config import MoeLoraConfig
from moelora_kernels.nn.base_linear import missing_size
from moelora_kernels.nn.ffn import MoeLoraFFN, why_no_ffn
from moelora_kernels.nn.layer import MixtureLayer
from moelora_kernels.nn.linear import MoeLoraLinear
from moelora_kernels.nn.routers import TaskRouter

# Modules that hand the weights of their linears to one function: the first always, the second in
# evaluation without gradients.
WEIGHT_READERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)


def replace_linears(
    model: nn.Module, config: MoeLoraConfig, target_modules: str | Iterable[str]
) -> list[str]:
    """Put a MoeLoraLinear over every matching linear of `model`, quantised or wrapped, in place.

    The bases are frozen; other parameters stay as they are. With router="task" one gate serves all
    layers, those of an earlier call with a gate of the same sizes included, unless
    task_gate="per_layer".

    Args:
        model: any module.
        config: the options of every layer.
        target_modules: a regular expression that matches whole module names, or names that equal a
            module's name or end it after a dot ("q_proj", "mlp.up_proj").

    Returns:
        The names of the replaced modules.

    Raises:
        ValueError: no module matches, or one of the names matches none.
        TypeError: a matching module has no in_features and out_features, or the module above it
            reads its weight without calling it (nn.MultiheadAttention, nn.TransformerEncoderLayer).
    """
    config = MoeLoraConfig.of(config, {})
    adapted = [
        name
        for name, m in model.named_modules(remove_duplicate=False)
        if isinstance(m, MixtureLayer)
    ]
    chosen = _matching(model, target_modules, adapted)
    for name in chosen:
        parent = model.get_submodule(name.rpartition(".")[0])
        check_target(name, model.get_submodule(name), parent)

    shared = fitting_task_router(model.modules(), config)
    # By id: a base that its layer does not keep must be free to go.
    replaced: dict[int, MoeLoraLinear] = {}
    for name in chosen:
        parent_name, _, child = name.rpartition(".")
        module = model.get_submodule(name)
        if id(module) not in replaced:
            layer = replaced[id(module)] = MoeLoraLinear.from_linear(module, config)
            if config.shares_gate():
                shared = shared or layer.router
                layer.router = shared
        setattr(model.get_submodule(parent_name), child, replaced[id(module)])
    return chosen


def check_target(name: str, module: nn.Module, parent: nn.Module) -> None:
    """Raise TypeError where a module that target_modules names cannot have experts over it."""
    if missing := missing_size(module):
        raise TypeError(
            f"target_modules: {name} is a {type(module)} without {missing}, expected a linear"
        )
    if isinstance(parent, WEIGHT_READERS):
        raise TypeError(
            f"target_modules: {name} lies in a {type(parent)}, which reads its weight without "
            "calling it: its experts would be left out"
        )


def replace_ffns(
    model: nn.Module,
    config: MoeLoraConfig,
    target_modules: str | Iterable[str] = r".*\.mlp",
    *,
    recompute: bool = False,
) -> list[str]:
    """Put a MoeLoraFFN over every matching gated MLP of `model` (Llama, Qwen2, Mistral), in place.

        replace_ffns(model, MoeLoraConfig.preset("mixlora"))
        attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
        replace_linears(model, MoeLoraConfig.preset("lora"), attention)

    is MixLoRA: whole-FFN experts, and plain LoRA on attention. The linears of an MLP keep their
    names and are frozen; other parameters stay as they are. With router="task" one gate serves all
    layers, as in `replace_linears`.

    Args:
        model: any module.
        config: the options of every layer.
        target_modules: as in `replace_linears`.
        recompute: of every layer, see `MoeLoraFFN`.

    Returns:
        The names of the replaced modules.

    Raises:
        ValueError: no module matches, one of the names matches none, or an option has no meaning
            for whole-FFN experts.
        TypeError: a matching module is no gated MLP, or has experts already. Nothing is replaced.
    """
    config = MoeLoraConfig.of(config, {})
    chosen = _matching(model, target_modules, ())
    for name in chosen:
        if problem := why_no_ffn(model.get_submodule(name)):
            raise TypeError(f"target_modules: {name}: {problem}")
    shared = fitting_task_router(model.modules(), config)
    replaced: dict[nn.Module, MoeLoraFFN] = {}
    for name in chosen:
        parent_name, _, child = name.rpartition(".")
        module = model.get_submodule(name)
        if module not in replaced:
            layer = replaced[module] = MoeLoraFFN.from_mlp(module, config, recompute=recompute)
            if config.shares_gate():
                shared = shared or layer.router
                layer.router = shared
        setattr(model.get_submodule(parent_name), child, replaced[module])
    return chosen


def _matching(
    model: nn.Module, target_modules: str | Iterable[str], adapted: Iterable[str]
) -> list[str]:
    """The names of the modules that match, without those in `adapted` and what lies inside them."""
    by_pattern = isinstance(target_modules, str)
    targets = [target_modules] if by_pattern else list(target_modules)
    if by_pattern:
        try:
            re.compile(target_modules)
        except re.error as error:
            raise ValueError(f"target_modules: bad pattern {target_modules!r}, {error}") from None
    names = [name for name, _ in model.named_modules(remove_duplicate=False) if name]
    names = [n for n in names if not any(n == a or n.startswith(f"{a}.") for a in adapted)]

    def matches(name: str, target: str) -> bool:
        if by_pattern:
            return re.fullmatch(target, name) is not None
        return name == target or name.endswith(f".{target}")

    unmatched = [t for t in targets if not any(matches(name, t) for name in names)]
    if unmatched or not targets:
        raise ValueError(f"target_modules: no module matches {unmatched or targets}")
    return [name for name in names if any(matches(name, target) for target in targets)]


def fitting_task_router(layers: Iterable[nn.Module], config: MoeLoraConfig) -> TaskRouter | None:
    """The gate that some of `layers` already share, if a new layer can use it."""
    sizes = (config.num_tasks, config.task_embedding_dim, config.num_experts)
    for layer in layers:
        if isinstance(layer, MixtureLayer) and layer.config.shares_gate() and config.shares_gate():
            own = layer.config
            if sizes == (own.num_tasks, own.task_embedding_dim, own.num_experts):
                return layer.router
    return None
