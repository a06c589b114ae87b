"""Put mixture layers over the linears or the MLPs of a model, in place."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn

from moelora_kernels.config import MoeLoraConfig
from moelora_kernels.nn.batch_rows import follow_batches
from moelora_kernels.nn.ffn import PROJECTIONS, MoeLoraFFN, ffn_problem
from moelora_kernels.nn.group import link_named
from moelora_kernels.nn.layer import MixtureLayer
from moelora_kernels.nn.linear import MoeLoraLinear
from moelora_kernels.nn.recorded_forwards import follow_forwards
from moelora_kernels.nn.router_warnings import router_warnings
from moelora_kernels.nn.routers import TaskRouter, task_routers
from moelora_kernels.nn.sharding import warn_if_parallel
from moelora_kernels.nn.token_order import TokenOrder, token_order
from moelora_kernels.nn.weight_readers import check_target, warn_of_readers
from moelora_kernels.nn.wrappers import (
    inside_checkpointing,
    named_modules,
    places,
    portable_name,
    wrapped_child,
)


def replace_linears(
    model: nn.Module,
    config: MoeLoraConfig,
    target_modules: str | Iterable[str],
    *,
    link: bool = False,
) -> list[str]:
    """Put a MoeLoraLinear over every matching linear of `model`, in place.

    The linears may be quantised or wrapped. They are frozen; other parameters do not change. With
    router="task" all layers share one router, also with the layers of an earlier call if the sizes
    are equal, unless task_gate="per_layer".

    Args:
        model: any module.
        config: the options of every layer.
        target_modules: a regular expression that matches whole module names, or names that equal a
            module's name or end it after a dot ("q_proj", "mlp.up_proj").
        link: whether the new layers of one parent that read the same x (q/k/v, gate/up) run
            together, as after `link_siblings`. Two of three names are enough, and names that the
            source of the parent calls with another x than the rest are left out.

    Returns:
        The names of the replaced modules, as in the model without wrappers (torch.compile, DDP).

    Raises:
        ValueError: no module matches, or one of the names matches none.
        TypeError: a matching module has no in_features or out_features, or a module above it is
            known to read its weight instead of calling it: nn.MultiheadAttention,
            nn.TransformerEncoderLayer, layers of transformers that never call it (the attention of
            WavLM, the mask head of DETR), out_proj of state-space layers with fused kernels.

    Warns if the source of another module shows that its forward reads the weight, and if several
    processes share the model under DDP or FSDP already.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from moelora_kernels import MoeLoraConfig, replace_linears
        >>> model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
        >>> replace_linears(model, MoeLoraConfig.preset("ming"), ["0", "2"])
        ['0', '2']
        >>> model(torch.randn(3, 16)).shape
        torch.Size([3, 4])
    """
    config = MoeLoraConfig.of(config, {})
    modules = dict(named_modules(model, remove_duplicate=False))
    adapted = [name for name, module in modules.items() if isinstance(module, MixtureLayer)]
    warn_if_parallel(model)
    place_of = places(model)
    names = _matching(model, place_of, target_modules, adapted)
    for name in names:
        parent, child = place_of[name]
        check_target(name, parent._modules[child], modules)
        check_layout(name, modules, config)
    orders = {name: sample_order(name, modules, config) for name in names}
    warn_of_readers(modules, names)

    shared = fitting_task_router(model.modules(), config)
    # Keyed by id, because a reference would keep alive a base that its layer does not keep.
    replaced: dict[int, MoeLoraLinear] = {}
    layers: dict[str, MoeLoraLinear] = {}
    with router_warnings():
        for name in names:
            parent, child = place_of[name]
            module = parent._modules[child]
            if id(module) not in replaced:
                layer = replaced[id(module)] = MoeLoraLinear.from_linear(module, config)
                layer.set_token_order(orders[name])
                if config.shares_gate():
                    shared = shared or layer.router
                    layer.router = shared
            layers[name] = replaced[id(module)]
            setattr(parent, child, layers[name])
    follow_calls(model, config)
    if link:
        link_named(modules, layers)
    return names


def follow_calls(model: nn.Module, config: MoeLoraConfig) -> None:
    """Add the hooks that layers with `config` need to the model."""
    if config.aux:
        follow_forwards(model)
    if config.granularity == "sequence":
        follow_batches(model)


def has_samples(config: MoeLoraConfig) -> bool:
    """Return whether the gate of a layer depends on the sample of a token."""
    router = config.router
    return (
        config.granularity != "token"
        or router in ("external", "token_task")
        or (isinstance(router, nn.Module) and bool(task_routers(router)))
    )


def sample_order(
    name: str, modules: dict[str, nn.Module], config: MoeLoraConfig
) -> TokenOrder | None:
    """Return the `token_order` of a layer, if its config needs it."""
    return token_order(name, modules) if config.batch_dim == 0 and has_samples(config) else None


def check_layout(name: str, modules: dict[str, nn.Module], config: MoeLoraConfig) -> None:
    """Raise ValueError if a gate per sample would count samples along the wrong dimension of x.

    PyTorch's own modules say with `batch_first` whether they get [batch, sequence, features].

    modules: as `named_modules` yields them.
    """
    if config.batch_dim != 0 or not has_samples(config):
        return
    path = name.split(".")
    for depth in range(len(path)):
        module = modules[".".join(path[:depth])]
        is_of_torch = type(module).__module__.startswith("torch.nn.")
        if is_of_torch and _is_sequence_first(module):
            raise ValueError(
                f"batch_dim: {name} is part of a {type(module).__name__} with batch_first=False, "
                "whose x is [sequence, batch, features]; use batch_dim=1"
            )


def _is_sequence_first(module: nn.Module) -> bool:
    """Return whether a module of torch.nn, or the attention in it, has batch_first=False."""
    modules = (module, getattr(module, "self_attn", None))
    return any(getattr(m, "batch_first", None) is False for m in modules)


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

    This is MixLoRA: whole-FFN experts, and plain LoRA on attention. The linears of an MLP keep
    their names and are frozen; other parameters do not change. With router="task" the layers share
    one router, as in `replace_linears`.

    Args:
        model: any module.
        config: the options of every layer.
        target_modules: as in `replace_linears`.
        recompute: as in `MoeLoraFFN`.

    Returns:
        The names of the replaced modules.

    Raises:
        ValueError: no module matches, one of the names matches none, or an option is not supported
            for whole-FFN experts.
        TypeError: a matching module is not a gated MLP, has experts already, or is wrapped
            (torch.compile, DDP, FSDP1). The model is then unchanged.

    An MLP inside torch's `checkpoint_wrapper` is replaced inside it.

    Example:
        >>> from torch import nn
        >>> from moelora_kernels import MoeLoraConfig, replace_ffns
        >>> block = nn.Module()
        >>> block.mlp = nn.Module()
        >>> block.mlp.gate_proj, block.mlp.up_proj = nn.Linear(16, 32), nn.Linear(16, 32)
        >>> block.mlp.down_proj, block.mlp.act_fn = nn.Linear(32, 16), nn.SiLU()
        >>> replace_ffns(nn.ModuleList([block]), MoeLoraConfig.preset("mixlora", rank=2))
        ['0.mlp']
    """
    config = MoeLoraConfig.of(config, {})
    warn_if_parallel(model)
    place_of = places(model)
    names = _matching(model, place_of, target_modules, ())
    for name in names:
        parent, child = place_of[name] = inside_checkpointing(*place_of[name])
        module = parent._modules[child]
        if wrapped_child(module) is not None:
            raise TypeError(
                f"target_modules: {name}: it is inside a {type(module).__name__}; replace the MLPs "
                "first, then wrap them"
            )
        if problem := ffn_problem(module):
            raise TypeError(f"target_modules: {name}: {problem}")
    above = {name: module for name, module in named_modules(model) if name not in names}
    warn_of_readers(above, [f"{name}.{projection}" for name in names for projection in PROJECTIONS])
    orders = {name: sample_order(name, above, config) for name in names}
    shared = fitting_task_router(model.modules(), config)
    replaced: dict[nn.Module, MoeLoraFFN] = {}
    with router_warnings():
        for name in names:
            parent, child = place_of[name]
            module = parent._modules[child]
            if module not in replaced:
                layer = replaced[module] = MoeLoraFFN.from_mlp(module, config, recompute=recompute)
                layer.set_token_order(orders[name])
                if config.shares_gate():
                    shared = shared or layer.router
                    layer.router = shared
            setattr(parent, child, replaced[module])
    follow_calls(model, config)
    return names


