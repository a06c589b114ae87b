"""MoeLoraConfig: the options of a mixture-of-LoRA layer. Presets name published combinations."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from moelora_kernels.config_rules import AUX_WEIGHTS, check
from moelora_kernels.presets import PRESETS, check_preset
from moelora_kernels.value_checks import check_number, check_one_of


@dataclasses.dataclass(frozen=True, kw_only=True)
class MoeLoraConfig:
    """The options of a layer. Every option is documented at its field.

        logits = router(x)                                              [T, E]
        gate   = normalize(select(score(logits / temperature)))         [T, E]
        y      = x Wt + b + sum_e gate_e scale_e B_e A_e x              [T, O]

    T tokens, E experts, K experts per token, I in_features, O out_features, r the rank of one
    expert, R the sum of the ranks. At the options E does not count a shared expert; in the formulas
    above, in R and in the shapes of tensors a shared expert is one more expert. METHODS.md lists
    the presets, the allowed values, and the options that do not work together.

    Raises:
        ValueError: an option is out of range, or two options do not work together. The message
            begins with the name of an option.
        TypeError: `router`, `router_bias` or `aux` has the wrong type.

    Example:
        >>> config = MoeLoraConfig.preset("ming", num_experts=4, rank=8)
        >>> config.num_experts, config.rank, config.top_k, config.router
        (4, 8, 2, 'linear')
    """

    # The experts.

    num_experts: int = 8
    """E, without a shared expert."""

    rank: int | tuple[int, ...] = 16
    """The rank r of every expert, or a list of E ranks."""

    alpha: float = 32.0
    """The numerator in `scaling`. Unused if `scaling` is a number or a list of numbers."""

    scaling: str | float | tuple[float, ...] = "alpha/r"
    """The scale of every expert's output: one number; one number per expert, with the shared expert
    last; or a rule: "alpha/r" (r of each expert), "alpha/R", "alpha/sqrt(r)" (rsLoRA), or
    "sqrt(3*alpha*I/r)" (GOAT, whose eta is alpha)."""

    share: str = "none"
    """Whether experts share A. "none": every expert has its own A. "A": all experts have one A and
    differ in B (HydraLoRA, HMoRA)."""

    shared_expert: str = "none"
    """Adds one expert that every token uses. "none": no such expert. "always": its gate is 1.
    "complement": its gate is 1 - max(gate) over the other experts (MoCLE)."""

    shared_rank: int | None = None
    """The rank of the shared expert. None: the rank of the first expert."""

    init: str = "kaiming"
    """How A starts. B starts at zero, except for "svd_segments".
    "kaiming": uniform in [-1/sqrt(I), 1/sqrt(I)].
    "normal": normal with standard deviation 0.01 (MOELoRA).
    "sparse": K/E of the entries of each row are normal with standard deviation 1/R, the others are
    zero (FlyLoRA).
    "svd_segments": A and B of expert e start from segment e of the base weight's singular values,
    and the base weight is reduced by the experts' mean. So, on average over balanced routings, a
    new layer returns the output of the base (GOAT; see `nn.initialization`)."""

    svd_rho: float | None = None
    """For init="svd_segments": divides the singular values. None: 10."""

    rank_activation: str | None = None
    """The activation between A and B: "gelu", "relu" or "silu". `MoeLoraAdapter` needs one (PESC);
    all other layers refuse it. None: no activation."""

    freeze: str = "none"
    """Which expert matrices are frozen: "none", "A" (FlyLoRA), or "AB", for existing LoRAs (Arrow,
    X-LoRA; see `MoeLoraLinear.from_loras`)."""

    frozen_experts: tuple[int, ...] = ()
    """The experts whose A and B get gradients of zero, numbered from 0; a shared expert has the
    number num_experts. The router trains. `freeze_experts` sets them in the layers of a model."""

    adapter_dtype: str | None = None
    """The dtype of A, B and the router: "float32", "bfloat16", "float16" or "float64". None: the
    dtype of the base's weight, or float32 if the base is quantised."""

    # The router.

    router: str | nn.Module | None = "linear"
    """Computes the logits.
    "linear": one linear map of x.
    "mlp": two linear maps of x with silu between.
    "task": a linear map of the embedding of a task id; give the ids with `set_tasks` (MOELoRA,
    MoCLE).
    "external": the layer has no router. Pass the gates to the layer or to `set_tasks` (Octavius,
    X-LoRA), dense or as weights and indices.
    "prototype": |x v_e|, with one vector v_e per expert from `set_prototypes` (Arrow).
    "self": A x, for experts of rank 1. No gradient flows through these logits (FlyLoRA).
    "token_task": returns probabilities instead of logits. It mixes the probabilities of the token
    with the probabilities of a task vector from `set_tasks` (HMoRA; see `TokenTaskRouter`).
    An nn.Module: x [T, I] -> logits [T, E]. It is not copied: all layers of this config share it.
    None: every gate is 1 (plain LoRA)."""

    router_bias: bool = False
    """For router="linear": whether it has a bias (MING-MOE, LLaVA-MoLE)."""

    router_hidden: int = 64
    """For router="mlp" and "token_task": the width of the hidden layer."""

    num_tasks: int | None = None
    """For router="task", which needs it: the number of tasks. Task ids run from 1 to num_tasks."""

    task_embedding_dim: int = 64
    """For router="task": the width of the task embedding. For "token_task": the length of a task
    vector."""

    task_gate: str = "shared"
    """For router="task": "shared", one router for all layers of a model, or "per_layer"."""

    batch_dim: int = 0
    """The batch dimension of x: 0 for [batch, sequence, I], 1 for [sequence, batch, I]. Only used
    if there is one gate per sequence or task, or one external gate row per sequence."""

    granularity: str | None = None
    """There is one gate per "token", per "sequence" (the router reads the mean of x over the
    positions) or per "task". None: "task" for router="task", else "token"."""

    # From logits to the gate.

    score: str = "softmax"
    """The score of logits / temperature: "softmax", "sigmoid", "identity" (raw logits) or "abs"."""

    temperature: float = 1.0
    """Divides the logits."""

    noise: float = 0.0
    """Standard deviation of the normal noise that is added to the logits in training."""

    select: str | None = None
    """Which experts of a token keep their gate. The gates of the others are zero.
    "all": every expert.
    "topk": the `top_k` largest scores.
    "sampling": `top_k` different experts, sampled with the probabilities softmax(logits /
    temperature), in training and in evaluation.
    "topp": the fewest experts whose scores add up to `top_p` of the total (DynMoLE).
    "threshold": scores of at least `threshold`.
    "learned_threshold": tau = max_threshold * sigmoid(w x + b) is subtracted from the scores, and
    the experts whose difference is not negative are kept (AdaMoLE).
    None: "topk" if `top_k` is set, else "all"."""

    top_k: int | None = None
    """K, for select="topk" and "sampling"."""

    top_p: float | None = None
    """For select="topp": the share of the total score, in (0, 1]."""

    threshold: float | None = None
    """For select="threshold": the smallest score that is kept."""

    max_threshold: float | None = None
    """For select="learned_threshold": the upper limit of tau. None: 1/E."""

    keep_min: int | None = None
    """For select="topp" and "threshold": each token keeps at least this many experts (DynMoLE)."""

    entropy_threshold: float | None = None
    """A token keeps all experts if its entropy is above this value, in [0, 1). The entropy is that
    of softmax(logits / temperature), divided by its largest possible value (DynMoLE). None: off."""

    entropy_index: float = 1.0
    """The index q of the entropy, here and in aux="entropy". 1: Shannon's. Other values: Tsallis'
    (1 - sum p^q) / (q - 1)."""

    balance_rate: float | None = None
    """For select="topk": the experts are selected by score(logits + bias), one bias per expert.
    `update_balance` lowers the bias by balance_rate if the expert has more than the mean load, and
    raises it if the expert has less. The bias has no gradient and does not change the gate of a
    selected expert (SMoRA, FlyLoRA). None: no bias."""

    normalize: str = "sum"
    """How the scores of the kept experts become their gates. "none": the gates are the scores.
    "sum": the scores are divided by their sum. "softmax": softmax over the scores. "one": every
    kept expert has the gate 1 (FlyLoRA)."""

    # Training.

    dropout: float = 0.0
    """The probability that an element of x is dropped before A, in training. It is rounded to a
    multiple of 2^-16; the kept elements are divided by 1 - the rounded probability."""

    dropout_mask: str = "shared"
    """The dropout masks: "shared", one for all experts, or "per_expert", one for each expert."""

    aux: Mapping[str, float] | tuple = ()
    """Auxiliary losses for `collect_aux_loss`: a name, a list of names, or weights by name. Names
    and default weights: "load_balance" 0.01, "z" 0.001, "entropy" 0.01."""

    grad_gate: str = "gate"
    """The gate in the gradients of A, B and x: "gate", or "sqrt", its square root (Riemannian
    mixture, arXiv 2502.15828). The gradient of the router does not change."""

    impl: str = "auto"
    """How the layer is computed: "auto" chooses (see `dispatch`). "wide", "grouped" (only for
    gates of select="topk" or "sampling" per token), "decode" (at most 64 tokens, without gradients)
    and "reference" are used or raise."""

    @classmethod
    def preset(cls, name: str, **options: Any) -> MoeLoraConfig:
        """Return the options of a published method, with `options` changed."""
        check_preset(name)
        return cls(**{**PRESETS[name], **options})

    @classmethod
    def of(cls, config: MoeLoraConfig | None, options: Mapping[str, Any]) -> MoeLoraConfig:
        """Return `config` with `options` changed; if config is None, a new config of `options`."""
        if config is None:
            return cls(**options)
        if not isinstance(config, cls):
            raise TypeError(f"config: expected a MoeLoraConfig, got {config!r}")
        return config.replace(**options) if options else config

    def replace(self, **options: Any) -> MoeLoraConfig:
        """Return a copy with some options changed.

        `select` and `granularity` are derived again if they were derived from a changed option.
        """
        if "top_k" in options and self.select in ("all", "topk"):
            options = {"select": None, **options}
        if "router" in options and "task" in (self.router, options["router"]):
            options = {"granularity": None, **options}
        return dataclasses.replace(self, **options)

    def to_dict(self) -> dict[str, Any]:
        """Return the options as plain values for JSON; `frozen_experts` only if there are any.

        Earlier versions of this package do not know `frozen_experts`. Raises TypeError if the
        router is a module.
        """
        if isinstance(self.router, nn.Module):
            raise TypeError("router: a module cannot be saved as JSON; use the name of a router")
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["aux"] = dict(self.aux)
        if not self.frozen_experts:
            del values["frozen_experts"]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MoeLoraConfig:
        """Return the config of a `to_dict`. Raises ValueError for an unknown option."""
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown options: {', '.join(unknown)}")
        return cls(**values)

    def __post_init__(self) -> None:
        for name in ("rank", "scaling", "frozen_experts"):
            if isinstance(getattr(self, name), list):
                self._set(name, tuple(getattr(self, name)))
        self._set("aux", _weighted_losses(self.aux))
        if self.select is None:
            self._set("select", "all" if self.top_k is None else "topk")
        if self.granularity is None:
            self._set("granularity", "task" if self.router == "task" else "token")
        check(self)
        self._set("frozen_experts", tuple(sorted(self.frozen_experts)))

    def _set(self, name: str, value: Any) -> None:
        """Set a field of this frozen dataclass; only for `__post_init__`."""
        object.__setattr__(self, name, value)

    def ranks(self) -> tuple[int, ...]:
        """Return the rank of every expert, the shared expert last."""
        ranks = self.rank if isinstance(self.rank, tuple) else (self.rank,) * self.num_experts
        if self.shared_expert == "none":
            return ranks
        return (*ranks, self.shared_rank or ranks[0])

    def scales(self, in_features: int | None = None) -> tuple[float, ...]:
        """Return the scale of every expert's output, the shared expert last.

        Args:
            in_features: I of the layer. Only scaling="sqrt(3*alpha*I/r)" needs it.

        Raises:
            ValueError: `scaling` is not a rule, not finite, or not one number per expert;
                in_features is missing; or alpha is negative under a square root.
        """
        ranks = self.ranks()
        if isinstance(self.scaling, tuple):
            for scale in self.scaling:
                check_number("scaling", scale)
            if len(self.scaling) != len(ranks):
                raise ValueError(
                    f"scaling: expected {len(ranks)} numbers, one per expert, "
                    f"got {len(self.scaling)}"
                )
            return tuple(float(scale) for scale in self.scaling)
        if not isinstance(self.scaling, str):
            check_number("scaling", self.scaling)
            return (float(self.scaling),) * len(ranks)
        rules = {
            "alpha/r": [self.alpha / rank for rank in ranks],
            "alpha/R": [self.alpha / sum(ranks)] * len(ranks),
            "alpha/sqrt(r)": [self.alpha / math.sqrt(rank) for rank in ranks],
        }
        goat_rule = "sqrt(3*alpha*I/r)"
        check_one_of("scaling", self.scaling, (*rules, goat_rule))
        if self.scaling != goat_rule:
            return tuple(rules[self.scaling])
        if in_features is None:
            raise ValueError(
                f"scaling: {goat_rule!r} depends on the width of the layer: pass in_features"
            )
        if self.alpha < 0:
            raise ValueError(
                f"alpha: expected a number from 0 for scaling={goat_rule!r}, got {self.alpha}"
            )
        return tuple(math.sqrt(3 * self.alpha * in_features / rank) for rank in ranks)

    def shares_gate(self) -> bool:
        """Return whether all layers of a model share one router."""
        return self.router == "task" and self.task_gate == "shared"

    def is_sparse(self) -> bool:
        """Return whether the gate is K weights and K experts per token, instead of E weights."""
        if self.granularity != "token" or self.top_k in (None, self.num_experts):
            return False
        return self.select == "sampling" or self.is_topk_gate()

    def is_topk_gate(self) -> bool:
        """Return whether the op `topk_gate` computes the gate from the logits (K = E for "all")."""
        return (
            self.select in ("all", "topk")
            and self.entropy_threshold is None
            and self.balance_rate is None
            # The softmax of the kept logits is the softmax of all logits, divided by the kept sum.
            and (self.score, self.normalize)
            in (("softmax", "none"), ("softmax", "sum"), ("identity", "softmax"))
        )

    def renormalize(self) -> bool:
        """Return whether `topk_gate` divides the kept probabilities by their sum.

        It is True if `topk_gate` does not compute the gate.
        """
        return not (self.is_topk_gate() and self.normalize == "none" and self.select == "topk")


def _weighted_losses(aux: Any) -> tuple[tuple[str, float], ...]:
    """Return `aux` as (name, weight) pairs. Losses without a weight get their default weight."""
    if isinstance(aux, str):
        aux = (aux,)
    if not isinstance(aux, Iterable):
        raise TypeError(f"aux: expected names, or weights by name, got {aux!r}")
    weights: dict[str, float] = {}
    entries: Iterable[Any] = aux.items() if isinstance(aux, Mapping) else aux
    for entry in entries:
        is_pair = isinstance(entry, tuple) and len(entry) == 2
        name, weight = entry if is_pair else (entry, None)
        check_one_of("aux", name, tuple(AUX_WEIGHTS))
        if weight is not None:
            check_number("aux", weight)
        weights[name] = AUX_WEIGHTS[name] if weight is None else float(weight)
    return tuple(weights.items())
