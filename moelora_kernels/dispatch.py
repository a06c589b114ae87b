"""Which formulation computes a layer: what impl="auto" takes, and what may be asked for."""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch

from moelora_kernels import native
from moelora_kernels.ops.registration import kernels_problem

# name -> why it cannot be chosen, or "" where it can.
IMPLS = {
    "reference": "",
    "wide": "",
    "grouped": "",
    "decode": "the decode kernels are not part of this version",
}
CHOICES = (*IMPLS, "auto")


class Threshold(NamedTuple):
    """From where on a device class computes top-k gates grouped."""

    # Columns of rank space that the wide products may have for each expert a token uses:
    # grouped where R > columns * K.
    columns: float
    # Tokens below which the dispatch costs more than the products it saves.
    tokens: int
    source: str


_MODEL = "modelled: (4/3) FLOP/s over B/s of the device"

# Device class -> threshold. A GPU's class is its compute capability; "cuda" is any other GPU.
THRESHOLDS = {
    "cpu": Threshold(32, 1, "measured: benchmarks/results/amd-epyc-2-cores/grouped.json"),
    "sm_80": Threshold(205, 1024, _MODEL),
    "sm_89": Threshold(230, 1024, _MODEL),
    "sm_90": Threshold(245, 1024, _MODEL),
    "sm_100": Threshold(305, 1024, _MODEL),
    "cuda": Threshold(205, 1024, _MODEL),
}


class Choice(NamedTuple):
    """A formulation and the reason it was taken."""

    impl: str
    reason: str


def check(impl: str) -> None:
    """Raise ValueError unless `impl` names a formulation that can be chosen here."""
    if impl not in CHOICES:
        raise ValueError(f"impl: expected one of {', '.join(CHOICES)}, got {impl!r}")
    if IMPLS.get(impl):
        raise ValueError(f"impl: {impl!r} is not available: {IMPLS[impl]}")


def why_not_grouped(top_k: int | None, share_a: bool) -> str:
    """Why a layer has no grouped form; empty where it has one. top_k None: a dense gate."""
    if top_k is None:
        return "a dense gate uses every expert for every token"
    return "experts that share A shrink every token once" if share_a else ""


def check_grouped(top_k: int | None, share_a: bool) -> None:
    """Raise ValueError where impl="grouped" is asked of a layer that has no grouped form."""
    if reason := why_not_grouped(top_k, share_a):
        raise ValueError(f"impl: 'grouped' does not go with this layer: {reason}")


def choose_impl(
    device: str,
    *,
    tokens: int,
    num_experts: int,
    total_rank: int,
    top_k: int | None,
    share_a: bool = False,
) -> str:
    """What impl="auto" takes: `explain_choice` without the words.

    A compiled graph calls this one. A number that is written into a text is a constant of the
    graph, and every T would compile anew; here T only has a side of the threshold.
    """
    top_k = _sparse(top_k, num_experts)
    if top_k is None or why_not_grouped(top_k, share_a) or _why_no_grouped_ops(device):
        return "wide"
    threshold = THRESHOLDS[device_class(device)]
    few = tokens < threshold.tokens
    return "wide" if few or total_rank <= threshold.columns * top_k else "grouped"


def _sparse(top_k: int | None, num_experts: int) -> int | None:
    """K, None where all E are used: such a gate is a dense one."""
    return None if top_k is None or top_k >= num_experts else top_k


def device_class(device: str) -> str:
    """The row of THRESHOLDS for a device type."""
    return _device_class(device)


def _why_no_grouped_ops(device: str) -> str:
    return _missing_ops(device)


@cache
def _device_class(device: str) -> str:
    if device != "cuda" or not torch.cuda.is_available():
        return device if device in THRESHOLDS else "cuda"
    major, minor = torch.cuda.get_device_capability()
    name = f"sm_{major}{minor}"
    return name if name in THRESHOLDS else "cuda"


@cache
def _missing_ops(device: str) -> str:
    if device == "cpu":
        return "" if native.available() else f"the native library is missing ({native.reason()})"
    return kernels_problem() or ""


# Constants of a compiled graph, which could not look for a package or ask a device. This is what
# torch.compiler.assume_constant_result does, after it has imported the whole compiler.
for _constant in (device_class, _why_no_grouped_ops):
    _constant._dynamo_marked_constant = True  # type: ignore[attr-defined]


def explain_choice(
    device: str,
    *,
    tokens: int,
    in_features: int,
    out_features: int,
    num_experts: int,
    rank: int,
    top_k: int | None,
    total_rank: int | None = None,
    share_a: bool = False,
) -> Choice:
    """What impl="auto" takes for these sizes: a static function, no timing and no look at data.

    rank is the largest, total_rank the sum R (None: E equal ranks); top_k None or E: dense gate.
    """
    total = num_experts * rank if total_rank is None else total_rank
    impl = choose_impl(
        device, tokens=tokens, num_experts=num_experts, total_rank=total, top_k=top_k,
        share_a=share_a,
    )  # fmt: skip
    top_k = _sparse(top_k, num_experts)
    if reason := why_not_grouped(top_k, share_a) or _why_no_grouped_ops(device):
        return Choice(impl, f"R = {total}: {reason}")
    assert top_k is not None
    name = device_class(device)
    threshold = THRESHOLDS[name]
    if tokens < threshold.tokens:
        return Choice(impl, f"T = {tokens}: below {threshold.tokens} tokens ({name})")
    limit = threshold.columns * top_k
    relation = "above" if total > limit else "not above"
    return Choice(
        impl, f"R = {total} is {relation} {threshold.columns:g} K = {limit:g} ({name}, top-{top_k})"
    )
