"""Which values an option can have, and which options have no meaning together."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import nn

from moelora_kernels import dispatch

if TYPE_CHECKING:
    from moelora_kernels.config import MoeLoraConfig

ROUTERS = ("linear", "mlp", "task", "external", "prototype", "self", "token_task")
AUX_WEIGHTS = {"load_balance": 0.01, "z": 0.001, "entropy": 0.01}

VALUES = {
    "granularity": ("token", "sequence", "task"),
    "score": ("softmax", "sigmoid", "identity", "abs"),
    "select": ("all", "topk", "sampling", "topp", "threshold", "learned_threshold"),
    "normalize": ("none", "sum", "softmax", "one"),
    "share": ("none", "A"),
    "shared_expert": ("none", "always", "complement"),
    "dropout_mask": ("shared", "per_expert"),
    "task_gate": ("shared", "per_layer"),
    "batch_dim": (0, 1),
    "init": ("kaiming", "normal", "sparse", "svd_segments"),
    "freeze": ("none", "A", "AB"),
    "grad_gate": ("gate", "sqrt"),
    "rank_activation": (None, "gelu", "relu", "silu"),
    "adapter_dtype": (None, "float32", "bfloat16", "float16", "float64"),
}


def check(config: MoeLoraConfig) -> None:
    """Raise ValueError or TypeError, naming the option, where options have no meaning."""
    for name, values in VALUES.items():
        one_of(name, getattr(config, name), values)
    if isinstance(config.router, str):
        one_of("router", config.router, ROUTERS)
    elif not (config.router is None or isinstance(config.router, nn.Module)):
        raise TypeError(f"router: expected a name or an nn.Module, got {type(config.router)}")
    dispatch.check(config.impl)
    whole("num_experts", config.num_experts)
    for rank in config.rank if isinstance(config.rank, tuple) else (config.rank,):
        whole("rank", rank)
    for name in ("router_hidden", "task_embedding_dim"):
        whole(name, getattr(config, name))
    for name in ("shared_rank", "num_tasks"):
        if getattr(config, name) is not None:
            whole(name, getattr(config, name))
    if not isinstance(config.router_bias, bool):
        raise TypeError(f"router_bias: expected True or False, got {config.router_bias!r}")
    if isinstance(config.rank, tuple) and len(config.rank) != config.num_experts:
        raise ValueError(f"rank: expected {config.num_experts} ranks, got {len(config.rank)}")
    for name in ("alpha", "dropout", "noise"):
        finite(name, getattr(config, name))
    # The scales of any size; that of the layer is not known yet.
    config.scales(in_features=1)
    if not 0.0 <= config.dropout < 1.0:
        raise ValueError(f"dropout: expected a probability in [0, 1), got {config.dropout}")
    above_zero("temperature", config.temperature)
    if config.noise < 0:
        raise ValueError(f"noise: expected a number from 0, got {config.noise}")
    if config.router in (None, "external"):
        if config.select != "all":
            raise ValueError(f"select: gates of router={config.router!r} are used as they are")
        if config.aux:
            raise ValueError(f"aux: router={config.router!r} has no logits to make a loss of")
    for option, selects in (
        ("top_k", ("topk", "sampling")),
        ("top_p", ("topp",)),
        ("threshold", ("threshold",)),
    ):
        value = getattr(config, option)
        if (value is not None) != (config.select in selects):
            raise ValueError(
                f"{option}: select={config.select!r} with {option}={value!r}; {option} goes with "
                f"select={' or '.join(map(repr, selects))}, and only with it"
            )
    if config.top_k is not None:
        whole("top_k", config.top_k, config.num_experts)
    if config.top_p is not None:
        finite("top_p", config.top_p)
    if config.top_p is not None and not 0.0 < config.top_p <= 1.0:
        raise ValueError(f"top_p: expected a number in (0, 1], got {config.top_p}")
    if config.top_p is not None and config.score == "identity":
        raise ValueError("top_p: raw logits can be negative; use a score that is not")
    if config.threshold is not None:
        finite("threshold", config.threshold)
    if config.router == "task":
        whole("num_tasks", config.num_tasks)
    if config.task_gate != "shared":
        _goes_with(config, "task_gate", "router", ("task",))
    if (config.granularity == "task") != (config.router == "task"):
        raise ValueError(
            f"granularity: {config.granularity!r} does not go with router={config.router!r}; "
            "'task' goes with router='task', and only with it"
        )
    if config.score == "identity" and config.normalize == "sum":
        raise ValueError("normalize: 'sum' of raw logits can be zero; use 'softmax' or 'none'")
    if config.share == "A":
        if len(set(config.ranks())) > 1:
            raise ValueError("rank: experts that share A have one rank")
        if config.dropout > 0 and config.dropout_mask == "per_expert":
            raise ValueError("dropout_mask: 'per_expert' does not go with share='A'")
    if dict(config.aux).get("load_balance") and config.select == "all":
        raise ValueError("aux: 'load_balance' is constant where every expert is selected")
    _check_selection(config)
    _check_router(config)
    _check_balance(config)
    _check_training(config)
    _check_svd_segments(config)
    if config.impl == "grouped":
        dispatch.check_grouped(config.top_k if config.is_sparse() else None, config.share == "A")


def _check_selection(config: MoeLoraConfig) -> None:
    """The options of a selection that differs from token to token."""
    if config.select == "learned_threshold":
        if config.router == "task":
            raise ValueError("select: 'learned_threshold' reads x, router='task' does not")
        if config.normalize == "softmax":
            raise ValueError(
                "normalize: 'softmax' cancels a learned threshold; use 'sum' or 'none'"
            )
    if config.max_threshold is not None:
        above_zero("max_threshold", config.max_threshold)
        _goes_with(config, "max_threshold", "select", ("learned_threshold",))
    if config.keep_min is not None:
        whole("keep_min", config.keep_min, config.num_experts)
        _goes_with(config, "keep_min", "select", ("topp", "threshold"))
    above_zero("entropy_index", config.entropy_index)
    if config.entropy_threshold is not None:
        finite("entropy_threshold", config.entropy_threshold)
        if not 0.0 <= config.entropy_threshold < 1.0:
            raise ValueError(
                f"entropy_threshold: expected a share of the largest entropy, in [0, 1), "
                f"got {config.entropy_threshold}"
            )
        _goes_with(config, "entropy_threshold", "select", ("topk", "topp", "threshold"))
    by_entropy = {
        "entropy_threshold": config.entropy_threshold is not None,
        "aux": "entropy" in dict(config.aux),
    }
    for name, used in by_entropy.items():
        if used and config.num_experts == 1:
            raise ValueError(f"{name}: the entropy of one expert is always 0")
    if not any(by_entropy.values()) and config.entropy_index != 1.0:
        raise ValueError("entropy_index: goes with entropy_threshold or aux='entropy'")


def _check_router(config: MoeLoraConfig) -> None:
    """The routers whose logits are not a free choice."""
    if config.router in ("prototype", "self") and config.aux:
        raise ValueError(f"aux: router={config.router!r} has no parameters for a loss to train")
    if config.router == "self":
        if set(config.ranks()) != {1}:
            raise ValueError(
                "rank: router='self' gates experts by their own A x, one number each: expected "
                f"rank 1, got {config.rank}"
            )
        if config.share == "A":
            raise ValueError("share: router='self' tells experts apart by A; share='A' has one")
        if config.shared_expert != "none":
            raise ValueError("shared_expert: router='self' has a number for every row of A")
        if config.granularity != "token":
            raise ValueError("granularity: router='self' gates tokens")
        if config.select == "learned_threshold":
            raise ValueError("select: router='self' has no logit of a learned threshold")
    if config.router == "token_task":
        if config.score != "identity":
            raise ValueError(
                "score: router='token_task' gives probabilities, which score='identity' takes "
                f"as they are, got {config.score!r}"
            )
        named = {
            "aux": config.aux,
            "noise": config.noise,
            "entropy_threshold": config.entropy_threshold,
            "select": config.select == "sampling",
        }
        for name, given in named.items():
            if given:
                raise ValueError(f"{name}: goes with logits, router='token_task' has none")
        if config.batch_dim != 0:
            raise ValueError("batch_dim: router='token_task' takes x [batch, sequence, I] only")


def _check_balance(config: MoeLoraConfig) -> None:
    if config.normalize == "one":
        if config.select == "all":
            raise ValueError("normalize: 'one' of all experts is router=None")
        if config.shared_expert == "complement":
            raise ValueError("shared_expert: 'complement' of weights of 1 is always 0")
    if config.balance_rate is None:
        return
    above_zero("balance_rate", config.balance_rate)
    _goes_with(config, "balance_rate", "select", ("topk",))
    if config.top_k == config.num_experts:
        raise ValueError("balance_rate: with top_k = num_experts every load is the same")
    if config.router == "task":
        raise ValueError("balance_rate: router='task' is one for all layers, a bias is not")


def _check_training(config: MoeLoraConfig) -> None:
    if config.init == "sparse" and config.top_k is None:
        raise ValueError("init: 'sparse' keeps K/E of A, so it goes with top_k")
    if config.grad_gate == "gate":
        return
    if config.router in (None, "external"):
        raise ValueError(f"grad_gate: 'sqrt' goes with a router, got router={config.router!r}")
    if config.freeze == "AB":
        raise ValueError("grad_gate: 'sqrt' is of the experts' gradients, freeze='AB' has none")
    if config.normalize == "one":
        raise ValueError("grad_gate: 'sqrt' of weights of 1 is 1")
    if config.score == "identity" and config.normalize == "none":
        raise ValueError("grad_gate: 'sqrt' of raw logits may be no number")
    if config.shared_expert != "none":
        raise ValueError("grad_gate: 'sqrt' does not go with a shared expert")


def _check_svd_segments(config: MoeLoraConfig) -> None:
    if config.svd_rho is not None:
        above_zero("svd_rho", config.svd_rho)
        _goes_with(config, "svd_rho", "init", ("svd_segments",))
    if config.init != "svd_segments":
        return
    if config.share == "A":
        raise ValueError("init: 'svd_segments' gives each expert an A; share='A' has one")
    if not min(config.scales(in_features=1)) > 0:
        raise ValueError(f"scaling: init='svd_segments' divides by it, got {config.scaling!r}")
    sums_to_one = config.normalize != "none" or (config.score, config.select) == ("softmax", "all")
    if config.router == "external" or not (config.router is None or sums_to_one):
        raise ValueError(
            "init: 'svd_segments' reduces the base by the mean over experts, which takes gates "
            "that sum to 1: normalize='sum' or 'softmax', and a router of the layer"
        )


def _goes_with(config: MoeLoraConfig, option: str, other: str, values: tuple[str, ...]) -> None:
    if getattr(config, other) not in values:
        raise ValueError(
            f"{option}: goes with {other} {' or '.join(map(repr, values))}, "
            f"got {other}={getattr(config, other)!r}"
        )


def one_of(name: str, value: Any, values: tuple) -> None:
    """Raise unless value is one of values."""
    # 1.0 and True are equal to 1 and are no dimension.
    is_plain = value is None or (isinstance(value, (str, int)) and not isinstance(value, bool))
    if not (is_plain and value in values):
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, values))}, got {value!r}")


def whole(name: str, value: Any, num_experts: int | None = None) -> None:
    """Raise unless value is a whole number from 1, and at most num_experts where that is given."""
    is_whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if num_experts is not None and not (is_whole and value <= num_experts):
        raise ValueError(f"{name}: expected 1 to num_experts = {num_experts}, got {value!r}")
    if not is_whole:
        raise ValueError(f"{name}: expected a whole number from 1, got {value!r}")


def above_zero(name: str, value: Any) -> None:
    """Raise unless value is a finite number above 0."""
    finite(name, value)
    if not value > 0:
        raise ValueError(f"{name}: expected a number above 0, got {value!r}")


def finite(name: str, value: Any) -> None:
    """Raise unless value is a finite number."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_number and math.isfinite(value)):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
