"""The values of every option of MoeLoraConfig, and the options that do not work together.

The rules are tables. `check` applies them in this order: VALUES, NUMBERS, NEEDS, WORKS_ONLY_WITH,
CONFLICTS. `constant_gate_problem` reads CONSTANT_GATES. `options_page` writes the same tables
into METHODS.md.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from moelora_kernels import dispatch
from moelora_kernels.value_checks import (
    BELOW_ONE,
    COUNT,
    FINITE,
    NOT_NEGATIVE,
    POSITIVE,
    UP_TO_ONE,
    Interval,
    check_experts,
    check_number,
    check_one_of,
)

if TYPE_CHECKING:
    from moelora_kernels.config import MoeLoraConfig

# Auxiliary loss -> its default weight.
AUX_WEIGHTS = {"load_balance": 0.01, "z": 0.001, "entropy": 0.01}

# Option -> its allowed values. `router` can also be an nn.Module.
VALUES: dict[str, tuple] = {
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
    "router": (None, "linear", "mlp", "task", "external", "prototype", "self", "token_task"),
}

# Option -> its allowed numbers. An option whose default is None can also be None. `rank` can also
# be a tuple of numbers.
NUMBERS: dict[str, Interval] = {
    **dict.fromkeys(("num_experts", "rank", "shared_rank", "router_hidden", "num_tasks"), COUNT),
    **dict.fromkeys(("task_embedding_dim", "top_k", "keep_min"), COUNT),
    **dict.fromkeys(("alpha", "threshold"), FINITE),
    **dict.fromkeys(("temperature", "max_threshold", "entropy_index"), POSITIVE),
    **dict.fromkeys(("balance_rate", "svd_rho"), POSITIVE),
    **dict.fromkeys(("dropout", "entropy_threshold"), BELOW_ONE),
    "noise": NOT_NEGATIVE,
    "top_p": UP_TO_ONE,
}
AT_MOST_NUM_EXPERTS = ("top_k", "keep_min")

# (option, its value) -> the option that must then have a value.
NEEDS = {
    ("select", "topk"): "top_k",
    ("select", "sampling"): "top_k",
    ("select", "topp"): "top_p",
    ("select", "threshold"): "threshold",
    ("router", "task"): "num_tasks",
}

# Option -> (other option, its values). The option can differ from its default only if the other
# option has one of these values.
WORKS_ONLY_WITH: dict[str, tuple[str, tuple[str, ...]]] = {
    "top_k": ("select", ("topk", "sampling")),
    "top_p": ("select", ("topp",)),
    "threshold": ("select", ("threshold",)),
    "max_threshold": ("select", ("learned_threshold",)),
    "keep_min": ("select", ("topp", "threshold")),
    "entropy_threshold": ("select", ("topk", "topp", "threshold")),
    "balance_rate": ("select", ("topk",)),
    "task_gate": ("router", ("task",)),
    "svd_rho": ("init", ("svd_segments",)),
}


class AnyExcept(NamedTuple):
    """A condition in CONFLICTS: any value except this one."""

    value: Any


class Test(NamedTuple):
    """A condition in CONFLICTS: a text for the page, and a test of the whole config."""

    text: str
    is_true: Callable[[MoeLoraConfig], bool]


SET = AnyExcept(None)
ANY_LOSS = AnyExcept(())
LOAD_BALANCE = Test("with load_balance", lambda c: dict(c.aux).get("load_balance", 0) != 0)
ENTROPY = Test("with entropy", lambda c: "entropy" in dict(c.aux))
NO_ENTROPY = Test("without entropy", lambda c: "entropy" not in dict(c.aux))
UNEQUAL_RANKS = Test("not the same for all experts", lambda c: len(set(c.ranks())) > 1)
RANK_ABOVE_ONE = Test("above 1", lambda c: max(c.ranks()) > 1)
ALL_EXPERTS = Test("equal to num_experts", lambda c: c.top_k == c.num_experts)
SCALE_NOT_POSITIVE = Test("0 or negative", lambda c: not min(c.scales(in_features=1)) > 0)
NO_UNIT_SUM = Test(
    '`"none"` (unless `score="softmax"` and `select="all"`)',
    lambda c: c.normalize == "none" and (c.score, c.select) != ("softmax", "all"),
)
# The routers that compute no logits: the gates are passed by the caller, or all are 1.
NO_LOGITS = (None, "external")
NEEDS_LOGITS = "it needs logits, but this router returns probabilities"
SUM_TO_ONE = "the base is reduced by the mean gate 1 / E, so the gates must sum to 1"

# (conditions, reason). A condition is an option -> one value, a tuple of values, AnyExcept or Test.
# If all conditions are true, `check` raises an error that begins with the first option. If several
# conflicts are true, the first one of the list is reported.
CONFLICTS: list[tuple[dict[str, Any], str]] = [
    ({"select": AnyExcept("all"), "router": NO_LOGITS}, "the gates are used unchanged"),
    ({"aux": ANY_LOSS, "router": NO_LOGITS}, "there are no logits to compute a loss from"),
    ({"top_p": SET, "score": "identity"}, "raw logits can be negative; use another score"),
    ({"granularity": "task", "router": AnyExcept("task")}, "only router='task' has tasks"),
    ({"granularity": AnyExcept("task"), "router": "task"}, "the gate depends only on the task"),
    (
        {"normalize": "sum", "score": "identity"},
        "the sum of raw logits can be 0; use 'softmax' or 'none'",
    ),
    ({"rank": UNEQUAL_RANKS, "share": "A"}, "experts that share A have the same rank"),
    (
        {"dropout_mask": "per_expert", "dropout": AnyExcept(0), "share": "A"},
        "experts that share A share the dropout mask",
    ),
    (
        {"aux": LOAD_BALANCE, "select": "all"},
        "the load-balance loss is constant if all experts are used",
    ),
    (
        {"select": "learned_threshold", "router": "task"},
        "the threshold is computed from x, which a task router does not read",
    ),
    (
        {"normalize": "softmax", "select": "learned_threshold"},
        "a softmax cancels the threshold; use 'sum' or 'none'",
    ),
    ({"entropy_threshold": SET, "num_experts": 1}, "the entropy of one expert is 0"),
    ({"aux": ENTROPY, "num_experts": 1}, "the entropy of one expert is 0"),
    (
        {"entropy_index": AnyExcept(1.0), "entropy_threshold": None, "aux": NO_ENTROPY},
        "no entropy is computed",
    ),
    (
        {"aux": ANY_LOSS, "router": ("prototype", "self")},
        "this router has no parameters that a loss could train",
    ),
    (
        {"rank": RANK_ABOVE_ONE, "router": "self"},
        "the logit of an expert is A x, which is one number only for rank 1",
    ),
    ({"share": "A", "router": "self"}, "each expert needs a separate row of A for its logit"),
    (
        {"shared_expert": AnyExcept("none"), "router": "self"},
        "the logits A x would include the shared expert",
    ),
    (
        {"granularity": AnyExcept("token"), "router": "self"},
        "the logits A x belong to single tokens",
    ),
    (
        {"select": "learned_threshold", "router": "self"},
        "the threshold needs one logit more than A x has",
    ),
    (
        {"score": AnyExcept("identity"), "router": "token_task"},
        "this router returns probabilities; use score='identity'",
    ),
    ({"aux": ANY_LOSS, "router": "token_task"}, NEEDS_LOGITS),
    ({"noise": AnyExcept(0), "router": "token_task"}, NEEDS_LOGITS),
    ({"entropy_threshold": SET, "router": "token_task"}, NEEDS_LOGITS),
    ({"select": "sampling", "router": "token_task"}, NEEDS_LOGITS),
    (
        {"batch_dim": AnyExcept(0), "router": "token_task"},
        "this router takes x [batch, sequence, I] only",
    ),
    ({"normalize": "one", "select": "all"}, "every gate would be 1; use router=None"),
    (
        {"shared_expert": "complement", "normalize": "one"},
        "the gate of the shared expert, 1 - max(gate), would always be 0",
    ),
    ({"balance_rate": SET, "top_k": ALL_EXPERTS}, "all experts always have the same load"),
    (
        {"balance_rate": SET, "router": "task"},
        "the bias belongs to one layer, but all layers can share a task router",
    ),
    ({"init": "sparse", "top_k": None}, "top_k / num_experts of the entries of A are not zero"),
    ({"grad_gate": "sqrt", "router": NO_LOGITS}, "the layer has no router"),
    (
        {"grad_gate": "sqrt", "freeze": "AB"},
        "it changes the gradients of A and B, which are frozen",
    ),
    ({"grad_gate": "sqrt", "normalize": "one"}, "every gate is 1, and so is its square root"),
    (
        {"grad_gate": "sqrt", "score": "identity", "normalize": "none"},
        "raw logits can be negative and then have no square root",
    ),
    (
        {"grad_gate": "sqrt", "shared_expert": AnyExcept("none")},
        "the gradients of a shared expert are not supported",
    ),
    (
        {"frozen_experts": AnyExcept(()), "share": "A", "freeze": "none"},
        "all experts have one A, so the frozen experts would change with it; use freeze='A'",
    ),
    ({"init": "svd_segments", "share": "A"}, "every expert gets the A of a different segment"),
    (
        {"scaling": SCALE_NOT_POSITIVE, "init": "svd_segments"},
        "A and B are divided by the square root of the scale",
    ),
    ({"init": "svd_segments", "router": "external"}, SUM_TO_ONE),
    ({"init": "svd_segments", "router": AnyExcept(None), "normalize": NO_UNIT_SUM}, SUM_TO_ONE),
]


ABOVE_HALF = Test("above 0.5", lambda c: c.threshold is not None and c.threshold > 0.5)
AT_MOST_MEAN = Test(
    "at most 1 / num_experts", lambda c: c.top_p is not None and c.top_p <= 1 / c.num_experts
)
NORMALIZED = {"normalize": ("sum", "softmax")}
ONE_KEPT = {"keep_min": (None, 1), "entropy_threshold": None, "score": "softmax", **NORMALIZED}

# (conditions, reason), as in CONFLICTS. If all conditions are true, the weight of every kept expert
# is the constant 1, so no gradient reaches the router through the gate.
CONSTANT_GATES: list[tuple[dict[str, Any], str]] = [
    (
        {"top_k": 1, "entropy_threshold": None, **NORMALIZED},
        "the only kept score, divided by itself, is 1",
    ),
    (
        {"top_p": AT_MOST_MEAN, **ONE_KEPT},
        "the largest probability reaches top_p alone; divided by itself it is 1",
    ),
    (
        {"threshold": ABOVE_HALF, **ONE_KEPT},
        "at most one probability is above 0.5; divided by itself it is 1",
    ),
    ({"num_experts": 1, **NORMALIZED}, "the only score, divided by itself, is 1"),
    (
        {"num_experts": 1, "score": "softmax", "select": AnyExcept("learned_threshold")},
        "the softmax over one expert is 1",
    ),
    ({"normalize": "one"}, "every kept expert has the gate 1"),
]


def untrained_router_problem(config: MoeLoraConfig) -> str | None:
    """Return why neither the gate nor a loss trains the router of `config`; None if one does.

    Also None with a `balance_rate`, which moves the selection without a gradient.
    """
    has_loss = any(weight != 0 for weight in dict(config.aux).values())
    if config.router in NO_LOGITS or has_loss or config.balance_rate is not None:
        return None
    return constant_gate_problem(config)


def constant_gate_problem(config: MoeLoraConfig) -> str | None:
    """Return why no gradient reaches the router through the gate, from CONSTANT_GATES; or None."""
    for conditions, reason in CONSTANT_GATES:
        if all(_is_true(config, name, test) for name, test in conditions.items()):
            names = [name for name in conditions if getattr(config, name) is not None]
            return f"{', '.join(f'{name}={_shown(config, name)}' for name in names)}: {reason}"
    return None


def router_remedy(config: MoeLoraConfig) -> str:
    """Return what to change if `untrained_router_problem` has a problem."""
    if config.num_experts == 1:
        return "One expert needs none: pass router=None"
    return (
        "Set score='softmax' and normalize='none' with top_k, so that the gate trains it; or add a "
        "loss, such as aux={'load_balance': 0.01}, with collect_aux_loss; or pass a frozen module "
        "as router"
    )


def check(config: MoeLoraConfig) -> None:
    """Raise ValueError or TypeError if an option or a combination of options is not allowed."""
    _check_values(config)
    _check_numbers(config)
    check_experts("frozen_experts", config.frozen_experts, len(config.ranks()))
    # Raises if `scaling` is not valid. Whether it is valid does not depend on in_features.
    config.scales(in_features=1)
    for (option, value), needed in NEEDS.items():
        if getattr(config, option) == value and getattr(config, needed) is None:
            raise ValueError(f"{needed}: expected a value with {option}={value!r}, got None")
    for option, (other, values) in WORKS_ONLY_WITH.items():
        value, default = getattr(config, option), getattr(type(config), option)
        if value != default and getattr(config, other) not in values:
            raise ValueError(
                f"{option}: {value!r} works only with {other}={' or '.join(map(repr, values))}, "
                f"got {other}={getattr(config, other)!r}"
            )
    for conditions, reason in CONFLICTS:
        if all(_is_true(config, name, test) for name, test in conditions.items()):
            option = next(iter(conditions))
            others = [f"{name}={_shown(config, name)}" for name in conditions if name != option]
            raise ValueError(
                f"{option}: {_shown(config, option)} cannot be combined with "
                f"{' and '.join(others)}: {reason}"
            )
    if config.impl == "grouped":
        # Gates from outside can be sparse; the forward checks them.
        can_be_sparse = config.is_sparse() or config.router == "external"
        dispatch.check_grouped(1 if can_be_sparse else None, config.share == "A")


def _check_values(config: MoeLoraConfig) -> None:
    if not isinstance(config.router, (str, nn.Module, type(None))):
        raise TypeError(f"router: expected a name, an nn.Module or None, got {config.router!r}")
    for option, values in VALUES.items():
        if not (option == "router" and isinstance(config.router, nn.Module)):
            check_one_of(option, getattr(config, option), values)
    if not isinstance(config.router_bias, bool):
        raise TypeError(f"router_bias: expected True or False, got {config.router_bias!r}")
    dispatch.check(config.impl)


def _check_numbers(config: MoeLoraConfig) -> None:
    for option, interval in NUMBERS.items():
        value = getattr(config, option)
        if value is None and getattr(type(config), option) is None:
            continue
        if option in AT_MOST_NUM_EXPERTS:
            interval = Interval(
                f"a whole number from 1 to num_experts = {config.num_experts}",
                lambda n: 1 <= n <= config.num_experts,
                whole=True,
            )
        for number in value if option == "rank" and isinstance(value, tuple) else (value,):
            check_number(option, number, interval)
    if isinstance(config.rank, tuple) and len(config.rank) != config.num_experts:
        raise ValueError(
            f"rank: expected one rank, or a list of num_experts = {config.num_experts} ranks, "
            f"got {len(config.rank)} ranks"
        )


def _is_true(config: MoeLoraConfig, option: str, condition: Any) -> bool:
    """Return whether a condition of CONFLICTS is true for an option."""
    value = getattr(config, option)
    if isinstance(condition, Test):
        return condition.is_true(config)
    if isinstance(condition, AnyExcept):
        return value != condition.value
    return value in condition if isinstance(condition, tuple) else value == condition


def _shown(config: MoeLoraConfig, option: str) -> str:
    value = getattr(config, option)
    return repr(dict(value) if option == "aux" else value)
