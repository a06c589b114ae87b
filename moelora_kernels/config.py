"""The options of a mixture-of-LoRA layer: orthogonal axes; methods are presets of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from moelora_kernels.config_rules import AUX_WEIGHTS, check, finite, one_of
from moelora_kernels.presets import PRESETS


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
            one_of("aux", name, tuple(AUX_WEIGHTS))
            if weight is not None:
                finite("aux", weight)
            weighted[name] = AUX_WEIGHTS[name] if weight is None else float(weight)
        settle("aux", tuple(weighted.items()))
        if self.select is None:
            settle("select", "all" if self.top_k is None else "topk")
        if self.granularity is None:
            settle("granularity", "task" if self.router == "task" else "token")
        check(self)

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
                finite("scaling", factor)
            if len(self.scaling) != len(ranks):
                raise ValueError(f"scaling: expected {len(ranks)} factors, got {len(self.scaling)}")
            return tuple(float(factor) for factor in self.scaling)
        if not isinstance(self.scaling, str):
            finite("scaling", self.scaling)
            return (float(self.scaling),) * len(ranks)
        factors = {
            "alpha/r": [self.alpha / rank for rank in ranks],
            "alpha/R": [self.alpha / sum(ranks)] * len(ranks),
            "alpha/sqrt(r)": [self.alpha / math.sqrt(rank) for rank in ranks],
        }
        by_width = "sqrt(3*alpha*I/r)"
        one_of("scaling", self.scaling, (*factors, by_width))
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