def _matching(
    model: nn.Module,
    modules: Iterable[str],
    target_modules: str | Iterable[str],
    adapted: Iterable[str],
) -> list[str]:
    """Return the matching names of `modules`, except the `adapted` modules and their children.

    A target may also be written with the children that wrappers add ("_orig_mod.q_proj").
    """
    by_pattern = isinstance(target_modules, str)
    if not by_pattern and not isinstance(target_modules, Iterable):
        raise TypeError(
            "target_modules: expected names of modules, such as ['q_proj', 'v_proj'], or a regular "
            f"expression, got {target_modules!r}"
        )
    targets = [target_modules] if by_pattern else list(target_modules)
    if by_pattern:
        try:
            re.compile(target_modules)
        except re.error as error:
            raise ValueError(f"target_modules: bad pattern {target_modules!r}, {error}") from None
    names = {
        name: {name}
        for name in modules
        if not any(name == a or name.startswith(f"{a}.") for a in adapted)
    }
    for spelling, _ in model.named_modules(remove_duplicate=False):
        names.get(portable_name(model, spelling), set()).add(spelling)

    def matches(name: str, target: str) -> bool:
        if by_pattern:
            return any(re.fullmatch(target, spelling) for spelling in names[name])
        return any(s == target or s.endswith(f".{target}") for s in names[name])

    unmatched = [t for t in targets if not any(matches(name, t) for name in names)]
    if unmatched or not targets:
        raise ValueError(
            f"target_modules: no module matches {unmatched or targets}; {_candidates(model, names)}"
        )
    return [name for name in names if any(matches(name, target) for target in targets)]


def _candidates(model: nn.Module, names: Iterable[str]) -> str:
    """Return words for the modules that a target could have named."""
    if isinstance(model, nn.Linear):
        return "the model is a linear itself, so use MoeLoraLinear.from_linear(model, config)"
    modules = dict(named_modules(model))
    linears = {
        name.rpartition(".")[2]: None for name in names if isinstance(modules.get(name), nn.Linear)
    }
    if not linears:
        return "the model has no nn.Linear without experts"
    listed = ", ".join([*linears][:10]) + (", ..." if len(linears) > 10 else "")
    return f"the names of its linears end in {listed}"


def fitting_task_router(layers: Iterable[nn.Module], config: MoeLoraConfig) -> TaskRouter | None:
    """Return the task router of `layers` that a new layer with `config` can share, or None."""
    sizes = (config.num_tasks, config.task_embedding_dim, config.num_experts)
    for layer in layers:
        if isinstance(layer, MixtureLayer) and layer.config.shares_gate() and config.shares_gate():
            other = layer.config
            if sizes == (other.num_tasks, other.task_embedding_dim, other.num_experts):
                return layer.router
    return None
