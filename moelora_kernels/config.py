"""The options of a mixture-of-LoRA layer: orthogonal axes; methods are presets of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from moelora_kernels import formulation
from moelora_kernels.presets import PRESETS

ROUTERS = ("linear", "mlp", "task", "external", "prototype", "self", "token_task")
AUX_WEIGHTS = {"load_balance": 0.01, "z": 0.001, "entropy": 0.01}

_VALUES = {
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeLoraConfig:
    """Every option of `MoeLoraLinear`.

        gate = normalize(select(score(router(x) / temperature)))        [T, E]

    Experts
        num_experts: E.
        rank: r of every expert, or E ranks; R is their sum.
        alpha, scaling: the factor of the adapter: "alpha/r" (r of each expert), "alpha/R",
            "alpha/sqrt(r)" (rsLoRA), "sqrt(3*alpha*I/r)" (GOAT, alpha its ratio eta of learning
            rates, I in_features), or explicit: one number, or E of them.
        share: "A" gives all experts one A (and E blocks of B), as HydraLoRA does.
        shared_expert: an expert more, of rank `shared_rank` (None: the first expert's), that
            every token uses: "always" with weight 1, "complement" with 1 - max(gate).
        init: of A: "kaiming" (uniform in +-1/sqrt(I)), "normal" (standard deviation 0.01) or
            "sparse" (FlyLoRA: K/E of each row, normal of standard deviation 1/R), with B zero; or
            "svd_segments": A and B of expert e from segment e of the base's singular
            values, divided by `svd_rho` (None: 10), and the base reduced by their mean, see
            `nn.initialization`. Then the mean over balanced routings is the base at the start.
        rank_activation: between A and the gate, "gelu", "relu" or "silu": for `MoeLoraAdapter`, and
            only for it.
        freeze: what of the experts does not train: "none", "A" (B trains), or "AB": LoRAs that
            exist already, see `MoeLoraLinear.from_loras`. With "AB" and a router that is not
            trained in the layer, backward makes neither dA nor dB.
        adapter_dtype: of A, B and router; None is the base's (float32 where that is not a float).

    Gate
        router: "linear", "mlp" (two layers, `router_hidden` between), "task" (embedding of a task
            id and a linear layer, one for all layers), "external" (gates are passed in),
            "prototype" (|x v_e|, v_e of each expert, see `set_prototypes`), "self" (A x itself, of
            experts of rank 1; no gradient), "token_task" (probabilities, of the token mixed with
            those of a task vector, see `TokenTaskRouter`), any nn.Module
            x [T, I] -> logits [T, E] (itself, no copy: layers of one config share it), or None:
            every gate is 1.
        router_bias: of the linear router.
        num_tasks, task_embedding_dim: of the task router; ids run from 1 to num_tasks. Of
            "token_task" task_embedding_dim is the size of a task vector.
        task_gate: one task router for all layers of a model ("shared"), or one "per_layer".
        batch_dim: the dimension of x that counts sequences: 0, or 1 for x [sequence, batch, I]. Of
            gates per sequence or task, and of external ones with a row for each sequence.
        granularity: one gate per "token", per "sequence" (router sees the mean over positions) or
            per "task" (implied by router="task").
        score, temperature, noise: "softmax", "sigmoid", "identity" or "abs" of logits /
            temperature; in training, noise * N(0, 1) is added to the logits first.
        select: "all", "topk" (implied by top_k), "sampling" (top_k experts, without replacement,
            with probabilities softmax(logits / temperature), in training and in evaluation), "topp"
            (fewest experts whose scores reach top_p of the total), "threshold" (scores of at least
            `threshold`), "learned_threshold" (scores less tau = max_threshold * sigmoid(w x + b)
            of the token, where that is not negative; max_threshold None is 1/E).
        keep_min: for "topp" and "threshold": the experts of a token that are kept in any case.
        entropy_threshold: a token keeps all experts where the entropy of softmax(logits /
            temperature), divided by its largest value, is above it.
        entropy_index: q of the entropy, 1 for Shannon's, else Tsallis' (1 - sum p^q) / (q - 1).
        balance_rate: for "topk": the experts are selected by score(logits + bias), with a bias per
            expert that has no gradient and no part in the weights; `update_balance` moves it by
            +-balance_rate against the load. None: no bias.
        normalize: the kept scores as they are ("none"), divided by their "sum", their "softmax", or
            "one": every kept expert has the weight 1.

    Training
        dropout, dropout_mask: on x on the way into A; one mask ("shared") or one "per_expert".
        aux: auxiliary losses by name with their weights: "load_balance", "z", "entropy".
        grad_gate: the gate in the gradients of A, B and of x on its way through them: the same
            "gate", or its root, "sqrt" (arXiv 2502.15828); the router's gradient stays as it is.
        impl: the formulation, see `formulation`: "auto" may choose, "wide", "grouped" (top-k gates
            of tokens only) or "reference" works or raises.

    Raises ValueError or TypeError that names the option, what was given and what is expected.
    """

    num_experts: int = 8
    rank: int | tuple[int, ...] = 16
    alpha: float = 32.0
    scaling: str | float | tuple[float, ...] = "alpha/r"
    share: str = "none"
    shared_expert: str = "none"
    shared_rank: int | None = None
    init: str = "kaiming"
    svd_rho: float | None = None
    rank_activation: str | None = None
    freeze: str = "none"
    adapter_dtype: str | None = None
    router: str | nn.Module | None = "linear"
    router_bias: bool = False
    router_hidden: int = 64
    num_tasks: int | None = None
    task_embedding_dim: int = 64
    task_gate: str = "shared"
    batch_dim: int = 0
    granularity: str | None = None
    score: str = "softmax"
    temperature: float = 1.0
    noise: float = 0.0
    select: str | None = None
    top_k: int | None = None
    top_p: float | None = None
    threshold: float | None = None
    max_threshold: float | None = None
    keep_min: int | None = None
    entropy_threshold: float | None = None
    entropy_index: float = 1.0
    balance_rate: float | None = None
    normalize: str = "sum"
    dropout: float = 0.0
    dropout_mask: str = "shared"
    aux: Mapping[str, float] | tuple = ()
    grad_gate: str = "gate"
    impl: str = "auto"

    @classmethod
    def preset(cls, name: str, **options: Any) -> MoeLoraConfig:
        """The options of a published method, with `options` in place of its own."""
        if name not in PRESETS:
            raise ValueError(f"preset: expected one of {', '.join(PRESETS)}, got {name!r}")
        return cls(**{**PRESETS[name], **options})

    @classmethod
    def of(cls, config: MoeLoraConfig | None, options: Mapping[str, Any]) -> MoeLoraConfig:
        """`config` changed by `options`, or made of them where there is none."""
        if config is None:
            return cls(**options)
        if not isinstance(config, cls):
            raise TypeError(f"config: expected a MoeLoraConfig, got {config!r}")
        return config.replace(**options) if options else config

    def replace(self, **options: Any) -> MoeLoraConfig:
        """A copy with some options changed; what the old values implied is settled anew."""
        if "top_k" in options and self.select in ("all", "topk"):
            options = {"select": None, **options}
        if "router" in options and "task" in (self.router, options["router"]):
            options = {"granularity": None, **options}
        return dataclasses.replace(self, **options)

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold; raises TypeError for a router that is a module."""
        if isinstance(self.router, nn.Module):
            raise TypeError("router: a module cannot be written to a dictionary")
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["aux"] = dict(self.aux)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MoeLoraConfig:
        """The inverse of `to_dict`; an unknown option raises ValueError."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown options: {', '.join(unknown)}")
        return cls(**values)

    def __post_init__(self) -> None:
        def settle(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        for name in ("rank", "scaling"):
            if isinstance(getattr(self, name), list):
                settle(name, tuple(getattr(self, name)))
        if isinstance(self.aux, str):
            settle("aux", (self.aux,))
        if not isinstance(self.aux, Iterable):
            raise TypeError(f"aux: expected names, or weights by name, got {self.aux!r}")
        given = self.aux.items() if isinstance(self.aux, Mapping) else self.aux
        weighted = {}
        for entry in given:
            pair = isinstance(entry, tuple) and len(entry) == 2
            name, weight = entry if pair else (entry, None)
            _one_of("aux", name, tuple(AUX_WEIGHTS))
            if weight is not None:
                _finite("aux", weight)
            weighted[name] = AUX_WEIGHTS[name] if weight is None else float(weight)
        settle("aux", tuple(weighted.items()))
        if self.select is None:
            settle("select", "all" if self.top_k is None else "topk")
        if self.granularity is None:
            settle("granularity", "task" if self.router == "task" else "token")
        self._check()

    def _check(self) -> None:
        for name, values in _VALUES.items():
            _one_of(name, getattr(self, name), values)
        if isinstance(self.router, str):
            _one_of("router", self.router, ROUTERS)
        elif not (self.router is None or isinstance(self.router, nn.Module)):
            raise TypeError(f"router: expected a name or an nn.Module, got {type(self.router)}")
        formulation.check(self.impl)
        _whole("num_experts", self.num_experts)
        for rank in self.rank if isinstance(self.rank, tuple) else (self.rank,):
            _whole("rank", rank)
        for name in ("router_hidden", "task_embedding_dim"):
            _whole(name, getattr(self, name))
        for name in ("shared_rank", "num_tasks"):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name))
        if not isinstance(self.router_bias, bool):
            raise TypeError(f"router_bias: expected True or False, got {self.router_bias!r}")
        if isinstance(self.rank, tuple) and len(self.rank) != self.num_experts:
            raise ValueError(f"rank: expected {self.num_experts} ranks, got {len(self.rank)}")
        for name in ("alpha", "dropout", "noise"):
            _finite(name, getattr(self, name))
        # The scales of any size; that of the layer is not known yet.
        self.scales(in_features=1)
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout: expected a probability in [0, 1), got {self.dropout}")
        _above_zero("temperature", self.temperature)
        if self.noise < 0:
            raise ValueError(f"noise: expected a number from 0, got {self.noise}")
        if self.router in (None, "external"):
            if self.select != "all":
                raise ValueError(f"select: gates of router={self.router!r} are used as they are")
            if self.aux:
                raise ValueError(f"aux: router={self.router!r} has no logits to make a loss of")
        for option, selects in (
            ("top_k", ("topk", "sampling")),
            ("top_p", ("topp",)),
            ("threshold", ("threshold",)),
        ):
            value = getattr(self, option)
            if (value is not None) != (self.select in selects):
                raise ValueError(
                    f"{option}: select={self.select!r} with {option}={value!r}; {option} goes with "
                    f"select={' or '.join(map(repr, selects))}, and only with it"
                )
        if self.top_k is not None:
            _whole("top_k", self.top_k, self.num_experts)
        if self.top_p is not None:
            _finite("top_p", self.top_p)
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p: expected a number in (0, 1], got {self.top_p}")
        if self.top_p is not None and self.score == "identity":
            raise ValueError("top_p: raw logits can be negative; use a score that is not")
        if self.threshold is not None:
            _finite("threshold", self.threshold)
        if self.router == "task":
            _whole("num_tasks", self.num_tasks)
        if self.task_gate != "shared":
            self._goes_with("task_gate", "router", ("task",))
        if (self.granularity == "task") != (self.router == "task"):
            raise ValueError(
                f"granularity: {self.granularity!r} does not go with router={self.router!r}; "
                "'task' goes with router='task', and only with it"
            )
        if self.score == "identity" and self.normalize == "sum":
            raise ValueError("normalize: 'sum' of raw logits can be zero; use 'softmax' or 'none'")
        if self.share == "A":
            if len(set(self.ranks())) > 1:
                raise ValueError("rank: experts that share A have one rank")
            if self.dropout > 0 and self.dropout_mask == "per_expert":
                raise ValueError("dropout_mask: 'per_expert' does not go with share='A'")
        if dict(self.aux).get("load_balance") and self.select == "all":
            raise ValueError("aux: 'load_balance' is constant where every expert is selected")
        self._check_selection()
        self._check_router()
        self._check_balance()
        self._check_training()
        self._check_svd_segments()
        if self.impl == "grouped":
            formulation.check_grouped(self.top_k if self.is_sparse() else None, self.share == "A")

    def _check_selection(self) -> None:
        """The options of a selection that differs from token to token."""
        if self.select == "learned_threshold":
            if self.router == "task":
                raise ValueError("select: 'learned_threshold' reads x, router='task' does not")
            if self.normalize == "softmax":
                raise ValueError(
                    "normalize: 'softmax' cancels a learned threshold; use 'sum' or 'none'"
                )
        if self.max_threshold is not None:
            _above_zero("max_threshold", self.max_threshold)
            self._goes_with("max_threshold", "select", ("learned_threshold",))
        if self.keep_min is not None:
            _whole("keep_min", self.keep_min, self.num_experts)
            self._goes_with("keep_min", "select", ("topp", "threshold"))
        _above_zero("entropy_index", self.entropy_index)
        if self.entropy_threshold is not None:
            _finite("entropy_threshold", self.entropy_threshold)
            if not 0.0 <= self.entropy_threshold < 1.0:
                raise ValueError(
                    f"entropy_threshold: expected a share of the largest entropy, in [0, 1), "
                    f"got {self.entropy_threshold}"
                )
            self._goes_with("entropy_threshold", "select", ("topk", "topp", "threshold"))
        by_entropy = {
            "entropy_threshold": self.entropy_threshold is not None,
            "aux": "entropy" in dict(self.aux),
        }
        for name, used in by_entropy.items():
            if used and self.num_experts == 1:
                raise ValueError(f"{name}: the entropy of one expert is always 0")
        if not any(by_entropy.values()) and self.entropy_index != 1.0:
            raise ValueError("entropy_index: goes with entropy_threshold or aux='entropy'")

    def _check_router(self) -> None:
        """The routers whose logits are not a free choice."""
        if self.router in ("prototype", "self") and self.aux:
            raise ValueError(f"aux: router={self.router!r} has no parameters for a loss to train")
        if self.router == "self":
            if set(self.ranks()) != {1}:
                raise ValueError(
                    "rank: router='self' gates experts by their own A x, one number each: expected "
                    f"rank 1, got {self.rank}"
                )
            if self.share == "A":
                raise ValueError("share: router='self' tells experts apart by A; share='A' has one")
            if self.shared_expert != "none":
                raise ValueError("shared_expert: router='self' has a number for every row of A")
            if self.granularity != "token":
                raise ValueError("granularity: router='self' gates tokens")
            if self.select == "learned_threshold":
                raise ValueError("select: router='self' has no logit of a learned threshold")
        if self.router == "token_task":
            if self.score != "identity":
                raise ValueError(
                    "score: router='token_task' gives probabilities, which score='identity' takes "
                    f"as they are, got {self.score!r}"
                )
            named = {
                "aux": self.aux,
                "noise": self.noise,
                "entropy_threshold": self.entropy_threshold,
                "select": self.select == "sampling",
            }
            for name, given in named.items():
                if given:
                    raise ValueError(f"{name}: goes with logits, router='token_task' has none")
            if self.batch_dim != 0:
                raise ValueError("batch_dim: router='token_task' takes x [batch, sequence, I] only")

    def _check_balance(self) -> None:
        if self.normalize == "one":
            if self.select == "all":
                raise ValueError("normalize: 'one' of all experts is router=None")
            if self.shared_expert == "complement":
                raise ValueError("shared_expert: 'complement' of weights of 1 is always 0")
        if self.balance_rate is None:
            return
        _above_zero("balance_rate", self.balance_rate)
        self._goes_with("balance_rate", "select", ("topk",))
        if self.top_k == self.num_experts:
            raise ValueError("balance_rate: with top_k = num_experts every load is the same")
        if self.router == "task":
            raise ValueError("balance_rate: router='task' is one for all layers, a bias is not")

    def _check_training(self) -> None:
        if self.init == "sparse" and self.top_k is None:
            raise ValueError("init: 'sparse' keeps K/E of A, so it goes with top_k")
        if self.grad_gate == "gate":
            return
        if self.router in (None, "external"):
            raise ValueError(f"grad_gate: 'sqrt' goes with a router, got router={self.router!r}")
        if self.freeze == "AB":
            raise ValueError("grad_gate: 'sqrt' is of the experts' gradients, freeze='AB' has none")
        if self.normalize == "one":
            raise ValueError("grad_gate: 'sqrt' of weights of 1 is 1")
        if self.score == "identity" and self.normalize == "none":
            raise ValueError("grad_gate: 'sqrt' of raw logits may be no number")
        if self.shared_expert != "none":
            raise ValueError("grad_gate: 'sqrt' does not go with a shared expert")

    def _check_svd_segments(self) -> None:
        if self.svd_rho is not None:
            _above_zero("svd_rho", self.svd_rho)
            self._goes_with("svd_rho", "init", ("svd_segments",))
        if self.init != "svd_segments":
            return
        if self.share == "A":
            raise ValueError("init: 'svd_segments' gives each expert an A; share='A' has one")
        if not min(self.scales(in_features=1)) > 0:
            raise ValueError(f"scaling: init='svd_segments' divides by it, got {self.scaling!r}")
        sums_to_one = self.normalize != "none" or (self.score, self.select) == ("softmax", "all")
        if self.router == "external" or not (self.router is None or sums_to_one):
            raise ValueError(
                "init: 'svd_segments' reduces the base by the mean over experts, which takes gates "
                "that sum to 1: normalize='sum' or 'softmax', and a router of the layer"
            )

    def _goes_with(self, option: str, other: str, values: tuple[str, ...]) -> None:
        if getattr(self, other) not in values:
            raise ValueError(
                f"{option}: goes with {other} {' or '.join(map(repr, values))}, "
                f"got {other}={getattr(self, other)!r}"
            )

    def ranks(self) -> tuple[int, ...]:
        """Rank of each expert, the shared expert last."""
        ranks = self.rank if isinstance(self.rank, tuple) else (self.rank,) * self.num_experts
        if self.shared_expert == "none":
            return ranks
        return (*ranks, self.shared_rank or ranks[0])

    def scales(self, in_features: int | None = None) -> tuple[float, ...]:
        """Factor of each expert's output, the shared expert last; some rules need in_features."""
        ranks = self.ranks()
        if isinstance(self.scaling, tuple):
            for factor in self.scaling:
                _finite("scaling", factor)
            if len(self.scaling) != len(ranks):
                raise ValueError(f"scaling: expected {len(ranks)} factors, got {len(self.scaling)}")
            return tuple(float(factor) for factor in self.scaling)
        if not isinstance(self.scaling, str):
            _finite("scaling", self.scaling)
            return (float(self.scaling),) * len(ranks)
        factors = {
            "alpha/r": [self.alpha / rank for rank in ranks],
            "alpha/R": [self.alpha / sum(ranks)] * len(ranks),
            "alpha/sqrt(r)": [self.alpha / math.sqrt(rank) for rank in ranks],
        }
        by_width = "sqrt(3*alpha*I/r)"
        _one_of("scaling", self.scaling, (*factors, by_width))
        if self.scaling != by_width:
            return tuple(factors[self.scaling])
        if in_features is None:
            raise ValueError(f"scaling: {by_width!r} differs from layer to layer: give in_features")
        if self.alpha < 0:
            raise ValueError(f"alpha: scaling={by_width!r} takes its root, got {self.alpha}")
        return tuple(math.sqrt(3 * self.alpha * in_features / rank) for rank in ranks)

    def shares_gate(self) -> bool:
        """Whether one router serves all layers of a model."""
        return self.router == "task" and self.task_gate == "shared"

    def is_sparse(self) -> bool:
        """Whether the gate is K weights and indices per token, not E weights."""
        if self.granularity != "token" or self.top_k in (None, self.num_experts):
            return False
        return self.select == "sampling" or self.renormalizes() is not None

    def renormalizes(self) -> bool | None:
        """Whether `topk_gate` divides by the kept sum; None where the gate is not a `topk_gate`."""
        if self.select not in ("all", "topk") or self.entropy_threshold is not None:
            return None
        if self.balance_rate is not None:
            return None
        if self.score == "softmax" and self.normalize in ("none", "sum"):
            return self.normalize == "sum" or self.select == "all"
        # The softmax of the kept logits is the softmax of all, divided by the kept sum.
        return True if (self.score, self.normalize) == ("identity", "softmax") else None


def _one_of(name: str, value: Any, values: tuple) -> None:
    # 1.0 and True are equal to 1 and are no dimension.
    is_plain = value is None or (isinstance(value, (str, int)) and not isinstance(value, bool))
    if not (is_plain and value in values):
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, values))}, got {value!r}")


def _whole(name: str, value: Any, num_experts: int | None = None) -> None:
    """Raise unless value is a whole number from 1, and at most num_experts where that is given."""
    is_whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if num_experts is not None and not (is_whole and value <= num_experts):
        raise ValueError(f"{name}: expected 1 to num_experts = {num_experts}, got {value!r}")
    if not is_whole:
        raise ValueError(f"{name}: expected a whole number from 1, got {value!r}")


def _above_zero(name: str, value: Any) -> None:
    _finite(name, value)
    if not value > 0:
        raise ValueError(f"{name}: expected a number above 0, got {value!r}")


def _finite(name: str, value: Any) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (is_number and math.isfinite(value)):
        raise ValueError(f"{name}: expected a finite number, got {value!r}")
